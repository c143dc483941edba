"""What collections are given and can't take, said by name before anything is read."""

import pytest
import torch

import embcomp
from embcomp.errors import InputError, UnseenIdError

pytest.importorskip("torchrec", reason="needs torchrec")

from torchrec import KeyedJaggedTensor

from embcomp.integrations.export import export_pt2
from tests.integrations.jagged_models import MODELS, Net, assert_same, bags, batch, compressed

pytestmark = pytest.mark.torchrec


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_feature_is_named(name):
    with pytest.raises(InputError, match=r"lacks features 'b'.*'a', 'c'"):
        compressed(MODELS[name]())(batch("ac", weighted="weighted" in name))


@pytest.mark.parametrize("name", MODELS)
def test_wrong_ids_are_named(name):
    new, weighted = compressed(MODELS[name]()), "weighted" in name
    features = batch(weighted=weighted)
    features.values()[-1] = 30
    place = int(features.lengths()[10:].sum()) - 1
    message = rf"feature 'c': id 30 at position \[{place}\] is outside table .*t3.*\[0, 30\)"
    with pytest.raises(UnseenIdError, match=message):
        new(features)
    with pytest.raises(UnseenIdError, match=message):
        new(features.permute([2, 0, 1]))
    weights = torch.rand(2) if weighted else None
    floats = KeyedJaggedTensor(list("abc"), torch.tensor([1.0, 2.0]), weights, lengths=torch.tensor([1, 1, 0]))
    with pytest.raises(InputError, match="int64"):
        new(floats)
    long = KeyedJaggedTensor(list("abc"), torch.tensor([1, 2]), weights, lengths=torch.tensor([1, 1, 5]))
    with pytest.raises(InputError, match="2 values, and lengths that add up to 7"):
        new(long)


@pytest.mark.parametrize("keys", ["abc", "cab", "abcd"])
@pytest.mark.parametrize("is_weighted", [True, False])
def test_bug_too_few_weights_are_refused_before_anything_reads_them(keys, is_weighted):
    new = compressed(bags(is_weighted, poolings=("SUM",) * 3))
    lengths = torch.tensor([1] * (2 * len(keys)))
    few = KeyedJaggedTensor(list(keys), torch.ones(len(lengths), dtype=torch.int64), torch.ones(2), lengths=lengths)
    with pytest.raises(InputError, match=f"{len(lengths)} values and 2 weights: give one float per value"):
        new(few)


def test_lengths_that_are_no_lengths_and_features_that_come_twice_are_refused():
    new, ids = compressed(bags()), torch.ones(4, dtype=torch.int64)
    with pytest.raises(InputError, match="7 lengths for 3 features"):
        new(KeyedJaggedTensor(list("bca"), ids, lengths=torch.tensor([1, 1, 1, 1, 0, 0, 0])))
    with pytest.raises(InputError, match="9 lengths, and stride=2 for 3 features"):
        new(KeyedJaggedTensor(list("abc"), ids, lengths=torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0]), stride=2))
    with pytest.raises(InputError, match="negative length"):
        new(KeyedJaggedTensor(list("abc"), ids, lengths=torch.tensor([2, -1, 3])))
    with pytest.raises(InputError, match="a feature twice: 'a', 'b', 'c', 'a'"):
        new(KeyedJaggedTensor(list("abca"), ids, lengths=torch.tensor([1, 1, 1, 1])))


@pytest.mark.parametrize("name", ["bags", "sequences"])
def test_bug_a_batch_without_lengths_is_refused(name):
    with pytest.raises(InputError, match="neither lengths nor offsets"):
        compressed(MODELS[name]())(KeyedJaggedTensor(list("abc"), torch.ones(3, dtype=torch.int64)))


@pytest.mark.parametrize("name", ["bags", "sequences"])
def test_bug_lengths_that_contradict_offsets_or_strides_are_refused(name):
    new, ids = compressed(MODELS[name]()), torch.ones(3, dtype=torch.int64)
    both = KeyedJaggedTensor(list("abc"), ids, lengths=torch.ones(3).long(), offsets=torch.tensor([0, 2, 3, 3]))
    with pytest.raises(
        InputError, match="lengths and offsets that do not go together"
    ):  # bags were read by the offsets
        new(both)
    few = KeyedJaggedTensor(list("abc"), ids, lengths=torch.ones(3).long(), stride_per_key_per_rank=[[1], [1], [2]])
    with pytest.raises(InputError, match=r"3 lengths, and strides \[1, 1, 2\] that add up to 4"):  # read beyond the end
        new(few)
    for dtype in (torch.int32, torch.int64):
        right = KeyedJaggedTensor(list("abc"), ids, lengths=torch.ones(3).to(dtype), offsets=torch.arange(4))
        assert_same(new(right), new(KeyedJaggedTensor(list("abc"), ids, offsets=torch.arange(4))))


@pytest.mark.parametrize("given", [None, torch.ones(3), {"a": torch.ones(3)}])
def test_what_is_no_keyed_jagged_tensor_is_named(given):
    with pytest.raises(InputError, match=f"a KeyedJaggedTensor, not a {type(given).__name__}"):
        compressed(bags())(given)


@pytest.mark.parametrize("name", ["bags", "weighted bags", "sequences"])
def test_bug_graphs_wrote_beyond_the_end_where_lengths_were_negative(name, tmp_path):
    def given(*lengths):
        return KeyedJaggedTensor(list("abc"), torch.ones(3).long(), torch.ones(3), lengths=torch.tensor(lengths))

    model = Net(MODELS[name](), 16 if name == "sequences" else 18)
    handle = embcomp.compress_(model, "full", verbose=False).finalize_()
    example = (torch.zeros(2, 2), given(1, 0, 1, 1, 0, 0))
    path = export_pt2(handle, tmp_path / "t.pt2", example=example).path
    for run in (torch.export.load(path).module(), torch.compile(model.eval(), backend="eager")):
        run(torch.zeros(2, 2), given(1, 0, 1, 1, 0, 0))
        for lengths in ((4, 0, -1, 0, 0, 0), (1, 0, 1, 0, 0, 0), (1, 1, 1, 1, 0, 0)):
            with pytest.raises(RuntimeError, match="must not be negative, and add up to its values"):
                run(torch.zeros(2, 2), given(*lengths))


def test_weights_must_be_there():
    with pytest.raises(InputError, match="no weights"):
        compressed(bags(True, poolings=("SUM",) * 3))(batch())


def test_weighted_means_are_refused_as_they_are_by_torchrec():
    model = bags(True)
    with pytest.raises(NotImplementedError):
        model(batch(weighted=True))
    with pytest.raises(InputError, match="sum"):
        compressed(model)(batch(weighted=True))
