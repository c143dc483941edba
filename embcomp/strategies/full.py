"""``full``: every id has its own row of the full dimension; the plain table, and the yardstick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from embcomp.config import StrategyConfig, register_strategy
from embcomp.row_source import RowSource
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import RowStore, make_row_store
from embcomp.storage.base import as_matrix
from embcomp.stretches import Stretch
from embcomp.tables import EmbeddingTables


@dataclass(frozen=True)
class FullConfig(StrategyConfig):
    """Plain tables: nothing to choose but the row format."""


@register_strategy("full", FullConfig)
class FullTables(EmbeddingTables):
    """One row of D values per id, all tables stacked in one store: a lookup is one gather.

    With ``rows="float32"`` it takes 100 % of the float32 tables and meets no smaller budget.
    """

    knob = "nothing (choose rows=)"
    knob_is_fine = False
    can_be_sharded = True
    can_be_streamed = True
    config: FullConfig
    _starts: Tensor

    def __init__(
        self, specs: Sequence[TableSpec], config: FullConfig, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(specs, config)
        self.rows = make_row_store(config.rows, self.num_ids, self.embedding_dim, config.sparse)
        self.constant("_starts", self.rows.starts())
        self.reset_parameters()

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        return self.rows(ids + self.pick(self._starts, table), table)

    def stored_rows(self, ids: Tensor, table: Tensor | int | None) -> tuple[RowStore, Tensor]:
        return self.rows, ids + self.pick(self._starts, table)

    def stretches(self, index: int, queries: Tensor) -> list[Stretch]:
        ids = range(self.specs[index].num_embeddings)
        return [Stretch(ids, queries, partial(self.rows.rows_from, self.rows.starts()[index], segment=index))]

    def widths_of(self, table: int | str) -> Tensor:
        number = self.specs[self.index_of(table)].num_embeddings
        return torch.full((number,), self.embedding_dim, device=self._starts.device)

    def reset_parameters(self) -> None:
        self.rows.reset_parameters([spec.init_std for spec in self.specs], self.generator())

    def fit(self, weights: Sequence[RowSource], counts: Sequence[Tensor]) -> None:
        for start, weight in zip(self.rows.starts(), weights, strict=True):
            self.rows.write_(start, weight)

    def _grown_config(self, specs: Sequence[TableSpec]) -> StrategyConfig:
        return self.config

    def take_table_(self, index: int, old: FullTables, own: int, last: int) -> None:
        as_matrix(self.rows).take_segment_(index, as_matrix(old.rows), own, last)

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: FullConfig, known: Knowledge) -> tuple[int, int]:
        return 1, 1

    @classmethod
    def resize(cls, specs: Sequence[TableSpec], config: FullConfig, size: int, known: Knowledge) -> FullConfig:
        return config

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: FullConfig, known: Knowledge) -> FullConfig:
        return config
