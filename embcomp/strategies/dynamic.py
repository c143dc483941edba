"""``dynamic``: a fixed number of rows under a stream of ids that come and go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from embcomp.config import StrategyConfig, check_at_least, check_choice, register_strategy
from embcomp.errors import ConfigError
from embcomp.hashing import check_range, hash_seed, hash_to_range
from embcomp.memory import SHARED, MemoryPart, MemoryReport
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import RowFormat, RowStore, make_row_store
from embcomp.storage.base import as_matrix
from embcomp.storage.ragged import check_granularity
from embcomp.strategies._allocation import check_table_names
from embcomp.strategies._dynamic_map import EMPTY
from embcomp.strategies._dynamic_policy import ADMISSIONS, POLICIES
from embcomp.strategies._dynamic_residents import NewResidents, Residents
from embcomp.strategies._dynamic_sizes import (
    ID_BYTES,
    fewest_rows,
    is_open,
    most_rows,
    sizes_within,
    with_fallback,
)
from embcomp.strategies._fitting import shared_means
from embcomp.tables import EmbeddingTables

STARTS = ("random", "fallback")


@dataclass(frozen=True)
class DynamicConfig(StrategyConfig):
    """Slots that ids compete for, and the rules by which they do.

    With ``unseen="hash"`` ids are open: every 64-bit id may have a slot. V of a table (``num_embeddings``) then is how
    many ids a plain table would have been made for. It says what 100 % of a budget are, how many slots are worth
    having, and which ids (those below V) `materialize` and `scores` run through; nothing else.

    Attributes:
        num_slots: table name -> ids that can have a row of their own at a time; None to let the budget choose.
        num_fallback: table name -> rows that ids without a slot are hashed to, at least one; 0 for a table that keeps
            a row for every id below V, and no map. None to let `fallback_share` choose.
        fallback_share: share of a table's rows that are fallback rows, above 0 and below 1.
        exempt_share: share of the budget's rows that may go to the smallest tables, so that all their ids have one, in
            [0, 1).
        policy: by which score slots are given, see the strategy: ``"lfu"``, ``"lru"``, ``"distance_lfu"``, ``"ttl"``.
        decay: p of ``"distance_lfu"``: scores are lookups / (steps since the last one + 1) ** p; at least 0.
        ttl: of ``"ttl"``: steps without a lookup after which a slot may be taken.
        admission: which candidates may compete: ``"always"`` all; ``"count"`` those that were looked up at least
            `min_count` times since the last competition; ``"probability"`` each with the chance
            1 − (1 − `admit_probability`) ** lookups.
        min_count: see `admission`.
        admit_probability: see `admission`; above 0, at most 1.
        interval: steps between competitions, which sort all slots: for millions of them take hundreds.
        history: ids without a slot that are remembered until the next competition, for each slot of their table. Where
            there are more, those of the lowest scores are forgotten; one that is looked up now and then among many that
            come once may then never get a slot, and a warning says so.
        min_history: the least number of ids that are remembered for a table, however few slots it has (where ids are
            not open, no more than there are).
        start: what is in the row of an id that gets a slot: ``"random"``, a newly drawn row, or ``"fallback"``, the row
            that it has shared until then.
    """

    num_slots: dict[str, int] | None = None
    num_fallback: dict[str, int] | None = None
    fallback_share: float = 0.05
    exempt_share: float = 0.05
    policy: str = "distance_lfu"
    decay: float = 1.0
    ttl: int = 1000
    admission: str = "always"
    min_count: int = 2
    admit_probability: float = 0.1
    interval: int = 100
    history: float = 1.0
    min_history: int = 16384
    start: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, allowed in (("policy", POLICIES), ("admission", ADMISSIONS), ("start", STARTS)):
            check_choice(self, field, allowed)
        if self.decay == math.inf:
            raise ConfigError("DynamicConfig(decay=inf): must be finite; policy='lru' looks at nothing but time")
        for field, minimum in (("ttl", 1), ("min_count", 1), ("interval", 1), ("decay", 0), ("min_history", 1)):
            check_at_least(self, field, minimum)
        if not 0 < self.fallback_share < 1:
            raise ConfigError(f"DynamicConfig(fallback_share={self.fallback_share!r}): must be above 0 and below 1")
        if not 0 <= self.exempt_share < 1:
            raise ConfigError(f"DynamicConfig(exempt_share={self.exempt_share!r}): must be in [0, 1)")
        if not 0 < self.admit_probability <= 1:
            raise ConfigError(
                f"DynamicConfig(admit_probability={self.admit_probability!r}): must be above 0, at most 1"
            )
        if not 0 < self.history < math.inf:
            raise ConfigError(f"DynamicConfig(history={self.history!r}): must be above 0, and finite")
        check_granularity(RowFormat.parse(self.rows))

    @classmethod
    def of_version(cls, version: int, options: dict[str, Any]) -> dict[str, Any]:
        return {"min_history": 1, **options} if version < 2 else options  # when checkpoints had no more room


@register_strategy("dynamic", DynamicConfig)
class DynamicTables(EmbeddingTables):
    """A fixed number of rows for ids that come and go: some ids have a row of their own, the others share a few.

    Training lookups are counted. Every ``interval`` steps the ids that had no slot compete with those that have one,
    table by table, and the best scores win: lookups (``"lfu"``), the step of the last one (``"lru"``), or lookups /
    (steps since the last one + 1) ** p (``"distance_lfu"``); with ``"ttl"`` only slots that are empty, or whose ids
    were not looked up for some time, are given away, to those that were looked up most often. The row of an id that
    gets a slot begins anew, and so does its optimizer state, if the loop hands its optimizers over:
    ``handle.step_(optimizer)`` after ``optimizer.step()``, or `embcomp.training.reset_rows_`. A loop that never makes
    ``step_`` trains shared rows alone. Evaluation, serving, lookups without gradients, and whole tables
    (`materialize`, `scores`) are not counted, nor are items that are scored by `embcomp.scoring`.

    These are the rules of TorchRec's managed collision modules, of which there is a paper for the one with time to live
    ("MPZCH", arXiv 2602.17050); Monolith ("Monolith: Real Time Recommendation System With Collisionless Embedding
    Table", arXiv 2209.07663) admits by count and chance. Here all tables of a group share one map, ids are found by
    bisection and never collide, whatever their table; there are several fallback rows instead of one; time is counted
    in steps, not hours; admission concerns candidates alone, where TorchRec's filter also hides lookups of residents.
    `embcomp.integrations.managed_collision` runs TorchRec's own modules in its place.

    Served, a slot costs its row and the 8 bytes of its id. The training form has, beside the rows, 32 bytes per slot
    and 64 per id of the history. Tables whose plain rows would cost no more than slots for them keep a row for every id
    below V, unless ids are open. The id 2⁶³ − 1 can't have a slot. One process: the map is not sharded.
    """

    knob = "rows"
    takes_any_id = True
    config: DynamicConfig
    _starts: Tensor
    _shared_starts: Tensor
    _shared_segments: Tensor
    _columns: Tensor
    _ranges: Tensor
    _seeds: Tensor
    _is_whole: Tensor

    def __init__(
        self, specs: Sequence[TableSpec], config: DynamicConfig, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(specs, config)
        self.num_fallback = self._checked_sizes()
        assert config.num_slots is not None
        self.is_whole = tuple(fallback == 0 for fallback in self.num_fallback)
        every = tuple(config.num_slots[name] for name in self.names)
        self.num_slots = tuple(0 if whole else slots for whole, slots in zip(self.is_whole, every, strict=True))
        oov = int(config.unseen == "oov_row")
        # Fallback rows are means, slots are not: they lie in segments of their own, so that each have scales that fit.
        shared = [fallback + oov for fallback in self.num_fallback if fallback]
        self.rows: RowStore = make_row_store(config.rows, [*every, *shared], self.embedding_dim, config.sparse)
        starts, behind = self.rows.starts(), iter(range(self.num_tables, self.num_tables + len(shared)))
        segments = [t if whole else next(behind) for t, whole in enumerate(self.is_whole)]
        self.constant("_starts", starts[: self.num_tables])
        self.constant("_shared_starts", [starts[segment] for segment in segments])
        self.constant("_shared_segments", segments)
        self.constant("_columns", list(range(self.num_tables)))
        self.constant("_ranges", [n or ids for n, ids in zip(self.num_fallback, self.num_ids, strict=True)])
        self.constant("_seeds", [hash_seed(config.seed, name, "fallback") for name in self.names])
        self.constant("_is_whole", self.is_whole)
        row_format = RowFormat.parse(config.rows).resolve(self.embedding_dim)
        self._has_segment_scales = row_format.is_integer and row_format.granularity in ("column", "table")
        self.residents = Residents(self.names, self.num_slots, self._room(), config)
        self._reassigned: Tensor | None = None
        self.reset_parameters()
        for index, name in enumerate(self.names):
            if name in (counts or {}) and not self.is_whole[index] and not self._weight().is_meta:
                self._admit(index, (counts or {})[name])

    # ---- lookups ----------------------------------------------------------------------------------------------------

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        return self.rows(*self._find(ids, table))

    def stored_rows(self, ids: Tensor, table: Tensor | int | None) -> tuple[RowStore, Tensor] | None:
        return None if self._has_segment_scales else (self.rows, self._find(ids, table)[0])

    def _find(self, ids: Tensor, table: Tensor | int | None) -> tuple[Tensor, Tensor | int | None]:
        """The stored row of each id, int64 ``(...)``, and its segment, where the store must know it."""
        rows = self._shared_row_of(ids, table)
        if not self.residents.map.total:
            return rows, table
        found, slots = self.residents.map(ids, table)
        rows = torch.where(found, slots + self.pick(self._starts, table), rows)
        if not self._has_segment_scales:
            return rows, None
        return rows, torch.where(found, self.pick(self._columns, table), self.pick(self._shared_segments, table))

    def _shared_row_of(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        """The stored row that ids have without a slot: a fallback row; in whole tables their own."""
        ranges, starts = self.pick(self._ranges, table), self.pick(self._shared_starts, table)
        rows = hash_to_range(ids, self.pick(self._seeds, table), ranges)
        if any(self.is_whole):
            rows = torch.where(self.pick(self._is_whole, table) & (ids >= 0) & (ids < ranges), ids, rows)
        if self.config.unseen == "oov_row":
            rows = torch.where(
                ids == self.pick(self._sizes, table), ranges - self.pick(self._is_whole, table).long(), rows
            )
        return rows + starts

    def residents_of(self, table: int | str) -> Tensor:
        """The ids that have a slot, sorted: int64 ``(n,)``; none for a table that keeps all ids."""
        return self.residents.map.of(self.index_of(table))

    # ---- what happens in training -----------------------------------------------------------------------------------

    def seen_(self, ids: Tensor, table: Tensor | int | None, blank: Tensor | None) -> None:
        if not self._is_dynamic() or type(ids) is not Tensor or ids.is_meta:  # those of somebody's trace don't count
            return
        if self.config.unseen == "oov_row":
            blank = (ids == self.pick(self._sizes, table)) | (False if blank is None else blank)
        owner = torch.arange(self.num_tables, device=ids.device) if table is None else table
        owner = owner.clone() if isinstance(owner, Tensor) else owner  # the caller may write to both
        self.residents.note_(ids.clone() if blank is None else ids.masked_fill(blank, EMPTY), owner)

    def step_(self) -> None:
        if self._is_dynamic():
            self._begin_rows_(self.residents.step_())

    def compete_(self) -> None:
        """Give slots to those who deserve them now; `step_` does so every ``interval`` steps."""
        if self._is_dynamic():
            self._begin_rows_(self.residents.compete_())

    def reassigned_(self) -> list[tuple[nn.Parameter, Tensor]]:
        rows, self._reassigned = self._reassigned, None
        return [] if rows is None else [(self._weight(), rows)]

    def row_owners(self) -> tuple[nn.Parameter, Tensor] | None:
        if not self._is_dynamic():
            return None
        places, number = self.residents.map, len(self._weight())
        owners = torch.full((number,), EMPTY, dtype=torch.int64, device=self._starts.device)
        owners[self._starts[places.owners()] + places.slots] = places.ids
        return self._weight(), owners

    def _is_dynamic(self) -> bool:
        """Whether there are slots to be given, in rows that are trained."""
        return not self.is_final and bool(self.residents.map.total) and self._weight().requires_grad

    @torch.no_grad()
    def _begin_rows_(self, new: NewResidents | None) -> None:
        """Begin the rows of ids that got a slot."""
        if new is None:
            return
        rows = self._starts[new.table] + new.slots
        if self.config.start == "fallback":
            first = self._weight()[self._shared_row_of(new.ids, new.table)]
        else:
            generator = self.generator(f"slots at step {int(self.residents.clock)}")
            deviation = torch.tensor([spec.init_std for spec in self.specs], device=rows.device)[new.table]
            first = torch.randn(len(rows), self.embedding_dim, generator=generator, device="cpu").to(rows.device)
            first *= deviation.unsqueeze(1)
        as_matrix(self.rows).put_(rows, first)
        self._reassigned = rows if self._reassigned is None else torch.cat([self._reassigned, rows]).unique()

    # ---- life -------------------------------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        owners = [*range(self.num_tables), *(table for table, whole in enumerate(self.is_whole) if not whole)]
        self.rows.reset_parameters([self.specs[table].init_std for table in owners], self.generator())

    def fit(self, weights: Sequence[Tensor], counts: Sequence[Tensor]) -> None:
        for index, (weight, count) in enumerate(zip(weights, counts, strict=True)):
            if self.is_whole[index]:
                self.rows.write_(self.rows.starts()[index], weight)
            else:
                self._fit_table(index, weight, count)

    def _fit_table(self, index: int, weight: Tensor, count: Tensor) -> None:
        """The most frequent ids get slots, and the others their count-weighted mean in each fallback row."""
        number, mean = self.specs[index].num_embeddings, count @ weight / count.sum()
        self._admit(index, count[:number])
        ids = torch.arange(number, device=weight.device)
        found, slots = self.residents.map(ids, index)
        own = mean.expand(self.num_slots[index], -1).clone()
        own[slots[found]] = weight[:number][found]
        self.rows.write_(self.rows.starts()[index], own)
        shared, start = mean.expand(self.num_fallback[index], -1), int(self._shared_starts[index])
        if not bool(found.all()):
            rows = (self._shared_row_of(ids, index) - start)[~found]
            shared = shared_means(rows, weight[:number][~found], count[:number][~found], len(shared))
        self.rows.write_(start, torch.cat([shared, weight[number:]]))

    def finalize_(self) -> EmbeddingTables:
        if self.is_final:
            return super().finalize_()
        self._sort_rows_()
        super().finalize_()  # may find rows that are not finite: until then nothing is lost
        self.residents.finalize_()
        self._reassigned = None
        return self

    @torch.no_grad()
    def _sort_rows_(self) -> None:
        """Bring slots into the order of places, so that served tables need not say which is whose."""
        weight, places = self._weight(), self.residents.map
        if weight.is_meta:
            return
        order, starts = torch.arange(len(weight), device=weight.device), self._starts[places.owners()]
        order[starts + places.within()] = starts + places.slots
        weight.copy_(weight[order])
        places.slots.copy_(places.within())

    # ---- growth -----------------------------------------------------------------------------------------------------

    def grown_config(self, specs: Sequence[TableSpec], num_slots: Mapping[str, int], is_open: bool) -> DynamicConfig:
        if is_open:
            return replace(self.config, num_slots=None)
        slots, oov = {**(self.config.num_slots or {}), **num_slots}, int(self.config.unseen == "oov_row")
        for spec, whole in zip(specs, self.is_whole, strict=True):
            if whole and spec.name in num_slots:
                raise ConfigError(
                    f"resize_: table {spec.name!r} keeps a row for every id below {spec.num_embeddings}, and has no "
                    "slots: leave it out of num_slots"
                )
            if whole:
                slots[spec.name] = spec.num_embeddings + oov
        return replace(self.config, num_slots=slots)

    def take_rows_(self, old: EmbeddingTables) -> None:
        super().take_rows_(old)
        assert isinstance(old, DynamicTables)
        taken = self.residents.take_(old.residents)
        mine = self._starts[taken.table] + taken.slots
        theirs = old._starts[taken.table] + old.residents.map(taken.ids, taken.table)[1]
        as_matrix(self.rows).put_(mine, old._weight()[theirs])

    def take_table_(self, index: int, old: DynamicTables, own: int, last: int) -> None:
        mine, theirs = as_matrix(self.rows), as_matrix(old.rows)
        if self.is_whole[index]:
            mine.take_segment_(index, theirs, own, last)
        else:
            segments = int(self._shared_segments[index]), int(old._shared_segments[own])
            mine.take_segment_(segments[0], theirs, segments[1])
            mine.take_scales_(index, theirs, own)

    # ---- bytes ------------------------------------------------------------------------------------------------------

    def memory(self) -> MemoryReport:
        report = super().memory()
        owners = [*self.names, *(name for name, whole in zip(self.names, self.is_whole, strict=True) if not whole)]
        stored = [part for part in report.parts if part.name == "rows"]
        parts = [replace(part, table=name) for part, name in zip(stored, owners, strict=True)]
        each = ID_BYTES if self.is_final else 4 * ID_BYTES
        for name, slots in zip(self.names, self.num_slots, strict=True):
            if slots:
                parts.append(MemoryPart(name, "ids", ID_BYTES * slots, 0, 0, each * slots))
        if not self.is_final:
            kept = [self.residents.clock, *self.residents.history.state_dict().values()]
            parts.append(MemoryPart(SHARED, "history", 0, 0, 0, sum(tensor.nbytes for tensor in kept)))
        return MemoryReport(tuple(parts), report.full_bytes)

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        self.residents.check_state(state, "residents.")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.residents.check_state(state_dict, f"{prefix}residents.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: DynamicConfig, known: Knowledge) -> tuple[int, int]:
        if config.num_slots is not None:
            return 1, 1
        return sum(fewest_rows(specs, config)), sum(most_rows(specs, config))

    @classmethod
    def resize(cls, specs: Sequence[TableSpec], config: DynamicConfig, size: int, known: Knowledge) -> DynamicConfig:
        return with_fallback(specs, config) if config.num_slots is not None else sizes_within(specs, config, size)

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: DynamicConfig, known: Knowledge) -> Any:
        return with_fallback(specs, config) if config.num_slots is not None else super().complete(specs, config, known)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _checked_sizes(self) -> tuple[int, ...]:
        config = self.config
        if config.num_slots is None or config.num_fallback is None:
            raise ConfigError("DynamicConfig needs num_slots and num_fallback: plan with a budget, or with num_slots")
        for field in ("num_slots", "num_fallback"):
            check_table_names(config, field, self.names)
        for name, num_ids in zip(self.names, self.num_ids, strict=True):
            slots, fallback = config.num_slots[name], config.num_fallback[name]
            most = math.inf if is_open(config) else num_ids
            if not 1 <= slots <= most:
                limit = "at least 1" if most == math.inf else f"in [1, {most}], its ids"
                raise ConfigError(f"DynamicConfig(num_slots={{{name!r}: {slots}}}): must be {limit}")
            if fallback < 0 or (fallback == 0 and slots != num_ids):
                raise ConfigError(
                    f"DynamicConfig(num_fallback={{{name!r}: {fallback}}}): must be at least 1, or 0 where num_slots "
                    f"is the number of ids, {num_ids}"
                )
            if fallback or is_open(config):
                check_range(name, fallback or num_ids)
        return tuple(config.num_fallback[name] for name in self.names)

    def _room(self) -> list[int]:
        """How many ids without a slot are remembered, table by table."""
        each, least = self.config.history, self.config.min_history
        lowest = [least if is_open(self.config) else min(least, num_ids) for num_ids in self.num_ids]
        sizes = zip(self.num_slots, lowest, strict=True)
        return [max(math.ceil(each * slots), least) if slots else 0 for slots, least in sizes]

    def _admit(self, index: int, counts: Tensor) -> None:
        """Give a table's slots to its most frequent ids."""
        padding = self.specs[index].padding_idx
        if padding is not None:
            counts = counts.index_fill(0, torch.tensor([padding], device=counts.device), 0)
        self.residents.admit_(index, counts)

    def _weight(self) -> nn.Parameter:
        return self.rows.get_parameter("weight")
