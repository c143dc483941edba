"""What sparse rows take, by arithmetic: bytes of each layout, and which layout takes the fewest."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from embcomp.errors import ConfigError, did_you_mean
from embcomp.storage import packing
from embcomp.storage.bitmap import bitmap_bytes, count_dtype
from embcomp.storage.formats import RowFormat
from embcomp.storage.packed import row_scale_dtype, size_of_segments

LAYOUTS = ("bitmap", "csr", "dcsr")


def sparse_bytes(
    segments: Sequence[int], dim: int, row_format: RowFormat, num_values: int, num_slots: int, layout: str
) -> int:
    """Bytes of `SparseRows`, whose arguments these are: values, scales and index.

    Raises:
        ConfigError: for an unknown layout, a scale per group of rows, or more values or slots than there can be.
    """
    num_rows = sum(segments)
    check_granularity(row_format)
    _check_sizes(num_rows, dim, num_values, num_slots, layout)
    size = packing.packed_bytes(1, num_values, row_format.bits)
    if row_format.granularity == "row":
        size += num_row_scales(num_rows, num_slots, layout) * 2 * row_scale_dtype(row_format.bits).itemsize
    elif row_format.is_integer:
        columns = dim if row_format.granularity == "column" else 1
        size += len(segments) * columns * 4 * (1 + row_format.offset)
    if layout == "bitmap":
        return size + bitmap_bytes(num_rows * dim, num_values)
    if layout == "dcsr":
        size += bitmap_bytes(num_rows, num_slots)
    runs = num_rows if layout == "csr" else num_slots
    return size + (runs + 1) * count_dtype(num_values).itemsize + num_values * column_dtype(dim).itemsize


def dense_bytes(segments: Sequence[int], dim: int, row_format: RowFormat) -> int:
    """Bytes of the same rows in their plain serving form, `DenseRows` or `PackedRows`."""
    if row_format.is_integer:
        return sum(size_of_segments(segments, dim, row_format))
    return sum(segments) * dim * row_format.bits // 8


def smallest_layout(segments: Sequence[int], dim: int, row_format: RowFormat, num_values: int) -> tuple[str, int]:
    """The layout that takes the fewest bytes, the first of `LAYOUTS` among equals, and its number of slots.

    Nothing is known but how many values there are, so there are slots for values that all lie in different rows.
    """
    slots = {layout: most_slots(segments, num_values, layout) for layout in LAYOUTS}
    best = min(LAYOUTS, key=lambda layout: sparse_bytes(segments, dim, row_format, num_values, slots[layout], layout))
    return best, slots[best]


def most_slots(segments: Sequence[int], num_values: int, layout: str) -> int:
    """Slots that are enough for so many values, wherever they lie."""
    return min(sum(segments), num_values) if layout == "dcsr" else 0


def share_out(size: int, segments: Sequence[int]) -> list[int]:
    """Bytes that all segments have in common, shared out by their rows: which rows have values is known too late."""
    num_rows, before, shares = max(sum(segments), 1), 0, []
    for rows in segments:
        shares.append(size * (before + rows) // num_rows - size * before // num_rows)
        before += rows
    if not before:
        shares[0] = size
    return shares


def num_row_scales(num_rows: int, num_slots: int, layout: str) -> int:
    """How many rows have a scale, where scales belong to rows."""
    return num_slots if layout == "dcsr" else num_rows


def column_dtype(dim: int) -> torch.dtype:
    """The dtype of column numbers."""
    return torch.uint8 if dim <= 2**8 else torch.int16 if dim <= 2**15 else torch.int32


def check_granularity(row_format: RowFormat) -> None:
    """Raise `ConfigError` for formats with a scale per group of rows."""
    if row_format.granularity == "group":
        raise ConfigError(
            f"rows='{row_format}': sparse rows have no scales per group of rows; choose a scale per 'row', 'column' or "
            f"'table', such as '{row_format.kind}:column'"
        )


def _check_sizes(num_rows: int, dim: int, num_values: int, num_slots: int, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ConfigError(f"layout={layout!r} is no layout of sparse rows; {did_you_mean(layout, LAYOUTS)}")
    if not 0 <= num_values <= num_rows * dim:
        raise ConfigError(f"num_values={num_values}: {num_rows} rows of {dim} have 0 to {num_rows * dim} values")
    low, high = (-(-num_values // dim), num_rows) if layout == "dcsr" else (0, 0)
    if not low <= num_slots <= high:
        raise ConfigError(f"num_slots={num_slots}: {num_values} values in layout {layout!r} need {low} to {high} slots")
