"""Sparse rows: the serving form of rows of which only some values are kept, whichever they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from embcomp.errors import ConfigError
from embcomp.row_source import RowSource, chunks, ids_of
from embcomp.storage import bitmap, grids, packing
from embcomp.storage.base import RowStore, Segment
from embcomp.storage.dense import DTYPES, DenseRows, check_float16
from embcomp.storage.formats import RowFormat
from embcomp.storage.packed import PackedRows, row_scale_dtype
from embcomp.storage.sparse_sizes import column_dtype, num_row_scales, share_out, sparse_bytes


class SparseRows(RowStore):
    """Rows of d values, of which n are kept over all rows, and the others are zero.

    Kept values lie one behind another, row by row, as floats or as a `packing` stream of codes, so those of one row are
    a run of at most d. An index says where runs begin and which columns their values belong to, without a search:

    - ``bitmap``: a bit per value, kept or not, and ranks that count the kept ones (see `bitmap`).
    - ``csr``: where the run of each row begins, ``pointers`` int32 ``(R + 1,)``, and the column of each value,
      ``columns`` uint8, or int16 where d > 256.
    - ``dcsr``: the same for the k rows that have a *slot*, and a bitmap of these rows: doubly compressed sparse rows
      ("On the Representation and Multiplication of Hypersparse Matrices", Buluç and Gilbert, IPDPS 2008), which is what
      lists of coordinates become where a lookup may not search them.

    Scales of ``column`` and ``table`` granularity are float32 ``(T, d)`` and ``(T, 1)``; scales of ``row`` granularity
    belong to rows, or to slots. Lookups take O(rows asked for · d).

    Args:
        segments: rows in each segment.
        dim: values per row, d.
        row_format: any row format but those with a scale per group of rows.
        num_values: n.
        num_slots: k, for ``dcsr``: at least as many as there are rows with values; else 0.
        layout: ``"bitmap"``, ``"csr"`` or ``"dcsr"``.

    Raises:
        ConfigError: for sizes that do not go together, another layout, or a scale per group of rows.
    """

    codes: Tensor
    scale: Tensor | None
    offset: Tensor | None
    bits: Tensor
    ranks: Tensor
    pointers: Tensor
    columns: Tensor

    def __init__(
        self, segments: Sequence[int], dim: int, row_format: RowFormat, num_values: int, num_slots: int, layout: str
    ) -> None:
        super().__init__(segments, dim)
        self.row_format, self.layout = row_format, layout
        self.num_values, self.num_slots = int(num_values), int(num_slots)
        self.by_words = False  # whether bits are read as they are stored, and never as bytes
        self._size = sparse_bytes(self.segments, dim, row_format, num_values, num_slots, layout)
        if row_format.is_integer:
            stored = torch.empty(packing.packed_bytes(1, num_values, row_format.bits), dtype=torch.uint8)
            self.register_buffer("codes", stored)
        else:
            self.values = nn.Parameter(torch.empty(num_values, dtype=DTYPES[row_format.kind]), requires_grad=False)
        if layout != "csr":
            positions, members = (self.num_rows * dim, num_values) if layout == "bitmap" else (self.num_rows, num_slots)
            words, rank_dtype = bitmap.bitmap_words(positions), bitmap.count_dtype(members)
            self.register_buffer("bits", torch.zeros(words, dtype=torch.int64))
            self.register_buffer("ranks", torch.zeros(words, dtype=rank_dtype))
        if layout != "bitmap":
            runs = self.num_rows if layout == "csr" else num_slots
            self.register_buffer("pointers", torch.zeros(runs + 1, dtype=bitmap.count_dtype(num_values)))
            self.register_buffer("columns", torch.zeros(num_values, dtype=column_dtype(dim)))
        self._make_scales()  # last, as exporters miscount buffers that come behind one that is None

    def _make_scales(self) -> None:
        self.register_buffer("scale", None)
        self.register_buffer("offset", None)
        if not self.row_format.is_integer:
            return
        by_row = self.row_format.granularity == "row"
        units = num_row_scales(self.num_rows, self.num_slots, self.layout) if by_row else len(self.segments)
        shape = (units, self.dim if self.row_format.granularity == "column" else 1)
        dtype = row_scale_dtype(self.row_format.bits) if by_row else torch.float32
        self.scale = torch.empty(shape, dtype=dtype)
        self.offset = torch.empty(shape, dtype=dtype) if by_row or self.row_format.offset else None

    # ---- lookups ----------------------------------------------------------------------------------------------------

    def forward(self, rows: Tensor, segment: Segment = None) -> Tensor:
        if not self.num_values:
            return torch.zeros(*rows.shape, self.dim, device=rows.device)
        slot, first, place, kept = self._runs(rows)
        if not self.row_format.is_integer:
            vectors = self._pick(self.values, first, place).to(torch.float32)
        else:
            vectors = self._dequantized(self._codes(first, place), rows, slot, segment)
        return torch.where(kept, vectors, 0.0)

    def is_kept(self, rows: Tensor) -> Tensor:
        """Which values of rows are kept: bool ``(..., d)``."""
        if not self.num_values:
            return torch.zeros(*rows.shape, self.dim, dtype=torch.bool, device=rows.device)
        return self._runs(rows)[-1]

    def _runs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Slots of rows and where runs begin, ``(...)``; each column's place and whether it is kept, ``(..., d)``."""
        if self.layout == "bitmap":
            return rows, *self._runs_of_bits(rows)
        if self.layout == "csr":
            return rows, *self._runs_of_pointers(rows, None)
        has_slot, slot = bitmap.look_up_bitmap(self.bits, self.ranks, rows, rows >> 6)
        slot = slot.clamp_max(self.num_slots - 1)
        return slot, *self._runs_of_pointers(slot, has_slot)

    def _runs_of_bits(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where each row's run begins, ``(...)``; each column's place in it and whether it is kept, ``(..., d)``."""
        position = rows * self.dim
        _, first = bitmap.look_up_bitmap(self.bits, self.ranks, position, position >> 6)
        if self.by_words:
            position = position.unsqueeze(-1) + torch.arange(self.dim, device=rows.device)
            flags = (self.bits[position >> 6] >> (position & (bitmap.WORD - 1))) & 1
            return first, (flags.cumsum(-1) - flags).to(torch.int32), flags.bool()
        stream = self.bits.view(torch.uint8)[: packing.packed_bytes(self.num_rows, self.dim, 1)]
        flags = packing.gather(stream, rows, self.dim, 1)
        return first, flags.cumsum(-1, dtype=torch.int32).sub_(flags), flags.bool()

    def _runs_of_pointers(self, slot: Tensor, has_slot: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same; runs are read to d values, and what lies behind their ends goes to a column d that is cut off."""
        first, end = self.pointers[slot].long(), self.pointers[slot + 1].long()
        end = end if has_slot is None else torch.where(has_slot, end, first)
        place = torch.arange(self.dim, dtype=torch.int32, device=slot.device).expand(*slot.shape, self.dim)
        inside = place < (end - first).unsqueeze(-1)
        column = torch.where(inside, self._pick(self.columns, first, place).long(), self.dim)
        nowhere = torch.full((*slot.shape, self.dim + 1), -1, dtype=torch.int32, device=slot.device)
        place = nowhere.scatter(-1, column, place)[..., : self.dim]
        kept = place >= 0
        return first, place.clamp_min_(0), kept

    def _pick(self, stream: Tensor, first: Tensor, place: Tensor) -> Tensor:
        """Entries of a stream at places of runs, ``(..., d)``; anything where a place is behind the stream's end."""
        dtype = bitmap.count_dtype(self.num_values + self.dim)  # half the bytes of int64 are half the time on CPU
        index = (first.unsqueeze(-1).to(dtype) + place).clamp_max_(self.num_values - 1)
        return stream.index_select(0, index.reshape(-1)).view(index.shape)

    def _codes(self, first: Tensor, place: Tensor) -> Tensor:
        if self.row_format.bits == 8:
            return self._pick(self.codes, first, place)
        run = packing.gather_runs(self.codes, first.clamp_max(self.num_values - 1), self.dim, self.row_format.bits)
        return run.gather(-1, place.long())

    def _dequantized(self, codes: Tensor, rows: Tensor, slot: Tensor, segment: Segment) -> Tensor:
        assert self.scale is not None
        if self.row_format.granularity == "row":
            assert self.offset is not None
            scale, low = (t.view(-1)[slot].unsqueeze(-1).to(torch.float32) for t in (self.scale, self.offset))
            return grids.dequantize_row(codes, scale, low)
        step = grids.pick(self.scale, self.row_format, rows, segment).to(torch.float32)
        offset = self.offset
        if offset is not None:
            offset = grids.pick(offset, self.row_format, rows, segment).to(torch.float32)
        return grids.dequantize(codes, step, offset, self.row_format.bits)

    # ---- life -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def take_(self, served: RowStore | RowSource, keep: Callable[[Tensor], Tensor]) -> SparseRows:
        """Take values over from a store in its serving form, or float values from where they are read.

        Args:
            served: what ``finalize()`` of the training form returned, with the same segments; or all float rows.
            keep: which values of rows are kept, int64 ``(N,)`` to bool ``(N, d)``; asked chunk by chunk.

        Raises:
            ConfigError: if there are not as many kept values, or more rows with values, than there is room for.
            IncompatibleStateError: if the format can't hold the values.
        """
        if not isinstance(served, DenseRows | PackedRows | RowSource):
            raise TypeError(f"{type(served).__name__} is no serving form that values can be taken from")
        if isinstance(served, DenseRows):
            served = RowSource.of(served.weight)
        device = served.device if isinstance(served, RowSource) else served.codes.device
        if device.type == "meta":
            return self
        packed = isinstance(served, PackedRows)
        stream = torch.empty(self.num_values, dtype=torch.uint8, device=device) if packed else self.values.data
        per_row, filled = torch.zeros(self.num_rows, dtype=torch.int32, device=device), 0
        for part in [*chunks(self.num_rows, self.dim)] or [slice(0, 0)]:
            rows = ids_of(part, device)
            kept = keep(rows)
            own = served.codes_of(rows)[kept] if isinstance(served, PackedRows) else served[part][kept]
            per_row[part] = kept.sum(1, dtype=torch.int32)
            begun, filled = filled, filled + len(own)
            if filled <= self.num_values:
                stream[begun:filled] = own
                self._take_places(part, kept, begun)
        if filled != self.num_values:
            raise ConfigError(f"sparse rows have room for {self.num_values} values, but {filled} are kept")
        if packed:
            self.codes.copy_(packing.pack(stream, self.row_format.bits))
        else:
            check_float16(stream)
        slots = self._take_index(per_row)
        if isinstance(served, PackedRows):
            self._take_scales(served, slots)
        return self

    def _take_places(self, part: slice, kept: Tensor, begun: int) -> None:
        """Note which values of consecutive rows are kept; chunks of rows begin at a word of the bitmap."""
        if self.layout == "bitmap":
            words = bitmap.pack_flags(kept.view(-1))
            first = part.start * self.dim // bitmap.WORD
            self.bits[first : first + len(words)] = words
            return
        columns = kept.nonzero()[:, 1]
        self.columns[begun : begun + len(columns)] = columns.to(self.columns.dtype)

    def _take_index(self, per_row: Tensor) -> Tensor:
        """Write the rest of the index; returns the rows that have scales, where scales belong to rows."""
        has_slot = torch.ones_like(per_row, dtype=torch.bool)
        if self.layout == "bitmap":
            self.ranks.copy_(bitmap.ranks_of(self.bits))
        if self.layout == "dcsr":
            has_slot = per_row > 0
            left = self.num_slots - int(has_slot.sum())
            if left < 0:
                raise ConfigError(
                    f"sparse rows have {self.num_slots} slots for {self.num_slots - left} rows with values"
                )
            has_slot[(~has_slot).nonzero()[:left, 0]] = True
            self.bits.copy_(bitmap.pack_flags(has_slot))
            self.ranks.copy_(bitmap.ranks_of(self.bits))
        if self.layout != "bitmap":
            self.pointers[1:] = per_row[has_slot].cumsum(0)
        return has_slot.nonzero()[:, 0]

    def _take_scales(self, served: PackedRows, slots: Tensor) -> None:
        assert self.scale is not None
        if self.row_format.granularity == "row":
            assert self.offset is not None
            if len(slots):
                scale, low = served.row_grids_of(slots)
                self.scale.copy_(scale)
                self.offset.copy_(low)
            return
        self.scale.copy_(served.scale)
        if self.offset is not None and served.offset is not None:
            self.offset.copy_(served.offset)

    def portable(self) -> RowStore:
        twin = copy.copy(self)
        twin.by_words = True
        return twin

    def serve_bytes(self) -> list[int]:
        return share_out(self._size, self.segments)

    def finalize(self) -> RowStore:
        return self
