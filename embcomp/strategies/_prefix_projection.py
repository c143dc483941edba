"""Matrices that bring the first values of a row to all D dimensions: a part of the strategies that cut rows short."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embcomp.storage import DenseRows, RowFormat, RowStore
from embcomp.strategies._table_matrices import multiply_by_table


class PrefixProjection(nn.Module):
    """A ``(D, D)`` matrix for each table; rows that are cut to w values use its first w rows, which alone are served.

    It begins as a rotation, which leaves the spread of whole rows as it is.

    Args:
        num_tables: T.
        dim: D.
        widths: rows of each table's matrix that are served; None for the training form, which has all.
    """

    weight: nn.Parameter
    _index: Tensor
    _used: Tensor

    def __init__(self, num_tables: int, dim: int, widths: Sequence[int] | None = None) -> None:
        super().__init__()
        self.num_tables, self.dim = num_tables, dim
        self.is_served = widths is not None
        if widths is None:
            self.weight = nn.Parameter(torch.empty(num_tables, dim, dim))
            return
        self.weight = nn.Parameter(torch.empty(sum(widths), dim), requires_grad=False)
        starts = [sum(widths[:table]) for table in range(num_tables)]
        places = zip(starts, widths, strict=True)
        index = [[start + min(row, max(width - 1, 0)) for row in range(dim)] for start, width in places]
        last = max(sum(widths) - 1, 0)
        used = [[row < width for row in range(dim)] for width in widths]
        self.register_buffer("_index", torch.tensor(index, device="cpu").clamp_max(last), persistent=False)
        self.register_buffer("_used", torch.tensor(used, device="cpu"), persistent=False)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw rotations."""
        if not self.weight.is_meta:
            drawn = torch.randn(self.num_tables, self.dim, self.dim, generator=generator)
            self.weight.copy_(torch.linalg.qr(drawn)[0])

    def forward(self, vectors: Tensor, table: Tensor | int | None) -> Tensor:
        """Multiply rows, zero behind their widths, by their tables' matrices: float ``(..., D)`` to ``(..., D)``."""
        return multiply_by_table(vectors, self._matrices(), table)

    def _matrices(self) -> Tensor:
        if not self.is_served:
            return self.weight
        if not len(self.weight):
            return torch.eye(self.dim, device=self._index.device).expand(self.num_tables, -1, -1)
        found = torch.where(self._used.unsqueeze(-1), self.weight[self._index], 0.0)
        identity = torch.eye(self.dim, device=found.device, dtype=found.dtype)
        # Tables without a matrix of their own have rows that were multiplied already.
        return torch.where(self._used[:, :1].unsqueeze(-1), found, identity)

    @torch.no_grad()
    def multiply_(self, store: RowStore, pieces: Sequence[tuple[int, int, int, int]]) -> None:
        """Multiply rows of a float store in place: pieces of table, first row, stop and width."""
        if self.weight.is_meta:
            return
        for table, first, stop, width in pieces:
            if isinstance(store, DenseRows) and width:
                for rows in store.weight.data[first:stop].split(65536):
                    rows.copy_(rows[:, :width] @ self.weight[table, :width])

    @torch.no_grad()
    def served(self, widths: Sequence[int]) -> PrefixProjection:
        """The serving form: the first ``widths`` rows of each matrix."""
        with self.weight.device:
            made = PrefixProjection(self.num_tables, self.dim, widths)
        if self.weight.is_meta:
            return made
        made = made.to(self.weight.device)
        parts = [matrix[:width] for matrix, width in zip(self.weight, widths, strict=True)]
        made.weight.copy_(torch.cat(parts))
        return made


def fold(
    rows: Sequence[int], widths: Sequence[int], owners: Sequence[int], dim: int, row_format: RowFormat
) -> tuple[list[int], list[int]]:
    """Choose for each table whether rows are served narrow, with a matrix, or multiplied by it and whole.

    Float32 rows are multiplied where that takes no more bytes: those of few ids, and those that are not cut. Others are
    served as they are, since what rounding them again would cost is not known.

    Args:
        rows: rows of each range of ids.
        widths: their widths.
        owners: their tables, rising from 0.
        dim: D.
        row_format: of the rows.

    Returns:
        Widths of the ranges as they are served, and rows of each table's matrix, 0 for none.
    """
    served, matrices = list(widths), []
    for table in range(max(owners) + 1):
        own = [part for part, owner in enumerate(owners) if owner == table and rows[part]]
        widest = max((widths[part] for part in own), default=0)
        narrow = sum(rows[part] * widths[part] for part in own) + widest * dim
        whole = sum(rows[part] * dim for part in own if widths[part])
        if widest and row_format.kind == "float32" and whole <= narrow:
            for part in own:
                served[part] = dim if widths[part] else 0
            matrices.append(0)
        else:
            matrices.append(widest)
    return served, matrices
