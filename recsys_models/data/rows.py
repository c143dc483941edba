"""Typed columns of delimited text, with every line that does not parse left out and accounted for."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.lines import BLOCK_BYTES, PADDING, Dialect, Lines, read_lines
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.times import LONGEST_TIME, parse_times

MISSING: int = np.iinfo(np.int64).min
"""Raw value that stands for an empty column."""

_MAX_DIGITS = 18
_MAX_TEXT = PADDING
_HEX = np.full(256, 16, np.int64)
_HEX[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_HEX[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)


class Rows:
    """One block of lines whose columns parse on demand.

    Every parsing method returns one value per line. Lines that do not parse get a placeholder and are marked in
    ``good``, so a reader parses all its columns first and takes the good rows at the end.

    Args:
        path: the file, for messages.
        dialect: its delimiters.
        lines: the block.
        log: where malformed lines are recorded.
    """

    def __init__(self, path: Path, dialect: Dialect, lines: Lines, log: MalformedLog) -> None:
        self.path = path
        self.dialect = dialect
        self.good = np.ones(len(lines.numbers), np.bool_)
        self._lines = lines
        self._log = log
        log.count_lines(path, len(lines.numbers) + len(lines.misfits))
        self._record_misfits()

    def __len__(self) -> int:
        """Return the number of lines with the right number of columns."""
        return len(self.good)

    def reject(self, bad: np.ndarray, reason: Callable[[int], str]) -> None:
        """Mark lines as malformed.

        Args:
            bad: bool ``(n,)``.
            reason: called with the position of a line in the block, returns what is wrong with it.

        Raises:
            DataError: if the bad line is the file's last and lacks its line end: the file was cut off.
        """
        new = np.flatnonzero(bad & self.good)
        self.good &= ~bad
        self._log.count_malformed(self.path, len(new))
        for position in new[: self._log.room].tolist():
            self._log.keep(self.path, int(self._lines.numbers[position]), reason(position))
        if len(new) and self._lines.numbers[new[-1]] == self._lines.unterminated:
            raise self._truncated(reason(int(new[-1])))

    def keep(self, kept: np.ndarray) -> None:
        """Go on with the lines ``kept``, bool ``(n,)``, alone; what the others hold is never looked at."""
        lines = self._lines
        self._lines = replace(lines, starts=lines.starts[kept], ends=lines.ends[kept], numbers=lines.numbers[kept])
        self.good = self.good[kept]

    def expect(self, good: np.ndarray, values: np.ndarray, name: str, wanted: str) -> None:
        """Mark the lines not ``good``, bool ``(n,)``, as malformed because of their ``values``, ``(n,)``."""
        self.reject(~good, lambda i: f"{name} {values[i]}, expected {wanted}")

    def equals(self, column: int, text: bytes) -> np.ndarray:
        """Return whether column ``column`` is ``text``, bool ``(n,)``."""
        found, length = self._characters(column, len(text))
        same: np.ndarray = length == len(text)
        if found.shape[1] == len(text):
            same &= (found == np.frombuffer(text, np.uint8)).all(axis=1)
        return same

    def times(self, column: int, name: str) -> np.ndarray:
        """Return column ``column`` of ISO 8601 times in UTC as float64 ``(n,)``, seconds since 1970.

        ``2014-04-07``, ``2014-04-07T10:51:09Z`` and ``2014-04-07T10:51:09.277Z`` are such times; the Z may be missing.
        """
        value, bad = parse_times(*self._characters(column, LONGEST_TIME))
        self.reject(bad, lambda i: self._wrong(column, name, i, "a time such as 2014-04-07T10:51:09.277Z"))
        return value

    def delimiter(self, column: int) -> np.ndarray:
        """Return the byte after column ``column``, uint8 ``(n,)``."""
        after: np.ndarray = self._lines.text[self._lines.ends[:, column]]
        return after

    def text(self, column: int, name: str, *, optional: bool = False) -> np.ndarray:
        """Return column ``column`` as strings ``(n,)``; those not in the file's encoding are malformed.

        Args:
            column: position of the column.
            name: what the column holds, for messages.
            optional: whether the column may be empty; else that is malformed.
        """
        distinct, inverse = np.unique(self._bytes(column, name), return_inverse=True)
        decoded = [_decode(value, self.dialect.encoding) for value in distinct.tolist()]
        usable = np.array([value is not None and (optional or value != "") for value in decoded], np.bool_)
        wanted = f"{'' if optional else 'non-empty '}text in {self.dialect.encoding}"
        self.reject(~usable[inverse], lambda i: self._wrong(column, name, i, wanted))
        return np.array([value or "" for value in decoded], np.str_)[inverse]

    def numbers(self, column: int, name: str) -> np.ndarray:
        """Return column ``column`` as float64 ``(n,)``; anything but a finite number is malformed."""
        distinct, inverse = np.unique(self._bytes(column, name), return_inverse=True)
        parsed = np.array([_number(value) for value in distinct.tolist()], np.float64)[inverse]
        bad = ~np.isfinite(parsed)
        self.reject(bad, lambda i: self._wrong(column, name, i, "a number"))
        return np.where(bad, 0.0, parsed)

    def integers(self, column: int, name: str, *, optional: bool = False) -> np.ndarray:
        """Return column ``column`` as int64 ``(n,)``; empty ones are :data:`MISSING` if ``optional``, else malformed.

        Args:
            column: position of the column.
            name: what the column holds, for messages.
            optional: whether the column may be empty.
        """
        text, length = self._characters(column, _MAX_DIGITS + 1)
        negative = text[:, 0] == ord("-")
        value = np.zeros(len(self), np.int64)
        bad = length - negative > _MAX_DIGITS
        for j in range(text.shape[1]):
            inside = (j < length) & (~negative if j == 0 else True)
            digit = text[:, j].astype(np.int64) - ord("0")
            bad |= inside & ((digit < 0) | (digit > 9))
            value = np.where(inside, value * 10 + digit, value)
        bad |= length == negative
        value = np.where(negative, -value, value)
        wanted = "an integer of up to 18 digits"
        return self._finish(column, name, value, bad, length == 0 if optional else None, wanted)

    def hexadecimals(self, column: int, name: str, *, digits: int = 8, optional: bool = False) -> np.ndarray:
        """Return column ``column`` of ``digits`` hexadecimal digits as int64 ``(n,)``.

        Args:
            column: position of the column.
            name: what the column holds, for messages.
            digits: number of digits.
            optional: whether the column may be empty, which gives :data:`MISSING`; else that is malformed.
        """
        text, length = self._characters(column, digits)
        value = np.zeros(len(self), np.int64)
        bad = length != digits
        for j in range(min(digits, text.shape[1])):
            nibble = _HEX[text[:, j]]
            bad |= nibble > 15
            value = value * 16 + (nibble & 15)
        wanted = f"{digits} hexadecimal digits"
        return self._finish(column, name, value, bad, length == 0 if optional else None, wanted)

    def _bytes(self, column: int, name: str) -> np.ndarray:
        text, length = self._characters(column, _MAX_TEXT)
        self.reject(length > _MAX_TEXT, lambda i: self._wrong(column, name, i, f"at most {_MAX_TEXT} bytes"))
        width = text.shape[1]
        filled = np.where(np.arange(width) < length[:, None], text, np.uint8(0))
        return np.ascontiguousarray(filled).view(f"S{width}").ravel()

    def _characters(self, column: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        start = self._lines.starts[:, column]
        length = self._lines.ends[:, column] - start
        width = max(1, min(width, int(length.max(initial=0))))
        text = self._lines.text
        # Overlapping items of `width` bytes: one copy per line, where indexing byte by byte takes several times longer.
        windows: np.ndarray = np.ndarray(len(text) - width + 1, f"V{width}", text, strides=(1,))
        return windows[start].view(np.uint8).reshape(len(start), width), length

    def _finish(
        self, column: int, name: str, value: np.ndarray, bad: np.ndarray, missing: np.ndarray | None, wanted: str
    ) -> np.ndarray:
        """Reject what is bad and, where columns may be empty, fill in :data:`MISSING`."""
        if missing is not None:
            bad, wanted = bad & ~missing, f"{wanted} or nothing"
            value = np.where(missing, MISSING, value)
        self.reject(bad, lambda i: self._wrong(column, name, i, wanted))
        return np.where(bad, 0, value)

    def _wrong(self, column: int, name: str, position: int, wanted: str) -> str:
        start, end = self._lines.starts[position, column], self._lines.ends[position, column]
        found = self._lines.text[start : min(end, start + 40)].tobytes().decode("latin-1")
        return f"column {column + 1} ({name}) is {found!r}, expected {wanted}"

    def _record_misfits(self) -> None:
        misfits = self._lines.misfits
        self._log.count_malformed(self.path, len(misfits))
        for number, found in misfits:
            reason = f"{found} columns, expected {self.dialect.columns} separated by {self._separators()}"
            if number == self._lines.unterminated:
                raise self._truncated(reason)
            self._log.keep(self.path, number, reason)

    def _separators(self) -> str:
        both = (self.dialect.separator, self.dialect.also)
        return " and ".join(repr(separator.decode()) for separator in both if separator)

    def _truncated(self, reason: str) -> DataError:
        return DataError(
            f"{self.path}: the file ends in the middle of line {self._lines.unterminated}: {reason}. "
            "It was cut off; download or copy it again, or delete that line"
        )


def read_rows(
    path: Path, dialect: Dialect, log: MalformedLog, expected: str, block_bytes: int = BLOCK_BYTES
) -> Iterator[Rows]:
    """Stream the rows of ``path``, block by block.

    Raises:
        DataError: if the file is missing, empty, binary or cut off, or if half of the first block's lines have the
            wrong number of columns, which means another format.
    """
    first = True
    for lines in read_lines(path, dialect, expected, block_bytes):
        rows = Rows(path, dialect, lines, log)
        if first and len(lines.misfits) > len(rows):
            number, found = lines.misfits[0]
            raise DataError(
                f"{path}: line {number} has {found} columns, and so it is for {len(lines.misfits)} of the first "
                f"{len(rows) + len(lines.misfits)} lines; expected {dialect.columns}. This is not {expected}"
            )
        first = False
        yield rows


def _decode(value: bytes, encoding: str) -> str | None:
    try:
        return value.decode(encoding)
    except UnicodeDecodeError:
        return None


def _number(value: bytes) -> float:
    try:
        return float(value)
    except ValueError:
        return float("nan")
