"""Reading rows of a float matrix, where memory is what it costs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_FEW_ROWS = 1024
_KEPT_BAGS = 1 << 20
_bags = torch.arange(_FEW_ROWS, device="cpu")


def read_rows(weight: Tensor, rows: Tensor, sparse: bool = False) -> Tensor:
    """``F.embedding``, and several times as fast on a CPU whose caches the matrix outgrows.

    There ``F.embedding`` waits for every row in turn. The kernel of ``F.embedding_bag`` fetches rows ahead, and the sum
    over a bag of one row is that row. Where dense gradients are asked for, it is ``F.embedding`` all the same.

    Args:
        weight: float ``(R, d)``.
        rows: int64 ``(...)`` in ``[0, R)``.
        sparse: row-sparse gradients.

    Returns:
        ``(..., d)`` of the weight's dtype.
    """
    with_gradient = torch.is_grad_enabled() and weight.requires_grad
    if (with_gradient and not sparse) or not _can_read_ahead(weight, rows):
        return F.embedding(rows, weight, sparse=sparse)
    found: Tensor = _SparseRead.apply(weight, rows) if with_gradient else _read_ahead(weight, rows)
    return found


def one_per_bag(count: int) -> Tensor:
    """Offsets of ``count`` bags of one id each, with the last offset: int64 ``(count + 1,)`` on CPU, not to be written.

    Kept between calls up to some 8 MB: to make them anew would take a tenth of a lookup's time.
    """
    global _bags
    if count < len(_bags):
        return _bags[: count + 1]
    bags = torch.arange(count + 1, device="cpu")
    if count <= _KEPT_BAGS and type(bags) is Tensor:  # a fake tensor of somebody's trace must not be kept
        _bags = bags
    return bags


class _SparseRead(torch.autograd.Function):
    """Rows, with the row-sparse gradient that ``F.embedding(sparse=True)`` has."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = weight.shape
        return _read_ahead(weight, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rows, values = ctx.saved_tensors[0].reshape(1, -1), gradient.reshape(-1, ctx.shape[1])
        return torch.sparse_coo_tensor(rows, values, ctx.shape, check_invariants=False), None


def _read_ahead(weight: Tensor, rows: Tensor) -> Tensor:
    index = rows.reshape(-1)
    found = F.embedding_bag(index, weight.detach(), one_per_bag(len(index)), mode="sum", include_last_offset=True)
    # Not a view: autograd refuses changes in place of views that a function made.
    return torch.ops.aten._unsafe_view(found, [*rows.shape, weight.shape[1]])


def _can_read_ahead(weight: Tensor, rows: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(rows) is not Tensor:
        return False
    return weight.is_cpu and rows.is_cpu and rows.dtype == torch.int64 and rows.numel() >= _FEW_ROWS
