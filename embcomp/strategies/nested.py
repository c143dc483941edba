"""``nested``: rows whose beginnings are good rows too, cut to any budget after a single training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from embcomp.budget import Budget
from embcomp.config import StrategyConfig, check_at_least, check_choice, register_strategy
from embcomp.errors import BudgetError, ConfigError
from embcomp.memory import MemoryReport
from embcomp.phases import Phase
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import RowFormat, make_row_store
from embcomp.storage.ragged import RaggedRows, check_granularity, ragged_bytes
from embcomp.strategies._allocation import check_table_names
from embcomp.strategies._candidates import first_block
from embcomp.strategies._prefix_projection import PrefixProjection, fold
from embcomp.strategies._projected import PROJECTIONS, principal_axes
from embcomp.tables import EmbeddingTables
from embcomp.training.greedy import GreedyCut
from embcomp.training.search import Candidate, FrontPoint, Search

RETRAIN = ("none", "finetune", "initial")
_NOWHERE = torch.iinfo(torch.int64).max
_PART = re.compile(r"(\d+)<(\d+)")


@dataclass(frozen=True)
class NestedConfig(StrategyConfig):
    """Nested tables.

    Attributes:
        ladder: widths that rows are trained to be cut to, rising, joined by commas, such as ``"1,2,4,8,16"``; None for
            the powers of two below D, and D. Width 0, no row at all, is always possible.
        projection: ``"linear"``: a matrix per table brings rows of any width to D, so that narrow rows take part in
            all dimensions; ``"none"``: zeros behind them.
        distill: weight of the divergence of narrower passes' predictions from those of the full width.
        tiers: frequency tiers that a table is cut into, each with a width of its own; only where counts are given, and
            ids are numbered by falling frequency.
        retrain: what follows the cut: ``"none"``; ``"finetune"``: training goes on with the widths that were chosen;
            ``"initial"``: it begins anew with them, from the first weights.
        layout: table name -> ``"stop<width"`` for consecutive ranges of ids, joined by spaces; None to let the budget,
            then the cut choose.
        limit_bytes: serve bytes that the cut ends at; None for all. The budget sets it.
    """

    ladder: str | None = None
    projection: str = "linear"
    distill: float = 0.0
    tiers: int = 1
    retrain: str = "none"
    layout: dict[str, str] | None = None
    limit_bytes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_granularity(RowFormat.parse(self.rows))
        check_choice(self, "projection", PROJECTIONS)
        check_at_least(self, "distill", 0)
        check_at_least(self, "tiers", 1)
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


class Part(NamedTuple):
    """Ids of a table up to ``stop``, and the width of their rows."""

    stop: int
    width: int


@register_strategy("nested", NestedConfig)
class NestedTables(EmbeddingTables):
    """One training for a whole front of sizes: the first values of every row make a good narrower row.

    After Matryoshka Representation Learning (Kusupati et al., arXiv 2205.13147), for tables: every step runs the model
    at full width, at random widths (one per field and batch, from a short list), and at the narrowest (the sandwich
    rule of Yu and Huang, arXiv 1903.05134), with one network for all. The *cut* then walks down from full width, each
    time narrowing the field, or the frequency tier of a field, that loses the least validation quality per byte; it
    needs no training. Where the walk passes the budget, its last step is taken for the rarest ids only, so that the
    budget is used up to within a row where ids are numbered by falling frequency. `pareto` returns the whole way, and
    `cut_` goes to any other budget. We differ in that there is one classifier for all widths, and widths are searched.
    """

    knob = "values"
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
        self._tiers = [_tiers(spec, config, (counts or {}).get(spec.name)) for spec in self.specs]
        self._most = max(config.tiers + 2, max(map(len, self._layout)))
        self._pass = "full"
        self._training_form = False
        self._shown: Tensor | None = None
        self._drawn: Tensor | None = None
        self._cutting: GreedyCut | None = None
        self.rows = make_row_store(config.rows, self.num_ids, self.embedding_dim, config.sparse)
        self.projection: PrefixProjection | None = None
        if config.projection == "linear":
            self.projection = PrefixProjection(self.num_tables, self.embedding_dim)
        self.constant("_starts", self.rows.starts())
        self.register_buffer("bounds", torch.zeros(self.num_tables, self._most, dtype=torch.int64))
        self.register_buffer("widths", torch.zeros(self.num_tables, self._most, dtype=torch.int64))
        self._write_layout()
        self.reset_parameters()

    # ---- lookups ----------------------------------------------------------------------------------------------------

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        rows = ids + self.pick(self._starts, table)
        if self.is_final:
            return self._projected(self.rows(rows, self.pick(self._first, table) + self._part_of(ids, table)), table)
        if self._shown is not None:
            return self._lookup_candidates(ids, table, self._shown)
        vectors: Tensor = self.rows(rows, table)
        if not self._training_form:
            widths = self._pick_part(self.widths, ids, table)
        elif self._pass == "full" or not self.training:
            return self._projected(vectors, table)
        else:
            widths = self._pass_widths(table)
        return self._projected(torch.where(self._prefix(widths), vectors, 0.0), table)

    def _projected(self, vectors: Tensor, table: Tensor | int | None) -> Tensor:
        return vectors if self.projection is None else self.projection(vectors, table)

    def _lookup_candidates(self, ids: Tensor, table: Tensor | int | None, shown: Tensor) -> Tensor:
        """Each block of ids is shown as its candidate has it, ``shown`` being ``(P, T, parts)``."""
        ids, table = first_block(ids, table, len(shown))
        vectors: Tensor = self.rows(ids + self.pick(self._starts, table), table)
        widths = torch.stack([self._pick_part(own, ids, table) for own in shown])
        return self._projected(torch.where(self._prefix(widths), vectors, 0.0), table).flatten(0, 1)

    def _pass_widths(self, table: Tensor | int | None) -> Tensor:
        """Widths of this pass: of each table, one for the whole batch."""
        assert self._drawn is not None
        return self.pick(self._drawn, table)

    def _prefix(self, widths: Tensor) -> Tensor:
        return torch.arange(self.embedding_dim, device=widths.device) < widths.unsqueeze(-1)

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
        train = Phase("train", passes=("full", "random", "narrow"), distill=self.config.distill)
        retrain = (Phase("retrain", rewind=self.config.retrain == "initial"),) if self.config.retrain != "none" else ()
        return (train, Phase("cut", kind="search"), *retrain)

    def enter_phase_(self, phase: Phase) -> None:
        self._training_form = phase.name != "retrain"
        self._pass = "full"

    def leave_phase_(self, phase: Phase) -> None:
        self._training_form, self._shown = False, None

    def set_pass_(self, name: str) -> None:
        self._pass = name
        if name == "random":
            ladder = torch.tensor([0, *self._ladder], device=self._starts.device)
            self._drawn = ladder[torch.randint(len(ladder), (self.num_tables,), device=ladder.device)]
        elif name == "narrow":
            self._drawn = torch.full_like(self._starts, self._ladder[0])

    def make_search(self) -> Search:
        ladder = [*reversed(self._ladder), 0]
        genes = sum(map(len, self._tiers))
        self._cutting = GreedyCut([ladder] * genes, self._bytes_of, self.config.limit_bytes)
        return self._cutting

    def show_(self, candidates: Sequence[Candidate]) -> None:
        layouts = [self._layout_of(candidate) for candidate in candidates]
        self._layout = layouts[0]  # all have the same bounds
        self._write_layout()
        widths = [_padded([[part.width for part in own] for own in layout], self._most) for layout in layouts]
        self._shown = torch.tensor(widths, device=self.widths.device)

    def adopt_(self, candidate: Candidate) -> None:
        self._training_form, self._shown = False, None
        self._choose(self._between(candidate))

    def pareto(self) -> list[FrontPoint]:
        if self._cutting is None:
            raise ConfigError("there is no front before the cut: run the phases first, with embcomp.training.Phases")
        return self._cutting.front()

    def cut_(self, budget: str | float | Budget) -> None:
        limit, smallest = (
            Budget.parse(budget).bytes(sum(spec.full_bytes for spec in self.specs)),
            self.pareto()[-1].bytes,
        )
        assert self._cutting is not None
        if limit < smallest:
            raise BudgetError(f"the smallest form takes {smallest} B, budget {budget} is {limit} B", smallest)
        self._cutting.limit = limit
        self._choose(self._between(self._cutting.within(limit)))

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
            [*(Part(stop, next(widths)) for stop in tiers), *_oov(spec, self.config)]
            for spec, tiers in zip(self.specs, self._tiers, strict=True)
        ]

    def _bytes_of(self, candidate: Candidate) -> int:
        return layout_bytes(self._layout_of(candidate), self.specs, self.config)

    def _between(self, candidate: Candidate) -> list[list[Part]]:
        """The form of a candidate, its last step undone for as many frequent ids as the budget allows."""
        layout = self._layout_of(candidate)
        assert self._cutting is not None
        place = self._cutting.path.index(candidate)
        limit = self._cutting.limit
        if not place or limit is None:
            return layout
        before = self._cutting.path[place - 1]
        gene = next(g for g, (old, new) in enumerate(zip(before, candidate, strict=True)) if old != new)
        table, tier = self._gene(gene)
        first, part = (layout[table][tier - 1].stop if tier else 0), layout[table][tier]
        low, high = 0, part.stop - first if self._is_ordered(table) else 0
        while low < high:
            middle = (low + high + 1) // 2
            fits = layout_bytes(_split(layout, table, tier, first + middle, before[gene]), self.specs, self.config)
            low, high = (middle, high) if fits <= limit else (low, middle - 1)
        return _split(layout, table, tier, first + low, before[gene]) if low else layout

    def _gene(self, gene: int) -> tuple[int, int]:
        for table, tiers in enumerate(self._tiers):
            if gene < len(tiers):
                return table, gene
            gene -= len(tiers)
        raise IndexError(gene)

    def _is_ordered(self, table: int) -> bool:
        return self._tiers[table].ordered

    def _choose(self, layout: list[list[Part]]) -> None:
        self._layout = layout
        self._write_layout()
        texts = [" ".join(f"{part.stop}<{part.width}" for part in own) for own in layout]
        self.config = replace(self.config, layout=dict(zip(self.names, texts, strict=True)))

    def _write_layout(self) -> None:
        if self.bounds.is_meta:
            return
        stops = _padded([[part.stop for part in own[:-1]] for own in self._layout], self._most, _NOWHERE)
        widths = _padded([[part.width for part in own] for own in self._layout], self._most)
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
        segments, cut, owner = _segments(layout)
        widths, matrices = served_form(layout, self.specs, self.config)
        stops = [[0, *(part.stop for part in own[:-1])] for own in layout]
        first = [start + stop for start, own in zip(starts, stops, strict=True) for stop in own]
        if self.projection is not None:
            pieces = [(o, f, f + rows, w) for o, f, rows, w in zip(owner, first, segments, cut, strict=True)]
            self.projection.multiply_(served, [piece for piece in pieces if not matrices[piece[0]]])
            self.projection = self.projection.served(matrices) if any(matrices) else None
        with self.bounds.device:
            ragged = RaggedRows(segments, self.embedding_dim, _row_format(self.specs, self.config), widths, owner)
        if not self.bounds.is_meta:
            ragged = ragged.to(self.bounds.device)
            places = zip(first, segments, strict=True)
            ragged.take_(served, [torch.arange(f, f + rows, device=self.bounds.device) for f, rows in places])
        bounds = _padded([[part.stop for part in own[:-1]] for own in layout], self._most, _NOWHERE)
        numbers = [sum(len(own) for own in layout[:table]) for table in range(self.num_tables)]
        del self.bounds, self.widths
        for name, values in (("bounds", bounds), ("_first", numbers), ("_starts", starts)):
            self.constant(name, torch.tensor(values, device=self._sizes.device))
        self.rows = ragged
        return super().finalize_()

    def memory(self) -> MemoryReport:
        report = super().memory()
        if self.is_final:
            return report
        rows, matrices = table_bytes(self._layout, self.specs, self.config)
        own = {"rows": dict(zip(self.names, rows, strict=True))}
        if self.projection is not None:
            own["projection"] = dict(zip(self.names, matrices, strict=True))
        parts = [
            replace(part, serve_bytes=own[part.name][part.table] if part.name in own else 0) for part in report.parts
        ]
        return MemoryReport(tuple(parts), report.full_bytes)

    # ---- life -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.rows.reset_parameters([spec.init_std for spec in self.specs], self.generator())
        if self.projection is not None:
            self.projection.reset_parameters(self.generator("projection"))
        weight = self.rows.weight
        if not isinstance(weight, Tensor) or weight.is_meta:
            return
        # What is served is of init_std in all D dimensions, of which those behind the width are zero.
        for start, own in zip(self.rows.starts(), self._layout, strict=True):
            for first, part in zip([0, *(part.stop for part in own)], own, strict=False):
                if 0 < part.width < self.embedding_dim:
                    factor = (self.embedding_dim / part.width) ** 0.5
                    weight[start + first : start + part.stop, : part.width].mul_(factor)

    def fit(self, weights: Sequence[Tensor], counts: Sequence[Tensor]) -> None:
        for table, (start, weight, count) in enumerate(zip(self.rows.starts(), weights, counts, strict=True)):
            if self.projection is not None:
                axes = principal_axes(weight, count)
                self.projection.weight[table].copy_(axes.T)
                weight = weight @ axes
            self.rows.write_(start, weight)

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
            layout[spec.name] = " ".join(f"{part.stop}<{part.width}" for part in [*parts, *_oov(spec, config)])
        return replace(config, layout={spec.name: layout[spec.name] for spec in specs})

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: NestedConfig, known: Knowledge) -> NestedConfig:
        whole = sum(spec.num_embeddings for spec in specs) * specs[0].embedding_dim
        return cls.resize(specs, config, whole, known)

    @classmethod
    def within(cls, config: NestedConfig, allowed: int) -> NestedConfig:
        return replace(config, limit_bytes=allowed) if config.limit_bytes is None else config

    # ---- inside -----------------------------------------------------------------------------------------------------

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


def parse_layout(name: str, text: str) -> list[Part]:
    """Read ``"100<16 6040<4"``.

    Raises:
        ConfigError: if it can't be read.
    """
    matches = [_PART.fullmatch(word) for word in text.split()]
    parts = [Part(int(match[1]), int(match[2])) for match in matches if match]
    if not parts or None in matches or any(a.stop >= b.stop for a, b in pairwise(parts)):
        raise ConfigError(f"layout of table {name!r}: {text!r}: write 'stop<width', with rising stops")
    return parts


def layout_bytes(layout: Sequence[Sequence[Part]], specs: Sequence[TableSpec], config: NestedConfig) -> int:
    """Serve bytes of a layout."""
    return sum(map(sum, table_bytes(layout, specs, config)))


def table_bytes(
    layout: Sequence[Sequence[Part]], specs: Sequence[TableSpec], config: NestedConfig
) -> tuple[list[int], list[int]]:
    """Serve bytes of each table's rows, and of its matrix."""
    segments, _, owner = _segments(layout)
    widths, matrices = served_form(layout, specs, config)
    dim = specs[0].embedding_dim
    sizes = ragged_bytes(segments, dim, _row_format(specs, config), widths, owner)
    rows = [sum(s for s, own in zip(sizes, owner, strict=True) if own == table) for table in range(len(layout))]
    return rows, [4 * width * dim for width in matrices]


def served_form(
    layout: Sequence[Sequence[Part]], specs: Sequence[TableSpec], config: NestedConfig
) -> tuple[list[int], list[int]]:
    """Widths of all parts as they are stored, and rows of each table's matrix."""
    segments, widths, owner = _segments(layout)
    if config.projection == "none":
        return widths, [0] * len(layout)
    return fold(segments, widths, owner, specs[0].embedding_dim, _row_format(specs, config))


def _segments(layout: Sequence[Sequence[Part]]) -> tuple[list[int], list[int], list[int]]:
    """Rows, widths and tables of all parts, one behind another."""
    rows = [part.stop - first for own in layout for first, part in zip([0, *(p.stop for p in own)], own, strict=False)]
    widths = [part.width for own in layout for part in own]
    return rows, widths, [table for table, own in enumerate(layout) for _ in own]


def _split(layout: list[list[Part]], table: int, tier: int, stop: int, width: int) -> list[list[Part]]:
    """The same layout, with a part's ids below ``stop`` at another width."""
    part = layout[table][tier]
    parts = [Part(stop, width), *([part] if stop < part.stop else [])]
    return [*layout[:table], [*layout[table][:tier], *parts, *layout[table][tier + 1 :]], *layout[table + 1 :]]


class _Stops(list[int]):
    """Stops of a table's tiers, and whether its ids are known to be numbered by falling frequency."""

    ordered = False


def _tiers(spec: TableSpec, config: NestedConfig, counts: Tensor | None) -> _Stops:
    """Where the frequency tiers of a table end: equal steps in the logarithm of the count."""
    stops = _Stops([spec.num_embeddings])
    if counts is None or bool((counts[1:] > counts[:-1]).any()):
        return stops
    stops.ordered = True
    top, bottom = float(counts[0]), max(float(counts[counts > 0][-1]) if bool((counts > 0).any()) else 1.0, 1.0)
    cuts = [top * (bottom / top) ** (i / config.tiers) for i in range(1, config.tiers)] if top > 0 else []
    inner = sorted({int((counts >= cut).sum()) for cut in cuts} - {0, spec.num_embeddings})
    stops[:] = [*inner, spec.num_embeddings]
    return stops


def _oov(spec: TableSpec, config: NestedConfig) -> list[Part]:
    """The row of unseen ids, which keeps its full width."""
    return [Part(spec.num_embeddings + 1, spec.embedding_dim)] if config.unseen == "oov_row" else []


def _padded(rows: Sequence[Sequence[int]], length: int, value: int = 0) -> list[list[int]]:
    return [[*row, *(value for _ in range(length - len(row)))] for row in rows]


def _row_format(specs: Sequence[TableSpec], config: NestedConfig) -> RowFormat:
    return RowFormat.parse(config.rows).resolve(specs[0].embedding_dim)
