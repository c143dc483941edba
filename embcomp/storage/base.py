"""The interface of a row store: how rows are kept, independent of which rows an id uses and of what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from embcomp.bags import pool_vectors
from embcomp.errors import IncompatibleStateError
from embcomp.row_source import RowSource
from embcomp.storage.gather import read_rows

Ids = Tensor | range
"""Int64 ``(...)``, or consecutive numbers, which need not be gathered."""

Segment = Tensor | int | None
"""The segment (table) of each row: int64 broadcastable to the rows, one int, or None for column t = segment t."""

_lends = ContextVar("embcomp_lends_rows", default=False)


@contextmanager
def rows_are_lent() -> Iterator[None]:
    """Make stores that have no matrix of their own, and are good for one thing: to be fitted and finalized.

    Rows that are written to them are *lent*: the store remembers where they are read from, and `finalize` reads them
    from there, some at a time. So trained tables go from a file into the serving form without the float rows of the
    training form ever being in memory.
    """
    token = _lends.set(True)
    try:
        yield
    finally:
        _lends.reset(token)


class RowStore(nn.Module):
    """Rows of one width, in consecutive segments (one per logical table, or a single one for a shared pool).

    A store has a training form, made by `embcomp.storage.make_row_store`, and a serving form, made by `finalize`.
    Both have the same ``forward``; the bytes that are reported are always those of the serving form.

    Args:
        segments: rows in each segment; their sum is R.
        dim: values per row, d.

    Attributes:
        rounding: whether lookups round rows to what will be served, where the format has them do so in training.
    """

    rounding = True

    def __init__(self, segments: Sequence[int], dim: int) -> None:
        super().__init__()
        self.segments = tuple(int(rows) for rows in segments)
        self.num_rows = sum(self.segments)
        self.dim = int(dim)

    def forward(self, rows: Tensor, segment: Segment = None) -> Tensor:
        """Look up rows.

        Args:
            rows: int64 ``(...)`` in ``[0, R)``, counted over all segments.
            segment: the segment of each row; stores whose scales belong to segments need it, the others ignore it.

        Returns:
            float32 ``(..., d)``.
        """
        raise NotImplementedError

    def pool(self, rows: Tensor, segment: Segment, bounds: Tensor, mode: str, weights: Tensor | None = None) -> Tensor:
        """Look rows up and pool them; stores that can do both in one need not write them down.

        Args:
            rows: int64 ``(...)``, N of them.
            segment: as in `forward`.
            bounds: int64 ``(B + 1,)``: bag b is ``[bounds[b], bounds[b + 1])``.
            mode: ``sum``, ``mean`` or ``max``.
            weights: float32 ``(N,)``, for sums.

        Returns:
            float32 ``(B, d)``.
        """
        return pool_vectors(self(rows, segment).reshape(-1, self.dim), bounds, mode, weights)

    def consecutive(self, start: int, stop: int, segment: Segment = None) -> Tensor:
        """Look up the rows ``start``, …, ``stop - 1``, where it can be without a copy: nobody may write to the result.

        Returns:
            float32 ``(stop - start, d)``.
        """
        device = next(chain(self.parameters(), self.buffers())).device
        return self(torch.arange(start, stop, device=device), segment)

    def rows_from(self, first: int, rows: Ids, segment: Segment = None) -> Tensor:
        """Look up rows that are counted from ``first`` on: `forward`, or `consecutive` for a range."""
        if isinstance(rows, range):
            return self.consecutive(first + rows.start, first + rows.stop, segment)
        return self(rows + first, segment)

    def serve_bytes(self) -> list[int]:
        """Bytes of the serving form, per segment; shared parts are in the first segment."""
        raise NotImplementedError

    def reset_parameters(self, std: Sequence[float], generator: torch.Generator | None = None) -> None:
        """Draw every row from N(0, std²), with one ``std`` per segment."""
        raise NotImplementedError

    def write_(self, start: int, values: Tensor | RowSource) -> None:
        """Overwrite the rows ``start, start + 1, …`` with float ``(N, d)``."""
        raise NotImplementedError

    def fit_scales_(self) -> None:
        """Fit scales (if any) to the rows as they are now; called once after rows were written from trained tables."""

    def set_rounding(self, enabled: bool) -> None:
        """Whether lookups round rows to what will be served; switched on again, learned scales start from the rows."""

    @property
    def is_unrounded(self) -> bool:
        """Whether rounding was switched off by `set_rounding`."""
        return not self.rounding

    def finalize(self) -> RowStore:
        """Return the serving form: no gradients, smallest bytes, the same vectors as evaluation of this form."""
        raise NotImplementedError

    def portable(self) -> RowStore:
        """Return a serving form that reads no bytes as another dtype, for runtimes that can't; never in a checkpoint.

        It has the same vectors, bit for bit, in the same bytes.
        """
        return self

    def starts(self) -> list[int]:
        """First row of each segment."""
        starts, total = [], 0
        for rows in self.segments:
            starts.append(total)
            total += rows
        return starts

    def extra_repr(self) -> str:
        size = sum(self.serve_bytes())
        return f"rows={self.num_rows}, dim={self.dim}, segments={len(self.segments)}, serve_bytes={size}"


class MatrixRows(RowStore):
    """Base of stores that are trained as one float matrix, of which lookups read rows, wherever it lies.

    Attributes:
        weight: float ``(R, d)``; not there while the rows lie elsewhere, and on ``meta`` where they are lent.
        sparse: whether gradients are row-sparse.
        elsewhere: what reads rows that other processes hold parts of, see `embcomp.integrations.sharding`; else None.
        processes: that make every lookup together, each for its part of a batch.
        lent: what was written, as first row and source, where rows are lent (`rows_are_lent`); else None.
    """

    weight: nn.Parameter
    sparse: bool
    elsewhere: nn.Module | None

    def __init__(self, segments: Sequence[int], dim: int) -> None:
        super().__init__(segments, dim)
        self.elsewhere, self.processes = None, 1
        self.lent: list[tuple[int, RowSource]] | None = None

    def make_weight_(self, dtype: torch.dtype) -> None:
        """Make the matrix, but where rows are lent."""
        self.lent = [] if _lends.get() else None
        device = None if self.lent is None else "meta"
        self.weight = nn.Parameter(torch.empty(self.num_rows, self.dim, dtype=dtype, device=device))

    @torch.no_grad()
    def write_(self, start: int, values: Tensor | RowSource) -> None:
        source = RowSource.of(values)
        if self.lent is not None:
            self.lent.append((start, source))
            return
        for rows in source.chunks():
            self.weight[start + rows.start : start + rows.stop].copy_(source[rows])

    def master(self) -> RowSource:
        """The rows as they are, before any rounding."""
        if self.lent is None:
            return RowSource.of(self.weight.detach())
        written = [source for _, source in sorted(self.lent, key=lambda own: own[0]) if len(source)]
        if sum(map(len, written)) != self.num_rows:
            raise IncompatibleStateError(
                f"of {self.num_rows} rows that were to be lent, {sum(map(len, written))} were: fit the tables first"
            )
        return RowSource.joined(written or [RowSource.of(torch.empty(0, self.dim))])

    @property
    def is_blank(self) -> bool:
        """Whether there are no rows to look at: on ``meta``."""
        return self.weight.is_meta and not self.lent

    def read(self, rows: Tensor, segment: Segment) -> Tensor:
        """Read rows as they are, float ``(..., d)``; arguments as those of `forward`."""
        if self.elsewhere is None:
            return read_rows(self.weight, rows, self.sparse)
        found: Tensor = self.elsewhere(rows, segment)
        return found

    @torch.no_grad()
    def put_(self, rows: Tensor, values: Tensor) -> None:
        """Overwrite some rows, different ones, int64 ``(n,)``, with float ``(n, d)``."""
        self.weight.index_copy_(0, rows, values.to(self.weight.dtype))

    @torch.no_grad()
    def take_segment_(self, segment: int, other: MatrixRows, own: int, last: int = 0, blocks: int = 1) -> None:
        """Take over a segment of another store, scales included.

        Args:
            segment: of this store, with as many rows or more.
            other: a store of the same format.
            own: its segment.
            last: how many rows, at its end, become the last ones of this segment; the others become the first ones.
            blocks: that a segment consists of, all of one size, for which this holds one by one.

        Raises:
            ConfigError: as `take_scales_`.
        """
        size, old_size = self.segments[segment] // blocks, other.segments[own] // blocks
        for block in range(blocks):
            start, old_start = self.starts()[segment] + block * size, other.starts()[own] + block * old_size
            rows = other.weight[old_start : old_start + old_size]
            self.write_(start, rows[: old_size - last])
            self.write_(start + size - last, rows[old_size - last :])
        self.take_scales_(segment, other, own)

    def take_scales_(self, segment: int, other: MatrixRows, own: int) -> None:
        """Take over what is learned for a segment of another store beside its rows.

        Raises:
            ConfigError: if rows of several segments share it.
        """

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__["_modules"].get("elsewhere") is not None:
            raise IncompatibleStateError(
                f"these {self.num_rows} rows lie in several processes, so that they can be looked up and trained, and "
                "nothing else: load what save_sharded saved to do more"
            )
        return super().__getattr__(name)


def as_matrix(store: RowStore) -> MatrixRows:
    """A store that is trained, as the matrix that it is.

    Raises:
        IncompatibleStateError: if it is a serving form.
    """
    if not isinstance(store, MatrixRows):
        raise IncompatibleStateError(f"{type(store).__name__} is a serving form: its rows can't be written any more")
    return store
