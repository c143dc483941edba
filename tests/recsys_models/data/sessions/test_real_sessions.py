"""The real data sets, where EMBCOMP_DATA names a folder that holds them, and what is published about them."""

import numpy as np
import pytest

from recsys_models.data import load_sessions, metadata_twin_rate

pytestmark = pytest.mark.data


@pytest.fixture
def load(real_root, real_cache):
    def load(name, folder, inside=False, **options):
        if not (real_root / folder).is_dir():
            pytest.skip(f"EMBCOMP_DATA has no folder {folder}")
        return load_sessions(name, real_root / folder if inside else real_root, real_cache, **options)

    return load


def check_invariants(data) -> None:
    assert data.num_malformed == 0
    catalogue = data.catalogue
    assert np.array_equal(np.bincount(data.train.items, minlength=catalogue.num_items), catalogue.counts)
    assert np.all(np.diff(catalogue.counts) <= 0)
    assert len(np.unique(catalogue.values)) == catalogue.num_items
    for cases in (data.validation, data.test):
        assert np.all((cases.ends >= 1) & (cases.ends < cases.sequences.lengths[cases.rows]))
        assert np.all(cases.sequences.items < catalogue.num_items)
    for attribute in catalogue.attributes:
        assert np.all(np.diff(attribute.counts[:-1]) <= 0)
        assert attribute.values.max() < attribute.num_values
        assert attribute.is_bag or np.all(attribute.lengths == 1)
        assert len(attribute.names) == attribute.num_values - 1


def events(data) -> int:
    """All events of a data set that is split leave-one-out."""
    return len(data.train.items) + len(data.validation) + len(data.test)


def test_the_file_of_sasrec(load):
    data = load("sasrec_text", "ml-1m", inside=True, file="ml-1m_sasrec.txt")
    check_invariants(data)
    assert (len(data.train), data.catalogue.num_items, events(data)) == (6_040, 3_416, 999_611)
    assert len(data.test) == 6_040


def test_movielens_1m(load):
    data = load("movielens_1m", "ml-1m")
    check_invariants(data)
    assert (len(data.train), data.catalogue.num_items, events(data)) == (6_040, 3_416, 999_611)
    assert [(a.name, a.num_values - 1) for a in data.catalogue.attributes if a.name in ("genres", "decade")] == [
        *(("genres", 18), ("decade", 10))
    ]
    assert "star" in data.catalogue.attribute("title").names
    assert metadata_twin_rate(data) < 0.01


def test_movielens_1m_is_the_file_of_sasrec_in_other_words(load):
    ours = load("movielens_1m", "ml-1m")
    theirs = load("sasrec_text", "ml-1m", inside=True, file="ml-1m_sasrec.txt")
    assert np.array_equal(ours.catalogue.counts, theirs.catalogue.counts)
    assert np.array_equal(np.sort(ours.train.lengths), np.sort(theirs.train.lengths))


def test_movielens_1m_in_the_recipe_of_recbole(load):
    data = load("movielens_1m", "ml-1m", min_rating=3, min_length=10, min_item_count=10, iterate=True)
    check_invariants(data)
    assert events(data) == 834_449
    assert data.catalogue.num_items + 1 == 3_124  # there with the id for padding


def test_movielens_100k(load):
    data = load("movielens_100k", "ml-100k")
    check_invariants(data)
    assert (len(data.train), data.catalogue.num_items, events(data)) == (943, 1_682, 100_000)
    timed = load("movielens_100k", "ml-100k", protocol="last_days", test_days=30, keep_unseen=True)
    check_invariants(timed)
    assert not timed.filters_seen


def test_diginetica_as_session_models_are_trained_on_it(load):
    data = load("diginetica_sessions", "diginetica")
    check_invariants(data)
    assert len(data.train) + len(data.validation.sequences) == 186_670
    assert len(data.validation.sequences) == 18_667
    assert (len(data.test), data.catalogue.num_items) == (60_858, 43_097)
    whole = load("diginetica_sessions", "diginetica", validation_share=0.0)
    assert whole.statistics["train_targets"] == 719_470
    assert len(whole.train.items) + len(whole.test.sequences.items) == 982_961
    assert whole.statistics["cold_test_targets"] == 0


def test_diginetica_sample(load, real_root):
    name = "train-item-views.sample.csv"
    if not (real_root / "diginetica" / name).is_file():
        pytest.skip(f"EMBCOMP_DATA has no file diginetica/{name}")
    data = load("diginetica", "diginetica", file=name, validation_share=0.0)
    check_invariants(data)
    # What the preprocessing script of SR-GNN says of the same file.
    assert (len(data.train), len(data.test.sequences)) == (469, 39)
    assert (data.statistics["train_targets"], len(data.test), data.catalogue.num_items) == (1_205, 99, 309)
    cold = load("diginetica", "diginetica", file=name, keep_unseen=True, min_item_count=1)
    check_invariants(cold)
    assert cold.statistics["cold_test_targets"] > 0.5
    (category,) = cold.catalogue.attributes
    assert np.mean(category.values[: cold.catalogue.num_seen] == category.unknown_id) < 0.05


def test_amazon_beauty(load):
    data = load("amazon_beauty", "amazon-beauty")
    check_invariants(data)
    assert (len(data.train), data.catalogue.num_items, events(data)) == (22_363, 12_101, 198_502)
    (attribute,) = data.catalogue.attributes
    assert 600 < attribute.num_values <= 638
    assert round(float(attribute.lengths.mean()), 1) == 3.7
    assert 0.5 < metadata_twin_rate(data) < 1
