"""Rows of floats: what is trained is what is served."""

import pytest
import torch

from embcomp import IncompatibleStateError
from embcomp.storage import DenseRows, make_row_store, stored_bytes
from embcomp.storage.dense import DTYPES

SEGMENTS = (5, 3)


def make(rows: str, sparse: bool = False) -> DenseRows:
    store = make_row_store(rows, SEGMENTS, 4, sparse)
    store.reset_parameters([1.0, 1.0], torch.Generator().manual_seed(0))
    return store


ROWS = pytest.mark.parametrize("rows", ["float32", "float16", "bfloat16", "float16:pure", "bfloat16:pure"])
HALF = pytest.mark.parametrize("rows", ["float16", "bfloat16"])


@ROWS
def test_looks_rows_up_in_float32_rounded_as_they_are_served(rows):
    store = make(rows)
    served = store.weight.detach().to(store.serve_dtype).float()
    for ids in (torch.arange(8), torch.tensor([[7, 0], [0, 3]]), torch.tensor(2), torch.zeros(0, dtype=torch.long)):
        vectors = store(ids)
        assert vectors.dtype == torch.float32
        assert torch.equal(vectors, served[ids])
        assert torch.equal(store.finalize()(ids), served[ids])


@HALF
@pytest.mark.parametrize("size", [1e-30, 1e-8, 6e-5, 1.0, 3.14159, 2e4])
def test_rounding_is_exact_at_every_size(rows, size):
    """Value + (rounded - value) is the rounded value, to the bit."""
    store = make(rows)
    with torch.no_grad():
        store.weight.mul_(size)
    assert torch.equal(store(torch.arange(8)), store.finalize()(torch.arange(8)))


@HALF
def test_gradients_pass_straight_through(rows):
    store, plain = make(rows), make("float32")
    for each in (store, plain):
        (each(torch.tensor([0, 0, 6])) * torch.arange(12.0).view(3, 4)).sum().backward()
    assert store.weight.grad.dtype == torch.float32
    assert torch.equal(store.weight.grad, plain.weight.grad)


@HALF
def test_small_updates_add_up_in_the_master_copy_and_not_without_it(rows):
    for form, moved in ((rows, True), (f"{rows}:pure", False)):
        store = make(form)
        store.write_(0, torch.ones(8, 4))
        for _ in range(100):
            with torch.no_grad():
                store.weight += 1e-4
        assert (store(torch.tensor(0)) > 1).all() == moved


@ROWS
def test_sparse_gradients(rows):
    sparse, dense = make(rows, sparse=True), make(rows)
    for store in (sparse, dense):
        store(torch.tensor([1, 5, 1])).sum().backward()
    assert sparse.weight.grad.is_sparse
    assert torch.equal(sparse.weight.grad.to_dense(), dense.weight.grad)
    assert sparse.weight.grad.coalesce().indices().tolist() == [[1, 5]]


@ROWS
def test_bytes(rows):
    store = make(rows)
    width = DTYPES[rows.partition(":")[0]].itemsize
    assert store.serve_bytes() == [5 * 4 * width, 3 * 4 * width]
    final = store.finalize()
    assert final.serve_bytes() == store.serve_bytes()
    assert sum(tensor.nbytes for tensor in final.state_dict().values()) == stored_bytes(8, 4, rows) == 32 * width


def test_finalizing_is_final_and_leaves_its_source_alone():
    store = make("bfloat16", sparse=True)
    before = store.weight.detach().clone()
    final = store.finalize()
    assert final.weight.dtype == torch.bfloat16
    assert not final.weight.requires_grad
    assert not final.sparse
    assert torch.equal(final.finalize()(torch.arange(8)), final(torch.arange(8)))
    with torch.no_grad():
        final.weight.zero_()
    assert torch.equal(store.weight, before)
    assert store.weight.requires_grad


def test_finalizing_float32_rows_takes_no_second_copy():
    store = make("float32")
    assert store.finalize().weight.data_ptr() == store.weight.data_ptr()


def test_each_segment_has_its_own_spread_and_seed_alone_decides():
    store = make_row_store("float32", [2000, 2000, 1], 8)
    for _ in range(2):
        store.reset_parameters([0.01, 5.0, 0.0], torch.Generator().manual_seed(3))
        first = store.weight.detach().clone()
    store.reset_parameters([0.01, 5.0, 0.0], torch.Generator().manual_seed(3))
    assert torch.equal(store.weight, first)
    assert store.weight[:2000].std().item() == pytest.approx(0.01, rel=0.05)
    assert store.weight[2000:4000].std().item() == pytest.approx(5.0, rel=0.05)
    assert not store.weight[4000].any()


def test_write_touches_its_rows_alone():
    store = make("float32")
    before = store.weight.detach().clone()
    store.write_(3, torch.full((2, 4), 7.0))
    assert torch.equal(store.weight[3:5], torch.full((2, 4), 7.0))
    assert torch.equal(store.weight[[0, 1, 2, 5, 6, 7]], before[[0, 1, 2, 5, 6, 7]])
    assert store.weight.is_leaf


def test_meta_takes_no_memory():
    with torch.device("meta"):
        store = make_row_store("float16", [10**12], 128)
        store.reset_parameters([1.0])
        final = store.finalize()
    assert store.serve_bytes() == [256 * 10**12]
    assert final.weight.is_meta


def test_shape_of_segments():
    store = make("float32")
    assert store.starts() == [0, 5]
    assert (store.num_rows, store.segments) == (8, (5, 3))
    assert "rows=8, dim=4, segments=2, serve_bytes=128" in repr(store)


@pytest.mark.parametrize("rows", ["float16", "float16:pure"])
def test_bug_values_that_float16_can_not_hold_became_infinite_where_they_serve(rows):
    store = make_row_store(rows, [5, 40_000], 4)
    store.reset_parameters([1.0, 1.0])
    with torch.no_grad():
        store.weight[40_001, 2] = -65_504
    assert store.finalize().weight.isfinite().all()
    with torch.no_grad():
        store.weight[40_001, 2] = -70_000
    with pytest.raises(IncompatibleStateError, match=r"float16 can't hold values beyond 65504.*bfloat16"):
        store.finalize()
    assert make_row_store("bfloat16", [1], 4).finalize().weight.dtype == torch.bfloat16
