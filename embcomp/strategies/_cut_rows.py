"""Tables whose rows are cut short where they are served: what the strategies that choose widths in training share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from embcomp.config import StrategyConfig, check_choice
from embcomp.memory import SHARED, MemoryPart, MemoryReport
from embcomp.specs import TableSpec
from embcomp.storage import RowFormat, RowStore
from embcomp.storage.ragged import check_granularity
from embcomp.strategies._prefix_projection import PrefixProjection
from embcomp.strategies._projected import PROJECTIONS, principal_axes
from embcomp.tables import EmbeddingTables


@dataclass(frozen=True)
class CutConfig(StrategyConfig):
    """What strategies that cut rows short have in common.

    Attributes:
        projection: ``"linear"``: a matrix per table brings rows of any width to D, so that narrow rows take part in
            all dimensions; ``"none"``: zeros behind them.
        limit_bytes: serve bytes that training may choose among; None for no limit. The budget sets it.
    """

    projection: str = "linear"
    limit_bytes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "projection", PROJECTIONS)
        check_granularity(RowFormat.parse(self.rows))

    @property
    def is_projected(self) -> bool:
        """Whether there are matrices: only where there may be narrow rows."""
        return self.projection == "linear"


class CutTables(EmbeddingTables):
    """Whole rows while training, beginnings of rows when served, brought to D by a matrix per table or by zeros.

    A subclass makes ``rows``, and says by `served_bytes` what its form takes.
    """

    rows: RowStore
    projection: PrefixProjection | None

    def served_bytes(self) -> tuple[list[int], list[int], int]:
        """Serve bytes of each table's rows and of its matrix, and of the remap, of the form that would be served."""
        raise NotImplementedError

    def make_projection_(self) -> None:
        """Make the matrices, where there are some."""
        is_projected = self.config.is_projected
        self.projection = PrefixProjection(self.num_tables, self.embedding_dim) if is_projected else None

    def projected(self, vectors: Tensor, table: Tensor | int | None) -> Tensor:
        """Bring rows, zero behind their widths, to D dimensions."""
        return vectors if self.projection is None else self.projection(vectors, table)

    def prefix(self, widths: Tensor) -> Tensor:
        """Which of D dimensions the first ``widths`` are: int64 ``(...)`` to bool ``(..., D)``."""
        return torch.arange(self.embedding_dim, device=widths.device) < widths.unsqueeze(-1)

    def rotated(self, table: int, weight: Tensor, count: Tensor) -> Tensor:
        """Trained rows as they are stored: along their principal axes, which the table's matrix takes back."""
        if self.projection is None:
            return weight
        axes = principal_axes(weight, count)
        self.projection.weight[table].copy_(axes.T)
        return weight @ axes

    def reset_parameters(self) -> None:
        self.rows.reset_parameters([spec.init_std for spec in self.specs], self.generator())
        if self.projection is not None:
            self.projection.reset_parameters(self.generator("projection"))

    def memory(self) -> MemoryReport:
        report = super().memory()
        if self.is_final:
            return report
        rows, matrices, remap = self.served_bytes()
        own = {"rows": dict(zip(self.names, rows, strict=True))}
        if self.projection is not None:
            own["projection"] = dict(zip(self.names, matrices, strict=True))
        parts = [
            replace(part, serve_bytes=own[part.name][part.table] if part.name in own else 0) for part in report.parts
        ]
        if remap:
            parts.append(MemoryPart(SHARED, "remap", remap, 0, 0, 0))
        return MemoryReport(tuple(parts), report.full_bytes)

    @classmethod
    def within(cls, config: Any, allowed: int) -> Any:
        return replace(config, limit_bytes=allowed) if config.limit_bytes is None else config


def resolved_format(specs: Sequence[TableSpec], config: StrategyConfig) -> RowFormat:
    """The row format of a group's rows, with its scale granularity."""
    return RowFormat.parse(config.rows).resolve(specs[0].embedding_dim)
