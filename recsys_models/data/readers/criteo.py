"""Criteo's Kaggle display advertising challenge: 13 counts and 26 hashed categories."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.lines import Dialect
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.reader import Chunk, RawLog, Reader, check_one_of
from recsys_models.data.rows import MISSING, read_rows
from recsys_models.data.splits import random_split, temporal_split

INTEGERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
_EXPECTED = (
    "train.txt of Criteo Kaggle: a label, 13 integers and 26 ids of 8 hexadecimal digits, separated by tabs, gaps "
    "empty (test.txt has no labels and cannot be used)"
)
_LOG_SHIFT = {"I2": 4}


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive rows as Criteo has them, gaps as :data:`~recsys_models.data.rows.MISSING`.

    Args:
        integers: int64 ``(n, 13)``.
        categories: int64 ``(n, 26)``.
        labels: ``(n,)``, 0 or 1.
    """

    integers: np.ndarray
    categories: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Criteo(Reader):
    """Reads the one ``.txt`` or ``.tsv`` file in its folder, ``train.txt`` first.

    Fields: C1 to C26; a gap is a value of its own. Dense features or more fields: I1 to I13.

    Args:
        numeric: ``"log"`` gives dense features: log(x + 1), for I2 log(x + 4), with smaller arguments raised to 1 and
            gaps 0. ``"buckets"`` gives fields: floor(ln(x)^2) for x over 2, else x, and a gap as a value of its own.
        split: ``"temporal"`` trains on the first six sevenths of the rows, one day each, and halves the rest into
            validation and test; ``"random"`` is 80/10/10 under ``split_seed``.
    """

    name: ClassVar[str] = "criteo"
    folder: ClassVar[str] = "criteo"

    numeric: str = "log"
    split: str = "temporal"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_one_of(self.name, "numeric", self.numeric, ("log", "buckets"))
        check_one_of(self.name, "split", self.split, ("temporal", "random"))

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the file of rows."""
        if (folder / "train.txt").exists():
            return {"rows": folder / "train.txt"}
        found = sorted(p for p in folder.iterdir() if p.suffix in (".tsv", ".txt") and "readme" not in p.name.lower())
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise DataError(
                f"{folder}: there must be train.txt or one other .txt or .tsv file, found: {names}. "
                f"Expected {_EXPECTED}"
            )
        return {"rows": found[0]}

    def open(self, files: Mapping[str, Path], log: MalformedLog) -> RawLog:
        """Start reading."""
        return raw_log(self._blocks(files["rows"], log), self.numeric)

    def assign(self, rows: int) -> np.ndarray:
        """Return the split of each row."""
        return random_split(rows, self.split_seed) if self.split == "random" else temporal_split(rows, 1 / 14, 1 / 14)

    def _blocks(self, path: Path, log: MalformedLog) -> Iterator[Block]:
        for rows in read_rows(path, Dialect(b"\t", 40), log, _EXPECTED):
            labels = rows.integers(0, "label")
            rows.expect((labels == 0) | (labels == 1), labels, "label", "0 or 1")
            integers = [rows.integers(1 + i, name, optional=True) for i, name in enumerate(INTEGERS)]
            categories = [rows.hexadecimals(14 + i, name, optional=True) for i, name in enumerate(CATEGORIES)]
            good = rows.good
            yield Block(np.column_stack(integers)[good], np.column_stack(categories)[good], labels[good])


def raw_log(blocks: Iterator[Block], numeric: str) -> RawLog:
    """Return the log of Criteo's columns, their integers as ``numeric``, ``"log"`` or ``"buckets"``, says."""
    if numeric == "log":
        return RawLog(CATEGORIES, (Chunk(b.categories, b.labels, log_features(b.integers)) for b in blocks), INTEGERS)
    chunks = (Chunk(np.column_stack((bucket(b.integers), b.categories)), b.labels) for b in blocks)
    return RawLog(INTEGERS + CATEGORIES, chunks)


def log_features(integers: np.ndarray) -> np.ndarray:
    """Return the dense features of the integers int64 ``(n, 13)``, float32 ``(n, 13)``."""
    return np.column_stack([log_feature(x, name) for x, name in zip(integers.T, INTEGERS, strict=True)])


def log_feature(values: np.ndarray, name: str) -> np.ndarray:
    """Return the dense feature of the counts int64 ``(n,)`` of column ``name``, float32 ``(n,)``."""
    shifted = np.maximum(values, 1 - _LOG_SHIFT.get(name, 1)) + _LOG_SHIFT.get(name, 1)
    return np.where(values == MISSING, 0.0, np.log(shifted)).astype(np.float32)


def bucket(values: np.ndarray) -> np.ndarray:
    """Return the buckets of the counts int64 ``(...)``, int64 ``(...)``; gaps stay gaps."""
    logarithm = np.log(np.maximum(values, 1))
    return np.where(values > 2, np.floor(logarithm * logarithm).astype(np.int64), values)
