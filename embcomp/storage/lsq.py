"""Snapping to a grid with gradients: LSQ for learned grids, straight-through for the grid of a row's own range."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embcomp.storage import grids

FAR = 2
"""How far beyond the grid, in half widths, values may still be pushed outwards."""


class LearnedGrid(torch.autograd.Function):
    """Snap values to a centred grid; gradients by LSQ (arXiv 1902.08153), the offset's by LSQ+ (arXiv 2004.09576).

    With u = (w − offset) / step and v = step·level + offset, level = q − L in ``[−L, L]``, and a value *inside* where
    |u| ≤ 2^(bits − 1), which is where rounding alone decides its code (LSQ's own range ends at L, half a step earlier:
    at many bits that is the same, at 1 bit it would leave out a third of Gaussian values):

    - ∂v/∂w = 1 inside, and up to twice that range; farther out, only gradients that lead back pass. LSQ's 0 outside
      holds back rows that grow faster than the span, and never lets rare rows return; 1 everywhere lets values run away
      until they can't change their code any more.
    - ∂v/∂step = level − u inside, level (that is ±L) outside;
    - ∂v/∂offset = 0 inside, 1 outside.

    LSQ multiplies a step's gradient by 1/√(N·Q), N values that share the step, Q the largest level: here 1/√(N·L) with
    the N of the lookup at hand. The parameter being ``span = 2^(bits − 1)·step``, its gradient is 2^(bits − 1) times
    that, so that plain SGD moves the step exactly as LSQ does.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, span: Tensor, offset: Tensor | None, bits: int, values_per_step: float
    ) -> Tensor:
        """Snap float32 values ``(..., d)`` to grids of broadcastable ``span`` and ``offset``."""
        ctx.save_for_backward(values, span, offset)
        ctx.bits, ctx.values_per_step = bits, values_per_step
        step = grids.step_of(span, bits)
        return grids.dequantize(grids.quantize(values, step, offset, bits), step, offset, bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of values, span and offset, in their shapes."""
        values, span, offset = ctx.saved_tensors
        bits, half, edge = ctx.bits, grids.half_levels(ctx.bits), 2.0 ** (ctx.bits - 1)
        lsq = 1 / math.sqrt(ctx.values_per_step * half)
        scaled = (values if offset is None else values - offset) / grids.step_of(span, bits)
        # Hardshrink keeps what lies outside and leaves zeros inside; masks of bools take ten times as long on CPU.
        outside = F.hardshrink(scaled, edge)
        levels = (scaled + half).round_().clamp_(0, 2 * half).sub_(half)
        slope = levels.sub_(scaled).add_(outside)
        grad_span = (slope * grad).sum_to_size(span.shape) * torch.where(span < 0, -edge * lsq, edge * lsq)
        grad_offset = None if offset is None else (outside.sign().abs_() * grad).sum_to_size(offset.shape) * lsq
        leaving = F.hardshrink(scaled, FAR * edge).mul_(grad).sign_().clamp_max_(0)
        return torch.addcmul(grad, grad, leaving), grad_span, grad_offset, None, None


class RowGrid(torch.autograd.Function):
    """Snap each row to the grid from its smallest to its largest value; gradients pass straight through."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bits: int) -> Tensor:
        """Snap float32 rows ``(..., d)``."""
        scale, low = grids.row_grid(values, bits)
        return grids.dequantize_row(grids.quantize_row(values, scale, low, bits), scale, low)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient as it is: no value of a row lies outside the row's range."""
        return grad, None
