"""Batches against a slow reference, and what a training loop relies on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_models.data import Cases, DataError, SessionBatch
from tests.recsys_models.data.sessions import reference
from tests.recsys_models.data.sessions.memory import make_sequences

LISTS = st.lists(st.lists(st.integers(0, 30), max_size=12), min_size=1, max_size=8)
SIZES = {"batch_size": st.integers(1, 7), "length": st.integers(1, 6)}
OPTIONS = {"shuffle": st.booleans(), "seed": st.integers(0, 3), "drop_last": st.booleans(), "trim": st.booleans()}


def as_lists(batch: SessionBatch):
    return [part.tolist() for part in batch]


def expected(samples, batches, epoch, length):
    """The batches that follow from the samples in order."""
    order = batches.order(epoch).tolist()
    size = batches.batch_size
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    if batches.drop_last and chunks and len(chunks[-1]) < size:
        chunks.pop()
    found = []
    for chunk in chunks:
        taken = [samples[i] for i in chunk]
        width = max(len(inputs) for inputs, _ in taken) if batches.trim else length
        found.append(list(reference.batch(taken, width)))
    return found


@settings(deadline=None, max_examples=150)
@given(lists=LISTS, every=st.booleans(), sizes=st.fixed_dictionaries(SIZES), options=st.fixed_dictionaries(OPTIONS))
def test_windows_are_what_plain_python_gives(lists, every, sizes, options):
    batches = make_sequences(lists).batches(**sizes, windows="all" if every else "last", **options)
    samples = [window for part in lists for window in reference.windows(part, sizes["length"], every)]
    for epoch in range(2):
        assert [as_lists(b) for b in batches.epoch(epoch)] == expected(samples, batches, epoch, sizes["length"])
    assert len(batches) == len(expected(samples, batches, 0, sizes["length"]))


@settings(deadline=None, max_examples=100)
@given(lists=LISTS, sizes=st.fixed_dictionaries(SIZES), options=st.fixed_dictionaries(OPTIONS))
def test_prefixes_are_what_plain_python_gives(lists, sizes, options):
    batches = make_sequences(lists).batches(**sizes, mode="prefixes", **options)
    samples = [(inputs[-sizes["length"] :], target) for inputs, target in reference.prefixes(lists)]
    assert [as_lists(b) for b in batches.epoch(1)] == expected(samples, batches, 1, sizes["length"])


@settings(deadline=None, max_examples=100)
@given(lists=LISTS, picked=st.randoms(), sizes=st.fixed_dictionaries(SIZES), trim=st.booleans())
def test_cases_come_in_order(lists, picked, sizes, trim):
    known = [(row, end) for row, part in enumerate(lists) for end in range(1, len(part))]
    chosen = picked.choices(known, k=10) if known else []
    rows, ends = (np.array([case[i] for case in chosen], np.int32) for i in (0, 1))
    cases = Cases(make_sequences(lists), rows, ends)
    batches = cases.batches(**sizes, trim=trim)
    samples = [(lists[row][:end][-sizes["length"] :], lists[row][end]) for row, end in chosen]
    assert [as_lists(b) for b in batches] == expected(samples, batches, 0, sizes["length"])
    assert cases.targets.tolist() == [target for _, target in samples]


def test_all_windows_hold_the_last_one_and_make_each_item_but_the_first_a_target_once():
    lists = [list(range(10, 31)), [5], [6, 7], []]
    last, every = (next(iter(make_sequences(lists).batches(99, 6, windows=w))) for w in ("last", "all"))
    assert last.items.tolist() == [[24, 25, 26, 27, 28, 29], [6, 0, 0, 0, 0, 0]]
    assert all(row in every.items.tolist() for row in last.items.tolist())
    assert sorted(every.targets[every.targets != -100].tolist()) == [7, *range(11, 31)]
    assert every.lengths.tolist() == [2, 6, 6, 6, 1]


def make_batches(**options):
    generator = np.random.default_rng(0)
    lists = [generator.integers(50, size=generator.integers(2, 9)).tolist() for _ in range(23)]
    return make_sequences(lists).batches(5, 4, **options)


@pytest.mark.parametrize("mode", ["positions", "prefixes"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_resuming_goes_on_where_it_stopped(mode, shuffle):
    batches = make_batches(mode=mode, shuffle=shuffle, seed=3)
    whole = [as_lists(batch) for batch in batches.epoch(2)]
    again = make_batches(mode=mode, shuffle=shuffle, seed=3)
    for start in range(len(batches) + 1):
        assert [as_lists(batch) for batch in again.epoch(2, start)] == whole[start:]


def test_order_depends_on_seed_and_epoch_alone():
    batches = make_batches(shuffle=True)
    list(batches.epoch(0))
    torch.manual_seed(99)
    np.random.seed(99)
    assert list(map(as_lists, batches.epoch(3))) == list(map(as_lists, make_batches(shuffle=True).epoch(3)))
    orders = {tuple(make_batches(shuffle=True, seed=s).order(e).tolist()) for s in (1, 2) for e in (0, 1, 2)}
    assert len(orders) == 6


@pytest.mark.parametrize(("mode", "dimensions"), [("positions", 2), ("prefixes", 1)])
def test_types_shapes_and_no_shared_memory(mode, dimensions):
    batches = make_batches(mode=mode)
    before = [as_lists(batch) for batch in batches]
    for batch in batches:
        assert isinstance(batch, SessionBatch)
        assert {part.dtype for part in batch} == {torch.int64}
        assert batch.items.shape == (len(batch.lengths), int(batch.lengths.max()))
        assert batch.targets.dim() == dimensions
        for part in batch:
            part.fill_(7)
    assert [as_lists(batch) for batch in batches] == before


def test_untrimmed_batches_all_have_the_full_width():
    assert {batch.items.shape[1] for batch in make_batches(trim=False)} == {4}
    assert {batch.items.shape[1] for batch in make_sequences([[1, 2]] * 9).batches(5, 4, trim=False)} == {4}
    assert {batch.items.shape[1] for batch in make_sequences([[1, 2]] * 9).batches(5, 4)} == {1}


@pytest.mark.parametrize("lists", [[], [[]], [[3], [], [4]]])
@pytest.mark.parametrize("options", [{}, {"windows": "all"}, {"mode": "prefixes"}])
def test_sequences_without_a_target_give_no_batch(lists, options):
    batches = make_sequences(lists).batches(5, 4, **options)
    assert (len(batches), list(batches)) == (0, [])


def test_read_only_arrays_give_no_warning(recwarn):
    sequences = make_sequences([[1, 2, 3]])
    for array in (sequences.items, sequences.offsets):
        array.setflags(write=False)
    list(sequences.batches(5, 4))
    assert not recwarn.list


def make_case(row, end):
    return Cases(make_sequences([[1, 2, 3], [4]]), np.array([0, row], np.int32), np.array([2, end], np.int32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_batches().epoch(0, 6), r"start in \[0, 5\]"),
        (lambda: make_sequences([[1, 2]]).batches(0, 4), "batch_size is 0, must be at least 1"),
        (lambda: make_sequences([[1, 2]]).batches(5, 0), "length is 0, must be an int of at least 1"),
        (lambda: make_case(0, 1).batches(5, 0), "length is 0, must be an int of at least 1"),
        (lambda: make_batches(mode="prefix"), "mode 'prefix' with windows 'last': must be 'positions' with"),
        (lambda: make_batches(mode="prefixes", windows="all"), "mode 'prefixes' with windows 'all'"),
        (lambda: make_case(0, 3).batches(5, 4), r"case 1 is a prefix of 3 items of sequence 0, must be in \[1, 2\]"),
        (lambda: make_case(0, 0).batches(5, 4), r"case 1 is a prefix of 0 items"),
    ],
)
def test_wrong_arguments_are_errors_at_the_call(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_sequences_and_cases_can_be_looked_at():
    sequences = make_sequences([[1, 2, 3], [4]])
    assert [part.tolist() for part in sequences] == [[1, 2, 3], [4]]
    assert (len(sequences), sequences.lengths.tolist()) == (2, [3, 1])
    case = make_case(0, 1)
    assert (len(case), case[1][0].tolist(), case[1][1]) == (2, [1], 2)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            sequences[index]
        with pytest.raises(IndexError):
            case[index]


@pytest.mark.cuda
def test_batches_come_out_on_the_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    on_device = list(make_batches(device="cuda", shuffle=True))
    assert {part.device.type for batch in on_device for part in batch} == {"cuda"}
    assert list(map(as_lists, on_device)) == list(map(as_lists, make_batches(shuffle=True)))
