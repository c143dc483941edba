"""Quantized rows: the training form of integer rows, with learned scales, or scales of each row's own range."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from embcomp.errors import ConfigError, IncompatibleStateError
from embcomp.storage import fitting, grids
from embcomp.storage.base import MatrixRows, RowStore, Segment
from embcomp.storage.formats import RowFormat
from embcomp.storage.lsq import LearnedGrid, RowGrid
from embcomp.storage.packed import PackedRows, size_of_segments

_CHUNK_VALUES = 1 << 20
_FIT_ROWS = 1 << 16


class QuantizedRows(MatrixRows):
    """Float32 master rows that are looked up as the integers they will be served as.

    A lookup gathers float32 rows and snaps only those to the grid, so it takes O(batch) memory; gradients pass straight
    through to the float32 rows. The grid is that of `embcomp.storage.grids`:

    - ``row`` granularity: from the row's own smallest value to its largest; nothing is learned.
    - ``column``, ``table``, ``group``: a centred grid ``step·(q − L) + offset`` whose step is learned, with LSQ's
      gradients (see `LearnedGrid`). The parameter is not the step but ``span = step·2^(bits − 1)``, half the width of
      the grid: it is of the rows' own magnitude at every number of bits, so optimizers with steps of a fixed length
      (Adam, Adagrad) let it follow rows that grow from 0.01 to 0.3, which at 8 bits the step itself can't without
      jumping over its whole value at every update.

    With ``row_format.aware`` off, rows are plain float32 until `finalize`, which fits grids to the rows as they are
    then (`fitting.fit_grid`). With it on, evaluation returns the same bits before and after `finalize`.

    Args:
        segments: rows in each segment.
        dim: values per row, d.
        row_format: an integer row format with a granularity other than ``auto``.
        sparse: row-sparse gradients for the rows, and for the spans of groups.

    Attributes:
        weight: float32 parameter ``(R, d)``.
        span: float32 parameter ``(T, d)``, ``(T, 1)`` or ``(⌈R / group⌉, 1)``, where the step is learned, else None.
        offset: the same shape, where the format has one and the step is learned, else None.
    """

    def __init__(self, segments: Sequence[int], dim: int, row_format: RowFormat, sparse: bool = False) -> None:
        super().__init__(segments, dim)
        self.row_format, self.bits, self.sparse = row_format, row_format.bits, sparse
        self.rounding = row_format.aware
        self.make_weight_(torch.float32)
        self.span: nn.Parameter | None = None
        self.offset: nn.Parameter | None = None
        if row_format.aware and row_format.granularity != "row":
            units = grids.num_units(row_format, self.num_rows, len(self.segments))
            shape = (units, dim if row_format.granularity == "column" else 1)
            self.span = nn.Parameter(torch.ones(shape))
            self.offset = nn.Parameter(torch.zeros(shape)) if row_format.offset else None

    def forward(self, rows: Tensor, segment: Segment = None) -> Tensor:
        vectors = self.read(rows, segment).to(torch.float32)
        if not self.rounding:
            return vectors
        if self.span is None:
            return RowGrid.apply(vectors, self.bits)
        span = grids.pick(self.span, self.row_format, rows, segment, self.sparse)
        offset = None
        if self.offset is not None:
            offset = grids.pick(self.offset, self.row_format, rows, segment, self.sparse)
        return LearnedGrid.apply(vectors, span, offset, self.bits, self._values_per_step(vectors, span, segment))

    def serve_bytes(self) -> list[int]:
        return size_of_segments(self.segments, self.dim, self.row_format)

    @torch.no_grad()
    def reset_parameters(self, std: Sequence[float], generator: torch.Generator | None = None) -> None:
        if self.weight.is_meta:
            return
        for start, rows, deviation in zip(self.starts(), self.segments, std, strict=True):
            self.weight[start : start + rows].normal_(0.0, deviation, generator=generator)
        if self.span is not None:
            per_segment = torch.tensor(list(std), device=self.span.device).view(-1, 1)
            step = grids.GAUSSIAN_STEP[self.bits] * per_segment[self._segment_of_units()]
            self.span.copy_(grids.span_of(step, self.bits).expand_as(self.span))
        if self.offset is not None:
            self.offset.zero_()

    @torch.no_grad()
    def take_scales_(self, segment: int, other: MatrixRows, own: int) -> None:
        assert isinstance(other, QuantizedRows)
        self.rounding = other.rounding
        for mine, theirs in ((self.span, other.span), (self.offset, other.offset)):
            if mine is None or theirs is None:
                continue
            if self.row_format.granularity == "group":
                raise ConfigError(
                    f"rows='{self.row_format}': groups of rows with one scale change when rows come between them; take "
                    f"'{self.row_format.kind}:column' for tables that grow"
                )
            mine[segment] = theirs[own]

    @torch.no_grad()
    def fit_scales_(self) -> None:
        """Set learned spans and offsets to those of small squared error for the rows as they are now."""
        if self.span is None or self.is_blank:
            return
        step, offset = self._fitted()
        self.span.copy_(grids.span_of(step, self.bits))
        if self.offset is not None:
            self.offset.copy_(offset)

    def set_rounding(self, enabled: bool) -> None:
        enabled = enabled and self.row_format.aware
        if enabled and not self.rounding:
            self.fit_scales_()
        self.rounding = enabled

    @property
    def is_unrounded(self) -> bool:
        return self.row_format.aware and not self.rounding

    @torch.no_grad()
    def finalize(self) -> RowStore:
        self.set_rounding(self.row_format.aware)
        with self.master().device:
            served = PackedRows(self.segments, self.dim, self.row_format).eval()
        if self.is_blank:
            return served
        if self.row_format.granularity == "row":
            fit = grids.row_grid if self.row_format.aware else fitting.fit_row_grid
            for start, values in self._chunks():
                scale, low = fit(values, self.bits)
                self._check_finite(scale + low, start, len(values), "scales")
                served.store_(start, grids.quantize_row(values, scale, low, self.bits).to(torch.uint8), scale, low)
            return served
        served.scale, served.offset = self._served_grids()
        for start, values in self._chunks():
            rows = torch.arange(start, start + len(values), device=values.device)
            segment = self._segment_of(rows)
            step = grids.pick(served.scale, self.row_format, rows, segment)
            offset = None if served.offset is None else grids.pick(served.offset, self.row_format, rows, segment)
            served.store_(start, grids.quantize(values, step, offset, self.bits).to(torch.uint8))
        return served

    def _served_grids(self) -> tuple[Tensor, Tensor | None]:
        """Steps and offsets, learned or fitted now."""
        if self.span is None:
            step, offset = self._fitted()
            return step, offset if self.row_format.offset else None
        step = grids.step_of(self.span, self.bits).detach()
        self._check_finite(step, 0, self.num_rows, "scales")
        return step, None if self.offset is None else self.offset.detach().clone()

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Rows in chunks that begin at a multiple of 8, with their first row; all of them finite."""
        master = self.master()
        for rows in master.chunks():
            values = master[rows]
            yield rows.start, self._check_finite(values, rows.start, len(values))

    def _fitted(self) -> tuple[Tensor, Tensor]:
        """Steps and offsets fitted to the rows, in the shape that the granularity has."""
        fits = [fitting.fit_grid(units, self.bits, self.row_format.offset) for units in self._units()]
        if self.row_format.granularity == "column":
            return torch.cat([step.T for step, _ in fits]), torch.cat([offset.T for _, offset in fits])
        return torch.cat([step for step, _ in fits]), torch.cat([offset for _, offset in fits])

    def _units(self) -> Iterator[Tensor]:
        """What shares a step, ``(units, n)``: by segment, or some groups at a time; of many rows, a sample."""
        master = self.master()
        if self.row_format.granularity != "group":
            for start, rows in zip(self.starts(), self.segments, strict=True):
                sample = self._check_finite(master[start : start + rows : _step(rows)], start, rows)
                yield sample.T if self.row_format.granularity == "column" else sample.reshape(1, -1)
            return
        if self.num_rows == 0:
            yield master[:]
            return
        size = self.row_format.group_rows
        at_once = size * max(1, _CHUNK_VALUES // (size * self.dim))
        whole = self.num_rows // size * size
        for start in [*range(0, whole, at_once), *([whole] if whole < self.num_rows else [])]:
            stop = min(start + at_once, whole) if start < whole else self.num_rows
            groups = master[start:stop].view(-1, min(size, stop - start), self.dim)
            yield self._check_finite(groups[:, :: _step(groups.shape[1])], start, stop - start).flatten(1)

    def _segment_of(self, rows: Tensor) -> Tensor:
        """Segment of each row, int64 ``(...)``."""
        return torch.bucketize(rows, torch.tensor(self.starts()[1:], device=rows.device, dtype=torch.int64), right=True)

    def _segment_of_units(self) -> Tensor:
        """Segment of each step; of a group, that of its first row."""
        if self.row_format.granularity != "group":
            return torch.arange(len(self.segments))
        return self._segment_of(torch.arange(0, self.num_rows, self.row_format.group_rows))

    def _values_per_step(self, vectors: Tensor, span: Tensor, segment: Segment) -> float:
        """N of LSQ: values of this lookup per step; where steps are picked one by one, as if all were used alike."""
        assert self.span is not None
        number = vectors.numel() * self.processes
        if self.row_format.granularity == "group" or (isinstance(segment, Tensor) and len(self.segments) > 1):
            # The row's own values are added, where a maximum would do, because a sum needs no guard when traced.
            return number / max(self.span.numel(), 1) + self.dim // self.span.shape[1]
        return number / span.numel() + 1e-12  # above zero for no vectors, again without a guard

    def _check_finite(self, values: Tensor, start: int, rows: int, what: str = "values") -> Tensor:
        if not bool(values.isfinite().all()):
            raise IncompatibleStateError(
                f"rows {start} to {start + rows - 1} of a {self.row_format} store have {what} that are no finite "
                "numbers (of that format), so they can't be quantized: did training diverge?"
            )
        return values


def _step(rows: int) -> int:
    """The distance of at most `_FIT_ROWS` evenly spaced rows of so many: enough to settle a step."""
    return -(-rows // _FIT_ROWS) or 1
