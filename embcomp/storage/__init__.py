"""Row stores: how rows are kept. `make_row_store` builds the training form of any row format."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from embcomp.storage.base import Ids, RowStore, Segment
from embcomp.storage.dense import DTYPES, DenseRows
from embcomp.storage.formats import RowFormat
from embcomp.storage.packed import size_of_segments
from embcomp.storage.quantized import QuantizedRows

__all__ = ["DenseRows", "Ids", "QuantizedRows", "RowFormat", "RowStore", "Segment", "make_row_store", "stored_bytes"]


def make_row_store(rows: str | RowFormat, segments: Sequence[int], dim: int, sparse: bool = False) -> RowStore:
    """Build the training form of a row store on the current default device (``meta`` included).

    Args:
        rows: a row format such as ``"float32"``, ``"int8"``, ``"int2:column"``.
        segments: rows in each segment (logical table).
        dim: values per row, d.
        sparse: row-sparse gradients.

    Raises:
        ConfigError: if ``rows`` is not a row format.
    """
    row_format = RowFormat.parse(rows).resolve(dim)
    if row_format.is_integer:
        return QuantizedRows(segments, dim, row_format, sparse)
    return DenseRows(segments, dim, DTYPES[row_format.kind], row_format.pure, sparse)


@lru_cache(maxsize=65536)
def stored_bytes(num_rows: int, dim: int, rows: str) -> int:
    """Bytes that ``num_rows`` rows of ``dim`` values take when served in a row format, scales included."""
    row_format = RowFormat.parse(rows).resolve(dim)
    if row_format.is_integer:
        return sum(size_of_segments([num_rows], dim, row_format))
    return num_rows * dim * DTYPES[row_format.kind].itemsize
