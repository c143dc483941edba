"""Sequences of items in one flat array, and the cases that are cut from them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.sessions.batches import SessionBatches
from recsys_models.data.sessions.samples import Samples, case_samples, every_window, last_window, prefix_samples

_MODES = {
    ("positions", "last"): last_window,
    ("positions", "all"): every_window,
    ("prefixes", "last"): prefix_samples,
}


@dataclass(frozen=True, eq=False)
class Sequences:
    """``S`` sequences of items, one behind another.

    Args:
        items: int32 ``(n,)``, item ids, memory-mapped and read-only when they come from a cache.
        offsets: int64 ``(S + 1,)``; sequence ``s`` is ``items[offsets[s]:offsets[s + 1]]``.
    """

    items: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.offsets) - 1

    def __getitem__(self, sequence: int) -> np.ndarray:
        """Return the items of one sequence, int32 ``(length,)``."""
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} is outside [0, {len(self)})")
        part: np.ndarray = self.items[self.offsets[sequence] : self.offsets[sequence + 1]]
        return part

    def __iter__(self) -> Iterator[np.ndarray]:
        """Iterate over the sequences."""
        return (self[sequence] for sequence in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Numbers of items, int64 ``(S,)``."""
        return np.diff(self.offsets)

    def batches(
        self, batch_size: int, length: int, *, mode: str = "positions", windows: str = "last", **options: Any
    ) -> SessionBatches:
        """Load the sequences into memory and return mini-batches to train on; sequences of one item give no sample.

        Args:
            batch_size: samples per batch.
            length: the most input items of a sample, ``L``.
            mode: ``"positions"`` asks at every position for the item that follows; ``"prefixes"`` makes a sample of
                every prefix, cut to its last ``L`` items, and the item after it.
            windows: which part of a sequence of over ``L + 1`` items the mode ``"positions"`` takes: the ``"last"``
                ``L + 1`` items; or ``"all"`` windows of that many, counted from the end and overlapping by one item,
                so that each item but the first is a target once.
            options: ``shuffle``, ``seed``, ``drop_last``, ``device`` and ``trim`` of :class:`SessionBatches`.

        Raises:
            DataError: if an argument is not allowed.
        """
        if (mode, windows) not in _MODES:
            raise DataError(
                f"mode {mode!r} with windows {windows!r}: must be 'positions' with 'last' or 'all', or 'prefixes' with "
                "'last'"
            )
        samples: Samples = _MODES[mode, windows](self.offsets, check_length(length))
        return SessionBatches(self.items, samples, batch_size, length, positions=mode == "positions", **options)


@dataclass(frozen=True, eq=False)
class Cases:
    """``C`` questions for the next item.

    Case ``c`` is the prefix ``sequences[rows[c]][:ends[c]]``, which has one item at least, and its target is the item
    at position ``ends[c]``.

    Args:
        sequences: that the cases are cut from.
        rows: int32 ``(C,)``, the sequence of each case.
        ends: int32 ``(C,)``, length of the prefix of each case.
    """

    sequences: Sequences
    rows: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        """Return the number of cases."""
        return len(self.rows)

    def __getitem__(self, case: int) -> tuple[np.ndarray, int]:
        """Return the prefix of one case, int32 ``(length,)``, and its target."""
        if not 0 <= case < len(self):
            raise IndexError(f"case {case} is outside [0, {len(self)})")
        items, end = self.sequences[self.rows[case]], self.ends[case]
        return items[:end], int(items[end])

    @property
    def targets(self) -> np.ndarray:
        """The items asked for, int32 ``(C,)``."""
        targets: np.ndarray = self.sequences.items[self.sequences.offsets[self.rows] + self.ends]
        return targets

    def batches(self, batch_size: int, length: int, **options: Any) -> SessionBatches:
        """Load the cases into memory and return mini-batches of them, in order unless they are shuffled.

        Args:
            batch_size: cases per batch.
            length: the most input items of a case, ``L``: of longer prefixes the last ones.
            options: ``shuffle``, ``seed``, ``drop_last``, ``device`` and ``trim`` of :class:`SessionBatches`.
        """
        samples = case_samples(self.sequences.offsets, self.rows, self.ends, check_length(length))
        return SessionBatches(self.sequences.items, samples, batch_size, length, positions=False, **options)


def check_length(length: int) -> int:
    """Return ``length``, or raise a :class:`DataError` unless it is at least 1."""
    if isinstance(length, bool) or not isinstance(length, int | np.integer) or length < 1:
        raise DataError(f"length is {length!r}, must be an int of at least 1")
    return length
