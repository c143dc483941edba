"""Least squares for rows that several ids share: a part of the strategies that hash or partition ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from embcomp.row_source import RowSource, ids_of

_PART_ROUNDS = 10

Slots = Callable[[Tensor], list[Tensor]]
"""Of ids int64 ``(n,)`` their rows, int64 ``(n,)`` each: worked out when they are needed, not kept for all ids."""
Factors = Callable[[Tensor], Tensor]
"""Of ids int64 ``(n,)`` the factors of their rows, float32 ``(n, H)``."""


def shared_means(
    slots: Tensor | Callable[[Tensor], Tensor], weight: Tensor | RowSource, count: Tensor, num_rows: int
) -> Tensor:
    """Count-weighted mean of the vectors that share each row: the exact minimum where a vector is one row.

    Args:
        slots: int64 ``(V,)`` in ``[0, num_rows)``, the row of each id; or what says them for ids int64 ``(n,)``.
        weight: ``(V, D)``.
        count: float32 ``(V,)``, above 0, or 0 for ids that are no part of it.
        num_rows: R.

    Returns:
        float32 ``(R, D)``; rows that no id uses get the mean of all.
    """
    source = RowSource.of(weight)
    total = torch.zeros(num_rows, source.shape[1], device=source.device)
    mass = torch.zeros(num_rows, device=source.device)
    for part in source.chunks():
        own = slots[part] if isinstance(slots, Tensor) else slots(ids_of(part, source.device))
        total.index_add_(0, own, source[part] * count[part, None])
        mass.index_add_(0, own, count[part])
    mean = total.sum(0) / mass.sum()
    total.div_(mass.clamp_min(1e-30)[:, None])
    total[mass == 0] = mean
    return total


def fit_summed_rows(
    rows: Tensor, slots: Slots, factors: Factors, weight: RowSource, count: Tensor, steps: int
) -> Tensor:
    """Rows whose weighted sums come closest to ``weight``: ``sum_h factors(ids)[:, h] * rows[slots(ids)[h]]``.

    Conjugate gradients on the normal equations, one system per dimension, preconditioned by their diagonal; the error
    falls with every step, and with one hash function the first step is exact.

    Args:
        rows: float32 ``(R, D)`` to start from.
        slots: the H rows of ids.
        factors: their factors.
        weight: ``(V, D)``, the vectors to come close to.
        count: float32 ``(V,)``, above 0, weights of the squared errors.
        steps: conjugate gradient steps.

    Returns:
        float32 ``(R, D)``.
    """

    def terms(part: slice) -> tuple[list[Tensor], Tensor, Tensor]:
        ids = ids_of(part, weight.device)
        return slots(ids), factors(ids), count[part, None]

    def pull(own: Sequence[Tensor], factor: Tensor, values: Tensor, out: Tensor) -> None:
        for number, slot in enumerate(own):
            out.index_add_(0, slot, values * factor[:, number, None])

    diagonal, residual = rows.new_zeros(len(rows), 1), torch.zeros_like(rows)
    for part in weight.chunks():
        own, factor, share = terms(part)
        for number, slot in enumerate(own):
            diagonal.index_add_(0, slot, factor[:, number, None].square() * share)
        pull(own, factor * share, weight[part] - summed(rows, own, factor), residual)
    scale = torch.where(diagonal > 0, 1 / diagonal.clamp_min(1e-30), 0.0)
    direction = residual * scale
    norm = (residual * direction).sum(0)
    for _ in range(steps):
        image = torch.zeros_like(rows)
        for part in weight.chunks():
            own, factor, share = terms(part)
            pull(own, factor * share, summed(direction, own, factor), image)
        length = norm / (direction * image).sum(0).clamp_min(1e-30)
        rows, residual = rows + length * direction, residual - length * image
        next_norm = (residual * residual * scale).sum(0)
        direction = residual * scale + next_norm / norm.clamp_min(1e-30) * direction
        norm = next_norm
    return rows


def fit_importance(
    importance: Tensor,
    rows: Tensor,
    slots: Slots,
    buckets: Callable[[Tensor], Tensor],
    weight: RowSource,
    count: Tensor,
) -> Tensor:
    """Importance weights whose weighted sums come closest to ``weight``, pulled slightly to what they were.

    Args:
        importance: float32 ``(W, H)`` as they were.
        rows: float32 ``(R, D)``.
        slots: the H rows of ids.
        buckets: of ids int64 ``(n,)`` the number of their importance weights, int64 ``(n,)`` in ``[0, W)``.
        weight: ``(V, D)``.
        count: float32 ``(V,)``, above 0.

    Returns:
        float32 ``(W, H)``.
    """
    num_hashes = importance.shape[1]
    gram = importance.new_zeros(len(importance), num_hashes, num_hashes)
    moment = importance.new_zeros(len(importance), num_hashes)
    for part in weight.chunks():
        ids = ids_of(part, weight.device)
        terms, bucket = torch.stack([rows[slot] for slot in slots(ids)], dim=1), buckets(ids)
        weighted = terms * count[part, None, None]
        gram.index_add_(0, bucket, weighted @ terms.transpose(1, 2))
        moment.index_add_(0, bucket, (weighted @ weight[part].unsqueeze(-1)).squeeze(-1))
    ridge = 1e-3 * gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-12
    gram += ridge[..., None] * torch.eye(num_hashes, device=gram.device)
    return torch.linalg.solve(gram, moment + ridge * importance)


def fit_parts(
    slots: Slots, sizes: Sequence[int], weight: RowSource, count: Tensor, product: bool, ridge: float
) -> list[Tensor]:
    """Rows of each part whose compositions come closest to trained vectors, by alternating least squares.

    Args:
        slots: the classes of ids in the k parts.
        sizes: k, the number of classes of each part.
        weight: ``(V, D)``.
        count: float32 ``(V,)``, above 0, weights of the squared errors.
        product: whether rows are composed as ``r_0 (1 + r_1) (1 + r_2) …``, else as a sum.
        ridge: pull to zero, relative to the curvature; more keeps rows of products small where others are near zero.

    Returns:
        k tensors float32 ``(sizes[j], D)``.
    """
    rows = [torch.zeros(size, weight.shape[1], device=weight.device) for size in sizes]
    masses = [torch.zeros(size, 1, device=weight.device) for size in sizes]
    for part in weight.chunks():
        for mass, own in zip(masses, slots(ids_of(part, weight.device)), strict=True):
            mass.index_add_(0, own, count[part, None])
    for number in list(range(len(rows))) * _PART_ROUNDS:
        moment, curvature = torch.zeros_like(rows[number]), torch.zeros_like(rows[number])
        for part in weight.chunks():
            classes = slots(ids_of(part, weight.device))
            slope, offset = _linear_in(number, [r[own] for r, own in zip(rows, classes, strict=True)], product)
            pull = slope * count[part, None]
            moment.index_add_(0, classes[number], pull * (weight[part] - offset))
            curvature.index_add_(0, classes[number], pull * slope)
        curvature += ridge * masses[number] * (curvature.sum(0) / count.sum())
        rows[number] = moment / curvature.clamp_min(1e-30)
    return rows


def _linear_in(number: int, rows: Sequence[Tensor], product: bool) -> tuple[Tensor, Tensor]:
    """Write composed vectors as ``slope * rows[number] + offset``."""
    others = [row for index, row in enumerate(rows) if index != number]
    if not product:
        return torch.ones_like(rows[number]), sum(others, torch.zeros_like(rows[number]))
    base, factors = (torch.ones_like(rows[0]), others) if number == 0 else (others[0], others[1:])
    for factor in factors:
        base = torch.addcmul(base, base, factor)
    return base, torch.zeros_like(base) if number == 0 else base


def summed(rows: Tensor, slots: Sequence[Tensor], factors: Tensor) -> Tensor:
    """Sums of H rows for each of n ids, with factors ``(n, H)``: float32 ``(n, D)``."""
    vectors = rows[slots[0]] * factors[:, :1]
    for number, slot in enumerate(slots[1:], start=1):
        vectors.addcmul_(rows[slot], factors[:, number : number + 1])
    return vectors
