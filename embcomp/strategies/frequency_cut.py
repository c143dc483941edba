"""``frequency_cut``: the most frequent ids keep rows of their own, the others share a few."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embcomp.config import StrategyConfig, check_choice, register_strategy
from embcomp.errors import ConfigError
from embcomp.hashing import check_range, hash_seed, hash_to_range
from embcomp.row_source import RowSource, ids_of
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import make_row_store
from embcomp.storage.base import as_matrix
from embcomp.strategies._allocation import check_table_names
from embcomp.strategies._fitting import shared_means
from embcomp.strategies._frequency_sizes import complete_sizes, most_frequent, row_range
from embcomp.strategies._kept_ids import KeptIds
from embcomp.tables import EmbeddingTables

logger = logging.getLogger(__name__)
TAILS = ("oov_row", "hash", "zero")


@dataclass(frozen=True)
class FrequencyCutConfig(StrategyConfig):
    """The most frequent ids of each table, and what becomes of the others, the tail.

    Attributes:
        num_kept: table name -> ids that keep a row of their own; None to let the budget choose: the most frequent ids
            of all tables where all counts are known, else the same share of every table.
        tail: ``"oov_row"``: one row per table for all other ids; ``"hash"``: they are hashed to a few rows; ``"zero"``:
            they get zeros, and take no row, but for ``unseen="oov_row"``'s.
        tail_share: share of the rows that tails get with ``tail="hash"``, in (0, 1).
        exempt_share: share of the budget's rows that may go to keeping the smallest tables whole, in [0, 1), where
            counts are not known.
        num_tail: table name -> rows of its tail; None to let `tail` and `tail_share` choose.
        remapped: table name -> whether a bit per id says which ids are kept, rather than being below ``num_kept``; None
            to do so for tables whose counts are known and do not fall with the id.
    """

    num_kept: dict[str, int] | None = None
    tail: str = "oov_row"
    tail_share: float = 0.1
    exempt_share: float = 0.05
    num_tail: dict[str, int] | None = None
    remapped: dict[str, bool] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "tail", TAILS)
        if not 0 < self.tail_share < 1:
            raise ConfigError(f"FrequencyCutConfig(tail_share={self.tail_share!r}): must be above 0 and below 1")
        if not 0 <= self.exempt_share < 1:
            raise ConfigError(f"FrequencyCutConfig(exempt_share={self.exempt_share!r}): must be in [0, 1)")


@register_strategy("frequency_cut", FrequencyCutConfig)
class FrequencyCutTables(EmbeddingTables):
    """Frequency-thresholded vocabularies: exact rows for frequent ids, one or a few shared rows for the tail.

    With ``tail="hash"`` it is the static form of DeepRec's adaptive embedding (no paper). The plain baseline that more
    clever methods must beat. The budget's rows go to the ids that occur most often, whatever their table; ids that
    occur equally often are taken in the order of tables, then of ids, so that the budget is used up in spite of ties.

    Ids should be numbered by falling frequency: "is kept" is then ``id < num_kept`` and costs nothing. Where counts say
    that they are not, a bit per id and a rank per 64 of them say which row is whose: 1.5 bits per id, counted, saved in
    the state and built from the counts that the plan was made with; without them it is empty until a state is loaded.
    """

    knob = "rows"
    can_be_sharded = True
    can_be_streamed = True
    config: FrequencyCutConfig
    _starts: Tensor
    _tail_starts: Tensor
    _tail_ranges: Tensor
    _tail_seeds: Tensor

    def __init__(
        self, specs: Sequence[TableSpec], config: FrequencyCutConfig, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(specs, config)
        self.num_kept, self.num_tail, self.is_remapped = self._checked_sizes()
        self.is_whole = tuple(kept == ids for kept, ids in zip(self.num_kept, self.num_ids, strict=True))
        sizes = [kept + tail for kept, tail in zip(self.num_kept, self.num_tail, strict=True)]
        self.rows = make_row_store(config.rows, sizes, self.embedding_dim, config.sparse)
        self.constant("_starts", [start if size else 0 for start, size in zip(self.rows.starts(), sizes, strict=True)])
        each = list(zip(self.num_kept, self.num_tail, strict=True))
        self.constant("_tail_starts", [kept if tail else 0 for kept, tail in each])
        self.constant("_tail_ranges", [max(tail, 1) for _, tail in each])
        self.constant("_tail_seeds", [hash_seed(config.seed, name, "tail") for name in self.names])
        self.remap = KeptIds(self.num_ids, self.num_kept, self.is_remapped)
        self._keep_most_frequent(counts or {})
        self.reset_parameters()

    # ---- lookups ----------------------------------------------------------------------------------------------------

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        starts = self.pick(self._starts, table)
        if all(self.is_whole):
            return self.rows(ids + starts, table)
        kept, rows = self.remap(ids, table)
        rows = torch.where(kept, rows, self._tail_rows(ids, table))
        vectors = self.rows(rows + starts, table)
        if self.config.tail == "zero":
            if self.config.unseen == "oov_row":
                kept = kept | (ids == self.pick(self._sizes, table))
            vectors = vectors.masked_fill(~kept.unsqueeze(-1), 0.0)
        return vectors

    def _tail_rows(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        """The row inside their table that ids have if they are not kept."""
        starts = self.pick(self._tail_starts, table)
        if self.config.tail == "hash":
            return hash_to_range(ids, self.pick(self._tail_seeds, table), self.pick(self._tail_ranges, table)) + starts
        return starts

    def widths_of(self, table: int | str) -> Tensor:
        index = self.index_of(table)
        ids = torch.arange(self.specs[index].num_embeddings, device=self._sizes.device)
        return self.embedding_dim * self.remap(ids, index)[0].long()

    # ---- life -------------------------------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        self.rows.reset_parameters([spec.init_std for spec in self.specs], self.generator())

    def fit(self, weights: Sequence[RowSource], counts: Sequence[Tensor]) -> None:
        for index, (weight, count) in enumerate(zip(weights, counts, strict=True)):
            start, number = self.rows.starts()[index], self.num_kept[index]
            self.rows.write_(start, self._kept_rows(index, weight))
            if self.num_tail[index]:
                self.rows.write_(start + number, self._tail_means(index, weight, count))

    def _kept_rows(self, index: int, weight: RowSource) -> RowSource:
        """Rows of kept ids: in the order of ids, which is that of their rows."""
        if not self.is_remapped[index]:
            return weight.part(0, self.num_kept[index])
        parts = [ids_of(part, weight.device) for part in weight.chunks()]
        return weight.take(torch.cat([ids[self.remap(ids, index)[0]] for ids in parts]))

    def _tail_means(self, index: int, weight: RowSource, count: Tensor) -> Tensor:
        """Means of the ids that are not kept, by the row of the tail that they share."""

        def slots(ids: Tensor) -> Tensor:
            return (self._tail_rows(ids, index) - self.num_kept[index]).expand_as(ids)

        in_tail = torch.cat([~self.remap(ids_of(part, weight.device), index)[0] for part in weight.chunks()])
        return shared_means(slots, weight, count * in_tail, self.num_tail[index])

    def _grown_config(self, specs: Sequence[TableSpec]) -> FrequencyCutConfig:
        kept = dict(self.config.num_kept or {})
        for spec, ids, whole in zip(specs, self.num_ids, self.is_whole, strict=True):
            if whole:
                kept[spec.name] = ids + spec.num_embeddings - self.specs[self.index_of(spec.name)].num_embeddings
        return replace(self.config, num_kept=kept)

    def take_table_(self, index: int, old: FrequencyCutTables, own: int, last: int) -> None:
        as_matrix(self.rows).take_segment_(index, as_matrix(old.rows), own, last if self.is_whole[index] else 0)
        if self.is_remapped[index]:
            ids = torch.arange(old.specs[own].num_embeddings, device=old._sizes.device)
            self.remap.keep_(index, ids[old.remap(ids, own)[0]])

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: FrequencyCutConfig, known: Knowledge) -> tuple[int, int]:
        return (1, 1) if config.num_kept is not None else row_range(specs, config, known)

    @classmethod
    def resize(
        cls, specs: Sequence[TableSpec], config: FrequencyCutConfig, size: int, known: Knowledge
    ) -> FrequencyCutConfig:
        return complete_sizes(specs, config, known, None if config.num_kept is not None else size)

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: FrequencyCutConfig, known: Knowledge) -> StrategyConfig:
        if config.num_kept is None:
            return super().complete(specs, config, known)
        return complete_sizes(specs, config, known, None)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _checked_sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
        config = self.config
        if config.num_kept is None or config.num_tail is None or config.remapped is None:
            raise ConfigError(
                "FrequencyCutConfig needs num_kept, num_tail and remapped: plan with a budget, or plan with num_kept"
            )
        for field in ("num_kept", "num_tail", "remapped"):
            check_table_names(config, field, self.names)
        for name, num_ids in zip(self.names, self.num_ids, strict=True):
            self._check_table(name, num_ids, config.num_kept[name], config.num_tail[name], config.remapped[name])
        if not any(config.num_kept.values()) and not any(config.num_tail.values()):
            raise ConfigError("FrequencyCutConfig keeps no id, and tail='zero' has no rows: keep at least one id")
        kept = tuple(config.num_kept[name] for name in self.names)
        tails = tuple(config.num_tail[name] for name in self.names)
        return kept, tails, tuple(config.remapped[name] for name in self.names)

    def _check_table(self, name: str, num_ids: int, kept: int, tail: int, remapped: bool) -> None:
        whole, kind = kept == num_ids, self.config.tail
        if not 0 <= kept <= num_ids:
            raise ConfigError(f"FrequencyCutConfig(num_kept={{{name!r}: {kept}}}): must be in [0, {num_ids}], its ids")
        zero = int(self.config.unseen == "oov_row")
        allowed = {"zero": (zero, zero), "oov_row": (1, 1), "hash": (1, num_ids - kept)}
        rows = (0, 0) if whole else allowed[kind]
        if not rows[0] <= tail <= max(rows):
            raise ConfigError(
                f"FrequencyCutConfig(num_tail={{{name!r}: {tail}}}): with tail={kind!r} and {kept} of {num_ids} ids "
                f"kept it must be in [{rows[0]}, {max(rows)}]"
            )
        if remapped and (whole or kept == 0):
            raise ConfigError(f"FrequencyCutConfig(remapped={{{name!r}: True}}): it keeps {kept} ids, which needs none")
        if remapped or kind == "hash":
            check_range(name, kept + tail)

    def _keep_most_frequent(self, counts: Mapping[str, Tensor]) -> None:
        for index, name in enumerate(self.names):
            if not self.is_remapped[index] or self.remap.bits.is_meta:
                continue
            if name not in counts:
                logger.info("table %r: no counts, so its remap is empty until a state is loaded", name)
                continue
            self.remap.keep_(index, most_frequent(counts[name], self.num_kept[index]))
