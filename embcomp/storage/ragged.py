"""Ragged rows: the serving form of rows whose widths differ from segment to segment, one behind another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embcomp.errors import ConfigError
from embcomp.storage import grids, packing
from embcomp.storage.base import RowStore, Segment
from embcomp.storage.dense import DTYPES, DenseRows
from embcomp.storage.formats import RowFormat
from embcomp.storage.packed import PackedRows, row_scale_dtype

_CHUNK_ROWS = 1 << 16


class RaggedRows(RowStore):
    """Rows of ``widths[s]`` values in segment s, brought to d by zeros behind them; nothing is stored for the zeros.

    All values of all segments lie in one stream, so a lookup is one gather whatever the widths: d values from where a
    row begins, of which those behind its width are blanked. (Float and 8-bit streams end with as many spare values as
    the last row is short of d.) Scales of ``column`` granularity are stored for columns that some row of the table has.

    Args:
        segments: rows in each segment.
        dim: values per looked-up row, d.
        row_format: any row format but those with a scale per group of rows.
        widths: values per stored row of each segment, 0 to d.
        owners: the table of each segment, for scales; rising from 0. None where every segment is a table.

    Raises:
        ConfigError: for groups of rows, which stop being consecutive when rows are left out.
    """

    codes: Tensor
    scale: Tensor | None
    offset: Tensor | None
    _starts: Tensor
    _row_starts: Tensor
    _widths: Tensor
    _owners: Tensor
    _columns: Tensor

    def __init__(
        self,
        segments: Sequence[int],
        dim: int,
        row_format: RowFormat,
        widths: Sequence[int],
        owners: Sequence[int] | None = None,
    ) -> None:
        super().__init__(segments, dim)
        self.row_format, self.bits = row_format, row_format.bits
        self.widths = tuple(widths)
        self.owners = tuple(range(len(self.segments))) if owners is None else tuple(owners)
        check_granularity(row_format)
        starts = [0]
        for rows, width in zip(self.segments, self.widths, strict=True):
            starts.append(starts[-1] + rows * width)
        self.num_values = starts[-1]
        self._is_full = all(width == dim for width in self.widths)
        size = self.num_values + spare_values(self.segments, dim, row_format, self.widths)
        if row_format.is_integer:
            self.register_buffer("codes", torch.empty(packing.packed_bytes(1, size, self.bits), dtype=torch.uint8))
        else:
            self.values = nn.Parameter(torch.empty(size, dtype=DTYPES[row_format.kind]), requires_grad=False)
        self._make_scales()
        for name, numbers in (("_starts", starts[:-1]), ("_row_starts", self.starts()), ("_widths", self.widths)):
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.int64, device="cpu"), persistent=False)
        self.register_buffer("_owners", torch.tensor(self.owners, device="cpu"), persistent=False)

    def _make_scales(self) -> None:
        size = _num_scales(self.segments, self.row_format, self.widths, self.owners)
        by_row = self.row_format.granularity == "row"
        dtype = row_scale_dtype(self.bits) if by_row else torch.float32
        has_offset = by_row or self.row_format.offset
        # What there is none of is no buffer: torch.export trips over buffers that are None in front of others.
        for name, exists in (("scale", self.row_format.is_integer), ("offset", has_offset)):
            if exists:
                self.register_buffer(name, torch.empty(size, dtype=dtype))
            else:
                setattr(self, name, None)
        if self.row_format.granularity == "column":
            # Where each table's columns are in the stored scales; columns that it has not read any, and are blanked.
            table_widths = _table_widths(self.widths, self.owners)
            index, total = [], 0
            for width in table_widths:
                index.append([min(total + column, max(size - 1, 0)) for column in range(self.dim)])
                total += width
            self.register_buffer("_columns", torch.tensor(index, device="cpu"), persistent=False)

    # ---- lookups ----------------------------------------------------------------------------------------------------

    def forward(self, rows: Tensor, segment: Segment = None) -> Tensor:
        starts, row_starts, widths, owners = (
            table if segment is None else table[segment]
            for table in (self._starts, self._row_starts, self._widths, self._owners)
        )
        first = starts + (rows - row_starts) * widths
        if not self.num_values:
            return torch.zeros(*first.shape, self.dim, device=first.device)
        if self.row_format.is_integer:
            vectors = self._dequantized(self._codes_from(first), rows, owners)
        else:
            vectors = self._values_from(self.values, first).to(torch.float32)
        if self._is_full:
            return vectors
        inside = torch.arange(self.dim, device=rows.device) < torch.as_tensor(widths).unsqueeze(-1)
        return torch.where(inside, vectors, 0.0)

    def _values_from(self, stream: Tensor, first: Tensor) -> Tensor:
        """The d values of a stream from each place on."""
        last = stream.numel() - self.dim  # rows of width 0 may begin behind it
        if torch.compiler.is_compiling():
            index = first.clamp_max(last).unsqueeze(-1) + torch.arange(self.dim, device=first.device)
            return stream.index_select(0, index.reshape(-1)).view(index.shape)
        windows = stream.detach().as_strided((last + 1, self.dim), (1, 1))
        return windows.index_select(0, first.clamp_max(last).reshape(-1)).view(*first.shape, self.dim)

    def _codes_from(self, first: Tensor) -> Tensor:
        if self.bits == 8:
            return self._values_from(self.codes, first)
        return packing.gather_runs(self.codes, first.clamp_max(self.num_values - 1), self.dim, self.bits)

    def _dequantized(self, codes: Tensor, rows: Tensor, owners: Tensor) -> Tensor:
        assert self.scale is not None
        if self.row_format.granularity == "row":
            assert self.offset is not None
            index = rows.clamp_max(self.num_rows - 1).reshape(-1)  # tables without rows may be asked for one behind
            scale, low = (t.index_select(0, index).view(*rows.shape, 1) for t in (self.scale, self.offset))
            return grids.dequantize_row(codes, scale.to(torch.float32), low.to(torch.float32))
        place = self._columns[owners] if self.row_format.granularity == "column" else owners.unsqueeze(-1)
        step = self.scale[place].to(torch.float32)
        offset = None if self.offset is None else self.offset[place].to(torch.float32)
        return grids.dequantize(codes, step, offset, self.bits)

    # ---- life -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def take_(self, served: RowStore, kept: Sequence[Tensor]) -> RaggedRows:
        """Take rows over from a store in its serving form.

        Args:
            served: what ``finalize()`` of the training form returned, with one segment per table.
            kept: for each segment the rows that it takes, int64 ``(segments[s],)``, counted over all of ``served``.
        """
        if not isinstance(served, DenseRows | PackedRows):
            raise TypeError(f"{type(served).__name__} is no serving form that rows can be taken from")
        if isinstance(served, PackedRows):
            self._take_scales(served, kept)
        if self._is_meta:
            return self
        target = self.codes if isinstance(served, PackedRows) else self.values
        if not self.num_values:
            target.zero_()
            return self
        stream = []
        for rows, width in zip(kept, self.widths, strict=True):
            for chunk in rows.split(_CHUNK_ROWS):
                read = served.codes_of(chunk) if isinstance(served, PackedRows) else served.weight[chunk]
                stream.append(read[:, :width].reshape(-1))
        flat = torch.cat(stream)
        if self.row_format.is_integer:
            spare = target.numel() * 8 // self.bits - flat.numel() if self.bits == 8 else 0
            target.copy_(packing.pack(torch.cat([flat, flat.new_zeros(spare)]), self.bits))
        else:
            target.zero_()
            target[: flat.numel()] = flat
        return self

    def _take_scales(self, served: PackedRows, kept: Sequence[Tensor]) -> None:
        assert self.scale is not None
        if self._is_meta:
            return
        if self.row_format.granularity == "row":
            scale, low = served.row_grids_of(torch.cat(list(kept)))
            assert self.offset is not None
            self.scale.copy_(scale.view(-1))
            self.offset.copy_(low.reshape(-1))
            return
        widths = _table_widths(self.widths, self.owners)
        for own, wide in ((self.scale, served.scale), (self.offset, served.offset)):
            if own is not None and wide is not None:
                by_column = self.row_format.granularity == "column"
                parts = [row[:width] if by_column else row for row, width in zip(wide, widths, strict=True)]
                own.copy_(torch.cat(parts))

    @property
    def _is_meta(self) -> bool:
        return next(iter(self.state_dict(keep_vars=True).values())).is_meta

    def serve_bytes(self) -> list[int]:
        return ragged_bytes(self.segments, self.dim, self.row_format, self.widths, self.owners)

    def finalize(self) -> RowStore:
        return self


def check_granularity(row_format: RowFormat) -> None:
    """Raise `ConfigError` for formats whose scales belong to groups of consecutive rows."""
    if row_format.granularity == "group":
        raise ConfigError(
            f"rows='{row_format}': rows that are left out break up groups of rows; choose a scale per 'row', 'column' "
            f"or 'table', such as '{row_format.kind}:column'"
        )


def spare_values(segments: Sequence[int], dim: int, row_format: RowFormat, widths: Sequence[int]) -> int:
    """Values behind the last row, so that reading d values from its beginning stays inside the stream."""
    if row_format.bits < 8:
        return 0
    return dim - next((w for rows, w in zip(reversed(segments), reversed(widths), strict=True) if rows and w), 0)


def ragged_bytes(
    segments: Sequence[int],
    dim: int,
    row_format: RowFormat,
    widths: Sequence[int],
    owners: Sequence[int] | None = None,
) -> list[int]:
    """Bytes of each segment of `RaggedRows`; a byte that two share and spare values count with the earlier one.

    Args are those of `RaggedRows`.
    """
    owners = range(len(segments)) if owners is None else owners
    values = [rows * width for rows, width in zip(segments, widths, strict=True)]
    bits, sizes, before = row_format.bits, [], 0
    for count in values:
        sizes.append((before + count) * bits // 8 + ((before + count) * bits % 8 > 0) - -(-before * bits // 8))
        before += count
    last = max((s for s, count in enumerate(values) if count), default=0)
    sizes[last] += spare_values(segments, dim, row_format, widths) * bits // 8
    if row_format.granularity == "row":
        each = 2 * row_scale_dtype(bits).itemsize
        return [size + rows * each for size, rows in zip(sizes, segments, strict=True)]
    if row_format.is_integer:
        firsts = {owner: s for s, owner in reversed(list(enumerate(owners)))}
        by_column = row_format.granularity == "column"
        for owner, width in enumerate(_table_widths(widths, owners)):
            sizes[firsts[owner]] += 4 * (1 + row_format.offset) * (width if by_column else 1)
    return sizes


def _table_widths(widths: Sequence[int], owners: Sequence[int]) -> list[int]:
    """Widest row of each table."""
    found = [0] * (max(owners) + 1)
    for width, owner in zip(widths, owners, strict=True):
        found[owner] = max(found[owner], width)
    return found


def _num_scales(segments: Sequence[int], row_format: RowFormat, widths: Sequence[int], owners: Sequence[int]) -> int:
    if row_format.granularity == "row":
        return sum(segments)
    return sum(_table_widths(widths, owners)) if row_format.granularity == "column" else max(owners) + 1
