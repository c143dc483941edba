"""Pruned rows: the training form of sparse rows, of which a fixed number of values is kept, the largest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from embcomp.row_source import RowSource
from embcomp.storage import packing
from embcomp.storage.base import MatrixRows, RowStore, Segment
from embcomp.storage.dense import DTYPES, DenseRows
from embcomp.storage.formats import RowFormat
from embcomp.storage.largest import mark_largest
from embcomp.storage.quantized import QuantizedRows
from embcomp.storage.sparse import SparseRows
from embcomp.storage.sparse_sizes import share_out, sparse_bytes

_FIT_ROWS = 1 << 16


class PrunedRows(MatrixRows):
    """Rows of which n values are kept, and served as `SparseRows`; made by `make_pruned_store`.

    In training mode nothing is pruned at first. In evaluation mode lookups show what would be served if training ended
    now: the n values of the largest magnitudes, times `importance` of their rows, and zeros for the others. Which they
    are is worked out when the store is switched to evaluation, in O(R·d), and again at a lookup only if the rows have
    changed since, as far as their version counter tells: compiled lookups do not read it, and some fused optimizers do
    not move it. `prune_` settles it: from then on all lookups, and so all gradients, are those of the kept values.

    Attributes:
        mask: uint8 ``(⌈R·d / 8⌉,)``, a bit per value, persistent, so that training goes on where it stopped: all ones
            until `prune_`. It takes no bytes in the serving form.
        importance: float32 ``(R,)``, what magnitudes of a row are multiplied by before they are compared; or None.
        last_rows: rows whose values are kept only where there is room to spare, such as those of padding ids.
        is_pruned: whether `mask` is settled.
        is_free: whether evaluation shows whole rows as long as it is not: post-training pruning, in the middle of it.
    """

    weight: nn.Parameter
    mask: Tensor
    importance: Tensor | None
    _shown: Tensor | None

    def prepare_(
        self, row_format: RowFormat, num_values: int, num_slots: int, layout: str, min_per_row: int
    ) -> PrunedRows:
        """Say what is kept and how it is served; see `make_pruned_store`."""
        self._form = (row_format, num_values, num_slots, layout)
        self._size = sparse_bytes(self.segments, self.dim, *self._form)
        self.num_values, self.min_per_row = num_values, min_per_row
        self.is_pruned = self.is_free = False
        self.last_rows: tuple[int, ...] = ()
        bits = torch.full((packing.packed_bytes(self.num_rows, self.dim, 1),), 255, dtype=torch.uint8)
        self.register_buffer("mask", bits)
        self.register_buffer("_shown", None, persistent=False)
        self.register_buffer("importance", None, persistent=False)
        self._shown_for: tuple[int, int] | None = None
        return self

    # ---- lookups ----------------------------------------------------------------------------------------------------

    def forward(self, rows: Tensor, segment: Segment = None) -> Tensor:
        vectors = super().forward(rows, segment)
        shows_whole = self.is_free and not self.is_pruned
        if not (self.is_pruned or self.training or shows_whole or torch.compiler.is_compiling()):
            self._refresh()
        mask = self.mask if self.is_pruned else None if shows_whole else self._shown
        if mask is None:
            return vectors
        return torch.where(packing.gather(mask, rows, self.dim, 1).bool(), vectors, 0.0)

    # Neither gives the rows as they are, which those of a plain store do.
    def pool(self, rows: Tensor, segment: Segment, bounds: Tensor, mode: str, weights: Tensor | None = None) -> Tensor:
        return RowStore.pool(self, rows, segment, bounds, mode, weights)

    def consecutive(self, start: int, stop: int, segment: Segment = None) -> Tensor:
        return RowStore.consecutive(self, start, stop, segment)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation."""
        super().train(mode)
        if mode or self.is_pruned or self.is_free:
            self._shown = self._shown_for = None
        else:
            self._refresh()
        return self

    def _refresh(self) -> None:
        """Bring what evaluation shows up to date with the rows."""
        version = 0 if self.weight.is_inference() else self.weight._version
        if self._shown_for != (id(self.weight), version):
            self._shown, self._shown_for = self._largest(), (id(self.weight), version)

    @torch.no_grad()
    def _largest(self) -> Tensor:
        """The mask of the n values that are kept."""
        if self.is_blank:
            return torch.empty_like(self.mask)
        return mark_largest(self._scores, self.num_rows, self.dim, self.num_values, self.min_per_row)

    def _scores(self, start: int, stop: int) -> Tensor:
        scores = self.master()[start:stop].abs()
        if self.importance is not None:
            scores *= self.importance[start:stop, None]
        for row in self.last_rows:
            if start <= row < stop:
                scores[row - start] = -1.0
        return scores

    # ---- life -------------------------------------------------------------------------------------------------------

    def is_kept(self, rows: Tensor) -> Tensor:
        """Which values of rows would be served if training ended now: bool ``(..., d)``."""
        mask = self.mask if self.is_pruned else self._largest()
        return packing.gather(mask, rows, self.dim, 1).bool()

    def prune_(self) -> None:
        """Settle which values are kept, by the rows as they are now; the second time it does nothing."""
        if not self.is_pruned:
            self.mask.copy_(self._largest())
            self.is_pruned, self._shown, self._shown_for = True, None, None

    def restore_(self) -> None:
        """Prune nothing again."""
        self.mask.fill_(255)
        self.is_pruned, self._shown, self._shown_for = False, None, None

    def reset_parameters(self, std: Sequence[float], generator: torch.Generator | None = None) -> None:
        self.restore_()
        super().reset_parameters(std, generator)

    def serve_bytes(self) -> list[int]:
        return share_out(self._size, self.segments)

    def finalize(self) -> RowStore:
        mask = self.mask if self.is_pruned else self._largest()
        with self.mask.device:
            sparse = SparseRows(self.segments, self.dim, *self._form).eval()
        shown, self._shown = self._shown, mask  # so that scales that are fitted only now see it
        try:
            served = self._served()
        finally:
            self._shown = shown
        return sparse.take_(served, lambda rows: packing.gather(mask, rows, self.dim, 1).bool())

    def _served(self) -> RowStore | RowSource:
        """All rows, pruned or not, as they are served."""
        return super().finalize()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._shown = self._shown_for = None
        if not self.mask.is_meta:
            self.is_pruned = bool((self.mask != 255).any())  # n < R·d, so that some bit of a settled mask is zero


class PrunedDenseRows(PrunedRows, DenseRows):
    """Float rows, pruned."""

    def _served(self) -> RowStore | RowSource:
        return super()._served() if self.lent is None else self.master()


class PrunedQuantizedRows(PrunedRows, QuantizedRows):
    """Quantized rows, pruned: magnitudes are those of the float32 master rows.

    Where scales are fitted after pruning, they are fitted to the kept values alone, for which at 4 bits the squared
    error is half of what it would be, and at 1 bit a tenth.
    """

    def _units(self) -> Iterator[Tensor]:
        mask = self.mask if self.is_pruned else self._shown
        if mask is None:
            yield from super()._units()
            return
        master = self.master()
        for start, rows in zip(self.starts(), self.segments, strict=True):
            sample = torch.arange(start, start + rows, max(1, rows // _FIT_ROWS), device=self.mask.device)
            values = self._check_finite(master[sample], start, rows)
            kept = packing.gather(mask, sample, self.dim, 1)
            by_column = self.row_format.granularity == "column"
            yield repeat_kept(*((t.T if by_column else t.reshape(1, -1)) for t in (values, kept)))


def repeat_kept(values: Tensor, kept: Tensor) -> Tensor:
    """Put the kept values of each line in the place of all: float ``(u, n)`` and 0 or 1 ``(u, n)`` to ``(u, n)``.

    They are repeated as often as fills the line; lines without any stay as they are.
    """
    size = values.shape[1]
    kept_first, count = kept.argsort(dim=1, descending=True, stable=True), kept.sum(1, keepdim=True)
    index = torch.arange(size, device=values.device) % torch.where(count == 0, max(size, 1), count)
    return values.gather(1, kept_first.gather(1, index))


def make_pruned_store(
    rows: str | RowFormat,
    segments: Sequence[int],
    dim: int,
    sparse: bool,
    num_values: int,
    num_slots: int,
    layout: str,
    min_per_row: int = 0,
) -> PrunedRows:
    """Build the training form of rows that are served sparse, on the current default device (``meta`` included).

    Args:
        rows: a row format without a scale per group of rows.
        segments: rows in each segment.
        dim: values per row, d.
        sparse: row-sparse gradients.
        num_values: n < R·d, values that are kept.
        num_slots: see `SparseRows`.
        layout: see `SparseRows`.
        min_per_row: values that are kept of each row, the largest, but for `PrunedRows.last_rows`.

    Raises:
        ConfigError: if ``rows`` is no such format, or the sizes do not go together.
    """
    row_format = RowFormat.parse(rows).resolve(dim)
    store: PrunedRows
    if row_format.is_integer:
        store = PrunedQuantizedRows(segments, dim, row_format, sparse)
    else:
        store = PrunedDenseRows(segments, dim, DTYPES[row_format.kind], row_format.pure, sparse)
    return store.prepare_(row_format, num_values, num_slots, layout, min_per_row)
