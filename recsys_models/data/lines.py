"""Streams delimited text files as blocks of column offsets, so that columns parse as arrays and not line by line."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from recsys_models.data.errors import DataError

BLOCK_BYTES = 1 << 24
PADDING = 1024
_MAGIC = {b"\x1f\x8b": "gzip", b"PK": "zip", b"BZ": "bzip2", b"\xfd7": "xz", b"7z": "7z", b"\x28\xb5": "zstandard"}
_NEWLINE, _RETURN = 10, 13


@dataclass(frozen=True)
class Dialect:
    r"""How the columns of a text file are delimited.

    Args:
        separator: one separator of one or two bytes, for example ``b"\t"`` or ``b"::"``.
        columns: number of columns of a well-formed line.
        header: whether the first line names the columns and holds no data.
        encoding: of the text columns.
        also: a further one-byte separator, for formats such as ``index:value`` pairs; empty for none.
    """

    separator: bytes
    columns: int
    header: bool = False
    encoding: str = "utf-8"
    also: bytes = b""


@dataclass(frozen=True)
class Lines:
    """A block of lines with the offsets of their columns.

    Args:
        text: uint8 ``(bytes + PADDING,)``, the block and zeros, so that a window may reach past the last column.
        starts: int64 ``(n, columns)``, first byte of each column of each line with the right number of columns.
        ends: int64 ``(n, columns)``, one past the last byte.
        numbers: int64 ``(n,)``, line numbers counted from 1.
        misfits: ``(line number, columns found)`` of the lines with another number of columns; empty lines are no lines.
        unterminated: number of the file's last line if it lacks the line end, else 0.
    """

    text: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    numbers: np.ndarray
    misfits: list[tuple[int, int]]
    unterminated: int


def check_readable(path: Path, expected: str) -> None:
    """Raise a :class:`DataError` unless ``path`` is a file that holds something other than a compressed archive."""
    if not path.is_file():
        raise DataError(f"{path}: no such file. Expected {expected}")
    with path.open("rb") as file:
        head = file.read(2)
    if not head:
        raise DataError(f"{path}: the file is empty. Expected {expected}; download it again")
    if head in _MAGIC:
        raise DataError(f"{path}: this is {_MAGIC[head]} data, line 1 is no text. Expected {expected}; unpack it first")


def read_header(path: Path, separator: str, expected: str) -> list[str]:
    """Return the column names in the first line of ``path``, without a byte-order mark."""
    check_readable(path, expected)
    with path.open("rb") as file:
        line = file.readline(1 << 16)
    _check_text(line, path, 1, expected)
    try:
        return line.decode("utf-8-sig").rstrip("\r\n").split(separator)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: line 1 is not UTF-8 text ({error}). Expected {expected}") from error


def find_columns(
    path: Path, separator: str, wanted: Sequence[str | tuple[str, ...]], expected: str
) -> tuple[Dialect, list[int]]:
    """Find columns by the header of a file, whose names may be followed by a colon and a type.

    Args:
        path: the file.
        separator: of the columns.
        wanted: names of columns; a tuple for one that has several spellings.
        expected: what the file should be, for messages.

    Returns:
        The dialect of the file, and the position of each wanted column.

    Raises:
        DataError: if one is not there.
    """
    header = read_header(path, separator, expected)
    names = [column.partition(":")[0] for column in header]
    positions = []
    for spellings in wanted:
        found = [name for name in ((spellings,) if isinstance(spellings, str) else spellings) if name in names]
        if not found:
            column = spellings if isinstance(spellings, str) else " or ".join(spellings)
            raise DataError(f"{path}: line 1 lacks the column {column}, it has {header}. Expected {expected}")
        positions.append(names.index(found[0]))
    return Dialect(separator.encode(), len(header), header=True), positions


def read_lines(path: Path, dialect: Dialect, expected: str, block_bytes: int = BLOCK_BYTES) -> Iterator[Lines]:
    """Stream ``path`` in blocks of whole lines.

    Args:
        path: the file.
        dialect: its delimiters.
        expected: what the file should be, for error messages.
        block_bytes: size of one block; the memory in use is some 20 times that.

    Raises:
        DataError: if the file is missing, empty, compressed or binary, or has lines longer than a block.
    """
    check_readable(path, expected)
    number = 1
    skip = dialect.header
    for block in _whole_lines(path, expected, block_bytes):
        _check_text(block, path, number, expected)
        lines = _split(block, dialect, number)
        number += block.count(b"\n")
        yield _without_first(lines, dialect) if skip else lines
        skip = False


def _whole_lines(path: Path, expected: str, block_bytes: int) -> Iterator[bytes]:
    rest = b""
    size = path.stat().st_size
    bar = tqdm(total=size, desc=path.name, unit="B", unit_scale=True, leave=False, disable=None)
    with path.open("rb") as file, bar:
        while block := file.read(block_bytes):
            bar.update(len(block))
            if file.tell() == len(block):
                block = block.removeprefix(b"\xef\xbb\xbf")
            block = rest + block
            cut = block.rfind(b"\n") + 1
            rest = block[cut:]
            if len(rest) > max(block_bytes, 1 << 16):
                raise DataError(f"{path}: a line of over {len(rest)} bytes; this is no text file. Expected {expected}")
            if cut:
                yield block[:cut]
    if rest:
        yield rest


def _check_text(block: bytes, path: Path, first_line: int, expected: str) -> None:
    zero = block.find(b"\0")
    if zero >= 0:
        line = first_line + block.count(b"\n", 0, zero)
        raise DataError(
            f"{path}: line {line} holds a zero byte, so this is no text file (binary, UTF-16 or damaged). "
            f"Expected {expected}; unpack, convert or download it again"
        )


def _split(block: bytes, dialect: Dialect, first_line: int) -> Lines:
    unterminated = not block.endswith(b"\n")
    text = np.frombuffer(block + b"\n" * unterminated + bytes(PADDING), np.uint8)
    newlines = np.flatnonzero(text == _NEWLINE)
    starts = np.concatenate(([0], newlines[:-1] + 1))
    ends = newlines - ((text[newlines - 1] == _RETURN) & (newlines > starts))
    numbers = np.arange(first_line, first_line + len(newlines))
    separators = _separators(text, dialect)
    found = np.diff(np.searchsorted(separators, newlines), prepend=0) + 1
    good = (found == dialect.columns) & (ends > starts)
    misfit = (found != dialect.columns) & (ends > starts)
    inner = separators[np.repeat(good, found - 1)].reshape(-1, dialect.columns - 1)
    return Lines(
        text,
        np.column_stack((starts[good], inner + len(dialect.separator))),
        np.column_stack((inner, ends[good])),
        numbers[good],
        list(zip(numbers[misfit].tolist(), found[misfit].tolist(), strict=True)),
        int(numbers[-1]) if unterminated else 0,
    )


def _separators(text: np.ndarray, dialect: Dialect) -> np.ndarray:
    matches = text == dialect.separator[0]
    if len(dialect.separator) == 2:
        matches[:-1] &= text[1:] == dialect.separator[1]
        matches[-1] = False
    if dialect.also:
        matches |= text == dialect.also[0]
    return np.flatnonzero(matches)


def _without_first(lines: Lines, dialect: Dialect) -> Lines:
    skip = int(len(lines.numbers) > 0 and lines.numbers[0] == 1)
    return Lines(
        lines.text,
        lines.starts[skip:],
        lines.ends[skip:],
        lines.numbers[skip:],
        [misfit for misfit in lines.misfits if misfit[0] != 1],
        lines.unterminated,
    )
