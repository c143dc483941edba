"""Grids fitted to rows that are there: small mean squared error, by a search over clipping ratios."""

from __future__ import annotations

import torch
from torch import Tensor

from embcomp.storage.grids import GAUSSIAN_STEP, TINY, dequantize, half_levels, quantize, round_step, stored_row_grid

CANDIDATES = 24
REFINEMENTS = 3


def fit_grid(values: Tensor, bits: int, with_offset: bool) -> tuple[Tensor, Tensor]:
    """Centred grids of small mean squared error, one per unit.

    For each unit, 24 clipping ratios are tried: steps in geometric progression from a quarter of the Gaussian optimum
    to the step that reaches the largest value (with an offset, its place moves along from the mean to mid-range).
    The best is refined three times by least squares, given its own codes, which can only lessen the error.

    Args:
        values: float32 ``(units, n)``, n = 0 gives steps of 1.
        bits: bits per code.
        with_offset: whether the grid may be shifted.

    Returns:
        step and offset, float32 ``(units, 1)``; zero offsets without ``with_offset``.
    """
    if values.numel() == 0:
        return values.new_ones(len(values), 1), values.new_zeros(len(values), 1)
    low, high = torch.aminmax(values, dim=1, keepdim=True)
    mean = values.mean(1, keepdim=True) if with_offset else torch.zeros_like(low)
    middle = (low + high) / 2 if with_offset else mean
    reach = torch.maximum(high - middle, middle - low)
    narrow = (0.25 * GAUSSIAN_STEP[bits] * (values - mean).square().mean(1, keepdim=True).sqrt()).clamp_min(TINY)
    wide = (reach / half_levels(bits)).clamp_min(TINY)
    best_step, best_offset, best_error = wide, middle, torch.full_like(low, torch.inf)
    for share in torch.linspace(0, 1, CANDIDATES).tolist():
        step, offset = narrow * (wide / narrow) ** share, torch.lerp(mean, middle, share)
        snapped = dequantize(quantize(values, step, offset, bits), step, offset, bits)
        error = (snapped - values).square_().sum(1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step, best_offset = torch.where(better, step, best_step), torch.where(better, offset, best_offset)
    for _ in range(REFINEMENTS):
        best_step, best_offset = _least_squares(values, best_step, best_offset, bits, with_offset)
    return round_step(best_step), best_offset


def fit_row_grid(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Row grids of small mean squared error, in the numbers that are stored.

    Args:
        values: float32 ``(R, d)``.
        bits: bits per code.

    Returns:
        ``scale`` and ``low``, float32 ``(R, 1)``.
    """
    step, offset = fit_grid(values, bits, with_offset=True)
    return stored_row_grid(step, offset - half_levels(bits) * step, bits)


def _least_squares(values: Tensor, step: Tensor, offset: Tensor, bits: int, with_offset: bool) -> tuple[Tensor, Tensor]:
    """Best step (and offset) for the codes that the present ones give."""
    levels = quantize(values, step, offset, bits).sub_(half_levels(bits))
    if not with_offset:
        return ((values * levels).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True)).clamp_min(TINY), offset
    mean, middle = values.mean(1, keepdim=True), levels.mean(1, keepdim=True)
    spread = (levels - middle).square().sum(1, keepdim=True)
    slope = ((values - mean) * (levels - middle)).sum(1, keepdim=True) / spread
    step = torch.where(spread > 0, slope, step).clamp_min(TINY)
    return step, mean - step * middle
