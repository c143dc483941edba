"""What bags are: the bounds of each among the ids, checked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from embcomp.errors import InputError, did_you_mean

MODES = ("max", "mean", "sum")


def bag_bounds(ids: Tensor, offsets: Tensor | None, include_last_offset: bool) -> Tensor:
    """Bounds of the bags among the flattened ids: bag b is ``[bounds[b], bounds[b + 1])``.

    Args:
        ids: ``(B, L)`` without offsets, or ``(N,)`` with them.
        offsets: int64 ``(B,)``, or ``(B + 1,)`` with ``include_last_offset``, or None.
        include_last_offset: whether ``offsets`` ends with N.

    Returns:
        int64 ``(B + 1,)``.

    Raises:
        InputError: if shapes or dtypes are wrong, or (on CPU; elsewhere looking would wait for the device) the values.
    """
    if ids.dim() == 2 and offsets is None:
        return torch.arange(ids.shape[0] + 1, device=ids.device) * ids.shape[1]
    if ids.dim() != 1 or offsets is None:
        raise InputError(
            f"bag: ids of shape {tuple(ids.shape)} {'without' if offsets is None else 'with'} offsets; "
            "ids of shape (B, L) are bags already, ids of shape (N,) need offsets"
        )
    if offsets.dtype not in (torch.int64, torch.int32) or offsets.dim() != 1 or offsets.device != ids.device:
        raise InputError(
            f"bag: offsets must be int64 (B,) on {ids.device}, not {offsets.dtype} {tuple(offsets.shape)} "
            f"on {offsets.device}"
        )
    bounds = offsets.long()
    if not include_last_offset:
        bounds = torch.cat([bounds, torch.full((1,), ids.shape[0], device=ids.device)])
    if bounds.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(bounds, len(ids))
    return bounds


def are_single(bounds: Tensor, num_ids: int) -> bool:
    """Whether every bag has one id, so that there is nothing to pool; False where looking would wait for a device."""
    if torch.compiler.is_compiling() or bounds.device.type != "cpu" or len(bounds) != num_ids + 1:
        return False  # a graph must not depend on whether there happen to be as many bags as ids
    return bool((bounds == torch.arange(num_ids + 1)).all())


def pool_vectors(
    vectors: Tensor, bounds: Tensor, mode: str, weights: Tensor | None = None, padding: Tensor | None = None
) -> Tensor:
    """Pool composed vectors.

    Args:
        vectors: float ``(N, D)``.
        bounds: int64 ``(B + 1,)``.
        mode: ``sum``, ``mean`` or ``max``.
        weights: float ``(N,)``, for sums.
        padding: bool ``(N,)``, vectors that count for nothing.

    Returns:
        ``(B, D)``; zeros for empty bags.
    """
    number = vectors.shape[0]
    position = torch.arange(number, device=vectors.device)
    padding_idx = None
    if padding is not None:
        padding_idx = number
        position = torch.where(padding, padding_idx, position)
    if padding is not None or number == 0:
        vectors = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])
    return F.embedding_bag(
        position,
        vectors,
        bounds,
        mode=mode,
        per_sample_weights=None if weights is None else weights.to(vectors.dtype),
        include_last_offset=True,
        padding_idx=padding_idx,
    )


def check_pooling(ids: Tensor, per_sample_weights: Tensor | None, mode: str) -> None:
    """Check how bags are to be pooled.

    Raises:
        InputError: if the mode is unknown, or weights don't fit the ids or the mode.
    """
    if mode not in MODES:
        raise InputError(f"bag: mode={mode!r}; {did_you_mean(mode, MODES)}")
    if per_sample_weights is None:
        return
    if mode != "sum":
        raise InputError(f"bag: per_sample_weights go with mode='sum' only, not {mode!r}")
    if per_sample_weights.shape != ids.shape:
        raise InputError(
            f"bag: per_sample_weights {tuple(per_sample_weights.shape)} and ids {tuple(ids.shape)} differ in shape"
        )


def _check_values(bounds: Tensor, num_ids: int) -> None:
    if len(bounds) and bounds[0] == 0 and bounds[-1] == num_ids and not (bounds.diff() < 0).any():
        return
    raise InputError(
        f"bag: offsets must start at 0, never fall, and not pass {num_ids}, the number of ids (with "
        f"include_last_offset=True they end with it); these bound the bags: {bounds[:10].tolist()}"
    )
