"""The number grids of integer rows: 2^bits equally spaced values, how they are placed, and how rows snap to them.

A *centred* grid has the values ``step·(q − L) + offset`` for codes q in ``[0, 2L]``, L = (2^bits − 1)/2: it is
symmetric around its offset, and zero lies between two codes. A *row* grid has the values ``scale·q + low``, from the
row's own smallest value to its largest.

Steps and scales keep 16 significant bits at most. Their products with codes are then exact in float32, so that kernels
that multiply and add in one rounding or in two, eager or compiled, on CPU or CUDA, return the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from embcomp.storage.base import Segment
from embcomp.storage.formats import RowFormat

GAUSSIAN_STEP = {1: 1.596, 2: 0.9957, 3: 0.586, 4: 0.335, 8: 0.0308}
"""The step of the centred grid that has the smallest mean squared error for N(0, 1)."""
TINY = 1e-12
"""The smallest step, so that nothing is ever divided by zero."""


def half_levels(bits: int) -> float:
    """L: the distance, in steps, from the middle of a centred grid to its ends."""
    return (2**bits - 1) / 2


def step_of(span: Tensor, bits: int) -> Tensor:
    """Step of the centred grid of half width ``span``; the sign of a span means nothing."""
    return round_step(span.to(torch.float32).abs().clamp_min(TINY) / 2 ** (bits - 1))


def span_of(step: Tensor, bits: int) -> Tensor:
    """Half width of the centred grid, the outer halves of its end cells included."""
    return step * 2 ** (bits - 1)


def round_step(step: Tensor) -> Tensor:
    """Round float32 to 16 significant bits."""
    return ((step.view(torch.int32) + 128) & -256).view(torch.float32)


def round_through(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to a 16-bit dtype and back; looking at the bits keeps Inductor from dropping the round trip."""
    return (values.to(dtype).view(torch.int16) | 0).view(dtype).to(torch.float32)


def quantize(values: Tensor, step: Tensor, offset: Tensor | None, bits: int) -> Tensor:
    """Codes on a centred grid, as whole numbers in float32 ``(..., d)``."""
    centred = values if offset is None else values - offset
    return (centred / step).add_(half_levels(bits)).round_().clamp_(0, 2**bits - 1)


def dequantize(codes: Tensor, step: Tensor, offset: Tensor | None, bits: int, out: Tensor | None = None) -> Tensor:
    """Values of codes on a centred grid, as in `dequantize_row`."""
    low = step * -half_levels(bits)
    return dequantize_row(codes, step, low if offset is None else low + offset, out)


def row_grid(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The grid from the smallest to the largest value of each row, in the numbers that are stored.

    Args:
        values: float32 ``(..., d)``.
        bits: bits per code.

    Returns:
        ``scale`` and ``low``, float32 ``(..., 1)``, rounded as `stored_row_grid` does.
    """
    low, high = torch.aminmax(values, dim=-1, keepdim=True)
    low = _round_low(low, bits)
    return stored_row_grid((high - low) / (2**bits - 1), low, bits)


def stored_row_grid(scale: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round a row grid to what is stored, in float32: float16 numbers below 8 bits, float32 ones for 8.

    A scale of zero, where all values of a row are equal, becomes one.
    """
    scale = round_step(scale) if bits == 8 else round_through(scale, torch.float16)
    return torch.where(scale == 0, 1.0, scale), _round_low(low, bits)


def quantize_row(values: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    """Codes on a row grid, as whole numbers in float32 ``(..., d)``."""
    return (values - low).div_(scale).round_().clamp_(0, 2**bits - 1)


def dequantize_row(codes: Tensor, scale: Tensor, low: Tensor, out: Tensor | None = None) -> Tensor:
    """Values of codes on a row grid: any dtype ``(..., d)`` to float32 ``(..., d)``; float32 codes are overwritten."""
    values = codes.to(torch.float32) if out is None else out.copy_(codes)
    # Written over the codes, one pass less; exporters know no ``out=``.
    return torch.addcmul(low, values, scale, out=None if torch.compiler.is_compiling() else values)


def pick(steps: Tensor, row_format: RowFormat, rows: Tensor, segment: Segment, sparse: bool = False) -> Tensor:
    """The entry of a ``(units, d or 1)`` table of steps or offsets for each row, broadcastable to ``(..., d)``."""
    if row_format.granularity == "group":
        return F.embedding(rows // row_format.group_rows, steps, sparse=sparse)
    if len(steps) == 1:
        return steps[0]
    if isinstance(segment, torch.Tensor):
        return F.embedding(segment, steps)
    return steps if segment is None else steps[segment]


def num_units(row_format: RowFormat, num_rows: int, num_segments: int) -> int:
    """How many steps (times d for ``column``) a learned granularity has."""
    return -(-num_rows // row_format.group_rows) if row_format.granularity == "group" else num_segments


def _round_low(low: Tensor, bits: int) -> Tensor:
    return low if bits == 8 else round_through(low, torch.float16)
