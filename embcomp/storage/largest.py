"""The n largest of very many scores, exactly: two passes that count, one that marks, and memory for a chunk of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from embcomp.row_source import chunks
from embcomp.storage import packing

_BINS = 1 << 16
_FIRST = 2**31 - 1
_LAST = -1


def mark_largest(
    scores: Callable[[int, int], Tensor], num_rows: int, dim: int, number: int, min_per_row: int = 0
) -> Tensor:
    """Mark the largest scores of a matrix that is never there as a whole.

    Of equal scores those that come first are taken, row by row. Scores are compared by their bit patterns, which have
    the order of the numbers: a histogram of the upper 16 bits says in which bin the smallest marked score is, one of
    the lower 16 bits within that bin says which it is.

    Args:
        scores: from a first row and the row behind the last one, their scores: float32 ``(N, d)``. Scores are at least
            0; those below 0 are all alike, and taken only where no others are left.
        num_rows: R, at least 1.
        dim: d.
        number: how many to mark, at least ``min_per_row · R`` and at most ``R · d``.
        min_per_row: mark so many of each row, its largest, in any case, but for rows with scores below 0.

    Returns:
        uint8 ``(⌈R·d / 8⌉,)``, a `packing` stream with one bit per score.
    """

    def keys() -> Iterator[Tensor]:
        for rows in chunks(num_rows, dim):  # whose bits begin at a byte
            yield _keys_of(scores(rows.start, rows.stop), min_per_row)

    high, above = _bin_of(((key >> 16) + _BINS // 2 for key in keys()), number)
    high -= _BINS // 2
    low, more = _bin_of((key[key >> 16 == high] & (_BINS - 1) for key in keys()), number - above)
    least, ties, parts = high * _BINS + low, number - above - more, []
    for key in keys():
        equal = key == least
        taken = equal & (equal.cumsum(0) <= ties)
        ties -= int(taken.sum())
        parts.append(packing.pack((taken | (key > least)).view(torch.uint8), 1))
    return torch.cat(parts)


def _keys_of(scores: Tensor, min_per_row: int) -> Tensor:
    """Int32 ``(N·d,)`` with the order of float32 ``(N, d)`` scores, and those first that are marked in any case."""
    keys = scores.contiguous().view(torch.int32)
    if min_per_row:
        largest = scores.sort(dim=1, descending=True, stable=True).indices[:, :min_per_row]
        keys = keys.scatter(1, largest, _FIRST)
    return torch.where(scores < 0, _LAST, keys).view(-1)


def _bin_of(bins: Iterable[Tensor], number: int) -> tuple[int, int]:
    """The bin of the ``number``-th of all entries, counted from the last bin down; and how many are in later bins."""
    counts = sum((torch.bincount(part, minlength=_BINS) for part in bins), torch.zeros((), dtype=torch.int64))
    from_above = counts.flip(0).cumsum(0)
    place = int((from_above < number).sum())
    found = _BINS - 1 - place
    return found, int(from_above[place]) - int(counts[found])
