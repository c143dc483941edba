"""What the MovieLens readers of sessions share: ratings as events, and films as attributes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recsys_models.data.lines import Dialect
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.reader import check_at_least
from recsys_models.data.readers.movielens import Films
from recsys_models.data.rows import read_rows
from recsys_models.data.sessions.attributes import bag_attribute, text_attribute, title_words
from recsys_models.data.sessions.raw import Events, RawAttribute, gather
from recsys_models.data.sessions.reader import TimedReader

_GENRE = re.compile(r"[^| ]+")


@dataclass(frozen=True, eq=False)
class RatingFile:
    """A file of ratings: its dialect, and the positions of user, item, rating and time.

    Args:
        path: the file.
        dialect: its delimiters.
        columns: positions of user, item, rating and time.
        expected: what the file should be, for messages.
        dated: whether times are dates, in seconds since 1970, or positions in a history.
    """

    path: Path
    dialect: Dialect
    columns: tuple[int, int, int, int]
    expected: str
    dated: bool = True


@dataclass(frozen=True, kw_only=True)
class RatingReader(TimedReader):
    """Reads ratings as histories of users.

    Args:
        min_rating: ratings below it are left out; 0 for none.
    """

    min_rating: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_at_least(self.name, "min_rating", self.min_rating, 0.0)

    def events(self, ratings: RatingFile, log: MalformedLog) -> Events:
        """Return the ratings of a file as events; malformed lines go to the log."""
        users, items, times = gather(self._blocks(ratings, log))
        return Events(users, items, times, dated=ratings.dated)

    def _blocks(self, ratings: RatingFile, log: MalformedLog) -> Iterator[tuple[np.ndarray, ...]]:
        user, item, rating, time = ratings.columns
        for rows in read_rows(ratings.path, ratings.dialect, log, ratings.expected):
            columns = rows.integers(user, "user"), rows.integers(item, "item"), rows.numbers(time, "time")
            stars = rows.numbers(rating, "rating")
            rows.expect((stars >= 0) & (stars <= 5), stars, "rating", "0 to 5")
            yield tuple(column[rows.good & (stars >= self.min_rating)] for column in columns)


def film_attributes(films: Films) -> tuple[RawAttribute, ...]:
    """Return genres (a bag), words of the title (a bag), year and decade."""
    years = films.years.tolist()
    return (
        bag_attribute("genres", films.keys, (_GENRE.findall(genres) for genres in films.genres.tolist())),
        bag_attribute("title", films.keys, map(title_words, films.titles.tolist())),
        text_attribute("year", films.keys, years),
        text_attribute("decade", films.keys, [f"{year[:3]}0s" if year else "" for year in years]),
    )
