"""What a reader of one data set provides; the rest of the package does everything else for it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.splits import random_split


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive rows with raw values, before they have ids.

    Args:
        values: int64 ``(n, F)``, raw values; readers map text to integers.
        labels: ``(n,)``, 0 or 1.
        dense: ``(n, P)``; None for no dense features.
        split: int8 ``(n,)`` for data that come with their splits, else None.
    """

    values: np.ndarray
    labels: np.ndarray
    dense: np.ndarray | None = None
    split: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class RawLog:
    """A data set as its reader found it.

    Args:
        fields: names of the ``F`` fields.
        chunks: the rows, in order, read once.
        dense_names: names of the ``P`` dense features.
        texts: for fields whose raw values are positions in a list of texts, that list, ``(T,)``.
    """

    fields: tuple[str, ...]
    chunks: Iterator[Chunk]
    dense_names: tuple[str, ...] = ()
    texts: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """One data set in its original format, of clicks or of sessions. Subclasses are dataclasses of options.

    Args:
        split_seed: seed of a random split.
        max_malformed: share of malformed lines per file above which reading fails.
    """

    name: ClassVar[str]
    folder: ClassVar[str]
    version: ClassVar[int] = 1
    """To be raised whenever the same files and options come to give other rows, so that old caches are not used."""

    split_seed: int = 2021
    max_malformed: float = 0.01

    def __post_init__(self) -> None:
        """Check the options."""
        for option in fields(self):
            _check_type(self.name, option.name, getattr(self, option.name), type(option.default))
        check_at_least(self.name, "split_seed", self.split_seed, 0)
        if not 0 <= self.max_malformed <= 1:
            raise DataError(f"{self.name}: option max_malformed is {self.max_malformed!r}, must be a share in [0, 1]")

    @abstractmethod
    def files(self, folder: Path) -> dict[str, Path]:
        """Return the source files in ``folder`` by their role; a missing one is reported when it is read."""


@dataclass(frozen=True, kw_only=True)
class Reader(Source):
    """Reads one click log.

    Args:
        min_count: values seen less often in training share the last id of their field.
    """

    min_count: int = 1

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_at_least(self.name, "min_count", self.min_count, 1)

    @abstractmethod
    def open(self, files: Mapping[str, Path], log: MalformedLog) -> RawLog:
        """Start reading.

        Args:
            files: what :meth:`files` returned.
            log: where malformed lines are recorded.
        """

    def assign(self, rows: int) -> np.ndarray:
        """Return the split of each of ``rows`` rows, int8 ``(rows,)``; random 80/10/10 unless a reader says else."""
        return random_split(rows, self.split_seed)


def check_one_of(dataset: str, option: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise a :class:`DataError` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise DataError(f"{dataset}: option {option} is {value!r}, must be one of {', '.join(map(repr, allowed))}")


def check_at_least(dataset: str, option: str, value: float, least: float) -> None:
    """Raise a :class:`DataError` unless ``value`` is at least ``least``, and finite."""
    if not least <= value < math.inf:
        finite = ", and finite" if value == math.inf else ""
        raise DataError(f"{dataset}: option {option} is {value!r}, must be at least {least}{finite}")


def _check_type(dataset: str, option: str, value: object, wanted: type) -> None:
    allowed = (int, float) if wanted is float else (wanted,)
    if type(value) not in allowed:
        raise DataError(f"{dataset}: option {option} is {value!r}, must be of type {wanted.__name__}")
