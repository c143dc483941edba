"""What the MovieLens readers share: labels from ratings, and the tables of users and films."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.lines import Dialect
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.reader import Chunk, RawLog, Reader, check_one_of
from recsys_models.data.rows import Rows, read_rows

LABEL_RULES = {"drop_3": (4.0, 3.0), ">=3": (3.0, None), ">=4": (4.0, None)}
"""Per rule the least rating of label 1, and the rating that is left out."""

_YEAR = re.compile(r"\((\d{4})\)\s*$|(?:^|-)(\d{4})$")


@dataclass(frozen=True, eq=False)
class Table:
    """Attributes of users or films.

    Args:
        path: the file they come from.
        keys: int64 ``(n,)``, ascending.
        columns: per attribute int64 ``(n,)``; positions in ``texts`` if the attribute is there.
        texts: per attribute of texts its distinct texts, ascending, ``(T,)``.
    """

    path: Path
    keys: np.ndarray
    columns: dict[str, np.ndarray]
    texts: dict[str, np.ndarray]

    def look_up(self, rows: Rows, keys: np.ndarray, name: str) -> list[np.ndarray]:
        """Return each attribute of ``keys`` as int64 ``(n,)``; lines with a key not in the table are malformed."""
        position = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        rows.expect(self.keys[position] == keys, keys, name, f"one in {self.path.name}")
        return [column[position] for column in self.columns.values()]


@dataclass(frozen=True, eq=False)
class Films:
    """What the files say about films.

    Args:
        path: the file they come from.
        keys: int64 ``(n,)``, ascending.
        titles: ``(n,)``, with or without the year.
        genres: ``(n,)``, the genres of each film as one text, separated by ``|`` or a space.
        years: ``(n,)``, of the release, as text; empty if unknown.
    """

    path: Path
    keys: np.ndarray
    titles: np.ndarray
    genres: np.ndarray
    years: np.ndarray

    def table(self) -> Table:
        """Return genres and years as attributes."""
        return _code(self.path, self.keys, {"genres": self.genres, "year": self.years})


@dataclass(frozen=True, eq=False)
class Ratings:
    """Where the columns of a ratings file are: its dialect and the positions of user, item and rating."""

    path: Path
    dialect: Dialect
    columns: tuple[int, int, int]
    expected: str


@dataclass(frozen=True, kw_only=True)
class MovieLens(Reader):
    """Options of both MovieLens readers.

    Args:
        label_rule: ``"drop_3"`` leaves out ratings of 3 and labels lower ones 0 and higher ones 1; ``">=3"`` and
            ``">=4"`` keep all ratings and label those at or above the threshold 1.
        item_features: whether to add the fields ``genres`` (the set of genres as one value) and ``year`` of the film.
    """

    label_rule: str = "drop_3"
    item_features: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_one_of(self.name, "label_rule", self.label_rule, tuple(LABEL_RULES))

    def assemble(self, ratings: Ratings, users: Table, items: Table | None, log: MalformedLog) -> RawLog:
        """Join ratings with the tables of users and, if there is one, of items."""
        tables = [("user", users)] + ([("item", items)] if items else [])
        fields = ["user", self.item_name, *(name for _, table in tables for name in table.columns)]
        texts = {name: values for _, table in tables for name, values in table.texts.items()}
        return RawLog(tuple(fields), self._chunks(ratings, tables, log), texts=texts)

    @property
    def item_name(self) -> str:
        """Name of the field of items."""
        return "item"

    def _chunks(self, ratings: Ratings, tables: list[tuple[str, Table]], log: MalformedLog) -> Iterator[Chunk]:
        least, dropped = LABEL_RULES[self.label_rule]
        for rows in read_rows(ratings.path, ratings.dialect, log, ratings.expected):
            user_column, item_column, rating_column = ratings.columns
            keys = {"user": rows.integers(user_column, "user"), "item": rows.integers(item_column, "item")}
            rating = rows.numbers(rating_column, "rating")
            rows.expect((rating >= 1) & (rating <= 5), rating, "rating", "1 to 5")
            attributes = [column for key, table in tables for column in table.look_up(rows, keys[key], key)]
            use = rows.good & (rating != dropped)
            yield Chunk(np.column_stack([*keys.values(), *attributes])[use], rating[use] >= least)


def read_table(
    path: Path,
    dialect: Dialect,
    log: MalformedLog,
    expected: str,
    columns: Mapping[str, int],
    integers: Sequence[str] = (),
) -> Table:
    """Read a table of users or items.

    Args:
        path: the file.
        dialect: its delimiters.
        log: where malformed lines are recorded, a repeated key among them.
        expected: what the file should be, for messages.
        columns: position of each attribute; the key is in column 0.
        integers: the attributes that are integers; the others are texts, which may be empty.
    """
    keys: list[np.ndarray] = []
    parts: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    for rows in read_rows(path, dialect, log, expected):
        key = rows.integers(0, "key")
        values = {
            name: rows.integers(i, name) if name in integers else rows.text(i, name, optional=True)
            for name, i in columns.items()
        }
        seen = np.concatenate([*keys, key])
        first = np.zeros(len(seen), np.bool_)
        first[np.unique(seen, return_index=True)[1]] = True
        rows.expect(first[len(seen) - len(key) :], key, "key", "one that was not there before")
        keys.append(key[rows.good])
        for name, value in values.items():
            parts[name].append(value[rows.good])
    joined = np.concatenate(keys)
    if not len(joined):
        raise DataError(f"{path}: no usable line. Expected {expected}")
    order = np.argsort(joined)
    return _code(path, joined[order], {name: np.concatenate(part)[order] for name, part in parts.items()})


def years_in(texts: np.ndarray) -> np.ndarray:
    """Return the years that texts ``(n,)`` end in, bare, in brackets or after a hyphen, ``(n,)``; empty for no year."""
    years = [_YEAR.search(text) for text in texts.tolist()]
    return np.array([next(filter(None, match.groups())) if match else "" for match in years], np.str_)


def attribute_texts(table: Table, name: str) -> np.ndarray:
    """Return the texts of an attribute, ``(n,)``."""
    texts: np.ndarray = table.texts[name][table.columns[name]]
    return texts


def _code(path: Path, keys: np.ndarray, attributes: Mapping[str, np.ndarray]) -> Table:
    columns, texts = {}, {}
    for name, values in attributes.items():
        if values.dtype.kind == "U":
            texts[name], columns[name] = np.unique(values, return_inverse=True)
        else:
            columns[name] = values
    return Table(path, keys, columns, texts)
