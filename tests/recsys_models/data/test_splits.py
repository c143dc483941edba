import numpy as np
import pytest

from recsys_models.data import DataError
from recsys_models.data.splits import random_split, temporal_split


@pytest.mark.parametrize(("rows", "sizes"), [(3, [1, 1, 1]), (10, [8, 1, 1]), (1004, [804, 100, 100])])
def test_shares_are_exact(rows, sizes):
    assert np.bincount(random_split(rows, 1)).tolist() == sizes
    assert np.bincount(temporal_split(rows)).tolist() == sizes


def test_random_split_depends_on_the_seed_alone():
    assert np.array_equal(random_split(500, 7), random_split(500, 7))
    assert not np.array_equal(random_split(500, 7), random_split(500, 8))
    # Pinned: results are compared across machines and versions.
    assert random_split(12, 2021).tolist() == [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_temporal_split_is_in_order():
    assert temporal_split(7, 1 / 7, 2 / 7).tolist() == [0, 0, 0, 0, 1, 2, 2]


def test_too_few_rows_are_an_error():
    with pytest.raises(DataError, match=r"2 usable rows cannot be split.*at least 3"):
        temporal_split(2)
