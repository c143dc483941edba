"""Histories of MovieLens-100K."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from recsys_models.data.lines import Dialect
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.readers.movielens_100k import (
    ATOMIC,
    ATOMIC_NAMES,
    EXPECTED,
    ORIGINAL_NAMES,
    atomic_columns,
    read_atomic_films,
    read_original_films,
)
from recsys_models.data.sessions.raw import Events, RawAttribute
from recsys_models.data.sessions.reader import find_file, present
from recsys_models.data.sessions.readers.movielens import RatingFile, RatingReader, film_attributes


@dataclass(frozen=True, kw_only=True)
class MovieLens100KSessions(RatingReader):
    """Reads ``u.data``, or RecBole's ``ml-100k.inter``.

    Attributes, from ``u.item`` or ``ml-100k.item`` if it is there: genres (bag), title (bag of words), year, decade.
    """

    name: ClassVar[str] = "movielens_100k"
    folder: ClassVar[str] = "ml-100k"

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the files of ratings and films, in the format that is there."""
        names = (ORIGINAL_NAMES["ratings"], ATOMIC_NAMES["ratings"])
        path = find_file(folder, names, f"{EXPECTED['ratings']}, or {ATOMIC}")
        if path.name == ORIGINAL_NAMES["ratings"]:
            return {"ratings": path} | present(folder, {"items": ORIGINAL_NAMES["items"]})
        return {"atomic_ratings": path} | present(folder, {"items": ATOMIC_NAMES["items"]})

    def read(self, files: Mapping[str, Path], log: MalformedLog) -> tuple[Events, tuple[RawAttribute, ...]]:
        """Return all ratings, and what is known about films."""
        if "ratings" in files:
            ratings = RatingFile(files["ratings"], Dialect(b"\t", 4), (0, 1, 2, 3), EXPECTED["ratings"])
            read_films = read_original_films
        else:
            path = files["atomic_ratings"]
            dialect, (user, item, rating, time) = atomic_columns(path, ("user_id", "item_id", "rating", "timestamp"))
            ratings = RatingFile(path, dialect, (user, item, rating, time), ATOMIC)
            read_films = read_atomic_films
        events = self.events(ratings, log)
        return events, film_attributes(read_films(files["items"], log)) if "items" in files else ()
