"""Attributes of items: from what files say to ids by frequency."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from recsys_models.data.rows import MISSING
from recsys_models.data.sessions.catalogue import Attribute
from recsys_models.data.sessions.editing import offsets_of
from recsys_models.data.sessions.raw import RawAttribute
from recsys_models.data.vocabulary import Vocabulary

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_YEAR = re.compile(r"\(\d{4}\)\s*$")


@dataclass
class TextCoder:
    """Numbers texts in the order in which they come, for readers that can't hold them all."""

    _codes: dict[str, int] = field(default_factory=dict)

    def code(self, text: str) -> int:
        """Return the number of a text."""
        return self._codes.setdefault(text, len(self._codes))

    def codes(self, texts: np.ndarray) -> np.ndarray:
        """Return the numbers of texts ``(n,)``, int64 ``(n,)``."""
        distinct, inverse = np.unique(texts, return_inverse=True)
        return np.array([self.code(text) for text in distinct.tolist()], np.int64)[inverse]

    def ascending(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the texts in ascending order, ``(T,)``, and the place of each number among them, int64 ``(T,)``."""
        texts = np.array(list(self._codes), np.str_)
        order = np.argsort(texts)
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(len(order))
        return texts[order], places


def text_attribute(
    name: str, keys: np.ndarray, texts: Sequence[str] | np.ndarray, owners: np.ndarray | None = None
) -> RawAttribute:
    """Return an attribute of one text per item; an empty one is unknown.

    Args:
        name: of the attribute.
        keys: ``(m,)``, raw keys of items.
        texts: the values.
        owners: the position in ``keys`` of the item of each value; None if there is one value per key.
    """
    array = np.asarray(texts, np.str_)
    known = np.flatnonzero(array != "")
    distinct, values = np.unique(array[known], return_inverse=True)
    return RawAttribute(name, keys, known if owners is None else owners[known], values, texts=distinct)


def bag_attribute(name: str, keys: np.ndarray, bags: Iterable[Iterable[str]]) -> RawAttribute:
    """Return an attribute of any number of texts per item.

    Args:
        name: of the attribute.
        keys: ``(m,)``, raw keys of items.
        bags: the values of each.
    """
    coder, owners, values = TextCoder(), [], []
    for owner, bag in enumerate(bags):
        for text in bag:
            owners.append(owner)
            values.append(coder.code(text))
    texts, places = coder.ascending()
    return RawAttribute(name, keys, np.array(owners, np.int64), places[np.array(values, np.int64)], True, texts)


def title_words(title: str) -> list[str]:
    """Return the lower-cased words of a title, without a year in brackets at its end."""
    return _WORD.findall(_YEAR.sub("", title).lower())


def log2_buckets(amounts: np.ndarray) -> np.ndarray:
    """Return floor(log2(x)) of positive amounts float64 ``(n,)``, int64 ``(n,)``, exactly."""
    return np.frexp(amounts)[1].astype(np.int64) - 1


def last_of_each(keys: np.ndarray) -> np.ndarray:
    """Return the positions, int64 ``(k,)``, of the last occurrence of each distinct key in ``(n,)``."""
    return len(keys) - 1 - np.unique(keys[::-1], return_index=True)[1]


def as_known(raw: RawAttribute, known: np.ndarray) -> RawAttribute:
    """Return an attribute that changes as training knows it.

    Of each item counts the last value that is known or, where none is, the first of the others. Values of one time keep
    their order.

    Args:
        raw: the attribute, with times.
        known: bool ``(k,)``, the values that training may know.
    """
    assert raw.times is not None
    late = ~known
    # Early ones come last and by time, behind late ones whose first comes last.
    place = np.where(late, np.arange(len(late))[::-1], np.arange(len(late)))
    order = np.lexsort((place, np.where(late, -raw.times, raw.times), ~late))
    chosen = order[last_of_each(raw.owners[order])]
    chosen = chosen[raw.values[chosen] != MISSING]
    return replace(raw, owners=raw.owners[chosen], values=raw.values[chosen], times=None)


def encode_attribute(raw: RawAttribute, item_values: np.ndarray, numbers: np.ndarray, counts: np.ndarray) -> Attribute:
    """Number the values of an attribute.

    Args:
        raw: the attribute.
        item_values: ``(K,)``, raw keys of items, ascending.
        numbers: int32 ``(K,)``, their ids; -1 for items that are not in the catalogue.
        counts: int64 ``(I,)``, train events per id.
    """
    items = ids_of(raw.keys, item_values, numbers)[raw.owners]
    items, values = items[items >= 0], raw.values[items >= 0]
    kept = _distinct(items, values) if raw.is_bag else last_of_each(items)
    items, values = items[kept], values[kept]
    vocabulary = _vocabulary(values, counts[items])
    ids = vocabulary.encode(values)
    if raw.is_bag:
        ids = ids[(first := _distinct(items, ids))]
        items = items[first]
        offsets = offsets_of(np.bincount(items, minlength=len(counts)))
    else:
        single = np.full(len(counts), vocabulary.num_ids - 1, np.int32)
        single[items] = ids
        items, ids, offsets = np.arange(len(counts)), single, np.arange(len(counts) + 1)
    totals = np.zeros(vocabulary.num_ids, np.int64)
    np.add.at(totals, ids, counts[items])
    names = vocabulary.values if raw.texts is None else raw.texts[vocabulary.values]
    return Attribute(raw.name, vocabulary.num_ids, ids, offsets, totals, names, raw.is_bag)


def ids_of(keys: np.ndarray, item_values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the ids of raw keys, int32 ``(m,)``; -1 for keys of no item."""
    place = np.minimum(np.searchsorted(item_values, keys), len(item_values) - 1)
    return np.where(item_values[place] == keys, numbers[place], np.int32(-1))


def _distinct(items: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the positions of the distinct pairs, ordered by item and value."""
    order = np.lexsort((values, items))
    items, values = items[order], values[order]
    new = np.ones(len(order), np.bool_)
    new[1:] = (items[1:] != items[:-1]) | (values[1:] != values[:-1])
    return order[new]


def _vocabulary(values: np.ndarray, counts: np.ndarray) -> Vocabulary:
    distinct, inverse = np.unique(values, return_inverse=True)
    totals = np.zeros(len(distinct), np.int64)
    np.add.at(totals, inverse, counts)
    return Vocabulary.from_counts(distinct, totals)
