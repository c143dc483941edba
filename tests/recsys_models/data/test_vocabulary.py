from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_models.data import vocabulary
from recsys_models.data.rows import MISSING
from recsys_models.data.vocabulary import ValueCounter, Vocabulary

INT64 = st.integers(-(2**63), 2**63 - 1)
VALUES = st.lists(st.one_of(st.integers(-3, 6), INT64), max_size=60)


@settings(deadline=None)
@given(train=VALUES, other=VALUES, min_count=st.integers(1, 4))
def test_vocabulary_is_what_plain_python_gives(train, other, min_count):
    counts = Counter(train)
    kept = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: (-counts[v], v))
    ids = {value: position for position, value in enumerate(kept)}

    counter = ValueCounter()
    counter.add(np.array(train, np.int64))
    built = Vocabulary.from_counts(*counter.result(), min_count)

    assert built.values.tolist() == kept
    assert built.num_ids == len(kept) + 1
    assert built.counts.tolist() == [counts[v] for v in kept] + [sum(n for n in counts.values() if n < min_count)]
    assert built.counts.sum() == len(train)
    assert np.all(np.diff(built.counts[:-1]) <= 0)
    encoded = built.encode(np.array(train + other, np.int64))
    assert encoded.dtype == np.int32
    assert encoded.tolist() == [ids.get(value, len(kept)) for value in train + other]


@settings(deadline=None)
@given(blocks=st.lists(VALUES, max_size=8), threshold=st.integers(0, 10))
def test_counting_in_blocks_equals_counting_at_once(blocks, threshold):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "_MERGE_ABOVE", threshold)
        counter = ValueCounter()
        for block in blocks:
            counter.add(np.array(block, np.int64))
        values, counts = counter.result()
    expected = Counter(value for block in blocks for value in block)
    assert values.tolist() == sorted(expected)
    assert counts.tolist() == [expected[value] for value in values.tolist()]


def test_ties_go_to_the_smaller_raw_value_and_missing_is_a_value():
    built = Vocabulary.from_counts(np.array([MISSING, 2, 5, 9]), np.array([3, 1, 3, 7]))
    assert built.values.tolist() == [9, MISSING, 5, 2]
    assert built.counts.tolist() == [7, 3, 3, 1, 0]
    assert built.encode(np.array([MISSING, MISSING + 1, 9])).tolist() == [1, 4, 0]


def test_vocabulary_of_nothing_maps_all_to_its_one_id():
    built = Vocabulary.from_counts(np.array([4, 5]), np.array([1, 2]), min_count=3)
    assert built.counts.tolist() == [3]
    assert built.encode(np.array([4, 6])).tolist() == [0, 0]
