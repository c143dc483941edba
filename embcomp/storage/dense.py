"""Dense rows: float32, bfloat16 or float16, with dense or row-sparse gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embcomp.errors import IncompatibleStateError
from embcomp.storage.base import MatrixRows, RowStore, Segment
from embcomp.storage.grids import round_through

_CHECKED = 1 << 14
"""Rows, or values, that are looked at together."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class DenseRows(MatrixRows):
    """Rows as one float matrix ``(R, d)``.

    Args:
        segments: rows in each segment.
        dim: values per row, d.
        serve_dtype: the dtype of the serving form. While training, a float32 master copy is kept and lookups round
            through ``serve_dtype`` (gradients pass straight through), so what is trained is what is served.
        pure: train in ``serve_dtype`` itself: half the training memory, at the cost of small updates that round away.
        sparse: row-sparse gradients (for ``SGD``, ``Adagrad``, ``SparseAdam`` and embcomp's row-wise Adagrad).
    """

    def __init__(
        self,
        segments: Sequence[int],
        dim: int,
        serve_dtype: torch.dtype = torch.float32,
        pure: bool = False,
        sparse: bool = False,
    ) -> None:
        super().__init__(segments, dim)
        self.serve_dtype = serve_dtype
        self.sparse = sparse
        self.rounding = True
        self.make_weight_(serve_dtype if pure else torch.float32)

    def forward(self, rows: Tensor, segment: Segment = None) -> Tensor:
        return self._rounded(self.read(rows, segment))

    def pool(self, rows: Tensor, segment: Segment, bounds: Tensor, mode: str, weights: Tensor | None = None) -> Tensor:
        if self.elsewhere is not None or (mode == "max" and self.sparse) or self.serve_dtype != torch.float32:
            return super().pool(rows, segment, bounds, mode, weights)
        return F.embedding_bag(
            rows.reshape(-1),
            self.weight,
            bounds,
            mode=mode,
            sparse=self.sparse,
            per_sample_weights=weights,
            include_last_offset=True,
        )

    def consecutive(self, start: int, stop: int, segment: Segment = None) -> Tensor:
        slices_cost = self.sparse and torch.is_grad_enabled() and self.weight.requires_grad  # their gradient is dense
        if self.elsewhere is not None or slices_cost:
            return super().consecutive(start, stop, segment)
        return self._rounded(self.weight[start:stop])

    def _rounded(self, vectors: Tensor) -> Tensor:
        if self.rounding and vectors.dtype != self.serve_dtype:
            plain = vectors.detach()
            vectors = vectors + (round_through(plain, self.serve_dtype).to(vectors.dtype) - plain)
        return vectors.to(torch.float32)

    def serve_bytes(self) -> list[int]:
        return [rows * self.dim * self.serve_dtype.itemsize for rows in self.segments]

    @torch.no_grad()
    def reset_parameters(self, std: Sequence[float], generator: torch.Generator | None = None) -> None:
        if self.weight.is_meta:
            return
        for start, rows, deviation in zip(self.starts(), self.segments, std, strict=True):
            self.weight[start : start + rows].normal_(0.0, deviation, generator=generator)

    def take_scales_(self, segment: int, other: MatrixRows, own: int) -> None:
        self.rounding = bool(getattr(other, "rounding", True))

    def set_rounding(self, enabled: bool) -> None:
        self.rounding = enabled

    def finalize(self) -> RowStore:
        served = DenseRows.__new__(DenseRows)
        MatrixRows.__init__(served, self.segments, self.dim)
        served.serve_dtype, served.sparse, served.rounding = self.serve_dtype, False, True
        rows = self.weight.detach() if self.lent is None else self.master().gathered(self.serve_dtype)
        served.weight = nn.Parameter(rows.to(self.serve_dtype), requires_grad=False)
        if not rows.is_meta:
            check_float16(served.weight)
        return served


def check_float16(values: Tensor) -> None:
    """Refuse float16 values that are not finite, since float16 can't hold what they were before.

    Raises:
        IncompatibleStateError: which says how far float16 goes.
    """
    if values.dtype == torch.float16 and not all(bool(part.isfinite().all()) for part in values.split(_CHECKED)):
        raise IncompatibleStateError(
            f"float16 can't hold values beyond {torch.finfo(values.dtype).max:.0f}, which some of these "
            f"{len(values):,} have: take bfloat16, float32 or integer rows; or did training diverge?"
        )
