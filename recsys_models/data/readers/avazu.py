"""Avazu's Kaggle click-through rate challenge: 21 categories and the hour."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import ClassVar

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.lines import Dialect, read_header
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.reader import Chunk, RawLog, Reader, check_one_of
from recsys_models.data.rows import Rows, read_rows
from recsys_models.data.splits import random_split, temporal_split

HEXADECIMAL = (
    *("site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model"),
)
COLUMNS = (
    *("C1", "banner_pos"),
    *HEXADECIMAL,
    *("device_type", "device_conn_type", "C14", "C15", "C16", "C17", "C18", "C19", "C20", "C21"),
)
_HEADER = ("id", "click", "hour", *COLUMNS)
_EXPECTED = f"train.csv of Avazu Kaggle: comma-separated, with the header {','.join(_HEADER)}"


@dataclass(frozen=True, kw_only=True)
class Avazu(Reader):
    """Reads ``train.csv``, or the one ``.csv`` file in its folder.

    Fields: the hour of the day and C1 to C21 in the order of the file; the id is left out.

    Args:
        weekday: whether to add the field ``weekday``, 0 for Monday.
        is_weekend: whether to add the field ``is_weekend``, 1 on Saturdays and Sundays.
        split: ``"random"`` is 80/10/10 under ``split_seed``, ``"temporal"`` the same shares in the order of rows.
    """

    name: ClassVar[str] = "avazu"
    folder: ClassVar[str] = "avazu"

    weekday: bool = False
    is_weekend: bool = False
    split: str = "random"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_one_of(self.name, "split", self.split, ("random", "temporal"))

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the file of rows."""
        if (folder / "train.csv").exists():
            return {"rows": folder / "train.csv"}
        found = sorted(folder.glob("*.csv"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise DataError(
                f"{folder}: there must be train.csv or one other .csv file, found: {names}. Expected {_EXPECTED}"
            )
        return {"rows": found[0]}

    def open(self, files: Mapping[str, Path], log: MalformedLog) -> RawLog:
        """Start reading."""
        added = [name for name, wanted in (("weekday", self.weekday), ("is_weekend", self.is_weekend)) if wanted]
        return RawLog(("hour", *added, *COLUMNS), self._chunks(files["rows"], log))

    def assign(self, rows: int) -> np.ndarray:
        """Return the split of each row."""
        return random_split(rows, self.split_seed) if self.split == "random" else temporal_split(rows)

    def _chunks(self, path: Path, log: MalformedLog) -> Iterator[Chunk]:
        header = read_header(path, ",", _EXPECTED)
        if sorted(header) != sorted(_HEADER):
            raise DataError(f"{path}: line 1 is {','.join(header)[:300]!r}. Expected {_EXPECTED}")
        position = {name: column for column, name in enumerate(header)}
        for rows in read_rows(path, Dialect(b",", len(_HEADER), header=True), log, _EXPECTED):
            clicks = rows.integers(position["click"], "click")
            rows.expect((clicks == 0) | (clicks == 1), clicks, "click", "0 or 1")
            hour, weekday = _clock(rows, rows.integers(position["hour"], "hour"))
            values = [hour]
            if self.weekday:
                values.append(weekday)
            if self.is_weekend:
                values.append((weekday >= 5).astype(np.int64))
            for name in COLUMNS:
                parse = rows.hexadecimals if name in HEXADECIMAL else rows.integers
                values.append(parse(position[name], name))
            yield Chunk(np.column_stack(values)[rows.good], clicks[rows.good])


def _clock(rows: Rows, stamps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hour of the day and the weekday of stamps YYMMDDHH, int64 ``(n,)`` each."""
    distinct, inverse = np.unique(stamps, return_inverse=True)
    weekdays = np.array([_weekday(stamp) for stamp in distinct.tolist()], np.int64)[inverse]
    hours = stamps % 100
    good = (weekdays >= 0) & (hours <= 23)
    rows.expect(good, stamps, "hour", "a time YYMMDDHH")
    return np.where(good, hours, 0), np.where(good, weekdays, 0)


def _weekday(stamp: int) -> int:
    if not 0 <= stamp < 100_000_000:
        return -1
    try:
        return date(2000 + stamp // 1_000_000, stamp // 10_000 % 100, stamp // 100 % 100).weekday()
    except ValueError:
        return -1
