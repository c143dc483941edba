"""Amazon Beauty in the form of S3-Rec: histories of users, and numbered attributes of items."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.sessions.raw import Events, RawAttribute
from recsys_models.data.sessions.reader import EventReader, find_file, present
from recsys_models.data.sessions.records import (
    RecordError,
    check_records,
    integers_in,
    read_json,
    read_records,
    shown,
)

_EXPECTED_SEQUENCES = "sequences.txt: lines 'user item item ...', integers, items in the order of time"
_EXPECTED_ATTRIBUTES = "item_attributes.json: an object of lists of attribute ids by item"


@dataclass(frozen=True, kw_only=True)
class AmazonBeauty(EventReader):
    """Reads ``sequences.txt``. Attribute: attribute (bag), from ``item_attributes.json`` if it is there."""

    name: ClassVar[str] = "amazon_beauty"
    folder: ClassVar[str] = "amazon-beauty"

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the files of histories and attributes."""
        path = find_file(folder, ("sequences.txt",), _EXPECTED_SEQUENCES)
        return {"sequences": path} | present(folder, {"attributes": "item_attributes.json"})

    def read(self, files: Mapping[str, Path], log: MalformedLog) -> tuple[Events, tuple[RawAttribute, ...]]:
        """Return all events, and the attributes of items."""
        lines = list(read_records(files["sequences"], _history, log, _EXPECTED_SEQUENCES))
        users = np.repeat(np.array([line[0] for line in lines], np.int64), [len(line) - 1 for line in lines])
        items = np.fromiter(chain.from_iterable(line[1:] for line in lines), np.int64)
        attributes = (_attribute(files["attributes"], log),) if "attributes" in files else ()
        return Events(users, items), attributes


def _history(line: str) -> list[int]:
    try:
        numbers = [int(word) for word in line.split()]
    except ValueError:
        numbers = []
    if len(numbers) < 2:
        raise RecordError(f"{shown(line.strip())}, expected a user and at least one item, all integers")
    return integers_in(numbers, 2)


def _attribute(path: Path, log: MalformedLog) -> RawAttribute:
    found = read_json(path, _EXPECTED_ATTRIBUTES)
    if type(found) is not dict:
        raise DataError(f"{path}: the file holds {shown(found)}. Expected {_EXPECTED_ATTRIBUTES}")
    pairs = check_records(path, list(found.items()), _item, log)
    bags = [bag for _, bag in pairs]
    owners = np.repeat(np.arange(len(bags)), [len(bag) for bag in bags])
    values = np.fromiter(chain.from_iterable(bags), np.int64)
    return RawAttribute("attribute", np.array([key for key, _ in pairs], np.int64), owners, values, is_bag=True)


def _item(pair: tuple[str, Any]) -> tuple[int, list[int]]:
    key, bag = pair
    if not key.isascii() or not key.isdigit() or len(key) > 18:
        raise RecordError(f"the item {shown(key)}, expected an integer of up to 18 digits")
    return int(key), integers_in(bag, 0)
