"""TorchRec's collections after compress_: same keys, order and values, in one lookup per group."""

import copy

import pytest
import torch
from torch import nn

import embcomp
from embcomp import EmbeddingTables, FullConfig, HashConfig
from embcomp.errors import InputError, NoMatchingTableError, SpecError, UnseenIdError
from embcomp.views import EmbeddingBagView

torchrec = pytest.importorskip("torchrec", reason="needs torchrec")

from torchrec import (  # noqa: E402
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)

from embcomp.integrations.export import export_onnx, export_pt2  # noqa: E402
from embcomp.integrations.torchrec import (  # noqa: E402
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)

pytestmark = pytest.mark.torchrec

SIZES = {"t1": 50, "t2": 40, "t3": 30}


def bags(is_weighted=False, dims=(4, 4, 6), poolings=("SUM", "MEAN", "SUM")):
    """Feature a in two tables, two features in t2, and t3 of another dimension."""
    features = {"t1": ["a"], "t2": ["b", "a"], "t3": ["c"]}
    torch.manual_seed(0)
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(
                name=name,
                embedding_dim=dim,
                num_embeddings=SIZES[name],
                feature_names=features[name],
                pooling=PoolingType[pooling],
            )
            for name, dim, pooling in zip(SIZES, dims, poolings, strict=True)
        ],
        is_weighted=is_weighted,
    )


def sequences(need_indices=False):
    features = {"t1": ["a"], "t2": ["b", "a"], "t3": ["c"]}
    torch.manual_seed(0)
    return EmbeddingCollection(
        [
            EmbeddingConfig(name=name, embedding_dim=4, num_embeddings=SIZES[name], feature_names=features[name])
            for name in SIZES
        ],
        need_indices=need_indices,
    )


def batch(keys=("a", "b", "c"), size=5, longest=3, weighted=False, seed=0, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (len(keys) * size,), generator=generator)
    number = int(lengths.sum())
    values = torch.randint(0, 30, (number,), generator=generator).to(dtype)
    weights = torch.rand(number, generator=generator) if weighted else None
    return KeyedJaggedTensor(list(keys), values, weights, lengths=lengths)


def compressed(model, config="full", **options):
    return embcomp.compress_(copy.deepcopy(model), config, init="trained", verbose=False, **options).model


def assert_same(found, wanted, rtol=1e-6, atol=1e-6):
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key, own in wanted.items():
            torch.testing.assert_close(found[key].values(), own.values(), rtol=rtol, atol=atol)
            assert torch.equal(found[key].lengths(), own.lengths())
            assert torch.equal(found[key].offsets(), own.offsets())
            one, other = found[key].weights_or_none(), own.weights_or_none()
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    else:
        assert found.keys() == wanted.keys()
        assert found.length_per_key() == wanted.length_per_key()
        assert found.values().dtype == wanted.values().dtype
        torch.testing.assert_close(found.values(), wanted.values(), rtol=rtol, atol=atol)


MODELS = {
    "bags": bags,
    "weighted bags": lambda: bags(True, poolings=("SUM", "SUM", "SUM")),
    "sequences": sequences,
    "sequences with indices": lambda: sequences(True),
}


@pytest.mark.parametrize("name", MODELS)
class TestEveryCollection:
    @pytest.mark.parametrize("keys", ["abc", "cab", "xcaby"])
    def test_keys_order_and_values_are_the_same(self, name, keys):
        model = MODELS[name]()
        features = batch(keys, weighted="weighted" in name)
        wanted, new = model(features), compressed(model)
        assert isinstance(new, CompressedEmbeddingBagCollection | CompressedEmbeddingCollection)
        assert_same(new(features), wanted)
        assert new.device == torch.device("cpu")

    @pytest.mark.parametrize("options", [{"longest": 0}, {"size": 1}, {"dtype": torch.int32}, {"longest": 40}])
    def test_empty_and_long_bags_and_int32(self, name, options):
        model = MODELS[name]()
        features = batch(weighted="weighted" in name, **options)
        assert_same(compressed(model)(features), model(features))

    def test_training_goes_the_same_way(self, name):
        losses = []
        for model in (MODELS[name](), compressed(MODELS[name]())):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            own = []
            for step in range(5):
                out = model(batch(weighted="weighted" in name, seed=step))
                vectors = [value.values() for value in out.values()] if isinstance(out, dict) else [out.values()]
                loss = sum((vector - 1).square().sum() for vector in vectors) / 50
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                own.append(loss.item())
            losses.append(own)
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert losses[0][-1] < losses[0][0]

    def test_there_is_one_lookup_per_group(self, name, monkeypatch):
        new = compressed(MODELS[name]())
        calls = []
        method = "bag" if "bags" in name else "forward"
        looked_up = getattr(EmbeddingTables, method)
        monkeypatch.setattr(
            EmbeddingTables, method, lambda self, *given, **more: calls.append(self) or looked_up(self, *given, **more)
        )
        new(batch(weighted="weighted" in name))
        assert len(calls) == (2 if "bags" in name else 1)

    def test_it_can_lie_anywhere(self, name):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.ModuleDict({"inner": MODELS[name]()})
                self.again = self.first["inner"]

            def forward(self, features):
                return self.first["inner"](features), self.again(features)

        model, features = Model(), batch(weighted="weighted" in name)
        wanted = model(features)
        handle = embcomp.compress_(model, "full", init="trained", verbose=False)
        assert handle.model is model
        assert model.again is model.first["inner"]
        for one, other in zip(model(features), wanted, strict=True):
            assert_same(one, other)
        sequential = nn.Sequential(MODELS[name]())
        embcomp.compress_(sequential, "full", init="trained", verbose=False)
        assert_same(sequential(features), wanted[0])

    def test_it_is_saved_and_loaded_into_the_plain_model(self, name, tmp_path):
        model = nn.ModuleDict({"inner": MODELS[name]()})
        new = compressed(model, HashConfig(unseen="hash"), budget="50%")
        embcomp.finalize_(new)
        embcomp.save_pretrained(new, tmp_path)
        loaded = embcomp.load_pretrained_(nn.ModuleDict({"inner": MODELS[name]()}), tmp_path)
        again = loaded if isinstance(loaded, nn.Module) else loaded.model
        features = batch(weighted="weighted" in name)
        assert type(again["inner"]) is type(new["inner"])
        assert_same(again["inner"](features), new["inner"](features), 0, 0)

    def test_copies_and_devices(self, name):
        new, features = compressed(MODELS[name]()), batch(weighted="weighted" in name)
        wanted = new(features)
        other = copy.deepcopy(new)
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.zero_()
        assert_same(other(features), wanted, 0, 0)
        other.to("meta")
        assert other.device == torch.device("meta")

    def test_a_missing_feature_is_named(self, name):
        with pytest.raises(InputError, match=r"lacks features 'b'.*'a', 'c'"):
            compressed(MODELS[name]())(batch("ac", weighted="weighted" in name))

    def test_wrong_ids_are_named(self, name):
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


def test_batches_without_duplicates():
    model = bags()
    values, lengths = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([1, 1, 2, 0, 2])
    inverse = (["a", "b", "c"], torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]]))
    features = KeyedJaggedTensor(
        ["a", "b", "c"], values, lengths=lengths, stride_per_key_per_rank=[[2], [2], [1]], inverse_indices=inverse
    )
    assert_same(compressed(model)(features), model(features))


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


def test_what_cannot_be_fused_is_looked_up_one_by_one(capsys):
    features = batch()
    model = bags()
    some = embcomp.compress_(copy.deepcopy(model), {"*t1": FullConfig(), "*": None}, init="trained")
    assert "one by one, since not all of its tables are compressed" in capsys.readouterr().out
    assert type(some.model) is EmbeddingBagCollection
    assert_same(some.model(features), model(features))
    hooked = copy.deepcopy(model)
    calls = []
    hooked.register_forward_hook(lambda *given: calls.append(1))
    handle = embcomp.compress_(hooked, "full", init="trained", verbose=False)
    assert_same(handle.model(features), model(features))
    assert calls
    assert "hooks" in handle.report()


def test_a_table_alone_can_take_the_place_of_one_of_theirs():
    model, features = bags(), batch()
    wanted = model(features)
    tables = embcomp.build_tables([embcomp.TableSpec("t1", 50, 4)])
    tables.load_dense_({"t1": model.embedding_bags["t1"].weight.detach()})
    model.embedding_bags["t1"] = EmbeddingBagView(tables, ["t1"], "sum", include_last_offset=True, owns=True)
    assert_same(model(features), wanted)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = tables.rows.weight.detach().clone()
    model(features).values().sum().backward()
    optimizer.step()
    assert (tables.rows.weight != before).any()
    assert "embedding_bags.t1.group.rows.weight" in model.state_dict()
    copied = copy.deepcopy(model).eval()
    assert copied.embedding_bags["t1"].tables is copied.embedding_bags["t1"].group is not tables
    assert not copied.embedding_bags["t1"].tables.training
    with torch.no_grad():
        copied.embedding_bags["t1"].tables.rows.weight.zero_()
    assert_same(model(features), model(features))
    assert (copied(features)["a@t1"] == 0).all()


@pytest.mark.parametrize("keys", ["abc", "cab", "xcaby", "acb"])
@pytest.mark.parametrize("dims", [(4, 4, 4), (4, 6, 8)])
def test_bug_gradients_of_weights_are_those_of_the_plain_collection(keys, dims):
    """FBGEMM's gradient of permuted weights wrote anywhere in memory where features were left out or came twice."""
    model = bags(True, dims, poolings=("SUM",) * 3)
    found = []
    for own in (model, compressed(model)):
        features = batch(keys, weighted=True)
        weights = features.weights().requires_grad_()
        values = own(features).values()
        (values * torch.arange(values.shape[1])).square().sum().backward()
        found.append(weights.grad)
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(found[1], found[0])


def test_weights_by_position_are_learned_as_in_the_plain_model():
    from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
    from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

    weights = PositionWeightedModuleCollection({"a": 5, "b": 5, "c": 5})
    model = FeatureProcessedEmbeddingBagCollection(bags(True, (4, 8, 4), poolings=("SUM",) * 3), weights)
    found = []
    for own in (model, compressed(model)):
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        for seed in range(5):
            own(batch(seed=seed)).values().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([own(batch(seed=9)).values().detach(), *own._feature_processors.state_dict().values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_weighted_means_are_refused_as_they_are_by_torchrec():
    model = bags(True)
    with pytest.raises(NotImplementedError):
        model(batch(weighted=True))
    with pytest.raises(InputError, match="sum"):
        compressed(model)(batch(weighted=True))


def test_configs_know_how_many_ids_there_are_by_now():
    for make in (bags, sequences):
        handle = embcomp.compress_(make(), "hash", budget="50%", verbose=False)
        handle.resize_({handle.tables[0].names[0]: 70})
        configs = handle.model.embedding_bag_configs() if make is bags else handle.model.embedding_configs()
        assert [config.num_embeddings for config in configs] == [70, 40, 30]
        assert [config.name for config in configs] == list(SIZES)


def test_tracing_says_what_to_do_instead():
    from torchrec.fx.tracer import Tracer, symbolic_trace

    model = nn.Sequential(compressed(bags()))
    with pytest.raises(InputError, match="leaf_modules"):
        symbolic_trace(model)
    graph = Tracer(leaf_modules=["CompressedEmbeddingBagCollection"]).trace(model)
    assert_same(torch.fx.GraphModule(model, graph)(batch()), model(batch()))


@pytest.mark.parametrize(
    "register",
    [
        lambda own: own.register_full_backward_pre_hook(lambda *given: None),
        lambda own: own.register_state_dict_post_hook(lambda *given: None),
        lambda own: own.register_state_dict_pre_hook(lambda *given: None),
        lambda own: own.register_load_state_dict_pre_hook(lambda *given: None),
        lambda own: own.register_load_state_dict_post_hook(lambda *given: None),
    ],
)
def test_bug_no_hook_is_lost_without_a_word(register):
    model = bags()
    register(model)
    handle = embcomp.compress_(model, "full", verbose=False)
    assert "hooks" in handle.report()
    assert type(handle.model) is EmbeddingBagCollection
    plain = nn.Sequential(nn.Embedding(10, 4))
    register(plain[0])
    with pytest.raises(SpecError, match="hooks"):
        embcomp.compress_(plain, "full", verbose=False)


@pytest.mark.parametrize("make", [bags, sequences])
def test_bug_models_that_were_built_on_meta_are_filled(make):
    """Constants were left as garbage by to_empty, and load_state_dict said that all was well."""
    source = embcomp.compress_(make(), HashConfig(unseen="hash"), "50%", verbose=False).model
    with torch.device("meta"):
        model = make()
    filled = embcomp.compress_(model, HashConfig(unseen="hash"), "50%", verbose=False).model
    assert all(tensor.is_meta for tensor in filled.parameters())
    filled = filled.to_empty(device="cpu")
    filled.load_state_dict(source.state_dict())
    assert_same(filled(batch()), source(batch()))


def test_a_quantized_collection_is_compared_with_and_refused():
    from torchrec.inference.modules import quantize_embeddings

    model, features = nn.Sequential(bags(poolings=("SUM",) * 3)), batch()
    theirs = quantize_embeddings(copy.deepcopy(model), torch.qint8, inplace=False)
    ours = compressed(model, "quantize", budget="60%")
    embcomp.finalize_(ours)
    assert_same(ours(features), theirs(features), rtol=0, atol=0.02)
    with pytest.raises(NoMatchingTableError, match="quantized"):
        embcomp.compress_(theirs, "full")


class Net(nn.Module):
    """Logits of dense values and of what a collection finds."""

    def __init__(self, collection, width):
        super().__init__()
        self.sparse, self.out = collection, nn.Linear(width + 2, 1)

    def forward(self, dense, features):
        found = self.sparse(features)
        if isinstance(found, dict):
            pooled = [
                torch.segment_reduce(jagged.values(), "sum", lengths=jagged.lengths()) for jagged in found.values()
            ]
            return self.out(torch.cat([dense, *pooled], dim=1))
        return self.out(torch.cat([dense, found.values()], dim=1))


@pytest.mark.parametrize(
    ("name", "config", "keys"),
    [
        *((name, "full", "abc") for name in MODELS),
        *(("bags", strategy, "abc") for strategy in ("hash", "compositional", "low_rank", "optembed", "dynamic")),
        ("bags", HashConfig(rows="int4:row", unseen="hash"), "cab"),
    ],
)
def test_models_that_take_a_jagged_tensor_are_exported_whole(tmp_path, name, config, keys):
    model = Net(MODELS[name](), 16 if "sequences" in name else 18)
    budget = None if config in ("full", "optembed") else "60%"
    handle = embcomp.compress_(model, config, budget, verbose=False).finalize_()
    weighted = "weighted" in name
    example = (torch.randn(5, 2), batch(keys, weighted=weighted))
    model.eval()(*example)  # the example has offsets now, which those below have not
    with pytest.raises(embcomp.ExportError, match="ONNX has no KeyedJaggedTensor"):
        export_onnx(handle, tmp_path / "t.onnx", example=example)
    exported = export_pt2(handle, tmp_path / "t.pt2", example=example)
    program = torch.export.load(exported.path)
    assert "fbgemm" not in str(program.graph)
    served = program.module()
    last = KeyedJaggedTensor(  # the last ids of their tables, beyond the end of others
        list(keys), torch.tensor([dict(a=39, b=39, c=29)[key] for key in keys]), torch.ones(3), torch.ones(3).long()
    )
    none = KeyedJaggedTensor(list(keys), torch.empty(0).long(), torch.empty(0), torch.zeros(6).long())
    for features in (*(batch(keys, size, weighted=weighted, seed=size) for size in (1, 2, 9)), last, none):
        if not weighted:
            features = KeyedJaggedTensor(features.keys(), features.values(), lengths=features.lengths())
        given = (torch.randn(features.stride(), 2), features)
        torch.testing.assert_close(served(*given), model(*given), rtol=1e-6, atol=1e-6)
