"""A reader of events that are given in memory, and what data look like as lists of raw keys."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from recsys_models.data.malformed import MalformedLog
from recsys_models.data.sessions import Cases, Sequences, SessionLog
from recsys_models.data.sessions.editing import offsets_of
from recsys_models.data.sessions.raw import Events
from recsys_models.data.sessions.reader import TimedReader


@dataclass(frozen=True, kw_only=True)
class MemoryReader(TimedReader):
    name: ClassVar[str] = "memory"
    folder: ClassVar[str] = ""

    def files(self, folder):
        return {}

    def read(self, files, log):
        return files["events"], ()


def split(events, days=None, **options):
    """The parts, as lists of raw items, of events (session, item, time)."""
    sessions, items, times = (np.array(column) for column in zip(*events, strict=True))
    found = Events(sessions, items, times, None if days is None else np.array(days))
    raw = MemoryReader(**options).open({"events": found}, MalformedLog())
    names = raw.item_values.tolist()
    parts = raw.parts
    return [
        [[names[i] for i in sequence.tolist()] for sequence in parts.train],
        *(
            [([names[i] for i in prefix], names[target]) for prefix, target in cases(part)]
            for part in (parts.validation, parts.test)
        ),
    ]


def make_sequences(lists) -> Sequences:
    items = np.array([item for part in lists for item in part], np.int32)
    return Sequences(items, offsets_of(np.array([len(part) for part in lists], np.int64)))


def cases(found: Cases):
    return [(prefix.tolist(), target) for prefix, target in (found[i] for i in range(len(found)))]


def in_keys(log: SessionLog):
    """Training sequences, validation cases and test cases with raw keys for items."""
    keys = log.catalogue.values.tolist()
    return [
        [[keys[i] for i in sequence.tolist()] for sequence in log.train],
        *([([keys[i] for i in prefix], keys[t]) for prefix, t in cases(part)] for part in (log.validation, log.test)),
    ]


def values_of(log: SessionLog, name: str):
    """The names of the values of an attribute by raw key of the item, None for the unknown one."""
    attribute = log.catalogue.attribute(name)
    names = [*attribute.names.tolist(), None]
    bounds = zip(attribute.offsets[:-1].tolist(), attribute.offsets[1:].tolist(), strict=True)
    bags = [[names[i] for i in attribute.values[a:b].tolist()] for a, b in bounds]
    found = bags if attribute.is_bag else [bag[0] for bag in bags]
    return dict(zip(log.catalogue.values.tolist(), found, strict=True))
