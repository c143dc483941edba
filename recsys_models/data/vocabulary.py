"""Ids by train frequency: counting raw values out of core, and the mapping from raw values to ids."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import numpy as np

_MERGE_ABOVE = 1 << 20


@dataclass
class ValueCounter:
    """Counts raw values of a stream too long for memory.

    Distinct values of each block wait in a list that is merged once it outgrows what is merged already, so that the
    merging costs ``O(n log n)`` over the stream and not one pass over all values per block.
    """

    _parts: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _waiting: int = 0

    def add(self, values: np.ndarray) -> None:
        """Count the raw values int64 ``(n,)``."""
        part = np.unique(values, return_counts=True)
        self._parts.append(part)
        self._waiting += len(part[0])
        if self._waiting > max(_MERGE_ABOVE, len(self._parts[0][0])):
            self._merge()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct values, ascending, int64 ``(K,)``, and how often each came, int64 ``(K,)``."""
        if not self._parts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        self._merge()
        return self._parts[0]

    def _merge(self) -> None:
        values = np.concatenate([part[0] for part in self._parts])
        counts = np.concatenate([part[1] for part in self._parts])
        order = np.argsort(values, kind="stable")
        values, counts = values[order], counts[order]
        first = np.flatnonzero(np.append(True, values[1:] != values[:-1])[: len(values)])
        self._parts = [(values[first], np.add.reduceat(counts, first) if len(first) else counts)]
        self._waiting = 0


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The ids of one field.

    Id 0 is the value most frequent in training, ties go to the smaller raw value, and the last id stands for all
    values outside the vocabulary.

    Args:
        values: int64 ``(K,)``, the raw value of each id but the last.
        counts: int64 ``(K + 1,)``, how often each id occurs in training.
    """

    values: np.ndarray
    counts: np.ndarray

    @classmethod
    def from_counts(cls, values: np.ndarray, counts: np.ndarray, min_count: int = 1) -> Self:
        """Build the vocabulary of values seen at least ``min_count`` times.

        Args:
            values: int64 ``(n,)``, distinct raw values of the training rows.
            counts: int64 ``(n,)``, how often each occurs there.
            min_count: rarer values share the last id, and their occurrences are its count.
        """
        kept = counts >= min_count
        rare = int(counts[~kept].sum())
        values, counts = values[kept], counts[kept]
        order = np.lexsort((values, -counts))
        return cls(values[order].astype(np.int64), np.append(counts[order], rare).astype(np.int64))

    @property
    def num_ids(self) -> int:
        """Number of ids, with the one for values outside the vocabulary."""
        return len(self.counts)

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Return the int32 ids of raw values int64 ``(n,)``; unknown ones get the last id."""
        if not len(self.values):
            return np.zeros(len(raw), np.int32)
        ascending, ids = self._index
        position = np.minimum(np.searchsorted(ascending, raw), len(ascending) - 1)
        return np.where(ascending[position] == raw, ids[position], np.int32(self.num_ids - 1))

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.values)
        return self.values[order], order.astype(np.int32)
