"""Matrices that are read some rows at a time, wherever they lie: in memory, in a file, or nowhere until then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

CHUNK_VALUES = 1 << 18
"""Values that are read at once: 1 MiB of float32, so that what is made of them stays in the cache too."""

Index = slice | Tensor
"""Rows that are read: a slice, or int64 ``(n,)``."""


class RowSource:
    """A matrix ``(R, d)`` of which some rows at a time are read as float32.

    Trained tables are handed to fits in this form, so that a table in a file, in any float format, is never in memory
    as a whole. What is derived from a source (`part`, `columns`, `mapped`, …) is read from it when it is read itself.

    Args:
        read: from a slice with a start, stop and step of at least 0, 0 and 1, or int64 ``(n,)``, to float ``(n, d)``.
        num_rows: R.
        dim: d.
        device: of what is read.
        reach: values that are read for a row; None for d.
    """

    def __init__(
        self,
        read: Callable[[Index], Tensor],
        num_rows: int,
        dim: int,
        device: torch.device | str = "cpu",
        reach: int | None = None,
    ) -> None:
        self._read, self.shape, self.device = read, (num_rows, dim), torch.device(device)
        self.reach = dim if reach is None else reach

    @classmethod
    def of(cls, values: Tensor | RowSource) -> RowSource:
        """Read from a float tensor ``(R, d)``; a source stays what it is."""
        if isinstance(values, RowSource):
            return values
        return cls(values.__getitem__, values.shape[0], values.shape[1], values.device)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index) -> Tensor:
        """Read rows: float32 ``(n, d)``, for a slice of a float32 tensor a view, so nobody may write to it."""
        if isinstance(index, slice):
            index = slice(*index.indices(len(self)))
        return self._read(index).to(torch.float32)

    def chunks(self) -> Iterator[slice]:
        """Slices that cover all rows, of `CHUNK_VALUES` values each."""
        return chunks(len(self), self.reach)

    def gathered(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All rows: ``(R, d)``."""
        found = torch.empty(self.shape, dtype=dtype, device=self.device)
        for rows in self.chunks():
            found[rows] = self[rows].to(dtype)
        return found

    def on(self, device: torch.device) -> RowSource:
        """The same rows, read to another device."""
        if device == self.device:
            return self

        def read(index: Index) -> Tensor:
            return self[index if isinstance(index, slice) else index.to(self.device)].to(device)

        return RowSource(read, *self.shape, device, self.reach)

    # ---- what is derived --------------------------------------------------------------------------------------------

    def part(self, start: int, stop: int) -> RowSource:
        """The rows ``start``, …, ``stop - 1``."""

        def read(index: Index) -> Tensor:
            if isinstance(index, slice):
                return self[index.start + start : index.stop + start : index.step]
            return self[index + start]

        return RowSource(read, stop - start, self.shape[1], self.device, self.reach)

    def take(self, rows: Tensor) -> RowSource:
        """Rows by number: int64 ``(n,)``."""
        return RowSource(lambda index: self[rows[index]], len(rows), self.shape[1], self.device, self.reach)

    def columns(self, start: int, stop: int) -> RowSource:
        """The columns ``start``, …, ``stop - 1``."""
        return self.mapped(lambda rows: rows[:, start:stop], stop - start)

    def times(self, matrix: Tensor) -> RowSource:
        """Rows times a float32 matrix ``(d, k)``."""
        return self.mapped(partial(torch.mm, mat2=matrix), matrix.shape[1])

    def mapped(self, function: Callable[[Tensor], Tensor], dim: int) -> RowSource:
        """Every row by itself as a function has it: float32 ``(n, d)`` to ``(n, dim)``."""
        return RowSource(lambda index: function(self[index]), len(self), dim, self.device, max(dim, self.reach))

    def cut(self, width: int) -> RowSource:
        """Rows cut into ``d / width`` rows of ``width`` values each."""
        each = self.shape[1] // width

        def read(index: Index) -> Tensor:
            if isinstance(index, slice) and index.step == 1:
                first, last = index.start // each, -(-index.stop // each)
                whole = self[first:last].reshape(-1, width)
                return whole[index.start - first * each : index.stop - first * each]
            rows = _numbers(index, self.device)
            return self[rows // each].view(-1, each, width)[torch.arange(len(rows), device=self.device), rows % each]

        return RowSource(read, len(self) * each, width, self.device, -(-self.reach // each))

    @classmethod
    def joined(cls, sources: Sequence[RowSource]) -> RowSource:
        """Sources of one width, one behind another."""
        starts = [0]
        for source in sources:
            starts.append(starts[-1] + len(source))
        dim, device = sources[0].shape[1], sources[0].device

        def read(index: Index) -> Tensor:
            if isinstance(index, slice) and index.step == 1:
                bounds = [(max(index.start - first, 0), max(index.stop - first, 0)) for first in starts[:-1]]
                found = [own[low:high] for own, (low, high) in zip(sources, bounds, strict=True)]
                found = [rows for rows in found if len(rows)] or found[:1]
                return found[0] if len(found) == 1 else torch.cat(found)
            rows = _numbers(index, device)
            values = torch.empty(len(rows), dim, device=device)
            for first, own in zip(starts[:-1], sources, strict=True):
                inside = (rows >= first) & (rows < first + len(own))
                values[inside] = own[rows[inside] - first]
            return values

        return cls(read, starts[-1], dim, device, max(source.reach for source in sources))


def chunks(num_rows: int, dim: int) -> Iterator[slice]:
    """Slices that cover ``num_rows`` rows, of `CHUNK_VALUES` values each, and of a multiple of 64 rows."""
    size = max(64, CHUNK_VALUES // max(dim, 1) // 64 * 64)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def ids_of(rows: slice, device: torch.device) -> Tensor:
    """The numbers of consecutive rows, int64 ``(n,)``."""
    return torch.arange(rows.start, rows.stop, device=device)


def weighted_mean(source: RowSource, count: Tensor) -> Tensor:
    """The mean of rows, weighted by counts float32 ``(R,)``: float32 ``(1, d)``."""
    total = torch.zeros(1, source.shape[1], device=source.device)
    for rows in source.chunks():
        total += (source[rows] * count[rows, None]).sum(0, keepdim=True)
    return total / count.sum()


def _numbers(index: Index, device: torch.device) -> Tensor:
    if isinstance(index, slice):
        return torch.arange(index.start, index.stop, index.step, device=device)
    return index
