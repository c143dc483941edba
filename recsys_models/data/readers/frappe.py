"""Frappe: context-aware app usage, in libfm form with given splits."""

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.lines import Dialect, check_readable, read_header
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.reader import Chunk, RawLog, Reader
from recsys_models.data.rows import Rows, read_rows
from recsys_models.data.splits import SPLIT_NAMES

FIELDS = ("user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
_EXPECTED = "a libfm file: a label 1 or -1 (or 0) and one 'index:1' per field, separated by single spaces"
_INDEX = re.compile(r"[0-9]{1,18}")
_EXPECTED_MAP = "feature_map.csv: the header field,index,value and one line per index"


@dataclass(frozen=True, kw_only=True)
class Frappe(Reader):
    """Reads ``train.libfm``, ``validation.libfm`` and ``test.libfm``, and ``feature_map.csv`` if it is there.

    With the map, an index belongs to the field that the map gives it, wherever it stands in its line, and
    ``Field.values`` holds the values of the map. Without it, the field is the position in the line, and the values are
    the indices.
    """

    name: ClassVar[str] = "frappe"
    folder: ClassVar[str] = "frappe"

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the three splits, and the map of indices if it exists."""
        files = {split: folder / f"{split}.libfm" for split in SPLIT_NAMES}
        feature_map = folder / "feature_map.csv"
        return files | ({"map": feature_map} if feature_map.exists() else {})

    def open(self, files: Mapping[str, Path], log: MalformedLog) -> RawLog:
        """Start reading."""
        feature_map = _FeatureMap.read(files["map"]) if "map" in files else None
        fields = feature_map.fields if feature_map else _fields_by_position(files["train"])
        texts = dict.fromkeys(fields, feature_map.texts) if feature_map else {}
        return RawLog(fields, _chunks(files, len(fields), feature_map, log), texts=texts)


@dataclass(frozen=True, eq=False)
class _FeatureMap:
    """The names of the fields; and by ascending index, ``(n,)`` each, the index, its field and the text behind it."""

    fields: tuple[str, ...]
    indices: np.ndarray
    field_of: np.ndarray
    texts: np.ndarray

    @classmethod
    def read(cls, path: Path) -> "_FeatureMap":
        check_readable(path, _EXPECTED_MAP)
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.reader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: {error}. Expected {_EXPECTED_MAP}") from error
        if rows[0] != ["field", "index", "value"]:
            raise DataError(f"{path}: line 1 is {','.join(rows[0])!r}. Expected {_EXPECTED_MAP}")
        texts: dict[int, str] = {}
        fields: dict[int, str] = {}
        for number, row in enumerate(rows[1:], start=2):
            if len(row) != 3 or not _INDEX.fullmatch(row[1]) or int(row[1]) in fields:
                raise DataError(
                    f"{path}: line {number} is {','.join(row)!r}, expected field,index,value with an index not used "
                    "before. Correct or remove the file; without it, fields go by their position in a line"
                )
            fields[int(row[1])], texts[int(row[1])] = row[0], row[2]
        if not fields:
            raise DataError(f"{path}: no line after the header. Expected {_EXPECTED_MAP}")
        return cls._from_dicts(fields, texts)

    @classmethod
    def _from_dicts(cls, fields: Mapping[int, str], texts: Mapping[int, str]) -> "_FeatureMap":
        names = tuple(dict.fromkeys(fields.values()))
        number = {name: position for position, name in enumerate(names)}
        indices = sorted(fields)
        return cls(
            names,
            np.array(indices, np.int64),
            np.array([number[fields[index]] for index in indices], np.int64),
            np.array([texts[index] for index in indices], np.str_),
        )

    def arrange(self, rows: Rows, indices: np.ndarray) -> np.ndarray:
        """Return the positions in ``texts`` of each line's indices, int64 ``(n, F)``, in the order of the fields.

        Lines that have not one index of each field are malformed.
        """
        position = np.minimum(np.searchsorted(self.indices, indices), len(self.indices) - 1)
        field_of = np.where(self.indices[position] == indices, self.field_of[position], -1)
        complete = np.all(np.sort(field_of, axis=1) == np.arange(len(self.fields)), axis=1)
        rows.reject(
            ~complete,
            lambda i: f"indices {indices[i].tolist()} are not one of each field ({', '.join(self.fields)}) of the map",
        )
        return np.take_along_axis(position, np.argsort(field_of, axis=1), axis=1)


def _fields_by_position(path: Path) -> tuple[str, ...]:
    count = len(read_header(path, " ", _EXPECTED)) - 1
    if count < 1:
        raise DataError(f"{path}: line 1 has no 'index:1' after the label. Expected {_EXPECTED}")
    return FIELDS if count == len(FIELDS) else tuple(f"field_{position}" for position in range(count))


def _chunks(
    files: Mapping[str, Path], num_fields: int, feature_map: _FeatureMap | None, log: MalformedLog
) -> Iterator[Chunk]:
    dialect = Dialect(b" ", 2 * num_fields + 1, also=b":")
    for code, split in enumerate(SPLIT_NAMES):
        for rows in read_rows(files[split], dialect, log, _EXPECTED):
            labels = rows.integers(0, "label")
            rows.expect(np.isin(labels, (-1, 0, 1)), labels, "label", "1 or -1 (or 0)")
            values = _indices(rows, num_fields)
            if feature_map is not None:
                values = feature_map.arrange(rows, values)
            good = rows.good
            yield Chunk(values[good], labels[good] == 1, split=np.full(int(good.sum()), code, np.int8))


def _indices(rows: Rows, num_fields: int) -> np.ndarray:
    columns = []
    for position in range(num_fields):
        column = 2 * position + 1
        columns.append(rows.integers(column, "index"))
        weight = rows.integers(column + 1, "value")
        rows.expect(weight == 1, weight, "value after an index", "1")
        paired = rows.delimiter(column) == ord(":")
        rows.reject(~paired, lambda i: "expected 'index:1' pairs separated by single spaces")
    return np.column_stack(columns)
