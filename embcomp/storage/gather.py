"""Reading rows of a float matrix, where memory is what it costs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW_ROWS = 1024
_KEPT_BAGS = 1 << 20
_bags = torch.arange(_FEW_ROWS, device="cpu")


def read_rows(weight: Tensor, rows: Tensor, sparse: bool = False) -> Tensor:
    """``F.embedding``, and several times as fast where no gradient is asked for and the matrix outgrows the caches.

    On CPU ``F.embedding`` waits for every row in turn. The kernel of ``F.embedding_bag`` fetches rows ahead, and the sum
    over a bag of one row is that row.

    Args:
        weight: float ``(R, d)``.
        rows: int64 ``(...)`` in ``[0, R)``.
        sparse: row-sparse gradients.

    Returns:
        ``(..., d)`` of the weight's dtype.
    """
    if (torch.is_grad_enabled() and weight.requires_grad) or not _reads_ahead(weight, rows):
        return F.embedding(rows, weight, sparse=sparse)
    index = rows.reshape(-1)
    found = F.embedding_bag(index, weight.detach(), one_per_bag(len(index)), mode="sum", include_last_offset=True)
    return found.view(*rows.shape, weight.shape[1])


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


def _reads_ahead(weight: Tensor, rows: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(rows) is not Tensor:
        return False
    return weight.is_cpu and rows.is_cpu and rows.dtype == torch.int64 and rows.numel() >= _FEW_ROWS
