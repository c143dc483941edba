"""Product views of the CIKM Cup 2016 (Diginetica)."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar

import numpy as np

from recsys_models.data.lines import find_columns
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.rows import read_rows
from recsys_models.data.sessions.raw import Events, RawAttribute, gather
from recsys_models.data.sessions.reader import TimedReader, find_file, present

_VIEW_COLUMNS = (("session_id", "sessionId"), ("item_id", "itemId"), "timeframe", "eventdate")
_EXPECTED_VIEWS = (
    "train-item-views.csv of the CIKM Cup 2016: separated by ';', with the header "
    "sessionId;userId;itemId;timeframe;eventdate or session_id;user_id;item_id;timeframe;eventdate"
)
_EXPECTED_CATEGORIES = "product-categories.csv of the CIKM Cup 2016: the header itemId;categoryId"
_EXPECTED_PRODUCTS = (
    "products.csv of the CIKM Cup 2016: the header itemId;pricelog2;product.name.tokens, tokens separated by commas"
)
_LARGEST_LOG2 = 1024
_TOKENS = re.compile(r"(\d{1,18}(,\d{1,18})*)?")


@dataclass(frozen=True, kw_only=True)
class Diginetica(TimedReader):
    """Reads ``train-item-views.csv``. Views are ordered by ``timeframe``; a session is of the day in its last line.

    Attributes, from the files that are there: category (``product-categories.csv``); price, its log2 rounded down, and
    name, a bag of numbered words (``products.csv``).

    Args:
        file: name of the file of views.
    """

    name: ClassVar[str] = "diginetica"
    folder: ClassVar[str] = "diginetica"
    version: ClassVar[int] = 2

    protocol: str = "last_days"
    min_length: int = 2
    min_item_count: int = 5
    test_days: int = 7
    file: str = "train-item-views.csv"

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the files of views and, if they are there, of categories and products."""
        views = find_file(folder, (self.file,), f"{_EXPECTED_VIEWS}; the option file names another")
        return {"views": views} | present(folder, {"categories": "product-categories.csv", "products": "products.csv"})

    def read(self, files: Mapping[str, Path], log: MalformedLog) -> tuple[Events, tuple[RawAttribute, ...]]:
        """Return all views, and what is known about products."""
        sessions, items, times, days = gather(_views(files["views"], log))
        attributes: list[RawAttribute] = []
        if "categories" in files:
            keys, categories = gather(_categories(files["categories"], log))
            attributes.append(RawAttribute("category", keys, np.arange(len(keys)), categories))
        if "products" in files:
            attributes += _products(files["products"], log)
        return Events(sessions, items, times, days), tuple(attributes)


def _views(path: Path, log: MalformedLog) -> Iterator[tuple[np.ndarray, ...]]:
    dialect, (session, item, time, day) = find_columns(path, ";", _VIEW_COLUMNS, _EXPECTED_VIEWS)
    for rows in read_rows(path, dialect, log, _EXPECTED_VIEWS):
        columns = rows.integers(session, "session"), rows.integers(item, "item"), rows.integers(time, "timeframe")
        yield tuple(column[rows.good] for column in (*columns, rows.times(day, "eventdate")))


def _categories(path: Path, log: MalformedLog) -> Iterator[tuple[np.ndarray, ...]]:
    dialect, (item, category) = find_columns(path, ";", ("itemId", "categoryId"), _EXPECTED_CATEGORIES)
    for rows in read_rows(path, dialect, log, _EXPECTED_CATEGORIES):
        items, categories = rows.integers(item, "item"), rows.integers(category, "category")
        yield items[rows.good], categories[rows.good]


def _products(path: Path, log: MalformedLog) -> list[RawAttribute]:
    keys, prices, names = gather(_product_blocks(path, log))
    bags = [text.split(",") if text else [] for text in names.tolist()]
    owners = np.repeat(np.arange(len(bags)), [len(bag) for bag in bags])
    tokens = np.fromiter(map(int, chain.from_iterable(bags)), np.int64)
    return [
        RawAttribute("price", keys, np.arange(len(keys)), prices),
        RawAttribute("name", keys, owners, tokens, is_bag=True),
    ]


def _product_blocks(path: Path, log: MalformedLog) -> Iterator[tuple[np.ndarray, ...]]:
    columns = ("itemId", "pricelog2", "product.name.tokens")
    dialect, (item, price, name) = find_columns(path, ";", columns, _EXPECTED_PRODUCTS)
    for rows in read_rows(path, dialect, log, _EXPECTED_PRODUCTS):
        items, prices = rows.integers(item, "item"), np.floor(rows.numbers(price, "pricelog2"))
        possible = np.abs(prices) <= _LARGEST_LOG2
        rows.expect(possible, prices, "pricelog2", f"the logarithm of a price, within {_LARGEST_LOG2} of 0")
        names = rows.text(name, "product.name.tokens", optional=True)
        fits = np.array([_TOKENS.fullmatch(text) is not None for text in names.tolist()], np.bool_)
        rows.expect(fits, names, "product.name.tokens", "integers separated by commas")
        yield items[rows.good], prices[rows.good].astype(np.int64), names[rows.good]
