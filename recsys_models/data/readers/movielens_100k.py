"""MovieLens-100K, in its original format or as RecBole's atomic files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.lines import Dialect, find_columns
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.reader import RawLog, check_one_of
from recsys_models.data.readers.movielens import (
    Films,
    MovieLens,
    Ratings,
    Table,
    attribute_texts,
    read_table,
    years_in,
)

ATOMIC = "an atomic file of RecBole: tab-separated, with a header of name:type"
EXPECTED = {
    "ratings": "u.data of MovieLens-100K: user, item, rating and timestamp, separated by tabs",
    "users": "u.user of MovieLens-100K: user|age|gender|occupation|zip",
    "items": "u.item of MovieLens-100K: item|title|release date|video date|URL and 19 flags of genres, in latin-1",
}
ATOMIC_NAMES = {"ratings": "ml-100k.inter", "users": "ml-100k.user", "items": "ml-100k.item"}
ORIGINAL_NAMES = {"ratings": "u.data", "users": "u.user", "items": "u.item"}
_AGES = np.array([18, 25, 35, 45, 50, 56])
_GENRES = (
    *(
        "unknown",
        "Action",
        "Adventure",
        "Animation",
        "Children's",
        "Comedy",
        "Crime",
        "Documentary",
        "Drama",
        "Fantasy",
    ),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


@dataclass(frozen=True, kw_only=True)
class MovieLens100K(MovieLens):
    """Reads ``u.data``, ``u.user`` and ``u.item``, or RecBole's ``ml-100k.inter``, ``.user`` and ``.item``.

    Fields: user, item, age, gender, occupation, zip; with ``item_features`` also genres and year.

    Args:
        age: ``"bucket"`` for the seven age groups of MovieLens-1M (1, 18, 25, 35, 45, 50, 56), ``"raw"`` for years.
    """

    name: ClassVar[str] = "movielens_100k"
    folder: ClassVar[str] = "ml-100k"

    age: str = "bucket"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_one_of(self.name, "age", self.age, ("bucket", "raw"))

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the files of ratings, users and, if asked for, films, in the format that is there."""
        roles = ("ratings", "users", "items") if self.item_features else ("ratings", "users")
        for prefix, names in (("", ORIGINAL_NAMES), ("atomic_", ATOMIC_NAMES)):
            if (folder / names["ratings"]).exists():
                return {prefix + role: folder / names[role] for role in roles}
        raise DataError(
            f"{folder}: neither u.data nor ml-100k.inter is there. Expected {EXPECTED['ratings']}, or {ATOMIC}; "
            "unpack ml-100k.zip there or pass another root"
        )

    def open(self, files: Mapping[str, Path], log: MalformedLog) -> RawLog:
        """Start reading."""
        if "ratings" in files:
            ratings = Ratings(files["ratings"], Dialect(b"\t", 4), (0, 1, 2), EXPECTED["ratings"])
            columns = {"age": 1, "gender": 2, "occupation": 3, "zip": 4}
            users = read_table(files["users"], Dialect(b"|", 5), log, EXPECTED["users"], columns, ("age",))
            items = read_original_films(files["items"], log).table() if self.item_features else None
        else:
            ratings = _atomic_ratings(files["atomic_ratings"])
            users = _atomic_users(files["atomic_users"], log)
            items = read_atomic_films(files["atomic_items"], log).table() if self.item_features else None
        if self.age == "bucket":
            users.columns["age"] = np.append(1, _AGES)[np.searchsorted(_AGES, users.columns["age"], side="right")]
        return self.assemble(ratings, users, items, log)


def read_original_films(path: Path, log: MalformedLog) -> Films:
    """Read ``u.item``; malformed lines go to the log."""
    columns = {"title": 1} | {genre: 5 + position for position, genre in enumerate(_GENRES)}
    table = read_table(path, Dialect(b"|", 24, encoding="latin-1"), log, EXPECTED["items"], columns, _GENRES)
    flags = np.column_stack([table.columns[genre] == 1 for genre in _GENRES])
    genres = np.array([" ".join(g for g, flag in zip(_GENRES, row, strict=True) if flag) for row in flags], np.str_)
    titles = attribute_texts(table, "title")
    return Films(path, table.keys, titles, genres, years_in(titles))


def _atomic_ratings(path: Path) -> Ratings:
    dialect, (user, item, rating) = atomic_columns(path, ("user_id", "item_id", "rating"))
    return Ratings(path, dialect, (user, item, rating), ATOMIC)


def _atomic_users(path: Path, log: MalformedLog) -> Table:
    dialect, (_, age, gender, occupation, code) = atomic_columns(
        path, ("user_id", "age", "gender", "occupation", "zip_code")
    )
    columns = {"age": age, "gender": gender, "occupation": occupation, "zip": code}
    return read_table(path, dialect, log, ATOMIC, columns, ("age",))


def read_atomic_films(path: Path, log: MalformedLog) -> Films:
    """Read RecBole's ``ml-100k.item``; malformed lines go to the log."""
    dialect, (_, title, year, genres) = atomic_columns(path, ("item_id", "movie_title", "release_year", "class"))
    table = read_table(path, dialect, log, ATOMIC, {"title": title, "year": year, "genres": genres})
    titles, classes, years = (attribute_texts(table, name) for name in ("title", "genres", "year"))
    return Films(path, table.keys, titles, classes, years_in(years))


def atomic_columns(path: Path, wanted: Sequence[str]) -> tuple[Dialect, list[int]]:
    """Return the dialect of an atomic file and the positions of the ``wanted`` columns.

    Raises:
        DataError: if one is not there.
    """
    return find_columns(path, "\t", wanted, ATOMIC)
