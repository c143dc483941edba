"""What a reader of sessions finds in its files, before items and values have ids."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from recsys_models.data.sessions.protocols import Parts


@dataclass(frozen=True, eq=False)
class Events:
    """Clicks, views or ratings, in the order of the source.

    Args:
        sessions: int64 ``(n,)``, the session or user of each event.
        items: int64 ``(n,)``, raw keys, or positions in ``item_texts``.
        times: ``(n,)``, what orders the events of a session, in seconds since 1970 unless there are ``days``; None if
            they are in order.
        days: ``(n,)``, in seconds since 1970, for events that are not dated by their times.
        item_texts: ascending, where items are texts.
        dated: whether times or days are dates at all.
    """

    sessions: np.ndarray
    items: np.ndarray
    times: np.ndarray | None = None
    days: np.ndarray | None = None
    item_texts: np.ndarray | None = None
    dated: bool = True


@dataclass(frozen=True, eq=False)
class RawAttribute:
    """Which items have which values, as the files say.

    Args:
        name: of the attribute.
        keys: ``(m,)``, raw keys of items, int64 or text, such as the lines of a file have.
        owners: int64 ``(k,)``, the position in ``keys`` of the item of each value.
        values: int64 ``(k,)``, raw values, or positions in ``texts``. Of an attribute that is no bag, the last value
            of an item counts.
        is_bag: whether items have any number of values.
        texts: ascending, where values are texts.
        times: ``(k,)``, since when an item has each value, in seconds since 1970, for attributes that change.
            `MISSING` among the values then says that an item has none from then on. Events are dated then.
        of_events: whether the values are what the events say of their items, ``k = n``, in their order.
    """

    name: str
    keys: np.ndarray
    owners: np.ndarray
    values: np.ndarray
    is_bag: bool = False
    texts: np.ndarray | None = None
    times: np.ndarray | None = None
    of_events: bool = False


@dataclass(frozen=True, eq=False)
class RawSessions:
    """A data set as its reader found and split it.

    Args:
        parts: with items as positions in ``item_values``.
        item_values: ``(K,)``, distinct raw keys of items, ascending, int64 or text.
        attributes: of these and other items.
        described: positions in ``item_values`` of items that the catalogue has though they may have no event left.
    """

    parts: Parts
    item_values: np.ndarray
    attributes: tuple[RawAttribute, ...] = ()
    described: np.ndarray | None = None


def gather(blocks: Iterable[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """Join the columns of blocks of rows, each column ``(n,)``; there is one block at least."""
    return tuple(np.concatenate(parts) for parts in zip(*blocks, strict=True))
