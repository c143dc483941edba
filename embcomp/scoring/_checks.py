"""Checks of queries and items, and precision: what all functions of `embcomp.scoring` share."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from embcomp.errors import InputError, did_you_mean
from embcomp.scoring.scorers import ItemScorer

REDUCTIONS = ("mean", "none", "sum")


def check_matrix(scorer: ItemScorer, queries: Tensor) -> Tensor:
    """Return queries ``(N, D)`` in the scorer's dtype.

    Raises:
        InputError: if they are something else.
    """
    queries = scorer.check_queries(queries)
    if queries.dim() != 2:
        raise InputError(f"queries of shape {tuple(queries.shape)}: they must be (N, {scorer.dim}); reshape them first")
    return queries


def check_examples(
    scorer: ItemScorer, queries: Tensor, targets: Tensor, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor]:
    """Return queries ``(N, D)`` and targets ``(N,)`` of a loss, which may be ``ignore_index``.

    Raises:
        InputError: if they are something else, or there is no such reduction.
    """
    queries = check_matrix(scorer, queries)
    targets = check_items(scorer, "targets", targets, (len(queries),), allowed=ignore_index)
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction={reduction!r}; {did_you_mean(reduction, REDUCTIONS)}")
    return queries, targets


def check_items(
    scorer: ItemScorer, what: str, ids: Tensor, shape: tuple[int | None, ...], allowed: int | None = None
) -> Tensor:
    """Return ids of items as int64.

    Args:
        scorer: whose items.
        what: their name in messages.
        ids: int64 or int32.
        shape: what they must have; None for any length.
        allowed: a number outside ``[0, V)`` that is allowed too.

    Raises:
        InputError: if dtype, device, shape or a value is wrong.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"{what} must be an int64 tensor, not {got}")
    if len(ids.shape) != len(shape) or any(
        wanted not in (None, size) for size, wanted in zip(ids.shape, shape, strict=True)
    ):
        wanted = ", ".join("n" if size is None else str(size) for size in shape)
        raise InputError(f"{what} of shape {tuple(ids.shape)}: these queries need ({wanted}{',' * (len(shape) == 1)})")
    if ids.device != scorer.device:
        raise InputError(f"{what} are on {ids.device}, the items on {scorer.device}: move one of them")
    ids = ids.long()
    if ids.is_meta or torch.compiler.is_compiling() or not ids.numel():
        return ids
    outside = (ids < 0) | (ids >= scorer.num_items)
    if allowed is not None:
        outside &= ids != allowed
    if bool(outside.any()):
        where = outside.nonzero()[0].tolist()
        also = "" if allowed is None else f" (or {allowed}, which counts for nothing)"
        raise InputError(
            f"{what}: {int(ids[tuple(where)])} at position {where} is no item: items are in "
            f"[0, {scorer.num_items}){also}"
        )
    return ids


def exact(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context that computes in the dtypes that tensors have, whatever autocast says."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
