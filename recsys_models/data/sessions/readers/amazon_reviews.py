"""Reviews of products on Amazon, with what is known about the products."""

import ast
import html
import json
import math
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from recsys_models.data.malformed import MalformedLog
from recsys_models.data.reader import check_at_least
from recsys_models.data.sessions.attributes import TextCoder, bag_attribute, log2_buckets, text_attribute, title_words
from recsys_models.data.sessions.raw import Events, RawAttribute
from recsys_models.data.sessions.reader import TimedReader, find_file, present
from recsys_models.data.sessions.records import RecordError, read_records, shown

_EXPECTED_REVIEWS = (
    "reviews of Amazon, an object of JSON per line with reviewerID, asin, overall and unixReviewTime (Amazon review "
    "data of 2014 or 2018, unpacked)"
)
_EXPECTED_META = "products of Amazon, an object per line with asin, in JSON or as a literal of Python"
_PRICE = re.compile(r"\s*\$?\s*(\d*\.?\d+)")
_LARGEST = 1 << 53
_PATH = " > "


@dataclass(frozen=True, eq=False)
class Product:
    """What one line of ``meta_*.json`` says.

    Args:
        asin: key of the product.
        path: its categories, from the root.
        brand: empty if unknown.
        price: in dollars; 0 if unknown.
        title: empty if unknown.
    """

    asin: str
    path: tuple[str, ...]
    brand: str
    price: float
    title: str


@dataclass(frozen=True, kw_only=True)
class AmazonReviews(TimedReader):
    """Reads ``reviews_<category>_5.json`` or ``reviews_<category>.json``; a history is what a user reviewed.

    Attributes, from ``meta_<category>.json`` if it is there: category_1 to category_<levels>, the beginnings of the
    first path that a product is listed under; brand; price, its log2 rounded down; title (bag of words).

    Args:
        category: of the file names, such as ``Beauty``.
        min_rating: reviews with fewer stars are left out; 0 for none.
        levels: how many levels of categories are attributes.
    """

    name: ClassVar[str] = "amazon_reviews"
    folder: ClassVar[str] = "amazon-reviews"
    version: ClassVar[int] = 3

    category: str = "Beauty"
    min_rating: float = 0.0
    levels: int = 3

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_at_least(self.name, "min_rating", self.min_rating, 0.0)
        check_at_least(self.name, "levels", self.levels, 0)

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the files of reviews and, if it is there, of products."""
        names = [f"{start}{self.category}{end}.json" for start in ("reviews_", "") for end in ("_5", "")]
        expected = f"{_EXPECTED_REVIEWS}; the option category names another"
        return {"reviews": find_file(folder, names, expected)} | present(folder, {"meta": f"meta_{self.category}.json"})

    def read(self, files: Mapping[str, Path], log: MalformedLog) -> tuple[Events, tuple[RawAttribute, ...]]:
        """Return all reviews, and what is known about products."""
        users, products = TextCoder(), TextCoder()
        sessions, items, times = array("q"), array("q"), array("q")
        for user, product, stars, time in read_records(files["reviews"], _review, log, _EXPECTED_REVIEWS):
            if stars >= self.min_rating:
                sessions.append(users.code(user))
                items.append(products.code(product))
                times.append(time)
        texts, places = products.ascending()
        attributes = self._attributes(files["meta"], log) if "meta" in files else ()
        return Events(np.array(sessions), places[np.array(items)], np.array(times), item_texts=texts), attributes

    def _attributes(self, path: Path, log: MalformedLog) -> tuple[RawAttribute, ...]:
        products = list(read_records(path, parse_product, log, _EXPECTED_META))
        keys = np.array([product.asin for product in products], np.str_)
        prices = np.array([product.price for product in products], np.float64)
        priced = np.flatnonzero(prices > 0)
        levels = [
            text_attribute(f"category_{level}", keys, [_beginning(product.path, level) for product in products])
            for level in range(1, self.levels + 1)
        ]
        return (
            *levels,
            text_attribute("brand", keys, [product.brand for product in products]),
            RawAttribute("price", keys, priced, log2_buckets(prices[priced])),
            bag_attribute("title", keys, (title_words(product.title) for product in products)),
        )


def parse_product(line: str) -> Product:
    """Return what a line of ``meta_*.json`` says.

    Raises:
        RecordError: if it is no object with a key; what else is missing, or of another kind, is unknown.
    """
    found = _object(line)
    asin = _text(found, "asin")
    paths = found.get("categories", found.get("category"))
    path = paths[0] if isinstance(paths, list) and paths and isinstance(paths[0], list) else paths
    categories = tuple(str(part) for part in path) if isinstance(path, list) else ()
    brand, title = (html.unescape(found[key]) if isinstance(found.get(key), str) else "" for key in ("brand", "title"))
    price = _PRICE.match(str(found.get("price", "")).replace(",", ""))
    dollars = float(price.group(1)) if price else 0.0
    return Product(asin, categories, brand.strip(), dollars if dollars < math.inf else 0.0, title)


def _review(line: str) -> tuple[str, str, float, int]:
    found = _object(line, literal=False)
    stars, time = found.get("overall"), found.get("unixReviewTime")
    if not isinstance(stars, int | float) or isinstance(stars, bool) or not 0 <= stars < _LARGEST:
        raise RecordError(f"overall is {shown(stars)}, expected a number of at least 0")
    if type(time) is not int or abs(time) >= _LARGEST:
        raise RecordError(f"unixReviewTime is {shown(time)}, expected a number of seconds")
    return _text(found, "reviewerID"), _text(found, "asin"), float(stars), time


def _object(line: str, literal: bool = True) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        found = _literal(line) if literal else None
        if found is None:
            raise RecordError(f"{shown(line.strip())}, expected an object of JSON ({error})") from error
    if type(found) is not dict:
        raise RecordError(f"{shown(found)}, expected an object")
    return found


def _literal(line: str) -> Any:
    """Return the value of a literal of Python, as the files of 2014 have them; None if the line is none."""
    try:
        return ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _text(found: dict[str, Any], key: str) -> str:
    value = found.get(key)
    if type(value) is not str or not value:
        raise RecordError(f"{key} is {shown(value)}, expected a text")
    return value


def _beginning(path: tuple[str, ...], level: int) -> str:
    return _PATH.join(path[:level]) if len(path) >= level else ""
