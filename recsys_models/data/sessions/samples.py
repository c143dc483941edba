"""Which parts of flat sequences are samples: where each ends, and how many items it takes in."""

from dataclasses import dataclass

import numpy as np

from recsys_models.data.errors import DataError


@dataclass(frozen=True, eq=False)
class Samples:
    """``N`` pieces of a flat array of items.

    Args:
        stops: int32, or int64 where there are too many items, ``(N,)``: position of the item behind the last input.
        lengths: int32 ``(N,)``, number of inputs, which lie right before ``stops``.
    """

    stops: np.ndarray
    lengths: np.ndarray


def last_window(offsets: np.ndarray, length: int) -> Samples:
    """Return the last ``length + 1`` items of each sequence of two or more.

    Args:
        offsets: int64 ``(S + 1,)`` of the sequences.
        length: the most inputs of a sample.
    """
    row = np.flatnonzero(np.diff(offsets) >= 2)
    return _samples(offsets, row, offsets[row + 1] - 1, length)


def every_window(offsets: np.ndarray, length: int) -> Samples:
    """Return consecutive windows of ``length + 1`` items, counted from the end, that overlap by one item.

    Takes what :func:`last_window` does. The window at the beginning of a sequence may be shorter.
    """
    targets = np.maximum(np.diff(offsets) - 1, 0)
    windows = -(-targets // length)
    row = np.repeat(np.arange(len(windows)), windows)
    behind = np.repeat(np.cumsum(windows), windows) - 1 - np.arange(len(row))
    return _samples(offsets, row, offsets[row + 1] - 1 - behind * length, length)


def prefix_samples(offsets: np.ndarray, length: int) -> Samples:
    """Return every prefix that has a next item, cut to its last ``length`` items.

    Takes what :func:`last_window` does.
    """
    items = np.diff(offsets)
    row = np.repeat(np.arange(len(items), dtype=np.int32), np.maximum(items - 1, 0))
    is_target = np.ones(int(offsets[-1]), np.bool_)
    is_target[offsets[:-1][items > 0]] = False
    return _samples(offsets, row, np.flatnonzero(is_target), length)


def case_samples(offsets: np.ndarray, rows: np.ndarray, ends: np.ndarray, length: int) -> Samples:
    """Return the prefixes of given ends, cut to their last ``length`` items.

    Args:
        offsets: int64 ``(S + 1,)`` of the sequences.
        rows: ``(C,)``, the sequence of each case.
        ends: ``(C,)``, length of each prefix.
        length: the most inputs of a sample.

    Raises:
        DataError: if a prefix is empty, or reaches to the end of its sequence, so that no item follows.
    """
    bad = np.flatnonzero((ends < 1) | (ends >= np.diff(offsets)[rows]))
    if len(bad):
        row, end = int(rows[bad[0]]), int(ends[bad[0]])
        most = int(offsets[row + 1] - offsets[row]) - 1
        raise DataError(f"case {bad[0]} is a prefix of {end} items of sequence {row}, must be in [1, {most}]")
    return _samples(offsets, rows, offsets[rows] + ends, length)


def _samples(offsets: np.ndarray, row: np.ndarray, stops: np.ndarray, length: int) -> Samples:
    lengths = np.minimum(stops - offsets[row], length).astype(np.int32)
    wide = offsets[-1] > np.iinfo(np.int32).max
    return Samples(stops if wide else stops.astype(np.int32), lengths)
