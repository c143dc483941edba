"""Behaviour of visitors of an online shop (Retailrocket)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.lines import find_columns
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.reader import check_at_least
from recsys_models.data.rows import MISSING, read_rows
from recsys_models.data.sessions.attributes import last_of_each
from recsys_models.data.sessions.raw import Events, RawAttribute, gather
from recsys_models.data.sessions.reader import TimedReader, find_file, present

_KINDS = ("view", "addtocart", "transaction")
_EXPECTED_EVENTS = "events.csv of Retailrocket: the header timestamp,visitorid,event,itemid,transactionid"
_EXPECTED_PROPERTIES = (
    "item_properties_part1.csv or item_properties_part2.csv of Retailrocket: the header timestamp,itemid,property,value"
)
_EXPECTED_TREE = "category_tree.csv of Retailrocket: the header categoryid,parentid"
_FILES = {
    "properties_1": "item_properties_part1.csv",
    "properties_2": "item_properties_part2.csv",
    "tree": "category_tree.csv",
}


@dataclass(frozen=True, kw_only=True)
class Retailrocket(TimedReader):
    """Reads ``events.csv``. A session is what a visitor does without a long break.

    Attributes, from the files that are there: category, the latest that ``item_properties_part1.csv`` and
    ``item_properties_part2.csv`` give an item before the test period (with ``protocol="leave_one_out"`` up to its last
    event in training), or the first after it where there is none; and parent, the category above it in
    ``category_tree.csv``.

    Args:
        kinds: events to take, separated by commas: ``view``, ``addtocart``, ``transaction``.
        max_gap_minutes: break after which a new session begins; 0 for one session per visitor.
    """

    name: ClassVar[str] = "retailrocket"
    folder: ClassVar[str] = "retailrocket"
    version: ClassVar[int] = 3

    protocol: str = "last_days"
    min_length: int = 2
    min_item_count: int = 5
    test_days: int = 7
    kinds: str = "view"
    max_gap_minutes: int = 30

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_at_least(self.name, "max_gap_minutes", self.max_gap_minutes, 0)
        if not set(self._kinds) <= set(_KINDS):
            raise DataError(
                f"{self.name}: option kinds is {self.kinds!r}, must be of {', '.join(_KINDS)}, separated by commas"
            )

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the files of events and, if they are there, of properties and categories."""
        return {"events": find_file(folder, ("events.csv",), _EXPECTED_EVENTS)} | present(folder, _FILES)

    def read(self, files: Mapping[str, Path], log: MalformedLog) -> tuple[Events, tuple[RawAttribute, ...]]:
        """Return the events of the kinds asked for, and the categories of items."""
        times, visitors, items = gather(self._events(files["events"], log))
        sessions = cut_sessions(visitors, times, self.max_gap_minutes * 60_000)
        paths = [files[role] for role in ("properties_1", "properties_2") if role in files]
        if not paths:
            return Events(sessions, items, times / 1000), ()
        since, keys, categories = gather(block for path in paths for block in _categories(path, log))
        known, owners = np.unique(keys, return_inverse=True)
        attributes = [RawAttribute("category", known, owners, categories, times=since / 1000)]
        if "tree" in files:
            parents = _parents(categories, *gather(_tree(files["tree"], log)))
            attributes.append(RawAttribute("parent", known, owners, parents, times=since / 1000))
        return Events(sessions, items, times / 1000), tuple(attributes)

    @property
    def _kinds(self) -> list[str]:
        return [kind.strip() for kind in self.kinds.split(",")]

    def _events(self, path: Path, log: MalformedLog) -> Iterator[tuple[np.ndarray, ...]]:
        wanted = ("timestamp", "visitorid", "event", "itemid")
        dialect, (time, visitor, event, item) = find_columns(path, ",", wanted, _EXPECTED_EVENTS)
        for rows in read_rows(path, dialect, log, _EXPECTED_EVENTS):
            columns = rows.integers(time, "timestamp"), rows.integers(visitor, "visitor"), rows.integers(item, "item")
            kinds = rows.text(event, "event")
            rows.expect(np.isin(kinds, _KINDS), kinds, "event", f"one of {', '.join(_KINDS)}")
            yield tuple(column[rows.good & np.isin(kinds, self._kinds)] for column in columns)


def cut_sessions(visitors: np.ndarray, times: np.ndarray, max_gap: int) -> np.ndarray:
    """Return a session number per event, int64 ``(n,)``.

    Args:
        visitors: int64 ``(n,)``.
        times: int64 ``(n,)``.
        max_gap: a later event of the same visitor begins a session if more time has passed; 0 for any time.
    """
    order = np.lexsort((times, visitors))
    visitor, time = visitors[order], times[order]
    begins = np.zeros(len(order), np.int64)
    begins[1:] = (visitor[1:] != visitor[:-1]) | ((np.diff(time) > max_gap) if max_gap else False)
    sessions = np.empty(len(order), np.int64)
    sessions[order] = np.cumsum(begins)
    return sessions


def _categories(path: Path, log: MalformedLog) -> Iterator[tuple[np.ndarray, ...]]:
    wanted = ("timestamp", "itemid", "property", "value")
    dialect, (time, item, name, value) = find_columns(path, ",", wanted, _EXPECTED_PROPERTIES)
    for rows in read_rows(path, dialect, log, _EXPECTED_PROPERTIES):
        rows.keep(rows.equals(name, b"categoryid"))
        columns = rows.integers(time, "timestamp"), rows.integers(item, "item"), rows.integers(value, "category")
        yield tuple(column[rows.good] for column in columns)


def _tree(path: Path, log: MalformedLog) -> Iterator[tuple[np.ndarray, ...]]:
    dialect, (category, parent) = find_columns(path, ",", ("categoryid", "parentid"), _EXPECTED_TREE)
    for rows in read_rows(path, dialect, log, _EXPECTED_TREE):
        categories, parents = rows.integers(category, "category"), rows.integers(parent, "parent", optional=True)
        use = rows.good & (parents != MISSING)
        yield categories[use], parents[use]


def _parents(categories: np.ndarray, children: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """Return the parent of each category, int64 ``(n,)``; `MISSING` of those at the root of the tree."""
    last = last_of_each(children)
    children, parents = np.append(children[last], 0), np.append(parents[last], MISSING)
    place = np.searchsorted(children[:-1], categories)
    return np.where(children[place] == categories, parents[place], MISSING)
