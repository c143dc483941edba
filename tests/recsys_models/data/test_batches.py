import numpy as np
import pytest
import torch

from recsys_models.data import Batch, DataError, Split


def make_split(rows: int = 23, dense: int = 2) -> Split:
    ids = np.stack([np.arange(rows), np.arange(rows) * 10], axis=1).astype(np.int32)
    values = np.arange(rows * dense, dtype=np.float32).reshape(rows, dense)
    return Split(ids, values, (np.arange(rows) % 3 == 0).astype(np.float32))


def seen(batches) -> list[int]:
    return [row for batch in batches for row in batch.ids[:, 0].tolist()]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("dense", [0, 2])
def test_batches_hold_matching_rows_in_the_promised_types(shuffle, dense):
    split = make_split(dense=dense)
    batches = list(split.batches(5, shuffle=shuffle).epoch(0))
    assert [len(batch.labels) for batch in batches] == [5, 5, 5, 5, 3]
    for batch in batches:
        assert isinstance(batch, Batch)
        assert (batch.ids.dtype, batch.dense.dtype, batch.labels.dtype) == (torch.int64, torch.float32, torch.float32)
        rows = batch.ids[:, 0].numpy()
        assert np.array_equal(batch.ids.numpy(), split.ids[rows])
        assert np.array_equal(batch.dense.numpy(), split.dense[rows])
        assert np.array_equal(batch.labels.numpy(), split.labels[rows])
    assert sorted(seen(batches)) == list(range(23))


def test_without_shuffling_rows_come_in_order():
    assert seen(make_split().batches(4)) == list(range(23))


def test_order_depends_on_seed_and_epoch_alone():
    one, other = make_split().batches(4, shuffle=True, seed=1), make_split().batches(4, shuffle=True, seed=1)
    list(one.epoch(0)), list(one.epoch(0))
    torch.manual_seed(99)
    np.random.seed(99)
    assert seen(one.epoch(3)) == seen(other.epoch(3))
    orders = {tuple(seen(make_split().batches(4, shuffle=True, seed=s).epoch(e))) for s in (1, 2) for e in (0, 1, 2)}
    assert len(orders) == 6


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_order_does_not_depend_on_batch_size(batch_size):
    assert seen(make_split().batches(batch_size, shuffle=True)) == seen(make_split().batches(5, shuffle=True))


@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_resuming_goes_on_where_it_stopped(start):
    batches = make_split().batches(5, shuffle=True)
    assert seen(batches.epoch(2, start)) == seen(batches.epoch(2))[5 * start :]


def test_last_batch_can_be_dropped():
    batches = make_split().batches(5, drop_last=True)
    assert len(batches) == 4
    assert len(list(batches)) == 4
    assert len(make_split().batches(5)) == 5


def test_changing_a_batch_changes_no_data():
    split = make_split()
    batches = split.batches(5)
    for batch in batches:
        for tensor in batch:
            tensor.zero_()
    again = next(iter(batches))
    assert again.ids[:, 1].tolist() == [0, 10, 20, 30, 40]
    assert again.dense.numpy().tolist() == split.dense[:5].tolist()
    assert again.labels.tolist() == split.labels[:5].tolist()


def test_read_only_arrays_give_no_warning(recwarn):
    split = make_split()
    for array in (split.ids, split.dense, split.labels):
        array.setflags(write=False)
    list(split.batches(5))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_split().batches(0), "batch_size is 0, must be at least 1"),
        (lambda: make_split().batches(5).epoch(-1), "epoch -1"),
        (lambda: make_split().batches(5).epoch(0, 6), r"start in \[0, 5\]"),
        (lambda: Split(np.zeros((3, 1)), np.zeros((2, 0)), np.zeros(3)).batches(1), "3, 2 and 3 rows"),
    ],
)
def test_wrong_arguments_are_errors_at_the_call(call, message):
    with pytest.raises(DataError, match=message):
        call()
