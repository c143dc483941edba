"""MovieLens-1M in its original format, with or without time stamps."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from recsys_models.data.errors import DataError
from recsys_models.data.lines import Dialect, read_header
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.reader import RawLog
from recsys_models.data.readers.movielens import (
    Films,
    MovieLens,
    Ratings,
    attribute_texts,
    read_table,
    years_in,
)

EXPECTED_RATINGS = "ratings.dat of MovieLens-1M: UserID::MovieID::Rating::Timestamp"
_EXPECTED_CSV = "ratings_no_time.csv: the header user_id,movie_id,rating and one line per rating"
_EXPECTED_USERS = "users.dat of MovieLens-1M: UserID::Gender::Age::Occupation::Zip-code"
_EXPECTED_MOVIES = "movies.dat of MovieLens-1M: MovieID::Title::Genres, in latin-1"


@dataclass(frozen=True, kw_only=True)
class MovieLens1M(MovieLens):
    """Reads ``users.dat`` and ``ratings.dat``, or ``ratings_no_time.csv`` if that is what there is.

    Fields: user, movie, gender, age, occupation, zip; with ``item_features`` also genres and year from ``movies.dat``.
    """

    name: ClassVar[str] = "movielens_1m"
    folder: ClassVar[str] = "ml-1m"

    @property
    def item_name(self) -> str:
        """Name of the field of items."""
        return "movie"

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the files of ratings, users and, if asked for, films."""
        ratings = next(
            (folder / name for name in ("ratings.dat", "ratings_no_time.csv") if (folder / name).exists()), None
        )
        if ratings is None:
            raise DataError(
                f"{folder}: neither ratings.dat nor ratings_no_time.csv is there. Expected {EXPECTED_RATINGS}, or "
                f"{_EXPECTED_CSV}; unpack ml-1m.zip there or pass another root"
            )
        role = "ratings" if ratings.suffix == ".dat" else "ratings_csv"
        files = {role: ratings, "users": folder / "users.dat"}
        return files | ({"movies": folder / "movies.dat"} if self.item_features else {})

    def open(self, files: Mapping[str, Path], log: MalformedLog) -> RawLog:
        """Start reading."""
        columns = {"gender": 1, "age": 2, "occupation": 3, "zip": 4}
        users = read_table(files["users"], Dialect(b"::", 5), log, _EXPECTED_USERS, columns, ("age", "occupation"))
        movies = read_films(files["movies"], log).table() if "movies" in files else None
        return self.assemble(_ratings(files), users, movies, log)


def _ratings(files: Mapping[str, Path]) -> Ratings:
    if "ratings" in files:
        return Ratings(files["ratings"], Dialect(b"::", 4), (0, 1, 2), EXPECTED_RATINGS)
    path = files["ratings_csv"]
    header = read_header(path, ",", _EXPECTED_CSV)
    if header != ["user_id", "movie_id", "rating"]:
        raise DataError(f"{path}: line 1 is {','.join(header)[:200]!r}. Expected {_EXPECTED_CSV}")
    return Ratings(path, Dialect(b",", 3, header=True), (0, 1, 2), _EXPECTED_CSV)


def read_films(path: Path, log: MalformedLog) -> Films:
    """Read ``movies.dat``; malformed lines go to the log."""
    dialect = Dialect(b"::", 3, encoding="latin-1")
    table = read_table(path, dialect, log, _EXPECTED_MOVIES, {"title": 1, "genres": 2})
    titles = attribute_texts(table, "title")
    return Films(path, table.keys, titles, attribute_texts(table, "genres"), years_in(titles))
