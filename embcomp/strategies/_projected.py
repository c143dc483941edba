"""Rows of a smaller dimension d, brought to D by a projection per table or by zeros: a part of several strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embcomp.config import StrategyConfig, check_choice
from embcomp.storage import make_row_store
from embcomp.tables import EmbeddingTables, TableSpec

PROJECTIONS = ("linear", "none")


@dataclass(frozen=True)
class ProjectedConfig(StrategyConfig):
    """Attributes:
    dim: d, values per stored row.
    projection: ``"linear"``: one ``(d, D)`` matrix per table; ``"none"``: D − d zeros behind the row.
    """

    dim: int = 1
    projection: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "projection", PROJECTIONS)


class ProjectedTables(EmbeddingTables):
    """Tables stored at one smaller dimension d < D, without exemptions."""

    def __init__(
        self, specs: Sequence[TableSpec], config: ProjectedConfig, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(specs, config)
        self.dim = config.dim
        self.rows = make_row_store(config.rows, self.num_ids, config.dim, config.sparse)
        self.constant("_starts", self.rows.starts())
        if config.projection == "linear":
            self.projection = nn.Parameter(torch.empty(self.num_tables, config.dim, self.embedding_dim))
        self.reset_parameters()

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        narrow = self.rows(ids + self.pick(self._starts, table), table)
        if self.config.projection == "none":
            return F.pad(narrow, (0, self.embedding_dim - self.dim))
        matrix = self.pick(self.projection, table)
        if isinstance(table, int):
            return narrow @ matrix
        return torch.einsum("...d,...dk->...k", narrow, matrix)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        generator = self.generator()
        self.rows.reset_parameters([spec.init_std for spec in self.specs], generator)
        if self.config.projection == "linear" and not self.projection.is_meta:
            self.projection.normal_(0.0, self.dim**-0.5, generator=generator)

    def fit(self, weights: Sequence[Tensor], counts: Sequence[Tensor]) -> None:
        for index, (start, weight, count) in enumerate(zip(self.rows.starts(), weights, counts, strict=True)):
            if self.config.projection == "none":
                self.rows.write_(start, weight[:, : self.dim])
                continue
            axes = principal_axes(weight, count)[:, : self.dim]
            self.rows.write_(start, weight @ axes)
            self.projection[index].copy_(axes.T)


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
