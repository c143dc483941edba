"""Clicks of the RecSys Challenge 2015 (Yoochoose)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from recsys_models.data.lines import Dialect
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.rows import read_rows
from recsys_models.data.sessions.attributes import TextCoder
from recsys_models.data.sessions.raw import Events, RawAttribute, gather
from recsys_models.data.sessions.reader import TimedReader, find_file

_EXPECTED = (
    "yoochoose-clicks.dat of the RecSys Challenge 2015: session, time such as 2014-04-07T10:51:09.277Z, item and "
    "category, separated by commas"
)


@dataclass(frozen=True, kw_only=True)
class Yoochoose(TimedReader):
    """Reads ``yoochoose-clicks.dat``; published figures are on a ``fraction`` of 64 or 4.

    Attribute: category, that of the item's last click in training (with ``protocol="last_days"`` before the test
    period), or of its first click where it has none there. S, a special offer, and 0, none given, are values like
    others.

    Args:
        file: name of the file of clicks.
    """

    name: ClassVar[str] = "yoochoose"
    folder: ClassVar[str] = "yoochoose"
    version: ClassVar[int] = 3

    protocol: str = "last_days"
    min_length: int = 2
    min_item_count: int = 5
    test_days: int = 1
    file: str = "yoochoose-clicks.dat"

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the file of clicks."""
        return {"clicks": find_file(folder, (self.file,), _EXPECTED)}

    def read(self, files: Mapping[str, Path], log: MalformedLog) -> tuple[Events, tuple[RawAttribute, ...]]:
        """Return all clicks, and the category of items."""
        coder = TextCoder()
        sessions, items, times, categories = gather(_blocks(files["clicks"], coder, log))
        texts, places = coder.ascending()
        keys, owners = np.unique(items, return_inverse=True)
        category = RawAttribute("category", keys, owners, places[categories], texts=texts, times=times, of_events=True)
        return Events(sessions, items, times), (category,)


def _blocks(path: Path, coder: TextCoder, log: MalformedLog) -> Iterator[tuple[np.ndarray, ...]]:
    for rows in read_rows(path, Dialect(b",", 4), log, _EXPECTED):
        columns = rows.integers(0, "session"), rows.integers(2, "item"), rows.times(1, "time")
        categories = coder.codes(rows.text(3, "category")).astype(np.int32)
        yield tuple(column[rows.good] for column in (*columns, categories))
