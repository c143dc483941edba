"""Histories of MovieLens-1M."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from recsys_models.data.lines import Dialect, find_columns
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.readers.movielens_1m import EXPECTED_RATINGS, read_films
from recsys_models.data.sessions.raw import Events, RawAttribute
from recsys_models.data.sessions.reader import find_file, present
from recsys_models.data.sessions.readers.movielens import RatingFile, RatingReader, film_attributes

_SEQUENCES = "sequences_original_ids.csv"
_COLUMNS = ("user_id", "pos", "movie_id", "rating")
_EXPECTED_SEQUENCES = f"{_SEQUENCES}: the header {','.join(_COLUMNS)} and one line per rating, pos counting in time"


@dataclass(frozen=True, kw_only=True)
class MovieLens1MSessions(RatingReader):
    """Reads ``ratings.dat``, or ``sequences_original_ids.csv`` (positions in place of time stamps) if that is there.

    Attributes, from ``movies.dat`` if it is there: genres (bag), title (bag of words), year, decade.
    """

    name: ClassVar[str] = "movielens_1m"
    folder: ClassVar[str] = "ml-1m"

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the files of ratings and films."""
        path = find_file(folder, ("ratings.dat", _SEQUENCES), f"{EXPECTED_RATINGS}, or {_EXPECTED_SEQUENCES}")
        role = "ratings" if path.suffix == ".dat" else "sequences"
        return {role: path} | present(folder, {"movies": "movies.dat"})

    def read(self, files: Mapping[str, Path], log: MalformedLog) -> tuple[Events, tuple[RawAttribute, ...]]:
        """Return all ratings, and what is known about films."""
        if "ratings" in files:
            ratings = RatingFile(files["ratings"], Dialect(b"::", 4), (0, 1, 2, 3), EXPECTED_RATINGS)
        else:
            path = files["sequences"]
            dialect, (user, position, movie, rating) = find_columns(path, ",", _COLUMNS, _EXPECTED_SEQUENCES)
            ratings = RatingFile(path, dialect, (user, movie, rating, position), _EXPECTED_SEQUENCES, dated=False)
        events = self.events(ratings, log)
        return events, film_attributes(read_films(files["movies"], log)) if "movies" in files else ()
