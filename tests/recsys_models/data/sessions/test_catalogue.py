"""Ids by train frequency, attributes, and items that nothing tells apart, against plain Python."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_models.data import Attribute, Catalogue, DataError
from recsys_models.data.sessions.attributes import (
    TextCoder,
    bag_attribute,
    encode_attribute,
    log2_buckets,
    text_attribute,
    title_words,
)
from recsys_models.data.sessions.editing import offsets_of
from recsys_models.data.sessions.raw import RawAttribute
from tests.recsys_models.data.sessions import reference

PAIRS = st.lists(st.tuples(st.integers(0, 9), st.integers(-3, 5)), max_size=40)
COUNTS = st.lists(st.integers(0, 4), min_size=1, max_size=6)


def encode(pairs, counts, is_bag) -> tuple[Attribute, list[int]]:
    """Encode pairs (item, value) for the items 0, 2, 4, …, whose train counts are given in the order of ids."""
    items = [2 * i for i in range(len(counts))]
    ids = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    numbers = np.empty(len(ids), np.int32)
    numbers[ids] = np.arange(len(ids))
    keys = np.array([item for item, _ in pairs], np.int64)
    raw = RawAttribute("colour", keys, np.arange(len(pairs)), np.array([v for _, v in pairs], np.int64), is_bag)
    by_id = np.array([counts[i] for i in ids], np.int64)
    return encode_attribute(raw, np.array(items), numbers, by_id), [items[i] for i in ids]


@settings(deadline=None, max_examples=200)
@given(pairs=PAIRS, counts=COUNTS, is_bag=st.booleans())
def test_attributes_are_what_plain_python_gives(pairs, counts, is_bag):
    found, items = encode(pairs, counts, is_bag)
    values_of = {}
    for item, value in pairs:
        values_of.setdefault(item, []).append(value)
    names, ids, sums = reference.attribute(values_of, items, sorted(counts, reverse=True), is_bag)
    assert found.names.tolist() == names
    assert [found.values[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:], strict=False)] == ids
    assert found.counts.tolist() == sums
    assert (found.num_values, found.unknown_id, found.is_bag) == (len(names) + 1, len(names), is_bag)
    assert (found.values.dtype, found.offsets.dtype, found.counts.dtype) == (np.int32, np.int64, np.int64)
    assert np.all(np.diff(found.counts[:-1]) <= 0)


def test_values_of_cold_items_are_unknown_once_per_item():
    found, items = encode([(0, 5), (2, 7), (2, 8), (2, 5)], [3, 0], is_bag=True)
    assert items == [0, 2]
    assert found.names.tolist() == [5]
    assert found.values.tolist() == [0, 0, 1]
    assert found.counts.tolist() == [3, 0]


def test_items_without_a_value_are_unknown_or_empty_bags():
    single, _ = encode([(2, 7)], [3, 2], is_bag=False)
    assert (single.values.tolist(), single.counts.tolist(), single.lengths.tolist()) == ([1, 0], [2, 3], [1, 1])
    bag, _ = encode([(2, 7)], [3, 2], is_bag=True)
    assert (bag.values.tolist(), bag.counts.tolist(), bag.lengths.tolist()) == ([0], [2, 0], [0, 1])


def test_the_last_value_of_an_item_counts():
    found, _ = encode([(0, 5), (0, 6), (2, 6), (2, 5)], [3, 2], is_bag=False)
    assert found.names[found.values].tolist() == [6, 5]


def test_text_attributes_and_bags_keep_their_texts_and_ties_go_to_the_smaller():
    keys, numbers, counts = np.array(["b", "a", "x"]), np.array([0, 1], np.int32), np.array([4, 4])
    brand = encode_attribute(text_attribute("brand", keys, ["Z", "Y", "W"]), np.array(["a", "b"]), numbers, counts)
    assert (brand.names.tolist(), brand.values.tolist()) == (["Y", "Z"], [0, 1])
    gap = encode_attribute(text_attribute("brand", keys, ["", "Y", ""]), np.array(["a", "b"]), numbers, counts)
    assert (gap.names.tolist(), gap.values.tolist(), gap.counts.tolist()) == (["Y"], [0, 1], [4, 4])
    bag = bag_attribute("title", keys, [["new", "york", "new"], ["york"], ["x"]])
    title = encode_attribute(bag, np.array(["a", "b"]), numbers, counts)
    assert (title.names.tolist(), title.counts.tolist()) == (["york", "new"], [8, 4, 0])
    assert (title.values.tolist(), title.offsets.tolist()) == ([0, 0, 1], [0, 1, 3])


def test_an_attribute_of_no_known_item_has_one_id():
    found, _ = encode([(9, 5)], [1], is_bag=False)
    assert (found.num_values, found.values.tolist(), found.counts.tolist(), len(found.names)) == (1, [0], [1], 0)
    empty, _ = encode([], [1], is_bag=True)
    assert (empty.num_values, empty.values.tolist(), empty.counts.tolist()) == (1, [], [0])


def make_attribute(bags) -> Attribute:
    values = np.array([value for bag in bags for value in bag], np.int32)
    offsets = offsets_of(np.array([len(bag) for bag in bags], np.int64))
    return Attribute("a", 9, values, offsets, np.zeros(9, np.int64), None, is_bag=True)


BAGS = st.sets(st.integers(0, 2), max_size=3).map(sorted)


@settings(deadline=None, max_examples=200)
@given(rows=st.lists(st.lists(BAGS, min_size=2, max_size=2), min_size=1, max_size=15), used=st.integers(0, 2))
def test_twins_are_items_with_equal_values_in_all_attributes(rows, used):
    attributes = tuple(make_attribute([row[i] for row in rows]) for i in range(2))
    tuples = [tuple(map(tuple, row[:used])) for row in rows]
    catalogue = Catalogue(len(rows), np.ones(len(rows), np.int64), np.arange(len(rows)), attributes)
    group = catalogue.twin_groups(attributes[:used])
    assert [[a == b for a in group] for b in group] == [[a == b for a in tuples] for b in tuples]
    assert np.array_equal(catalogue.twin_groups(), catalogue.twin_groups(attributes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": np.array([1, 0, 1, 2], np.int32)}, r"item 0 must be distinct and ascending, found \[1, 0\]"),
        ({"values": np.array([0, 1, 2, 2], np.int32)}, r"item 2 must be distinct and ascending, found \[2, 2\]"),
        ({"values": np.array([0.0, 1.9, 1.0, 2.0])}, "values of float64 must be integers"),
        ({"names": np.array(["p", "q", "r"])}, r"names \(3,\) must be \(2,\)"),
    ],
)
def test_bug_attributes_that_contradict_themselves_were_taken(changes, message):
    right = {"values": np.array([0, 1, 1, 2], np.int32), "names": np.array(["p", "q"])}
    offsets, counts = np.array([0, 2, 2, 4]), np.zeros(3, np.int64)
    Attribute("kind", 3, right["values"], offsets, counts, right["names"], is_bag=True)
    with pytest.raises(DataError, match=message):
        Attribute("kind", 3, offsets=offsets, counts=counts, is_bag=True, **{**right, **changes})


def test_bug_items_that_training_lacks_were_trained_where_they_were_not_the_last():
    assert Catalogue(4, np.array([5, 3, 0, 0]), np.arange(4)).num_seen == 2
    with pytest.raises(DataError, match="item 0 has count 0, and items behind it have not"):
        Catalogue(4, np.array([0, 5, 0, 3]), np.arange(4))


def test_attributes_are_found_by_name():
    catalogue = Catalogue(1, np.array([1]), np.array([5]), (make_attribute([[1]]),))
    assert catalogue.attribute("a").values.tolist() == [1]
    with pytest.raises(KeyError, match="no attribute 'b', there are: a"):
        catalogue.attribute("b")


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("Toy Story (1995)", ["toy", "story"]),
        ("Lion King, The (1994)", ["lion", "king", "the"]),
        ("2001: A Space Odyssey (1968) ", ["2001", "a", "space", "odyssey"]),
        ("Schindler's List (1993)", ["schindler's", "list"]),
        ("Misérables, Les (1995)", ["misérables", "les"]),
        ("X-Men_2", ["x", "men", "2"]),
        ("(1900)", []),
        ("", []),
    ],
)
def test_words_of_titles(title, words):
    assert title_words(title) == words


def test_buckets_of_prices_are_exact_at_powers_of_two():
    prices = np.array([0.25, 0.3, 0.99, 1.0, 1.99, 2.0, 3.99, 4.0, 7.99, 1024.0, 2.0**40 - 0.5])
    assert log2_buckets(prices).tolist() == [-2, -2, -1, 0, 0, 1, 1, 2, 2, 10, 39]


@settings(deadline=None)
@given(blocks=st.lists(st.lists(st.text(max_size=3).filter(lambda s: "\0" not in s), min_size=1), max_size=5))
def test_texts_keep_their_numbers_over_blocks(blocks):
    coder = TextCoder()
    codes = [coder.codes(np.array(block, np.str_)) for block in blocks]
    texts, places = coder.ascending()
    assert texts.tolist() == sorted(texts.tolist())
    for block, code in zip(blocks, codes, strict=True):
        assert texts[places[code]].tolist() == block


class TestNewItems:
    @pytest.fixture
    def catalogue(self):
        kind = Attribute(
            "kind", 3, np.array([0, 1, 0], np.int32), np.arange(4), np.array([5, 2, 0]), np.array(["a", "b"]), False
        )
        words = Attribute(
            "words",
            3,
            np.array([0, 1, 1], np.int32),
            np.array([0, 2, 2, 3]),
            np.array([4, 3, 0]),
            np.array([7, 9]),
            True,
        )
        return Catalogue(3, np.array([4, 2, 1]), np.array([30, 10, 20]), (kind, words))

    def test_come_behind_the_others_with_the_ids_of_their_values(self, catalogue):
        found = catalogue.with_items(
            [5, 40, 6], {"kind": ["b", "never seen", None], "words": [[9, 7, 9], [1, 2], None]}
        )
        assert (found.num_items, found.num_seen) == (6, 3)
        assert (found.values.tolist(), found.counts.tolist()) == ([30, 10, 20, 5, 40, 6], [4, 2, 1, 0, 0, 0])
        kind, words = found.attributes
        assert (kind.values.tolist(), kind.offsets.tolist()) == ([0, 1, 0, 1, 2, 2], list(range(7)))
        assert (words.values.tolist(), words.offsets.tolist()) == ([0, 1, 1, 0, 1, 2], [0, 2, 2, 3, 5, 6, 6])
        for before, after in zip(catalogue.attributes, found.attributes, strict=True):
            assert (after.num_values, after.values.dtype, after.offsets.dtype) == (3, np.int32, np.int64)
            assert after.counts is before.counts
        assert catalogue.num_items == 3

    def test_may_have_unknown_attributes_or_be_none_at_all(self, catalogue):
        found = catalogue.with_items([5], {})
        assert (found.attributes[0].firsts[-1], found.attributes[1].lengths[-1]) == (2, 0)
        assert catalogue.with_items([], {}).values.tolist() == [30, 10, 20]

    @pytest.mark.parametrize(
        ("keys", "values", "message"),
        [
            (["A"], {}, r"keys \['A'\] of new items must be a list of integers"),
            (5, {}, "must be a list of integers"),
            ([20], {}, "20 is in the catalogue already"),
            ([5, 5], {}, "keys of new items: come twice"),
            ([5], {"brand": ["x"]}, "values of 'brand': items have no such attribute, there are: kind, words"),
            (
                [5],
                {"kind": ["a", "b"]},
                "attribute 'kind' has 2 values, but 1 new items need a named value or None each",
            ),
            ([5], {"words": [7]}, "attribute 'words' is a bag: give a list of values per item, not 7"),
            ([5], {"words": ["79"]}, "is a bag: give a list"),
            ([5], {"words": [[["a"]]]}, r"attribute 'words': \['a'\] must be"),
            ([5], {"kind": [["a"]]}, r"attribute 'kind': \['a'\] must be a"),
            ([5], {"kind": [True]}, "attribute 'kind': True must be a"),
        ],
    )
    def test_that_do_not_fit_are_an_error(self, catalogue, keys, values, message):
        with pytest.raises(DataError, match=message):
            catalogue.with_items(keys, values)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"offsets": np.array([1, 2, 2, 3])}, "attribute 'words': offsets must be"),
            ({"offsets": np.array([0, 2, 1, 3])}, "never fall"),
            ({"offsets": np.array([0, 2, 2, 4])}, r"values \(3,\), but offsets end with 4"),
            ({"values": np.array([0, 1, 3], np.int32)}, r"values of 0 to 3 must be in \[0, 3\)"),
            ({"values": np.array([-1, 1, 1], np.int32)}, "values of -1 to 1"),
            ({"counts": np.array([4, 3])}, r"counts \(2,\) must be \(3,\)"),
            ({"is_bag": False}, "item 0 has 2 values, but must have one"),
        ],
    )
    def test_bug_attributes_that_contradict_themselves_are_refused(self, catalogue, changes, message):
        """Models of them failed far from here, or composed items of values of others."""
        with pytest.raises(DataError, match=message):
            dataclasses.replace(catalogue.attributes[1], **changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_items": 4}, r"catalogue of 4 items: counts \(3,\) must be \(4,\)"),
            ({"values": np.arange(2)}, r"values \(2,\) must be \(3,\)"),
            ({"counts": np.array([4, 2, -1])}, "item 2 has count -1, below 0"),
            (
                {"num_items": 2, "counts": np.array([4, 2]), "values": np.arange(2)},
                "attribute 'kind' is of 3 items, the catalogue of 2",
            ),
        ],
    )
    def test_bug_catalogues_that_contradict_their_attributes_are_refused(self, catalogue, changes, message):
        """A model of metadata had as many items as the first attribute."""
        with pytest.raises(DataError, match=message):
            dataclasses.replace(catalogue, **changes)
