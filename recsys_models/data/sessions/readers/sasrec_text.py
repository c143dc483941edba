"""Plain histories in the form of SASRec and BERT4Rec: a user and an item per line."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.lines import Dialect
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.rows import read_rows
from recsys_models.data.sessions.raw import Events, RawAttribute, gather
from recsys_models.data.sessions.reader import EventReader, find_file

_EXPECTED = "a text file of lines 'user item', integers, each user's items in the order of time"


@dataclass(frozen=True, kw_only=True)
class SasrecText(EventReader):
    """Reads lines ``user item``, which are in the order of time.

    Args:
        file: name of the file in the folder; empty if it is the only ``.txt`` file there.
    """

    name: ClassVar[str] = "sasrec_text"
    folder: ClassVar[str] = "sasrec"

    file: str = ""

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the file of events."""
        if self.file:
            return {"events": find_file(folder, (self.file,), _EXPECTED)}
        found = sorted(folder.glob("*.txt"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise DataError(
                f"{folder}: there must be one .txt file, found: {names}. Expected {_EXPECTED}; name it by the option "
                "file"
            )
        return {"events": found[0]}

    def read(self, files: Mapping[str, Path], log: MalformedLog) -> tuple[Events, tuple[RawAttribute, ...]]:
        """Return all events."""
        users, items = gather(_blocks(files["events"], log))
        return Events(users, items), ()


def _blocks(path: Path, log: MalformedLog) -> Iterator[tuple[np.ndarray, ...]]:
    for rows in read_rows(path, Dialect(b" ", 2), log, _EXPECTED):
        users, items = rows.integers(0, "user"), rows.integers(1, "item")
        yield users[rows.good], items[rows.good]
