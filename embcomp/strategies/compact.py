"""``compact``: dimension × bits × sharing, chosen jointly under one budget; every id its own row where it can be."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from embcomp.config import StrategyConfig, check_at_least, check_choice, register_strategy
from embcomp.errors import ConfigError
from embcomp.mixed import MixedTables, Piece
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import stored_bytes
from embcomp.strategies._frequency_sizes import frequency_stops
from embcomp.strategies._projected import PROJECTIONS, ProjectedConfig, ProjectedTables
from embcomp.strategies.full import FullConfig, FullTables
from embcomp.strategies.low_rank import spectrum

NOISE = {1: 0.3634, 2: 0.1188, 3: 0.0374, 4: 0.0115, 8: 1.0e-4, 16: 4.0e-8, 32: 0.0}
"""Squared error of the best uniform quantizer of a unit Gaussian, by bits (Max 1960; 8 bits: the high-rate formula);
16 bits are float16."""
LEARNED = 0.1
"""What is left of that noise where training chooses the codes: the order of magnitude measured on MovieLens-1M."""

Key = tuple[int, int]
"""A tier: index of the table, number of the tier."""

_SHARED_BYTES = 8
_CHOICE = re.compile(r"(?:(\d+)<)?(\d+)x(\d+)(?:/(\d+))?")


class Choice(NamedTuple):
    """How ids up to ``stop`` are kept: ``dim`` values of ``bits`` bits per row, ``share`` ids per row."""

    stop: int
    dim: int
    bits: int
    share: int

    def __str__(self) -> str:
        return f"{self.stop}<{self.dim}x{self.bits}" + (f"/{self.share}" if self.share > 1 else "")


@dataclass(frozen=True)
class CompactConfig(StrategyConfig):
    """What ``compact`` may choose from; ``rows`` stays ``"float32"``, since this strategy chooses the rows itself.

    Attributes:
        projection: ``"none"``: zeros behind the narrow rows; ``"linear"``: a ``(d, D)`` matrix per table.
        granularity: what shares a scale: ``"column"``, ``"table"``, ``"row"`` or ``"group<N>"``.
        aware: quantization-aware training; False rounds trained rows at the end.
        tiers: most frequency tiers a table is cut into, where counts are given; ids must be numbered by falling
            frequency for that to help, and a table whose ids are not becomes one tier.
        reliability: an id seen c times is worth ``c²/(c + reliability)``: rare ids can't be learned exactly anyway.
        max_share: most ids that may share a row by hashing.
        layout: table name -> tiers as ``"stop<dimxbits/share"``, joined by spaces; None to let the budget choose.
    """

    projection: str = "none"
    granularity: str = "column"
    aware: bool = True
    tiers: int = 4
    reliability: float = 10.0
    max_share: int = 1024
    layout: dict[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "projection", PROJECTIONS)
        check_at_least(self, "tiers", 1)
        check_at_least(self, "reliability", 0)
        check_at_least(self, "max_share", 1)
        if self.rows != "float32":
            raise ConfigError(f"CompactConfig(rows={self.rows!r}): this strategy chooses the rows itself")
        for name, text in (self.layout or {}).items():
            parse_layout(name, text)

    def row_format(self, bits: int) -> str:
        """The row format for a number of bits."""
        if bits >= 16:
            return f"float{bits}"
        return f"int{bits}:{self.granularity}" + ":after" * (not self.aware)


@register_strategy("compact", CompactConfig)
class CompactTables(MixedTables):
    """A smaller dimension, fewer bits, and shared rows only where nothing else is left, per table and frequency tier.

    Our own method. Every tier of every table is offered all of dimension × bits × sharing; an offer's error is the
    energy of the dimensions that are dropped plus the quantization noise of those that are kept, or what an average
    over shared rows loses (a rate–distortion model). Dimensions' energies are measured where trained tables are given;
    from scratch they are taken to fall like 1/j², as those of trained tables do. The budget then buys the steps along
    each tier's lower convex hull that remove the most error per byte.
    """

    knob = "steps of dimension, bits and sharing"
    knob_is_fine = False
    can_be_streamed = True

    def pieces(self) -> list[Piece]:
        layout, found = self.config.layout or {}, []
        for index, (spec, rows) in enumerate(zip(self.specs, self.num_ids, strict=True)):
            if spec.name not in layout:
                raise ConfigError(f"CompactConfig: no layout for table {spec.name!r}")
            start = 0
            for choice in parse_layout(spec.name, layout[spec.name]):
                stop = rows if choice.stop == spec.num_embeddings else choice.stop
                found.append(Piece(index, start, stop, *_kind(spec, choice, self.config)))
                start = stop
            if start != rows:
                raise ConfigError(f"CompactConfig: layout of table {spec.name!r} ends at id {start}, not at {rows}")
        return found

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: CompactConfig, known: Knowledge) -> tuple[int, int]:
        return (0, 0) if config.layout is not None else (0, len(_worthwhile(specs, config, known)) - 1)

    @classmethod
    def resize(cls, specs: Sequence[TableSpec], config: CompactConfig, size: int, known: Knowledge) -> CompactConfig:
        if config.layout is not None:
            return config
        start, steps = _purchases(specs, config, known)
        chosen = dict(start)
        chosen.update((key, choice) for key, choice in steps[: _worthwhile(specs, config, known)[size]])
        layout = {spec.name: " ".join(map(str, _tiers_of(chosen, index))) for index, spec in enumerate(specs)}
        return replace(config, layout=layout)

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: CompactConfig, known: Knowledge) -> CompactConfig:
        return config if config.layout is not None else super().complete(specs, config, known)


def parse_layout(name: str, text: str) -> list[Choice]:
    """Read a table's layout: choices with rising stops.

    Raises:
        ConfigError: if it can't be read.
    """
    choices = []
    for word in text.split():
        match = _CHOICE.fullmatch(word)
        if match is None or match[1] is None:
            raise ConfigError(f"layout of table {name!r}: {word!r} is not 'stop<dimxbits' or 'stop<dimxbits/share'")
        choice = Choice(int(match[1]), int(match[2]), int(match[3]), int(match[4] or 1))
        if choice.bits not in NOISE or choice.dim < 1 or choice.share < 1:
            raise ConfigError(f"layout of table {name!r}: {word!r}: bits are one of {', '.join(map(str, NOISE))}")
        choices.append(choice)
    if not choices or any(a.stop >= b.stop for a, b in itertools.pairwise(choices)):
        raise ConfigError(f"layout of table {name!r}: {text!r}: stops must rise")
    return choices


def _kind(spec: TableSpec, choice: Choice, config: CompactConfig) -> tuple[type, StrategyConfig]:
    rows, seed, sparse = config.row_format(choice.bits), config.seed, config.sparse
    if choice.dim >= spec.embedding_dim and choice.share == 1:
        return FullTables, FullConfig(rows, "error", seed, sparse)
    kept = ProjectedConfig(rows, "error", seed, sparse, choice.dim, config.projection, choice.share)
    return ProjectedTables, kept


def _tiers_of(chosen: Mapping[Key, Choice], table: int) -> list[Choice]:
    """Choices of a table's tiers; tiers that are kept alike become one, with all that lie between them."""
    joined: list[Choice] = []
    for number in itertools.takewhile(lambda number: (table, number) in chosen, itertools.count()):
        choice = chosen[table, number]
        alike = [i for i, earlier in enumerate(joined) if earlier[1:] == choice[1:]]
        if alike:
            del joined[alike[0] :]
        joined.append(choice)
    return joined


def _purchases(
    specs: Sequence[TableSpec], config: CompactConfig, known: Knowledge
) -> tuple[dict[Key, Choice], list[tuple[Key, Choice]]]:
    """The cheapest choice of every tier, and the steps up from there, the most error per byte first."""
    memo = ("compact steps", tuple(specs), replace(config, layout=None))
    if memo not in known.derived:
        start, steps = {}, []
        for index, spec in enumerate(specs):
            for number, (first, stop, worth) in enumerate(_tiers(spec, config, known)):
                hull = _hull(_offers(spec, first, stop, worth, config, known))
                start[index, number] = hull[0][2]
                for (cost, error, _), (next_cost, next_error, choice) in itertools.pairwise(hull):
                    steps.append(((next_error - error) / (next_cost - cost), (index, number), choice))
        steps.sort(key=lambda step: step[0])
        known.derived[memo] = start, [(key, choice) for _, key, choice in steps]
    return known.derived[memo]


def _worthwhile(specs: Sequence[TableSpec], config: CompactConfig, known: Knowledge) -> list[int]:
    """Numbers of steps after which more bytes are really taken than before.

    A step that makes two tiers alike can save their second set of scales, so that fewer steps take more bytes.
    """
    memo = ("compact sizes", tuple(specs), replace(config, layout=None))
    if memo not in known.derived:
        start, steps = _purchases(specs, config, known)
        chosen, total = dict(start), 0
        sizes = [_table_bytes(spec, _tiers_of(chosen, index), config) for index, spec in enumerate(specs)]
        totals = [sum(sizes)]
        for (index, number), choice in steps:
            chosen[index, number] = choice
            size = _table_bytes(specs[index], _tiers_of(chosen, index), config)
            totals.append(totals[-1] + size - sizes[index])
            sizes[index] = size
        kept: list[int] = []
        for number in range(len(totals) - 1, -1, -1):
            # Tables that share a part share its last bytes too, which these totals don't know.
            if not kept or totals[number] + _SHARED_BYTES <= total:
                kept.append(number)
                total = totals[number]
        if totals[0] <= totals[kept[-1]]:
            kept[-1] = 0  # the smallest size is what error messages promise
        known.derived[memo] = kept[::-1]
    return known.derived[memo]


def _table_bytes(spec: TableSpec, tiers: Sequence[Choice], config: CompactConfig) -> int:
    total, first = 0, 0
    for choice in tiers:
        extra = config.unseen == "oov_row" and choice.stop == spec.num_embeddings
        rows = -(-(choice.stop - first + extra) // choice.share)
        total += stored_bytes(rows, choice.dim, config.row_format(choice.bits)) + _matrix_bytes(
            spec, choice.dim, config
        )
        first = choice.stop
    return total


def _matrix_bytes(spec: TableSpec, dim: int, config: CompactConfig) -> int:
    return 4 * dim * spec.embedding_dim if config.projection == "linear" and dim < spec.embedding_dim else 0


def _tiers(spec: TableSpec, config: CompactConfig, known: Knowledge) -> list[tuple[int, int, float]]:
    """Cut a table by frequency: (first id, stop, worth), worths being shares of the table's traffic."""
    counts = known.counts.get(spec.name)
    if counts is None or config.tiers == 1 or not bool((counts > 0).any()):
        return [(0, spec.num_embeddings, 1.0)]
    # A tier's rows differ by the same factor in what another bit is worth.
    tiers = [*itertools.pairwise([0, *frequency_stops(counts, config.tiers)])]
    worths = [_worth(counts[first:stop].double(), config.reliability) for first, stop in tiers]
    return [(first, stop, worth / sum(worths)) for (first, stop), worth in zip(tiers, worths, strict=True)]


def _worth(counts: Tensor, reliability: float) -> float:
    """Traffic of ids, that of rare ones discounted."""
    return float((counts * counts / (counts + reliability).clamp_min(1e-9)).sum())


def _offers(
    spec: TableSpec, first: int, stop: int, worth: float, config: CompactConfig, known: Knowledge
) -> list[tuple[int, float, Choice]]:
    """Every choice for a tier with its bytes and its error."""
    energy = spectrum(spec, known)
    energy = energy / energy.sum().clamp_min(1e-30) if spec.name not in known.weights else energy
    total, kept = float(energy.sum()), energy.cumsum(0)
    offers = []
    for dim in _dims(spec.embedding_dim):
        matrix = _matrix_bytes(spec, dim, config)
        for bits, gaussian in NOISE.items():
            noise = gaussian * (LEARNED if config.aware else 1)
            own = total - (1 - noise) * float(kept[dim - 1])
            share = 1
            while share <= min(config.max_share, stop - first):
                rows = -(-(stop - first) // share)
                error = worth * (own / share + total * (1 - 1 / share))
                cost = stored_bytes(rows, dim, config.row_format(bits)) + matrix
                offers.append((cost, error, Choice(stop, dim, bits, share)))
                share *= 2
    return offers


def _dims(dim: int) -> list[int]:
    """Dimensions on offer: all up to 8, then four per doubling, and D itself."""
    steps = {*range(1, 9), *(eighth * 2**power for power in range(1, 12) for eighth in (5, 6, 7, 8))}
    return sorted({d for d in steps if d < dim} | {dim})


def _hull(offers: list[tuple[int, float, Choice]]) -> list[tuple[int, float, Choice]]:
    """The lower convex hull of error over bytes, from the cheapest offer to the best one."""
    hull: list[tuple[int, float, Choice]] = []
    for offer in sorted(offers):
        if hull and offer[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], offer) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        if hull and len(hull) == 1 and offer[0] == hull[0][0]:
            hull.pop()
        hull.append(offer)
    return hull


def _slope(left: tuple[int, float, Choice], right: tuple[int, float, Choice]) -> float:
    return (right[1] - left[1]) / max(right[0] - left[0], 1e-9)
