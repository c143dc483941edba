"""A made click log in which single ids matter, for tests and benchmarks where no data set is at hand."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.reader import Chunk, RawLog, Reader, check_at_least, check_one_of
from recsys_models.data.readers.planted import DEFAULT, Plan, PlannedField, criteo_plan, find_intercept, scaled, sigmoid
from recsys_models.data.splits import random_split, temporal_split

_CHUNK_ROWS = 1 << 17
_DAYS = 14
_LATE_SHARE = 0.1
_EARLIEST = 0.5
_CALIBRATION_ROWS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class Synthetic(Reader):
    """Makes rows in the order of time; the same options give the same rows on every machine.

    Ids are drawn by Zipf's law with slopes measured on real logs. The log-odds of a click are the sum of an effect of
    every id (the quality of an item, the activity of a user and so on) and of products of two fields' vectors (what a
    user likes, what sells at which hour). A tenth of the large fields' ids appear only in the second half of time, some
    of them after the training split.

    Args:
        rows: number of rows.
        seed: of everything drawn.
        click_rate: share of rows with label 1 that the intercept aims at.
        skew: ``"measured"`` for the slope of each field; ``"criteo"``, ``"ip"``, ``"frappe"``, ``"lastfm"`` or
            ``"sessions"`` for one measured slope in all large fields; or a number as text.
        vocabularies: ``"default"`` has 8 fields of 3 to 100 000 ids; ``"criteo"`` has the 26 vocabularies of Criteo
            Kaggle, 33.8 million ids, of which a ``vocabulary_scale`` of 0.003 leaves some 100 000.
        vocabulary_scale: factor on vocabularies of over 32 ids.
        split: ``"temporal"`` or ``"random"``, 80/10/10.
    """

    name: ClassVar[str] = "synthetic"
    folder: ClassVar[str] = ""

    rows: int = 300_000
    seed: int = 0
    click_rate: float = 0.25
    skew: str = "measured"
    vocabularies: str = "default"
    vocabulary_scale: float = 1.0
    split: str = "temporal"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_at_least(self.name, "rows", self.rows, 10)
        check_at_least(self.name, "seed", self.seed, 0)
        if not 0 < self.click_rate < 1:
            raise DataError(f"{self.name}: option click_rate is {self.click_rate!r}, must be a share in (0, 1)")
        check_at_least(self.name, "vocabulary_scale", self.vocabulary_scale, 0.0)
        check_one_of(self.name, "vocabularies", self.vocabularies, ("default", "criteo"))
        check_one_of(self.name, "split", self.split, ("temporal", "random"))
        self.plan()

    def plan(self) -> Plan:
        """Return the fields and interactions."""
        plan = DEFAULT if self.vocabularies == "default" else criteo_plan()
        return scaled(plan, self.vocabulary_scale, self.skew)

    def files(self, folder: Path) -> dict[str, Path]:
        """Return no files."""
        return {}

    def open(self, files: Mapping[str, Path], log: MalformedLog) -> RawLog:
        """Start making rows."""
        plan = self.plan()
        return RawLog(tuple(planned.name for planned in plan.fields), self._chunks(_World(plan, self.seed)))

    def assign(self, rows: int) -> np.ndarray:
        """Return the split of each row."""
        return temporal_split(rows) if self.split == "temporal" else random_split(rows, self.split_seed)

    def _chunks(self, world: "_World") -> Iterator[Chunk]:
        generator = np.random.default_rng([self.seed, 1])
        sample = world.draw(generator.random(_CALIBRATION_ROWS), generator)
        intercept = find_intercept(world.log_odds(sample), self.click_rate)
        for start in range(0, self.rows, _CHUNK_ROWS):
            time = np.arange(start, min(start + _CHUNK_ROWS, self.rows)) / self.rows
            values = world.draw(time, generator)
            odds = world.log_odds(values) + intercept
            yield Chunk(world.raw(values), generator.random(len(time)) < sigmoid(odds))


class _World:
    """Effects, vectors and dates of birth of all values, by popularity rank."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self._plan = plan
        self._column = {planned.name: i for i, planned in enumerate(plan.fields)}
        generator = np.random.default_rng([seed, 0])
        self._effects = [f.effect * _normal(generator, f.size) for f in plan.fields]
        self._raw = [generator.permutation(f.size) for f in plan.fields]
        self._cumulated = [_zipf(f) for f in plan.fields]
        self._births = [_births(f, generator) for f in plan.fields]
        self._parents = [generator.integers(f.size, size=self._size(f.of)) if f.of else None for f in plan.fields]
        self._vectors = [
            tuple(_normal(generator, (self._size(name), pair.rank)) for name in (pair.first, pair.second))
            for pair in plan.pairs
        ]

    def draw(self, time: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Draw values at the times ``(n,)`` in [0, 1); int64 ``(n, F)``, by popularity rank."""
        values = np.empty((len(time), len(self._plan.fields)), np.int64)
        for i, planned in enumerate(self._plan.fields):
            parents = self._parents[i]
            if planned.clock:
                values[:, i] = np.floor(time * (_DAYS * 24 / planned.clock)).astype(np.int64) % planned.size
            elif parents is not None and planned.of:
                values[:, i] = parents[values[:, self._column[planned.of]]]
            else:
                values[:, i] = self._draw_born(i, time, generator)
        return values

    def log_odds(self, values: np.ndarray) -> np.ndarray:
        """Return the log-odds of a click without the intercept, float64 ``(n,)``."""
        total = np.zeros(len(values))
        for effect, column in zip(self._effects, values.T, strict=True):
            total += effect[column]
        for pair, (first, second) in zip(self._plan.pairs, self._vectors, strict=True):
            product = first[values[:, self._column[pair.first]]] * second[values[:, self._column[pair.second]]]
            total += pair.effect / np.sqrt(pair.rank) * product.sum(axis=1)
        return total

    def raw(self, values: np.ndarray) -> np.ndarray:
        """Return raw values that do not give away popularity, int64 ``(n, F)``."""
        return np.column_stack([raw[column] for raw, column in zip(self._raw, values.T, strict=True)])

    def _draw_born(self, field: int, time: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        cumulated, births = self._cumulated[field], self._births[field]
        drawn = np.searchsorted(cumulated, generator.random(len(time)), side="right")
        while len(again := np.flatnonzero(births[drawn] > time)):
            drawn[again] = np.searchsorted(cumulated, generator.random(len(again)), side="right")
        return drawn

    def _size(self, name: str) -> int:
        return self._plan.fields[self._column[name]].size


def _normal(generator: np.random.Generator, shape: int | tuple[int, ...]) -> np.ndarray:
    return generator.standard_normal(shape, dtype=np.float32)


def _zipf(planned: PlannedField) -> np.ndarray:
    cumulated = np.cumsum(np.arange(1, planned.size + 1) ** -planned.slope)
    inner: np.ndarray = cumulated[:-1] / cumulated[-1]
    return inner


def _births(planned: PlannedField, generator: np.random.Generator) -> np.ndarray:
    births = np.zeros(planned.size, np.float32)
    if planned.late:
        late = generator.random(planned.size) < _LATE_SHARE
        late[0] = False  # so that there is always something to draw
        births[late] = generator.uniform(_EARLIEST, 1.0, int(late.sum()))
    return births
