"""Diginetica as session models are trained on it: already filtered, numbered and split."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.sessions.editing import offsets_of, rows_of, select
from recsys_models.data.sessions.protocols import Parts, hold_out
from recsys_models.data.sessions.raw import RawSessions
from recsys_models.data.sessions.reader import SessionReader, check_share, find_file
from recsys_models.data.sessions.records import RecordError, check_records, integers_in, read_json, shown
from recsys_models.data.sessions.sequences import Cases, Sequences

_EXPECTED_TRAIN = "sessions_train.json: a list of sessions, each a list of item ids in the order of time"
_EXPECTED_TEST = "sessions_test.json: [prefixes, targets], a list of lists of item ids and a list of item ids"


@dataclass(frozen=True, kw_only=True)
class DigineticaSessions(SessionReader):
    """Reads ``sessions_train.json`` and ``sessions_test.json``, the outcome of the preprocessing of SR-GNN.

    Sessions and test cases are as they come; a random share of the training sessions validates.

    Args:
        validation_share: share of the training sessions that validate, drawn under ``split_seed``; may be 0.
    """

    name: ClassVar[str] = "diginetica_sessions"
    folder: ClassVar[str] = "diginetica"

    validation_share: float = 0.1

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_share(self.name, self.validation_share)

    @property
    def filters_seen(self) -> bool:
        """Whether rankings leave out the items of the prefix."""
        return False

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the files of training sessions and test cases."""
        return {
            "train": find_file(folder, ("sessions_train.json",), _EXPECTED_TRAIN),
            "test": find_file(folder, ("sessions_test.json",), _EXPECTED_TEST),
        }

    def open(self, files: Mapping[str, Path], log: MalformedLog) -> RawSessions:
        """Read and split."""
        train = _read_train(files["train"], log)
        test = _read_test(files["test"], log)
        self.check_lines(log)
        values, items = np.unique(np.concatenate([_flat(train), _flat(test)]), return_inverse=True)
        split = sum(map(len, train))
        trained, validation = hold_out(
            _sequences(train, items[:split]), self.validation_share, self.split_seed, self.name
        )
        return RawSessions(Parts(trained, validation, _cases(_sequences(test, items[split:]))), values)


def _read_train(path: Path, log: MalformedLog) -> list[list[int]]:
    found = read_json(path, _EXPECTED_TRAIN)
    if type(found) is not list:
        raise DataError(f"{path}: the file holds {shown(found)}. Expected {_EXPECTED_TRAIN}")
    return check_records(path, found, lambda session: integers_in(session, 1), log)


def _read_test(path: Path, log: MalformedLog) -> list[list[int]]:
    """Return each prefix with its target behind."""
    found = read_json(path, _EXPECTED_TEST)
    if type(found) is not list or len(found) != 2 or any(type(part) is not list for part in found):
        raise DataError(f"{path}: the file holds {shown(found)}. Expected {_EXPECTED_TEST}")
    prefixes, targets = found
    if len(prefixes) != len(targets):
        raise DataError(f"{path}: {len(prefixes)} prefixes and {len(targets)} targets. Expected {_EXPECTED_TEST}")
    return check_records(path, list(zip(prefixes, targets, strict=True)), _joined, log)


def _joined(case: tuple[Any, Any]) -> list[int]:
    prefix, target = case
    if type(prefix) is not list or not prefix:
        raise RecordError(f"the prefix {shown(prefix)}, expected a list of at least 1 integers")
    return integers_in([*prefix, target], 2)


def _flat(lists: list[list[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(lists), np.int64)


def _sequences(lists: list[list[int]], items: np.ndarray) -> Sequences:
    return Sequences(items.astype(np.int32), offsets_of(np.array([len(part) for part in lists], np.int64)))


def _cases(joined: Sequences) -> Cases:
    """Return a case per sequence, its last item the target, with one sequence for what in a row is of one session."""
    lengths = joined.lengths
    begins = np.ones(len(joined), np.bool_)
    begins[1:] = lengths[1:] != lengths[:-1] - 1
    # What follows a case one item longer is a prefix of the same session unless an item differs.
    row = rows_of(joined)
    before = np.arange(len(row)) - joined.offsets[row] + joined.offsets[np.maximum(row - 1, 0)]
    compared = np.flatnonzero(~begins[row])
    differs = compared[joined.items[compared] != joined.items[before[compared]]]
    begins[row[differs]] = True
    whole = select(joined, np.flatnonzero(begins))
    return Cases(whole, (np.cumsum(begins) - 1).astype(np.int32), (lengths - 1).astype(np.int32))
