"""Rows of a dimension d, shared by hashing or not, brought to D by a projection or by zeros: a part of strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embcomp.config import StrategyConfig, check_at_least, check_choice
from embcomp.hashing import hash_seed, hash_to_range
from embcomp.specs import TableSpec
from embcomp.storage import Ids, make_row_store
from embcomp.storage.base import as_matrix
from embcomp.strategies._table_matrices import multiply_by_table
from embcomp.stretches import RowTerm, Stretch
from embcomp.tables import EmbeddingTables

PROJECTIONS = ("linear", "none")


@dataclass(frozen=True)
class ProjectedConfig(StrategyConfig):
    """A smaller dimension, and sharing.

    Attributes:
        dim: d, values per stored row.
        projection: ``"linear"``: one ``(d, D)`` matrix per table; ``"none"``: D − d zeros behind the row.
        share: ids per stored row; above 1, ids are hashed onto ``ceil(V / share)`` rows.
    """

    dim: int = 1
    projection: str = "linear"
    share: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "dim", 1)
        check_at_least(self, "share", 1)
        check_choice(self, "projection", PROJECTIONS)


class ProjectedTables(EmbeddingTables):
    """Tables stored at one smaller dimension d < D, without exemptions."""

    can_be_sharded = True
    _starts: Tensor
    _ranges: Tensor
    _seeds: Tensor
    projection: nn.Parameter

    def __init__(
        self, specs: Sequence[TableSpec], config: ProjectedConfig, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(specs, config)
        self.dim = config.dim
        rows = [-(-ids // config.share) for ids in self.num_ids]
        self.rows = make_row_store(config.rows, rows, config.dim, config.sparse)
        self.constant("_starts", self.rows.starts())
        if config.share > 1:
            self.constant("_ranges", rows)
            self.constant("_seeds", [hash_seed(config.seed, name, "share") for name in self.names])
        if config.projection == "linear":
            self.projection = nn.Parameter(torch.empty(self.num_tables, config.dim, self.embedding_dim))
        self.reset_parameters()

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        narrow = self.rows(self._row(ids, table) + self.pick(self._starts, table), table)
        if self.config.projection == "none":
            return F.pad(narrow, (0, self.embedding_dim - self.dim))
        return multiply_by_table(narrow, self.projection, table)

    def stretches(self, index: int, queries: Tensor) -> list[Stretch]:
        ids, start = range(self.specs[index].num_embeddings), self.rows.starts()[index]
        if self.config.projection == "none":
            narrow = queries[:, : self.dim]
        else:
            narrow = queries @ self.projection[index].to(queries.dtype).transpose(0, 1)
        if self.config.share == 1:
            return [Stretch(ids, narrow, partial(self.rows.rows_from, start, segment=index))]

        def shared(own: Ids) -> Tensor:
            return self.rows(self._row(self.as_ids(own), index) + start, index)

        size = self.rows.segments[index]
        term = RowTerm(narrow, self.rows, start, size, index, lambda own: [self._row(own, index)])
        return [Stretch(ids, narrow, shared, [term])]

    def _row(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        if self.config.share == 1:
            return ids
        return hash_to_range(ids, self.pick(self._seeds, table), self.pick(self._ranges, table))

    def widths_of(self, table: int | str) -> Tensor | None:
        number = self.specs[self.index_of(table)].num_embeddings
        return torch.full((number,), self.dim, device=self._starts.device) if self.config.share == 1 else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        generator = self.generator()
        self.rows.reset_parameters([spec.init_std for spec in self.specs], generator)
        if self.config.projection == "linear" and not self.projection.is_meta:
            self.projection.normal_(0.0, self.dim**-0.5, generator=generator)

    @torch.no_grad()
    def take_table_(self, index: int, old: ProjectedTables, own: int, last: int) -> None:
        as_matrix(self.rows).take_segment_(index, as_matrix(old.rows), own, last)
        if self.config.projection == "linear":
            self.projection[index] = old.projection[own]

    def fit(self, weights: Sequence[Tensor], counts: Sequence[Tensor]) -> None:
        for index, (start, weight, count) in enumerate(zip(self.rows.starts(), weights, counts, strict=True)):
            if self.config.share > 1:
                ids = torch.arange(len(weight), device=weight.device)
                weight, count = weighted_means(weight, count, self._row(ids, index), self.rows.segments[index])
            if self.config.projection == "none":
                self.rows.write_(start, weight[:, : self.dim])
                continue
            axes = principal_axes(weight, count)[:, : self.dim]
            self.rows.write_(start, weight @ axes)
            self.projection[index].copy_(axes.T)


def weighted_means(weight: Tensor, count: Tensor, row: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Count-weighted means of the rows that share a bucket.

    Args:
        weight: float32 ``(V, D)``.
        count: float32 ``(V,)``, above zero.
        row: int64 ``(V,)``, the bucket of each row.
        num_rows: R.

    Returns:
        float32 ``(R, D)`` means (zeros for empty buckets) and ``(R,)`` summed counts.
    """
    total = torch.zeros(num_rows, device=weight.device).index_add_(0, row, count)
    mean = torch.zeros(num_rows, weight.shape[1], device=weight.device)
    for ids in torch.arange(len(weight), device=weight.device).split(65536):
        mean.index_add_(0, row[ids], weight[ids] * count[ids, None])
    return mean / total.clamp_min(torch.finfo(torch.float32).tiny)[:, None], total


def principal_axes(weight: Tensor, count: Tensor) -> Tensor:
    """Right singular vectors of ``diag(count)^½ weight``, ``(D, D)``, by falling singular value.

    Projecting rows on the first d of them is the best rank-d approximation in the count-weighted Frobenius norm
    (Eckart–Young).
    """
    return torch.linalg.eigh(gram(weight, count))[1].flip(1).to(weight.dtype)


def gram(weight: Tensor, count: Tensor) -> Tensor:
    """Count-weighted Gram matrix ``weightᵀ diag(count) weight`` in float64, ``(D, D)``, chunk by chunk."""
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows, share in zip(weight.split(65536), count.split(65536), strict=True):
        wide = rows.double()
        total += (wide * share.double()[:, None]).T @ wide
    return total
