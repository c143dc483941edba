"""The real data sets, where EMBCOMP_DATA names a folder that holds them."""

import numpy as np
import pytest

from recsys_models.data import load_dataset
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.readers.criteo import CATEGORIES, Criteo
from recsys_models.data.rows import MISSING

pytestmark = pytest.mark.data


@pytest.fixture
def load(real_root, real_cache):
    def load(name, folder, **options):
        if not (real_root / folder).is_dir():
            pytest.skip(f"EMBCOMP_DATA has no folder {folder}")
        return load_dataset(name, real_root, real_cache, **options)

    return load


def sizes(data) -> tuple[int, int, int]:
    return len(data.train), len(data.validation), len(data.test)


def kept(data) -> dict[str, int]:
    return {field.name: field.num_ids - 1 for field in data.fields}


def check_invariants(data) -> None:
    assert data.num_malformed == 0
    for split in (data.train, data.validation, data.test):
        assert split.ids.min() >= 0
        assert np.all(split.ids.max(axis=0) < [field.num_ids for field in data.fields])
        assert set(np.unique(split.labels)) == {0.0, 1.0}
        assert np.isfinite(split.dense).all()
    for position, field in enumerate(data.fields):
        assert np.array_equal(np.bincount(data.train.ids[:, position], minlength=field.num_ids), field.counts)
        assert np.all(np.diff(field.counts[:-1]) <= 0)


def test_frappe(load):
    data = load("frappe", "frappe")
    check_invariants(data)
    assert sizes(data) == (202_027, 57_722, 28_860)
    assert [field.name for field in data.fields] == [
        *("user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
    ]
    # Two users, and no item, are outside the training split.
    assert list(kept(data).values()) == [954, 4082, 7, 7, 2, 3, 2, 9, 80, 233]
    assert 0.33 < data.train.labels.mean() < 0.34
    assert "United States" in data.fields[8].values


def test_movielens_1m(load):
    data = load("movielens_1m", "ml-1m")
    check_invariants(data)
    assert sizes(data) == (591_210, 73_901, 73_901)
    assert sum(sizes(data)) == 1_000_209 - 261_197
    found = kept(data)
    assert [found[name] for name in ("gender", "age", "occupation")] == [2, 7, 21]
    assert (found["user"], found["zip"]) == (6_040, 3_439)
    assert 3_600 < found["movie"] <= 3_706
    assert abs(data.train.labels.mean() - 0.778) < 0.002


def test_movielens_1m_with_thresholds_and_films(load):
    data = load("movielens_1m", "ml-1m", label_rule=">=4", item_features=True)
    check_invariants(data)
    assert sum(sizes(data)) == 1_000_209
    assert sum(split.labels.sum() for split in (data.train, data.validation, data.test)) == 348_971 + 226_310
    assert kept(data)["year"] == 81


def test_movielens_100k(load):
    data = load("movielens_100k", "ml-100k", label_rule=">=3", age="raw")
    check_invariants(data)
    assert sum(sizes(data)) == 100_000
    found = kept(data)
    assert found["user"] == 943
    assert found["zip"] == 795
    assert 1_600 < found["item"] <= 1_682


def test_lastfm_tags(load):
    data = load("lastfm_tags", "hetrec-lastfm")
    check_invariants(data)
    assert sum(sizes(data)) == 3 * 186_478
    assert sum(split.labels.sum() for split in (data.train, data.validation, data.test)) == 186_478
    found = kept(data)
    assert found["user"] == 1_892
    assert 12_400 < found["artist"] <= 12_523
    assert found["tag"] == 9_749


@pytest.mark.parametrize("numeric", ["log", "buckets"])
def test_criteo_sample(load, numeric):
    data = load("criteo", "criteo", numeric=numeric)
    check_invariants(data)
    if sum(sizes(data)) != 8_000:
        pytest.skip("not the first 8 000 rows of train.txt")
    assert sizes(data) == (6_858, 571, 571)
    positives = sum(split.labels.sum() for split in (data.train, data.validation, data.test))
    assert abs(positives / 8_000 - 0.216) < 0.001
    assert len(data.fields) == (26 if numeric == "log" else 39)
    assert data.train.dense.shape[1] == (13 if numeric == "log" else 0)


def test_criteo_sample_has_the_cardinalities_of_its_description(real_root):
    """Over all rows, and so before any split."""
    reader = Criteo()
    folder = real_root / "criteo"
    if not folder.is_dir():
        pytest.skip("EMBCOMP_DATA has no folder criteo")
    values = np.concatenate([chunk.values for chunk in reader.open(reader.files(folder), MalformedLog()).chunks])
    if len(values) != 8_000:
        pytest.skip("not the first 8 000 rows of train.txt")
    distinct = {name: len(np.unique(values[values[:, i] != MISSING, i])) for i, name in enumerate(CATEGORIES)}
    assert (distinct["C3"], distinct["C12"], distinct["C21"]) == (4_524, 4_337, 4_140)


def test_the_cache_gives_the_same_data(load):
    first, second = load("frappe", "frappe"), load("frappe", "frappe")
    assert first.content_hash == second.content_hash
    assert isinstance(second.train.ids, np.memmap)
    assert np.array_equal(first.test.ids, second.test.ids)


def test_rare_ids_share_the_last_one(load):
    data = load("lastfm_tags", "hetrec-lastfm", min_count=5)
    check_invariants(data)
    artist = data.fields[1]
    assert artist.counts[:-1].min() >= 5
    assert artist.counts[-1] > 0
