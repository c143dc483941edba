"""Reading rows ahead: the same rows as ``F.embedding``, and only where it is allowed."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from embcomp.storage import gather
from embcomp.storage.gather import one_per_bag, read_rows

ROWS = 5000


def weight_and_rows(dim=16, dtype=torch.float32, shape=(60, 30)):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, dim, generator=generator).to(dtype)
    return torch.nn.Parameter(weight), torch.randint(0, ROWS, shape, generator=generator)


@pytest.fixture
def kernel_calls(monkeypatch):
    calls = []

    def embedding_bag(*args, **options):
        calls.append(args)
        return F.embedding_bag(*args, **options)

    monkeypatch.setattr(gather, "F", type("F", (), {"embedding": F.embedding, "embedding_bag": embedding_bag}))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [1, 2, 6, 16, 100])
@torch.no_grad()
def test_same_rows(dim, dtype, kernel_calls):
    weight, rows = weight_and_rows(dim, dtype)
    weight[7, 0] = float("inf")
    assert torch.equal(read_rows(weight, rows), F.embedding(rows, weight))
    assert kernel_calls


def test_dense_gradients_take_the_way_of_torch(kernel_calls):
    weight, rows = weight_and_rows()
    read_rows(weight, rows).sum().backward()
    assert not weight.grad.is_sparse
    assert not kernel_calls


def test_same_sparse_gradients(kernel_calls):
    gradients = []
    for read in (read_rows, lambda weight, rows, sparse: F.embedding(rows, weight, sparse=sparse)):
        weight, rows = weight_and_rows()
        first, second = (read(weight, rows + offset, sparse=True) for offset in (torch.tensor(0), -rows.min()))
        (first.mul_(2).square().sum(1) + second.sum(1)).sum().backward()
        assert weight.grad.is_sparse
        gradients.append(weight.grad.to_dense())
    torch.testing.assert_close(*gradients)
    assert len(kernel_calls) == 2


@pytest.mark.parametrize("bad", [-1, ROWS])
@torch.no_grad()
def test_rows_outside_are_refused(bad):
    weight, rows = weight_and_rows()
    rows[5, 5] = bad
    with pytest.raises((RuntimeError, IndexError)):
        read_rows(weight, rows)


@torch.no_grad()
def test_traces_hold_no_lengths():
    weight, rows = weight_and_rows()
    weight = weight.detach()
    traced = torch.jit.trace(lambda rows: read_rows(weight, rows), rows)
    exported = torch.export.export(_Reader(weight), (rows,), dynamic_shapes=({0: torch.export.Dim("B", min=2)},))
    for shape in ((70, 30), (3, 30)):
        _, others = weight_and_rows(shape=shape)
        assert torch.equal(traced(others), F.embedding(others, weight))
        assert torch.equal(exported.module()(others), F.embedding(others, weight))


class _Reader(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, rows):
        return read_rows(self.weight, rows)


@torch.no_grad()
def test_fake_tensors_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(gather, "_bags", torch.arange(1))
    with FakeTensorMode():
        assert read_rows(torch.randn(ROWS, 2), torch.zeros(2000, dtype=torch.int64)).shape == (2000, 2)
        assert len(one_per_bag(100)) == 101
    assert type(gather._bags) is torch.Tensor
    assert torch.equal(one_per_bag(100), torch.arange(101))


def test_offsets_are_kept_up_to_a_size(monkeypatch):
    monkeypatch.setattr(gather, "_bags", torch.arange(1))
    monkeypatch.setattr(gather, "_KEPT_BAGS", 50)
    for count in (0, 3, 50, 7, 51, 200):
        assert torch.equal(one_per_bag(count), torch.arange(count + 1))
    assert len(gather._bags) == 51
