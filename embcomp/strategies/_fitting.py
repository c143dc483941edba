"""Least squares for rows that several ids share: a part of the strategies that hash or partition ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 65536
_PART_ROUNDS = 10


def shared_means(slots: Tensor, weight: Tensor, count: Tensor, num_rows: int) -> Tensor:
    """Count-weighted mean of the vectors that share each row: the exact minimum where a vector is one row.

    Args:
        slots: int64 ``(V,)`` in ``[0, num_rows)``, the row of each id.
        weight: float32 ``(V, D)``.
        count: float32 ``(V,)``, above 0.
        num_rows: R.

    Returns:
        float32 ``(R, D)``; rows that no id uses get the mean of all.
    """
    total, mass = weight.new_zeros(num_rows, weight.shape[1]), weight.new_zeros(num_rows)
    for part in chunks(len(weight)):
        total.index_add_(0, slots[part], weight[part] * count[part, None])
        mass.index_add_(0, slots[part], count[part])
    mean = total.sum(0) / mass.sum()
    return torch.where(mass[:, None] > 0, total / mass.clamp_min(1e-30)[:, None], mean)


def fit_summed_rows(
    rows: Tensor, slots: Sequence[Tensor], factors: Tensor, weight: Tensor, count: Tensor, steps: int
) -> Tensor:
    """Rows whose weighted sums come closest to ``weight``: ``sum_h factors[:, h] * rows[slots[h]]``.

    Conjugate gradients on the normal equations, one system per dimension, preconditioned by their diagonal; the error
    falls with every step, and with one hash function the first step is exact.

    Args:
        rows: float32 ``(R, D)`` to start from.
        slots: H tensors int64 ``(V,)``: the rows of each id.
        factors: float32 ``(V, H)``.
        weight: float32 ``(V, D)``, the vectors to come close to.
        count: float32 ``(V,)``, above 0, weights of the squared errors.
        steps: conjugate gradient steps.

    Returns:
        float32 ``(R, D)``.
    """

    def pull(part: slice, values: Tensor, out: Tensor) -> None:
        for number, slot in enumerate(slots):
            out.index_add_(0, slot[part], values * (factors[part, number] * count[part])[:, None])

    diagonal, residual = rows.new_zeros(len(rows), 1), torch.zeros_like(rows)
    for part in chunks(len(weight)):
        for number, slot in enumerate(slots):
            diagonal.index_add_(0, slot[part], (factors[part, number].square() * count[part])[:, None])
        pull(part, weight[part] - summed(rows, slots, factors, part), residual)
    scale = torch.where(diagonal > 0, 1 / diagonal.clamp_min(1e-30), 0.0)
    direction = residual * scale
    norm = (residual * direction).sum(0)
    for _ in range(steps):
        image = torch.zeros_like(rows)
        for part in chunks(len(weight)):
            pull(part, summed(direction, slots, factors, part), image)
        length = norm / (direction * image).sum(0).clamp_min(1e-30)
        rows, residual = rows + length * direction, residual - length * image
        next_norm = (residual * residual * scale).sum(0)
        direction = residual * scale + next_norm / norm.clamp_min(1e-30) * direction
        norm = next_norm
    return rows


def fit_importance(
    importance: Tensor, rows: Tensor, slots: Sequence[Tensor], buckets: Tensor, weight: Tensor, count: Tensor
) -> Tensor:
    """Importance weights whose weighted sums come closest to ``weight``, pulled slightly to what they were.

    Args:
        importance: float32 ``(W, H)`` as they were.
        rows: float32 ``(R, D)``.
        slots: H tensors int64 ``(V,)``: the rows of each id.
        buckets: int64 ``(V,)`` in ``[0, W)``: the importance weights of each id.
        weight: float32 ``(V, D)``.
        count: float32 ``(V,)``, above 0.

    Returns:
        float32 ``(W, H)``.
    """
    num_hashes = importance.shape[1]
    gram = importance.new_zeros(len(importance), num_hashes, num_hashes)
    moment = importance.new_zeros(len(importance), num_hashes)
    for part in chunks(len(weight)):
        terms = torch.stack([rows[slot[part]] for slot in slots], dim=1)
        weighted = terms * count[part, None, None]
        gram.index_add_(0, buckets[part], weighted @ terms.transpose(1, 2))
        moment.index_add_(0, buckets[part], (weighted @ weight[part, :, None]).squeeze(-1))
    ridge = 1e-3 * gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-12
    gram += ridge[..., None] * torch.eye(num_hashes, device=gram.device)
    return torch.linalg.solve(gram, moment + ridge * importance)


def fit_parts(
    slots: Sequence[Tensor], sizes: Sequence[int], weight: Tensor, count: Tensor, product: bool, ridge: float
) -> list[Tensor]:
    """Rows of each part whose compositions come closest to trained vectors, by alternating least squares.

    Args:
        slots: k tensors int64 ``(V,)``, the class of each id in each part.
        sizes: k, the number of classes of each part.
        weight: float32 ``(V, D)``.
        count: float32 ``(V,)``, above 0, weights of the squared errors.
        product: whether rows are composed as ``r_0 (1 + r_1) (1 + r_2) …``, else as a sum.
        ridge: pull to zero, relative to the curvature; more keeps rows of products small where others are near zero.

    Returns:
        k tensors float32 ``(sizes[j], D)``.
    """
    rows = [weight.new_zeros(size, weight.shape[1]) for size in sizes]
    masses = [weight.new_zeros(size, 1).index_add_(0, s, count[:, None]) for size, s in zip(sizes, slots, strict=True)]
    for number in list(range(len(rows))) * _PART_ROUNDS:
        moment, curvature = torch.zeros_like(rows[number]), torch.zeros_like(rows[number])
        for part in chunks(len(weight)):
            slope, offset = _linear_in(number, [r[s[part]] for r, s in zip(rows, slots, strict=True)], product)
            pull = slope * count[part, None]
            moment.index_add_(0, slots[number][part], pull * (weight[part] - offset))
            curvature.index_add_(0, slots[number][part], pull * slope)
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


def summed(rows: Tensor, slots: Sequence[Tensor], factors: Tensor, part: slice) -> Tensor:
    """Weighted sums of rows for a chunk of ids, float32 ``(len(part), D)``."""
    vectors = rows[slots[0][part]] * factors[part, :1]
    for number, slot in enumerate(slots[1:], start=1):
        vectors.addcmul_(rows[slot[part]], factors[part, number : number + 1])
    return vectors


def chunks(length: int) -> Iterator[slice]:
    """Slices that cover ``[0, length)``."""
    for start in range(0, length, CHUNK):
        yield slice(start, min(start + CHUNK, length))
