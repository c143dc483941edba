"""Packed rows: the serving form of integer rows, codes without a gap and the scales that belong to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embcomp.storage import grids, packing
from embcomp.storage.base import RowStore, Segment
from embcomp.storage.formats import RowFormat
from embcomp.storage.gather import one_per_bag

_BLOCK_VALUES = 1 << 21
_KERNELS = {
    8: torch.ops.quantized.embedding_bag_byte_rowwise_offsets,
    4: torch.ops.quantized.embedding_bag_4bit_rowwise_offsets,
    2: torch.ops.quantized.embedding_bag_2bit_rowwise_offsets,
}


def row_scale_dtype(bits: int) -> torch.dtype:
    """The dtype of the scale and of the smallest value that each row has with ``row`` granularity."""
    return torch.float32 if bits == 8 else torch.float16


def size_of_rows(num_rows: int, dim: int, row_format: RowFormat) -> int:
    """Bytes of the first ``num_rows`` rows, with the scales of rows and of groups, without those of tables."""
    size = packing.packed_bytes(num_rows, dim, row_format.bits)
    if row_format.granularity == "row":
        return size + num_rows * 2 * row_scale_dtype(row_format.bits).itemsize
    if row_format.granularity == "group":
        return size + grids.num_units(row_format, num_rows, 1) * 4 * (1 + row_format.offset)
    return size


def size_of_segments(segments: Sequence[int], dim: int, row_format: RowFormat) -> list[int]:
    """Bytes of each segment: a byte or a group that two segments share counts with the earlier one."""
    values = {"column": dim, "table": 1}.get(row_format.granularity, 0)
    sizes, before = [], 0
    for rows in segments:
        sizes.append(
            size_of_rows(before + rows, dim, row_format)
            - size_of_rows(before, dim, row_format)
            + values * 4 * (1 + row_format.offset)
        )
        before += rows
    return sizes


class PackedRows(RowStore):
    """Integer rows as they are served: buffers only, and nothing beside what `size_of_segments` counts.

    - ``row`` scales where a row's codes fill whole bytes at 8, 4 or 2 bits: ``codes`` is uint8 ``(R, n)``, each row its
      codes, its scale and its smallest value, in the layout of ``torch.ops.quantized.embedding_bag_byte_prepack`` and
      its kin, whose fused kernels look rows up on CPU.
    - ``row`` scales otherwise: ``codes`` is a `packing` stream, ``scale`` and ``offset`` are ``(R, 1)``.
    - ``column``, ``table``, ``group`` scales: ``codes`` is a stream, ``scale`` and ``offset`` (where the format has
      one) are float32 ``(T, d)``, ``(T, 1)``, ``(⌈R / group⌉, 1)``.

    Args:
        segments: rows in each segment.
        dim: values per row, d.
        row_format: an integer row format with a granularity other than ``auto``.
        fused: False keeps the first layout from being used.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(self, segments: Sequence[int], dim: int, row_format: RowFormat, fused: bool = True) -> None:
        super().__init__(segments, dim)
        self.row_format, self.bits = row_format, row_format.bits
        by_row = row_format.granularity == "row"
        self.fused = fused and by_row and self.bits in _KERNELS and dim * self.bits % 8 == 0
        if self.fused:
            row_bytes = size_of_rows(1, dim, row_format)
            self.register_buffer("codes", torch.empty(self.num_rows, row_bytes, dtype=torch.uint8))
            return
        self.register_buffer(
            "codes", torch.empty(packing.packed_bytes(self.num_rows, dim, self.bits), dtype=torch.uint8)
        )
        units = self.num_rows if by_row else grids.num_units(row_format, self.num_rows, len(self.segments))
        shape = (units, dim if row_format.granularity == "column" else 1)
        dtype = row_scale_dtype(self.bits) if by_row else torch.float32
        self.register_buffer("scale", torch.empty(shape, dtype=dtype))
        self.register_buffer("offset", torch.empty(shape, dtype=dtype) if by_row or row_format.offset else None)

    def forward(self, rows: Tensor, segment: Segment = None) -> Tensor:
        eager_on_cpu = self.codes.is_cpu and not torch.compiler.is_compiling()
        if self.fused:
            return self._lookup_fused(rows) if eager_on_cpu else self._lookup_rows(rows)
        if eager_on_cpu and rows.numel() * self.dim > _BLOCK_VALUES:
            return self._lookup_in_blocks(rows, segment)
        return self._lookup_packed(rows, segment)

    def pool(self, rows: Tensor, segment: Segment, bounds: Tensor, mode: str, weights: Tensor | None = None) -> Tensor:
        if not (self.fused and mode == "sum" and self.codes.is_cpu) or torch.compiler.is_compiling():
            return super().pool(rows, segment, bounds, mode, weights)
        found: Tensor = _KERNELS[self.bits](self.codes, rows.reshape(-1), bounds, False, 0, False, weights, None, True)
        return found

    def serve_bytes(self) -> list[int]:
        return size_of_segments(self.segments, self.dim, self.row_format)

    def finalize(self) -> RowStore:
        return self

    def portable(self) -> RowStore:
        if not self.fused:
            return self
        apart, width = PackedRows(self.segments, self.dim, self.row_format, fused=False), self.dim * self.bits // 8
        apart.codes = self.codes[:, :width].reshape(-1)
        apart.scale, apart.offset = (part.clone() for part in self._grids_in(self.codes))
        return apart

    def store_(self, start: int, codes: Tensor, scale: Tensor | None = None, low: Tensor | None = None) -> None:
        """Write consecutive rows.

        Args:
            start: first row, a multiple of 8, so that it begins at a byte.
            codes: uint8 ``(N, d)``.
            scale: float ``(N, 1)``, scale of each row, for ``row`` granularity.
            low: float ``(N, 1)``, smallest value of each row, likewise.
        """
        packed = packing.pack(codes, self.bits)
        dtype, stop = row_scale_dtype(self.bits), start + len(codes)
        if self.fused:
            assert scale is not None
            assert low is not None
            ends = [part.to(dtype).contiguous().view(torch.uint8) for part in (scale, low)]
            self.codes[start:stop] = torch.cat([packed.view(len(codes), -1), *ends], dim=1)
            return
        first = start * self.dim * self.bits // 8
        self.codes[first : first + packed.numel()] = packed
        if scale is not None and low is not None and self.offset is not None:
            self.scale[start:stop], self.offset[start:stop] = scale.to(dtype), low.to(dtype)

    def codes_of(self, rows: Tensor) -> Tensor:
        """Read codes back: int64 ``(n,)`` to uint8 ``(n, d)``."""
        if not self.fused:
            return packing.gather(self.codes, rows, self.dim, self.bits)
        found = packing.gather_bytes(self.codes.view(-1), rows, self.codes.shape[1])
        return packing.unpack(found[..., : self.dim * self.bits // 8], self.bits, self.dim)

    def row_grids_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and smallest value of rows with ``row`` granularity, in the dtype they are stored in: ``(n, 1)``."""
        if not self.fused:
            assert self.offset is not None
            return self.scale[rows], self.offset[rows]
        return self._grids_in(packing.gather_bytes(self.codes.view(-1), rows, self.codes.shape[1]))

    def _lookup_packed(self, rows: Tensor, segment: Segment, out: Tensor | None = None) -> Tensor:
        codes = packing.gather(self.codes, rows, self.dim, self.bits)
        if self.row_format.granularity == "row":
            assert self.offset is not None
            scale, low = (table.view(-1)[rows].unsqueeze(-1) for table in (self.scale, self.offset))
            return grids.dequantize_row(codes, scale.to(torch.float32), low.to(torch.float32), out)
        step = grids.pick(self.scale, self.row_format, rows, segment).to(torch.float32)
        offset = None if self.offset is None else grids.pick(self.offset, self.row_format, rows, segment)
        return grids.dequantize(codes, step, offset, self.bits, out)

    def _lookup_in_blocks(self, rows: Tensor, segment: Segment) -> Tensor:
        """The same, in blocks that stay in the cache between one operation and the next."""
        found = torch.empty(*rows.shape, self.dim, dtype=torch.float32, device=rows.device)
        size = max(1, _BLOCK_VALUES * len(rows) // found.numel())
        blocks = rows.split(size)
        owners: Sequence[Segment] = [segment] * len(blocks)
        if isinstance(segment, Tensor) and segment.dim() == rows.dim() and len(segment) == len(rows):
            owners = segment.split(size)
        for block, owner, out in zip(blocks, owners, found.split(size), strict=True):
            self._lookup_packed(block, owner, out)
        return found

    def _lookup_fused(self, rows: Tensor) -> Tensor:
        """Bags of one row each, by torch's fused kernel."""
        index = rows.reshape(-1)
        bags = one_per_bag(index.numel())
        found = _KERNELS[self.bits](self.codes, index, bags, False, 0, False, None, None, True)
        return found.view(*rows.shape, self.dim)

    def _lookup_rows(self, rows: Tensor) -> Tensor:
        """The same, bit for bit, in operations that every device has and every compiler knows."""
        found = packing.gather_bytes(self.codes.view(-1), rows, self.codes.shape[1])
        scale, low = self._grids_in(found)
        codes = packing.unpack(found[..., : self.dim * self.bits // 8], self.bits, self.dim)
        return grids.dequantize_row(codes, scale.to(torch.float32), low.to(torch.float32))

    def _grids_in(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and smallest value behind the codes of fused rows: uint8 ``(..., n)`` to two of ``(..., 1)``."""
        # The end of a single row is contiguous, but may begin where no number of this dtype can: it must be copied.
        ends = found[..., self.dim * self.bits // 8 :].clone(memory_format=torch.contiguous_format)
        grid = ends.view(row_scale_dtype(self.bits))
        return grid[..., :1], grid[..., 1:]
