"""What is known about items: how often they occur in training, and their attributes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Self

import numpy as np

from recsys_models.data.errors import DataError


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

    Raises:
        DataError: if these do not go together.
    """

    name: str
    num_values: int
    values: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray
    names: np.ndarray | None
    is_bag: bool

    def __post_init__(self) -> None:
        lengths = self.lengths
        if self.offsets.ndim != 1 or not len(self.offsets) or self.offsets[0] != 0 or (lengths < 0).any():
            raise DataError(f"attribute {self.name!r}: offsets must be (I + 1,), begin with 0 and never fall")
        if self.values.dtype.kind not in "iu":
            raise DataError(f"attribute {self.name!r}: values of {self.values.dtype} must be integers, ids of values")
        if self.values.shape != (self.offsets[-1],):
            raise DataError(
                f"attribute {self.name!r}: values {self.values.shape}, but offsets end with {self.offsets[-1]}"
            )
        if len(self.values) and not 0 <= self.values.min() <= self.values.max() < self.num_values:
            raise DataError(
                f"attribute {self.name!r}: values of {self.values.min()} to {self.values.max()} must be in "
                f"[0, {self.num_values})"
            )
        if self.counts.shape != (self.num_values,):
            raise DataError(f"attribute {self.name!r}: counts {self.counts.shape} must be ({self.num_values},)")
        if self.names is not None and self.names.shape != (self.num_values - 1,):
            raise DataError(
                f"attribute {self.name!r}: names {self.names.shape} must be ({self.num_values - 1},), without the last"
            )
        falls = np.diff(self.values) <= 0
        borders = self.offsets[1:-1]
        falls[borders[(borders > 0) & (borders < len(self.values))] - 1] = False
        if falls.any():
            item = int(np.searchsorted(self.offsets, np.flatnonzero(falls)[0], side="right")) - 1
            raise DataError(
                f"attribute {self.name!r}: values of item {item} must be distinct and ascending, found "
                f"{self.values[slice(*self.offsets[item : item + 2])].tolist()}: sort them, each once"
            )
        if not self.is_bag and (lengths != 1).any():
            item = int(np.flatnonzero(lengths != 1)[0])
            raise DataError(
                f"attribute {self.name!r}: item {item} has {lengths[item]} values, but must have one; give it the last "
                "id where its value is not known, or set is_bag"
            )

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
    occur in validation or test alone, or nowhere but in files of metadata, come last, with count 0, so that they can be
    ranked too.

    Args:
        num_items: ``I``.
        counts: int64 ``(I,)``, train events per item.
        values: ``(I,)``, raw keys, int64 or text.
        attributes: what is known about the items.

    Raises:
        DataError: if these are not of as many items, a count is below 0, or one of 0 is before others.
    """

    num_items: int
    counts: np.ndarray
    values: np.ndarray
    attributes: tuple[Attribute, ...] = ()

    def __post_init__(self) -> None:
        for name, found in (("counts", self.counts.shape), ("values", self.values.shape)):
            if found != (self.num_items,):
                raise DataError(f"catalogue of {self.num_items} items: {name} {found} must be ({self.num_items},)")
        if (self.counts < 0).any():
            raise DataError(f"catalogue: item {int(self.counts.argmin())} has count {self.counts.min()}, below 0")
        if (unseen := np.flatnonzero(self.counts[: self.num_seen] == 0)).size:
            raise DataError(
                f"catalogue: item {int(unseen[0])} has count 0, and items behind it have not: order items by how often "
                "they occur in training"
            )
        for attribute in self.attributes:
            if len(attribute.lengths) != self.num_items:
                raise DataError(
                    f"attribute {attribute.name!r} is of {len(attribute.lengths)} items, the catalogue of "
                    f"{self.num_items}"
                )

    @property
    def num_seen(self) -> int:
        """Number of items that occur in training, whose ids are those below it."""
        occurring = np.flatnonzero(self.counts)
        return int(occurring[-1]) + 1 if len(occurring) else 0

    def attribute(self, name: str) -> Attribute:
        """Return the attribute called ``name``.

        Raises:
            KeyError: if there is none.
        """
        for attribute in self.attributes:
            if attribute.name == name:
                return attribute
        raise KeyError(f"no attribute {name!r}, there are: {', '.join(a.name for a in self.attributes) or 'none'}")

    def with_items(self, keys: Sequence[Any], values: Mapping[str, Sequence[Any]]) -> Self:
        """Return a catalogue with new items behind the others, as for a model of metadata that was trained already.

        Counts and the ids of items and values stay as they are, so that the model's weights fit.

        Args:
            keys: raw keys of ``n`` new items.
            values: of attributes by name: a raw value per new item, as in `Attribute.names`, or of bags a list of them;
                None where it is not known. Values that training did not know are unknown.

        Raises:
            DataError: if a key is there already or of another kind, or the values don't fit the attributes.
        """
        new = np.asarray(keys)
        if new.ndim != 1 or (len(new) and new.dtype.kind != self.values.dtype.kind):
            kind = "texts" if self.values.dtype.kind == "U" else "integers"
            raise DataError(f"keys {keys!r} of new items must be a list of {kind}, as those of the catalogue are")
        everything = np.concatenate([self.values, new]) if len(new) else self.values
        if len(np.unique(everything)) < len(everything):
            there = new[np.isin(new, self.values)]
            told = f"{there[0]} is in the catalogue already" if len(there) else "come twice"
            raise DataError(f"keys of new items: {told}; give each item once, and only those that are new")
        for name in values:
            if name not in [attribute.name for attribute in self.attributes]:
                known = ", ".join(attribute.name for attribute in self.attributes) or "none"
                raise DataError(f"values of {name!r}: items have no such attribute, there are: {known}")
        attributes = tuple(
            _lengthened(a, list(values.get(a.name, [None] * len(new))), len(new)) for a in self.attributes
        )
        counts = np.concatenate([self.counts, np.zeros(len(new), self.counts.dtype)])
        return replace(self, num_items=len(everything), counts=counts, values=everything, attributes=attributes)

    def twin_groups(self, attributes: Sequence[Attribute] | None = None) -> np.ndarray:
        """Number groups of items that have the same values in all of these attributes, None for all: int64 ``(I,)``."""
        group = np.zeros(self.num_items, np.int64)
        for attribute in self.attributes if attributes is None else attributes:
            group = _refine(group, attribute)
        return group


def _lengthened(attribute: Attribute, values: list[Any], number: int) -> Attribute:
    """Return an attribute of ``number`` items more, by their raw values; None for unknown."""
    if attribute.names is None or len(values) != number:
        names = "has no names of its values" if attribute.names is None else f"has {len(values)} values"
        raise DataError(f"attribute {attribute.name!r} {names}, but {number} new items need a named value or None each")
    ids = {name: i for i, name in enumerate(attribute.names.tolist())}
    bags = []
    for value in values:
        if attribute.is_bag and value is not None and (isinstance(value, str) or not isinstance(value, Iterable)):
            raise DataError(f"attribute {attribute.name!r} is a bag: give a list of values per item, not {value!r}")
        own = ([] if value is None else list(value)) if attribute.is_bag else [value]
        _check_kind(attribute, own)
        bags.append(sorted({ids.get(part, attribute.unknown_id) for part in own}))
    flat = np.array([part for bag in bags for part in bag], np.int32)
    offsets = attribute.offsets[-1] + np.cumsum([len(bag) for bag in bags], dtype=np.int64)
    return replace(
        attribute,
        values=np.concatenate([attribute.values, flat]),
        offsets=np.concatenate([attribute.offsets, offsets]),
    )


def _check_kind(attribute: Attribute, values: list[Any]) -> None:
    """Raise `DataError` unless raw values are of the kind that the attribute's names have."""
    assert attribute.names is not None
    is_text = attribute.names.dtype.kind in "UO"
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, str if is_text else Integral)):
            kind = "a text" if is_text else "an integer"
            raise DataError(f"attribute {attribute.name!r}: {value!r} must be {kind}, as its values are, or None")


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
