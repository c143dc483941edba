"""Sequences made of sequences: parts of them, without some items, grouped from events; all without a loop over rows."""

import numpy as np

from recsys_models.data.sessions.sequences import Sequences


def group(
    sessions: np.ndarray, items: np.ndarray, times: np.ndarray | None, days: np.ndarray | None
) -> tuple[Sequences, np.ndarray | None]:
    """Group events by session, in the order of time; events of one time keep their order.

    Args:
        sessions: int64 ``(n,)``, the session of each event, in the order of the source.
        items: ``(n,)``, what the sequences are to hold, items or what stands for events.
        times: ``(n,)``; None if the events of a session are in order.
        days: ``(n,)``, what dates a session if it is not its last time.

    Returns:
        The sequences, in the order in which their sessions begin in the source, and when each ended, ``(S,)``: its last
        time or, if there are days, the day in its last line. None without both.
    """
    keys, first, row = np.unique(sessions, return_index=True, return_inverse=True)
    rank = np.empty(len(keys), np.int64)
    rank[np.argsort(first)] = np.arange(len(keys))
    row = rank[row]
    order = np.argsort(row, kind="stable") if times is None else np.lexsort((times, row))
    sequences = Sequences(items[order], offsets_of(np.bincount(row, minlength=len(keys))))
    last = sequences.offsets[1:] - 1
    if days is not None:
        return sequences, days[np.argsort(row, kind="stable")[last]]
    return sequences, None if times is None else times[order][last]


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Return the offsets, int64 ``(S + 1,)``, of sequences of lengths ``(S,)``."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def rows_of(sequences: Sequences) -> np.ndarray:
    """Return the sequence of each item, int64 ``(n,)``."""
    return np.repeat(np.arange(len(sequences)), sequences.lengths)


def keep_items(sequences: Sequences, kept: np.ndarray) -> Sequences:
    """Return the sequences without the items that are not kept, bool ``(n,)``; some may become empty."""
    before = np.concatenate(([0], np.cumsum(kept, dtype=np.int64)))
    return Sequences(sequences.items[kept], before[sequences.offsets])


def select(sequences: Sequences, rows: np.ndarray) -> Sequences:
    """Return the sequences ``rows``, int64 ``(k,)``, in that order."""
    lengths = sequences.lengths[rows]
    offsets = offsets_of(lengths)
    where = np.arange(offsets[-1]) + np.repeat(sequences.offsets[rows] - offsets[:-1], lengths)
    return Sequences(sequences.items[where], offsets)


def cut(sequences: Sequences, lengths: np.ndarray) -> Sequences:
    """Return the first items of each sequence, at most ``lengths``, ``(S,)``, of them."""
    position = np.arange(len(sequences.items)) - np.repeat(sequences.offsets[:-1], sequences.lengths)
    return keep_items(sequences, position < np.repeat(lengths, sequences.lengths))


def without_repeats(events: Sequences, items: np.ndarray) -> Sequences:
    """Return sequences of events with every run of events on one item within a sequence as its first.

    Args:
        events: positions in ``items``.
        items: int32 ``(n,)``.
    """
    of_events = items[events.items]
    kept = np.ones(len(of_events), np.bool_)
    kept[1:] = of_events[1:] != of_events[:-1]
    kept[events.offsets[:-1][events.lengths > 0]] = True
    return keep_items(events, kept)


def core(
    events: Sequences, items: np.ndarray, min_items: int, min_length: int, iterate: bool
) -> tuple[Sequences, np.ndarray]:
    """Leave out short sequences, then rare items, then the sequences that have become short.

    Args:
        events: all sequences, of positions in ``items``.
        items: int32 ``(n,)``.
        min_items: occurrences of an item below which it is left out.
        min_length: items of a sequence below which it is left out.
        iterate: whether to go on until nothing changes, which gives a core of the data.

    Returns:
        What is left, and its rows, int64 ``(k,)``.
    """
    rows = np.flatnonzero(events.lengths >= min_length)
    events = select(events, rows)
    while before := len(events.items):
        of_events = items[events.items]
        events = keep_items(events, (np.bincount(of_events) >= min_items)[of_events])
        long = np.flatnonzero(events.lengths >= max(1, min_length))
        events, rows = select(events, long), rows[long]
        if not iterate or len(events.items) == before:
            break
    return events, rows
