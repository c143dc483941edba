"""Rows of a dimension d, shared by hashing or not, brought to D by a projection or by zeros: a part of strategies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embcomp.config import StrategyConfig, check_at_least, check_choice
from embcomp.hashing import hash_seed, hash_to_range
from embcomp.row_source import RowSource, ids_of
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
    can_be_streamed = True
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

    def fit(self, weights: Sequence[RowSource], counts: Sequence[Tensor]) -> None:
        for index, (start, weight, count) in enumerate(zip(self.rows.starts(), weights, counts, strict=True)):
            if self.config.projection == "none":
                weight = weight.columns(0, self.dim)
            if self.config.share > 1:
                means, count = weighted_means(weight, count, partial(self._row, table=index), self.rows.segments[index])
                weight = RowSource.of(means)
            if self.config.projection == "none":
                self.rows.write_(start, weight)
                continue
            axes = principal_axes(weight, count)[:, : self.dim]
            self.rows.write_(start, weight.times(axes))
            self.projection[index].copy_(axes.T)


def weighted_means(
    weight: RowSource, count: Tensor, row: Callable[[Tensor], Tensor], num_rows: int
) -> tuple[Tensor, Tensor]:
    """Count-weighted means of the rows that share a bucket.

    Args:
        weight: ``(V, D)``.
        count: float32 ``(V,)``, above zero.
        row: of ids int64 ``(n,)`` the bucket of each, int64 ``(n,)``.
        num_rows: R.

    Returns:
        float32 ``(R, D)`` means (zeros for empty buckets) and ``(R,)`` summed counts.
    """
    total = torch.zeros(num_rows, device=weight.device)
    mean = torch.zeros(num_rows, weight.shape[1], device=weight.device)
    for part in weight.chunks():
        own = row(ids_of(part, weight.device))
        total.index_add_(0, own, count[part])
        mean.index_add_(0, own, weight[part] * count[part, None])
    return mean.div_(total.clamp_min(torch.finfo(torch.float32).tiny)[:, None]), total


def principal_axes(weight: Tensor | RowSource, count: Tensor) -> Tensor:
    """Right singular vectors of ``diag(count)^½ weight``, ``(D, D)``, by falling singular value.

    Projecting rows on the first d of them is the best rank-d approximation in the count-weighted Frobenius norm
    (Eckart–Young).
    """
    return torch.linalg.eigh(gram(weight, count))[1].flip(1).to(torch.float32)


def gram(weight: Tensor | RowSource, count: Tensor) -> Tensor:
    """Count-weighted Gram matrix ``weightᵀ diag(count) weight`` in float64, ``(D, D)``, chunk by chunk."""
    source = RowSource.of(weight)
    total = torch.zeros(source.shape[1], source.shape[1], dtype=torch.float64, device=source.device)
    for rows in source.chunks():
        wide = source[rows].double()
        total += (wide * count[rows, None].double()).T @ wide
    return total
