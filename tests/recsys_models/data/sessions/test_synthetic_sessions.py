import hashlib

import numpy as np
import pytest

from recsys_models.data import load_sessions
from recsys_models.data.sessions.readers.synthetic import World

# Of 500 sessions over 100 items with seed 3. A change needs a new SyntheticSessions.version, as it makes old results
# incomparable.
PINNED = "b642fcc599ef841bb3f6a1dfa5cf6bd2c9728121271fecd82c908aaabf68b221"


def digest(data) -> str:
    total = hashlib.sha256()
    arrays = [data.train.items, data.train.offsets, data.catalogue.values]
    for cases in (data.validation, data.test):
        arrays += [cases.sequences.items, cases.rows, cases.ends]
    for attribute in data.catalogue.attributes:
        arrays += [attribute.values, attribute.counts]
        total.update("|".join(map(str, attribute.names.tolist())).encode())
    for array in arrays:
        total.update(np.ascontiguousarray(array).astype(np.int64).tobytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_sessions("synthetic_sessions", cache_dir=tmp_path_factory.mktemp("synthetic"))


def test_options_that_are_the_same_give_the_same_data_on_any_machine(cache):
    options = {"sessions": 500, "items": 100}
    data = load_sessions("synthetic_sessions", cache_dir=cache, seed=3, **options)
    again = load_sessions("synthetic_sessions", cache_dir=cache.with_name("again"), seed=3, **options)
    other = load_sessions("synthetic_sessions", cache_dir=cache, seed=4, **options)
    assert digest(data) == digest(again) == PINNED
    assert data.content_hash == again.content_hash != other.content_hash
    assert digest(other) != digest(data)


def test_sizes_and_attributes(data):
    figures = data.statistics
    assert figures["train_sequences"] + 2 * len(np.unique(data.validation.rows)) > 15_000
    assert 1_900 < figures["items"] <= 2_000
    assert 2 <= figures["median_length"] < figures["mean_length"] < figures["longest"] <= 20
    assert [(a.name, a.num_values - 1, a.is_bag) for a in data.catalogue.attributes][:4] == [
        *(("category", 8, False), ("subcategory", 32, False), ("brand", 50, False), ("price", 8, False))
    ]
    assert data.catalogue.attribute("title").is_bag
    assert not data.filters_seen


def test_popularity_is_long_tailed(data):
    counts = data.catalogue.counts
    assert counts[: len(counts) // 10].sum() > 0.3 * counts.sum()
    assert np.median(counts) < counts.mean()


def test_late_items_are_cold_and_have_attributes_that_training_knows(data):
    cold = np.arange(data.catalogue.num_seen, data.catalogue.num_items)
    assert len(cold) > 20
    assert 0.01 < data.statistics["cold_test_targets"] < 0.1
    for name in ("category", "subcategory", "brand", "price"):
        attribute = data.catalogue.attribute(name)
        assert np.all(attribute.values[cold] < attribute.unknown_id)


def test_what_follows_can_be_told_from_the_subcategory(data):
    """In the test, the two subcategories that most often follow one in training are right in most cases."""
    subcategory = data.catalogue.attribute("subcategory").values
    pairs = np.zeros((32, 32))
    batch = next(iter(data.train.batches(10**6, 1, windows="all")))
    np.add.at(pairs, (subcategory[batch.items[:, 0]], subcategory[batch.targets[:, 0]]), 1)
    likely = np.argsort(-pairs, axis=1)[:, :2]
    batch = next(iter(data.test.batches(10**6, 1)))
    last, target = subcategory[batch.items[:, 0]], subcategory[batch.targets]
    assert (likely[last] == target[:, None]).any(axis=1).mean() > 0.85
    assert (last == target).mean() < 0.7


def test_no_item_is_drawn_before_it_is_there():
    world = World(300, 0)
    position = {key: item for item, key in enumerate(world.keys.tolist())}
    for _, keys, times in world.sessions(2_000, np.random.default_rng(0)):
        born = world.births[[position[key] for key in keys.tolist()]]
        assert np.all(born <= times)


@pytest.mark.parametrize("items", [1, 2, 7, 9])
def test_small_catalogues_load(cache, items):
    data = load_sessions("synthetic_sessions", cache_dir=cache, sessions=200, items=items)
    assert data.catalogue.num_items <= items
    assert len(data.test) > 0


def test_other_protocols_work(cache):
    data = load_sessions("synthetic_sessions", cache_dir=cache, sessions=300, protocol="leave_one_out")
    assert data.filters_seen
    assert len(data.validation) == len(data.test)
    strict = load_sessions(
        "synthetic_sessions", cache_dir=cache, sessions=3_000, keep_unseen=False, validation_share=0.0
    )
    assert strict.catalogue.num_seen == strict.catalogue.num_items
