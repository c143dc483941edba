"""Files without columns: JSON, and lists of any length. What does not parse is left out and accounted for."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from recsys_models.data.errors import DataError
from recsys_models.data.lines import check_readable
from recsys_models.data.malformed import MalformedLog

_FIRST_LINES = 1_000
_SHOWN = 60
_LARGEST = np.iinfo(np.int64).max

T = TypeVar("T")


class RecordError(ValueError):
    """A record is malformed; the text says what was found and what was expected."""


def read_records(path: Path, parse: Callable[[str], T], log: MalformedLog, expected: str) -> Iterator[T]:
    """Yield what ``parse`` makes of each line of a UTF-8 file; empty lines are no lines.

    Args:
        path: the file.
        parse: raises a :class:`RecordError` for a malformed line, which is left out.
        log: where malformed lines are recorded.
        expected: what the file should be, for messages.

    Raises:
        DataError: if the file is missing, empty, compressed or cut off, or if most of its first lines are malformed,
            which means another format.
    """
    check_readable(path, expected)
    good = bad = 0
    bar = tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, leave=False, disable=None)
    with path.open("rb") as file, bar:
        for number, line in enumerate(file, start=1):
            bar.update(len(line))
            if not line.strip():
                continue
            try:
                record = parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (RecordError, UnicodeDecodeError) as error:
                bad += 1
                _record(path, number, line, error, log, expected)
            else:
                good += 1
                yield record
            if good + bad == _FIRST_LINES:
                _check_format(path, good, bad, log, expected)
    log.count_lines(path, good + bad)
    _check_format(path, good, bad, log, expected)


def check_records(path: Path, records: list[Any], check: Callable[[Any], T], log: MalformedLog) -> list[T]:
    """Return what ``check`` makes of the records of a file; those it raises a :class:`RecordError` for are left out.

    Args:
        path: the file, whose "lines" are the records, counted from 1.
        records: as the file has them.
        check: returns the record in the form to go on with.
        log: where malformed records are recorded.
    """
    kept = []
    log.count_lines(path, len(records))
    for number, record in enumerate(records, start=1):
        try:
            kept.append(check(record))
        except RecordError as error:
            log.count_malformed(path, 1)
            log.keep(path, number, f"record {number} is {error}")
    return kept


def read_json(path: Path, expected: str) -> Any:
    """Return what a JSON file holds.

    Raises:
        DataError: if the file is missing, empty, compressed, or no JSON.
    """
    check_readable(path, expected)
    try:
        return json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: this is no text ({error}). Expected {expected}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {error.lineno}, column {error.colno}: no JSON ({error.msg}). Expected {expected}; if the "
            "file was cut off, download or copy it again"
        ) from error


def integers_in(values: Any, least: int) -> list[int]:
    """Return a list of at least ``least`` 64-bit integers as it is.

    Raises:
        RecordError: if ``values`` is anything else.
    """
    if type(values) is not list or len(values) < least:
        raise RecordError(f"{shown(values)}, expected a list of at least {least} integers")
    for value in values:
        if type(value) is not int or not -_LARGEST <= value <= _LARGEST:
            raise RecordError(f"{shown(values)}, which has {shown(value)}, expected integers of up to 64 bits")
    return values


def shown(value: Any) -> str:
    """Return the beginning of how a value is written."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _record(path: Path, number: int, line: bytes, error: ValueError, log: MalformedLog, expected: str) -> None:
    reason = str(error) if isinstance(error, RecordError) else f"{shown(line)}, expected text in UTF-8"
    if not line.endswith(b"\n"):
        raise DataError(
            f"{path}: the file ends in the middle of line {number}: {reason}. It was cut off; download or copy it "
            f"again, or delete that line. Expected {expected}"
        )
    log.count_malformed(path, 1)
    log.keep(path, number, reason)


def _check_format(path: Path, good: int, bad: int, log: MalformedLog, expected: str) -> None:
    if bad > good:
        examples = "\n  ".join(str(line) for line in log.kept if line.file == path.name)
        raise DataError(
            f"{path}: {bad} of the first {good + bad} lines are malformed. This is not {expected}:\n  {examples}"
        )
