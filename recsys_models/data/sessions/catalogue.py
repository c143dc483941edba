"""What is known about items: how often they occur in training, and their attributes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Attribute:
    """An attribute of ``I`` items, such as their category, or the words of their titles.

    Ids of values are ordered by their frequency over training events: the count of a value is the sum of the train
    counts of its items, id 0 has the largest, and ties go to the smaller raw value. The last id stands for values that
    no item of training has, and for items whose value is not known.

    Args:
        name: of the attribute.
        num_values: number of ids, with the last one.
        values: int32 ``(m,)``, ids of the values of all items, one item behind another, ascending within an item.
        offsets: int64 ``(I + 1,)``; those of item ``i`` are ``values[offsets[i]:offsets[i + 1]]``.
        counts: int64 ``(num_values,)``, train events on items that have the value.
        names: ``(num_values - 1,)``, the raw value behind each id but the last, int64 or text; None if unknown.
        is_bag: whether an item has any number of values, distinct ones; else it has exactly one.
    """

    name: str
    num_values: int
    values: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray
    names: np.ndarray | None
    is_bag: bool

    @property
    def unknown_id(self) -> int:
        """The id of values that training does not know, the last one."""
        return self.num_values - 1

    @property
    def lengths(self) -> np.ndarray:
        """Numbers of values per item, int64 ``(I,)``."""
        return np.diff(self.offsets)

    @property
    def firsts(self) -> np.ndarray:
        """The most frequent value of each item, or :attr:`unknown_id` of those without any, int32 ``(I,)``."""
        firsts = np.full(len(self.offsets) - 1, self.unknown_id, np.int32)
        has_values = self.lengths > 0
        firsts[has_values] = self.values[self.offsets[:-1][has_values]]
        return firsts


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The ``I`` items of a data set.

    Ids are ordered by frequency in training: item 0 is the most frequent, ties go to the smaller raw key. Items that
    occur in validation or test alone come last, with count 0, so that they can be ranked too.

    Args:
        num_items: ``I``.
        counts: int64 ``(I,)``, train events per item.
        values: ``(I,)``, raw keys, int64 or text.
        attributes: what is known about the items.
    """

    num_items: int
    counts: np.ndarray
    values: np.ndarray
    attributes: tuple[Attribute, ...] = ()

    @property
    def num_seen(self) -> int:
        """Number of items that occur in training; their ids are those below it."""
        return int(np.count_nonzero(self.counts))

    def attribute(self, name: str) -> Attribute:
        """Return the attribute called ``name``.

        Raises:
            KeyError: if there is none.
        """
        for attribute in self.attributes:
            if attribute.name == name:
                return attribute
        raise KeyError(f"no attribute {name!r}, there are: {', '.join(a.name for a in self.attributes) or 'none'}")

    def twin_groups(self, attributes: Sequence[Attribute] | None = None) -> np.ndarray:
        """Number groups of items that have the same values in all of these attributes, None for all: int64 ``(I,)``."""
        group = np.zeros(self.num_items, np.int64)
        for attribute in self.attributes if attributes is None else attributes:
            group = _refine(group, attribute)
        return group


def _refine(group: np.ndarray, attribute: Attribute) -> np.ndarray:
    """Split groups of items int64 ``(I,)`` by an attribute: by the number of values, then by one value at a time."""
    lengths = attribute.lengths
    group = _number(group, lengths)
    for position in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(lengths > position)
        # Items of one group have as many values, so a group is split as a whole or left as a whole.
        part = _number(group[longer], attribute.values[attribute.offsets[longer] + position])
        group[longer] = part + len(group) * (position + 1)
    return np.unique(group, return_inverse=True)[1]


def _number(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return a number per distinct pair, int64 ``(n,)``."""
    second = second.astype(np.int64)
    return np.unique(first * (second.max(initial=0) + 1) + second, return_inverse=True)[1]
