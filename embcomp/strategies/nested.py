"""``nested``: rows whose beginnings are good rows too, cut to any budget after a single training."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from embcomp.budget import Budget
from embcomp.config import check_at_least, check_at_most, check_choice, register_strategy
from embcomp.errors import ConfigError
from embcomp.hooks import Repeat
from embcomp.phases import Phase
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import make_row_store
from embcomp.storage.ragged import RaggedRows
from embcomp.strategies._allocation import check_table_names
from embcomp.strategies._candidates import first_block
from embcomp.strategies._cut_rows import CutConfig, CutTables, resolved_format
from embcomp.strategies._frequency_sizes import frequency_stops, is_falling
from embcomp.strategies._layouts import (
    Part,
    layout_bytes,
    oov_part,
    padded,
    parse_layout,
    segments_of,
    served_form,
    split_part,
    table_bytes,
)
from embcomp.tables import EmbeddingTables
from embcomp.training.greedy import GreedyCut
from embcomp.training.joint_cut import cut_groups_
from embcomp.training.search import Candidate, FrontPoint, Search

logger = logging.getLogger(__name__)

MOST_TIERS = 256
RETRAIN = ("none", "finetune", "initial")
_NOWHERE = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class NestedConfig(CutConfig):
    """Nested tables.

    Attributes:
        ladder: widths that rows are trained to be cut to, rising, joined by commas, such as ``"1,2,4,8,16"``; None for
            the powers of two below D, and D. Width 0, no row at all, is always possible.
        distill: weight of the divergence of narrower passes' predictions from those of the full width.
        tiers: frequency tiers that a table is cut into, each with a width of its own; only where counts are given, and
            ids are numbered by falling frequency. Other tables are cut as a whole, and the log names them.
        retrain: what follows the cut: ``"none"``; ``"finetune"``: training goes on with the widths that were chosen;
            ``"initial"``: it begins anew with them, from the first weights.
        layout: table name -> ``"stop<width"`` for consecutive ranges of ids, joined by spaces; None to let the budget,
            then the cut choose.
    """

    ladder: str | None = None
    distill: float = 0.0
    tiers: int = 1
    retrain: str = "none"
    layout: dict[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "distill", 0)
        check_at_least(self, "tiers", 1)
        check_at_most(self, "tiers", MOST_TIERS)
        check_choice(self, "retrain", RETRAIN)
        if self.ladder is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.ladder):
            raise ConfigError(f"NestedConfig(ladder={self.ladder!r}): write rising widths, such as '1,2,4,8,16'")
        for name, text in (self.layout or {}).items():
            parse_layout(name, text)

    def widths(self, dim: int) -> list[int]:
        """The ladder, rising, with D on top.

        Raises:
            ConfigError: if it does not rise, or goes beyond D.
        """
        if self.ladder is None:
            return [*(2**power for power in range((dim - 1).bit_length())), dim]
        widths = [int(width) for width in self.ladder.split(",")]
        if any(low >= high for low, high in pairwise(widths)) or widths[-1] > dim:
            raise ConfigError(f"NestedConfig(ladder={self.ladder!r}): widths must rise, to at most D = {dim}")
        return widths if widths[-1] == dim else [*widths, dim]


@register_strategy("nested", NestedConfig)
class NestedTables(CutTables):
    """One training for a whole front of sizes: the first values of every row make a good narrower row.

    After Matryoshka Representation Learning (Kusupati et al., arXiv 2205.13147), for tables: every step runs the model
    at full width, at random widths (one per field and batch, from a short list), and at the narrowest (the sandwich
    rule of Yu and Huang, arXiv 1903.05134), with one network for all. The *cut* then walks down from full width, each
    time narrowing the field, or the frequency tier of a field, that loses the least validation quality per byte; it
    needs no training. Where the walk passes the budget, its last step is taken for the rarest ids only, so that the
    budget is used up to within a row where ids are numbered by falling frequency. `pareto` returns the whole way, and
    `cut_` goes to any other budget, unless a retraining has fitted the weights to one. We differ in that there is one
    classifier for all widths, and widths are searched.
    """

    knob = "values"
    chosen_by_budget = ("limit_bytes", "layout")
    config: NestedConfig
    bounds: Tensor
    widths: Tensor
    _starts: Tensor
    _first: Tensor

    def __init__(
        self, specs: Sequence[TableSpec], config: NestedConfig, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(specs, config)
        self._layout = self._checked_layout()
        self._ladder = config.widths(self.embedding_dim)
        known = [(counts or {}).get(spec.name) for spec in self.specs]
        self._ordered = [count is not None and is_falling(count) for count in known]
        self._tiers = [
            frequency_stops(count, config.tiers) if ordered and count is not None else [spec.num_embeddings]
            for spec, count, ordered in zip(self.specs, known, self._ordered, strict=True)
        ]
        self._most = max(config.tiers + 2, max(map(len, self._layout)))
        self._pass = "full"
        self._training_form = False
        self._shown: Tensor | None = None
        self._drawn: Tensor | None = None
        self._cutting: GreedyCut | None = None
        self._front: list[FrontPoint] = []
        self.rows = make_row_store(config.rows, self.num_ids, self.embedding_dim, config.sparse)
        self.make_projection_()
        self.constant("_starts", self.rows.starts())
        self.register_buffer("bounds", torch.zeros(self.num_tables, self._most, dtype=torch.int64))
        self.register_buffer("widths", torch.zeros(self.num_tables, self._most, dtype=torch.int64))
        self._write_layout()
        if config.tiers > 1 and not self.bounds.is_meta:
            self._log_whole(known)
        self.reset_parameters()

    # ---- lookups ----------------------------------------------------------------------------------------------------

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        rows = ids + self.pick(self._starts, table)
        if self.is_final:
            return self.projected(self.rows(rows, self.pick(self._first, table) + self._part_of(ids, table)), table)
        if self._shown is not None:
            return self._lookup_candidates(ids, table, self._shown)
        vectors: Tensor = self.rows(rows, table)
        if not self._training_form:
            widths = self._pick_part(self.widths, ids, table)
        elif self._pass == "full" or not self.training:
            return self.projected(vectors, table)
        else:
            assert self._drawn is not None
            widths = self.pick(self._drawn, table)  # of each table one for the whole batch
        return self.projected(torch.where(self.prefix(widths), vectors, 0.0), table)

    def _lookup_candidates(self, ids: Tensor, table: Tensor | int | None, shown: Tensor) -> Tensor:
        """Each block of ids is shown as its candidate has it, ``shown`` being ``(P, T, parts)``."""
        ids, table = first_block(ids, table, len(shown))
        vectors: Tensor = self.rows(ids + self.pick(self._starts, table), table)
        widths = torch.stack([self._pick_part(own, ids, table) for own in shown])
        return self.projected(torch.where(self.prefix(widths), vectors, 0.0), table).flatten(0, 1)

    def _part_of(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        """Number of the part within its table that each id is in: int64 ``(...)``."""
        return (ids.unsqueeze(-1) >= self.pick(self.bounds, table)).sum(-1)

    def _pick_part(self, values: Tensor, ids: Tensor, table: Tensor | int | None) -> Tensor:
        """The entry of ``(T, parts)`` values that belongs to each id."""
        part = self._part_of(ids, table)
        own = self.pick(values, table)
        return own.expand(*ids.shape, self._most).gather(-1, part.unsqueeze(-1)).squeeze(-1)

    # ---- phases -----------------------------------------------------------------------------------------------------

    def phases(self) -> tuple[Phase, ...]:
        passes = ("full", "random", "narrow")
        train = Phase("train", passes=passes, distill=self.config.distill, any_budget=True)
        retrain = (Phase("retrain", rewind=self.config.retrain == "initial"),) if self.config.retrain != "none" else ()
        return (train, Phase("cut", kind="search"), *retrain)

    def enter_phase_(self, phase: Phase) -> None:
        self._training_form = phase.name != "retrain"
        self._pass = "full"

    def leave_phase_(self, phase: Phase) -> None:
        self._training_form, self._shown = False, None
        if phase.name == "retrain":
            self._front = []  # its values are of the weights before

    def set_pass_(self, name: str) -> None:
        self._pass = name
        if name == "random":
            ladder = torch.tensor([0, *self._ladder], device=self._starts.device)
            self._drawn = ladder[torch.randint(len(ladder), (self.num_tables,), device=ladder.device)]
        elif name == "narrow":
            self._drawn = torch.full_like(self._starts, self._ladder[0])

    def repeatable(self) -> Repeat:
        return partial(self._showing, self._pass, self._drawn)

    @contextlib.contextmanager
    def _showing(self, name: str, drawn: Tensor | None) -> Iterator[None]:
        now = self._pass, self._drawn
        self._pass, self._drawn = name, drawn
        try:
            yield
        finally:
            self._pass, self._drawn = now

    def make_search(self) -> Search:
        ladder = [*reversed(self._ladder), 0]
        genes = sum(map(len, self._tiers))
        self._cutting = GreedyCut([ladder] * genes, self._bytes_of, self.config.limit_bytes)
        return self._cutting

    def show_(self, candidates: Sequence[Candidate]) -> None:
        layouts = [self._layout_of(candidate) for candidate in candidates]
        self._layout = layouts[0]  # all have the same bounds
        self._write_layout()
        widths = [padded([[part.width for part in own] for own in layout], self._most) for layout in layouts]
        self._shown = torch.tensor(widths, device=self.widths.device)

    def hide_(self) -> None:
        self._shown, self._layout = None, self._checked_layout()
        self._write_layout()

    def candidate_bytes(self, candidate: Candidate) -> int:
        return self._bytes_of(candidate)

    def adopt_(self, candidate: Candidate) -> None:
        assert self._cutting is not None
        self.adopt_cut_(self._cutting.front(), self._cutting.path.index(candidate), self.config.limit_bytes)

    def adopt_cut_(self, front: Sequence[FrontPoint], place: int, limit: int | None) -> None:
        self._training_form, self._shown, self._front = False, None, list(front)
        self._choose(self._between(place, limit))

    def pareto(self) -> list[FrontPoint]:
        if not self._front:
            raise ConfigError(
                "there is no front before the cut, or after a retraining, which is for one form: run the phases first, "
                "with embcomp.training.Phases and retrain='none', or load the training form that save_pretrained saved "
                "after the cut"
            )
        return list(self._front)

    def front_state(self) -> dict[str, Any] | None:
        if not self._front or self.is_final:
            return None
        front = [[list(point.candidate), point.value] for point in self._front]
        return {"tiers": self._tiers, "ordered": self._ordered, "front": front}

    def load_front_(self, state: Mapping[str, Any] | None) -> None:
        self._front = []
        if state is None:
            return
        tiers, ordered = [list(map(int, own)) for own in state["tiers"]], list(map(bool, state["ordered"]))
        front = [(tuple(map(int, candidate)), float(value)) for candidate, value in state["front"]]
        genes, rungs = sum(map(len, tiers)), {0, *self._ladder}
        if (
            [own[-1:] for own in tiers] != [[spec.num_embeddings] for spec in self.specs]
            or len(ordered) != self.num_tables
            or not front
            or any(len(candidate) != genes or not rungs.issuperset(candidate) for candidate, _ in front)
        ):
            raise ValueError(f"the front is not of tables {', '.join(self.names)}")
        self._tiers, self._ordered = tiers, ordered
        self._front = [FrontPoint(candidate, self._bytes_of(candidate), value) for candidate, value in front]

    def cut_(self, budget: str | float | Budget) -> None:
        cut_groups_([self], budget)

    # ---- the form that is served ------------------------------------------------------------------------------------

    def widths_of(self, table: int | str) -> Tensor:
        index = self.index_of(table)
        first, found = 0, []
        for part in self._layout[index]:
            found += [torch.full((part.stop - first,), part.width, device=self._sizes.device)]
            first = part.stop
        return torch.cat(found)[: self.specs[index].num_embeddings]

    def _layout_of(self, candidate: Candidate) -> list[list[Part]]:
        widths = iter(candidate)
        return [
            [*(Part(stop, next(widths)) for stop in tiers), *oov_part(spec, self.config)]
            for spec, tiers in zip(self.specs, self._tiers, strict=True)
        ]

    def _bytes_of(self, candidate: Candidate) -> int:
        return layout_bytes(self._layout_of(candidate), self.specs, self.config)

    def _between(self, place: int, limit: int | None) -> list[list[Part]]:
        """The form at a place of the front, with what steps took given back, latest first, as far as ``limit`` allows.

        The latest step of a table whose ids are numbered by frequency is undone for as many of them as fit; the others
        for all ids or none.
        """
        layout = self._layout_of(self._front[place].candidate)
        if limit is None:
            return layout
        steps = [(old.candidate, new.candidate) for old, new in pairwise(self._front[: place + 1])]
        divided: int | None = None
        for step in reversed([step for step in steps if step[0] != step[1]]):
            changed = enumerate(zip(*step, strict=True))
            gene, before = next((gene, old) for gene, (old, new) in changed if old != new)
            table, tier = self._gene(gene)
            if divided is None and self._ordered[table]:
                layout = self._with_frequent(layout, table, tier, before, limit)
                divided = table
            elif table != divided:
                layout = self._with_all(layout, table, tier, before, limit)
        return layout

    def _with_all(self, layout: list[list[Part]], table: int, tier: int, most: int, limit: int) -> list[list[Part]]:
        """The layout with a part at the largest width up to ``most`` that fits."""
        part = layout[table][tier]
        for width in reversed(self._ladder):
            if part.width < width <= most:
                wider = split_part(layout, table, tier, part.stop, width)
                if layout_bytes(wider, self.specs, self.config) <= limit:
                    return wider
        return layout

    def _with_frequent(
        self, layout: list[list[Part]], table: int, tier: int, width: int, limit: int
    ) -> list[list[Part]]:
        """The layout with as many of a part's first ids at ``width`` as fit."""
        first, part = (layout[table][tier - 1].stop if tier else 0), layout[table][tier]
        low, high = 0, part.stop - first
        while low < high:
            middle = (low + high + 1) // 2
            fits = layout_bytes(split_part(layout, table, tier, first + middle, width), self.specs, self.config)
            low, high = (middle, high) if fits <= limit else (low, middle - 1)
        return split_part(layout, table, tier, first + low, width) if low else layout

    def _gene(self, gene: int) -> tuple[int, int]:
        for table, tiers in enumerate(self._tiers):
            if gene < len(tiers):
                return table, gene
            gene -= len(tiers)
        raise IndexError(gene)

    def _choose(self, layout: list[list[Part]]) -> None:
        self._layout = layout
        self._write_layout()
        texts = [" ".join(f"{part.stop}<{part.width}" for part in own) for own in layout]
        self.config = replace(self.config, layout=dict(zip(self.names, texts, strict=True)))

    def _write_layout(self) -> None:
        if self.bounds.is_meta:
            return
        stops = padded([[part.stop for part in own[:-1]] for own in self._layout], self._most, _NOWHERE)
        widths = padded([[part.width for part in own] for own in self._layout], self._most)
        self.bounds.copy_(torch.tensor(stops))
        self.widths.copy_(torch.tensor(widths))

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.is_final or self.bounds.is_meta:
            return
        layout = []
        for bounds, widths, ids in zip(self.bounds.tolist(), self.widths.tolist(), self.num_ids, strict=True):
            stops = [*(stop for stop in bounds if stop != _NOWHERE), ids]
            layout.append([Part(stop, width) for stop, width in zip(stops, widths, strict=False)])
        self._choose(layout)

    def finalize_(self) -> EmbeddingTables:
        if self.is_final:
            return self
        served, layout, starts = self.rows.finalize(), self._checked_layout(), self.rows.starts()
        segments, cut, owner = segments_of(layout)
        widths, matrices = served_form(layout, self.specs, self.config)
        stops = [[0, *(part.stop for part in own[:-1])] for own in layout]
        first = [start + stop for start, own in zip(starts, stops, strict=True) for stop in own]
        if self.projection is not None:
            pieces = [(o, f, f + rows, w) for o, f, rows, w in zip(owner, first, segments, cut, strict=True)]
            self.projection.multiply_(served, [piece for piece in pieces if not matrices[piece[0]]])
            self.projection = self.projection.served(matrices) if any(matrices) else None
        with self.bounds.device:
            ragged = RaggedRows(segments, self.embedding_dim, resolved_format(self.specs, self.config), widths, owner)
        if not self.bounds.is_meta:
            ragged = ragged.to(self.bounds.device)
            places = zip(first, segments, strict=True)
            ragged.take_(served, [torch.arange(f, f + rows, device=self.bounds.device) for f, rows in places])
        bounds = padded([[part.stop for part in own[:-1]] for own in layout], self._most, _NOWHERE)
        numbers = [sum(len(own) for own in layout[:table]) for table in range(self.num_tables)]
        del self.bounds, self.widths
        for name, values in (("bounds", bounds), ("_first", numbers), ("_starts", starts)):
            self.constant(name, torch.tensor(values, device=self._sizes.device))
        self.rows = ragged
        return super().finalize_()

    def served_bytes(self) -> tuple[list[int], list[int], int]:
        return *table_bytes(self._layout, self.specs, self.config), 0

    # ---- life -------------------------------------------------------------------------------------------------------

    def fit(self, weights: Sequence[Tensor], counts: Sequence[Tensor]) -> None:
        for table, (start, weight, count) in enumerate(zip(self.rows.starts(), weights, counts, strict=True)):
            self.rows.write_(start, self.rotated(table, weight, count))

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: NestedConfig, known: Knowledge) -> tuple[int, int]:
        total = sum(spec.num_embeddings for spec in specs)
        return (1, 1) if config.layout is not None else (1, total * specs[0].embedding_dim)

    @classmethod
    def resize(cls, specs: Sequence[TableSpec], config: NestedConfig, size: int, known: Knowledge) -> NestedConfig:
        if config.layout is not None:
            return config
        level, left = divmod(size, sum(spec.num_embeddings for spec in specs))
        layout = {}
        for spec in sorted(specs, key=lambda spec: spec.num_embeddings):  # small tables get one more value first
            wider = min(left, spec.num_embeddings)
            left -= wider
            parts = [Part(wider, level + 1)] if wider else []
            if wider < spec.num_embeddings:
                parts.append(Part(spec.num_embeddings, level))
            layout[spec.name] = " ".join(f"{part.stop}<{part.width}" for part in [*parts, *oov_part(spec, config)])
        return replace(config, layout={spec.name: layout[spec.name] for spec in specs})

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: NestedConfig, known: Knowledge) -> NestedConfig:
        whole = sum(spec.num_embeddings for spec in specs) * specs[0].embedding_dim
        return cls.resize(specs, config, whole, known)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _log_whole(self, known: Sequence[Tensor | None]) -> None:
        """Name the tables that ``tiers`` can't divide."""
        found = list(zip(self.names, known, self._ordered, strict=True))
        if missing := [name for name, count, _ in found if count is None]:
            logger.info("no counts of tables %s: they are cut as a whole, not in tiers", ", ".join(missing))
        if unordered := [name for name, count, ordered in found if count is not None and not ordered]:
            logger.warning(
                "ids of tables %s are not numbered by falling frequency: they are cut as a whole, not in tiers; "
                "number ids by count, the most frequent first, and give counts in that order",
                ", ".join(unordered),
            )

    def _checked_layout(self) -> list[list[Part]]:
        if self.config.layout is None:
            raise ConfigError("NestedConfig needs layout: make a plan first, with a budget or without")
        check_table_names(self.config, "layout", self.names)
        found = [parse_layout(name, self.config.layout[name]) for name in self.names]
        for name, parts, ids in zip(self.names, found, self.num_ids, strict=True):
            if parts[-1].stop != ids or any(part.width > self.embedding_dim for part in parts):
                raise ConfigError(
                    f"NestedConfig(layout={{{name!r}: …}}): must end at {ids} ids, widths being in "
                    f"[0, {self.embedding_dim}]"
                )
        return found
