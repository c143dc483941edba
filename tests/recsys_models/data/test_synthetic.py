import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest

from recsys_models.data import load_dataset
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.readers.planted import SKEWS
from recsys_models.data.readers.synthetic import Synthetic, _World

# Of 5 000 rows with seed 3. A change needs a new Synthetic.version, as it makes old results incomparable.
PINNED = "7ddfda65b5166e44d754ee2e186a12bf9ae2b9cbdb27ce48444fc93661a049e4"


def digest(data) -> str:
    total = hashlib.sha256()
    for split in (data.train, data.validation, data.test):
        total.update(np.ascontiguousarray(split.ids).tobytes() + np.ascontiguousarray(split.labels).tobytes())
    return total.hexdigest()


def raw(**options) -> tuple[np.ndarray, np.ndarray]:
    chunks = list(Synthetic(**options).open({}, MalformedLog()).chunks)
    return np.concatenate([c.values for c in chunks]), np.concatenate([c.labels for c in chunks])


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    ranks = np.argsort(np.argsort(scores)) + 1.0
    positives = labels > 0
    return (ranks[positives].mean() - (positives.sum() + 1) / 2) / (~positives).sum()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_dataset("synthetic", cache_dir=tmp_path_factory.mktemp("synthetic"))


def test_size_and_fields(data):
    rows = [len(data.train), len(data.validation), len(data.test)]
    assert rows == [240_000, 30_000, 30_000]
    assert [f.name for f in data.fields] == ["user", "item", "category", "publisher", "ip", "hour", "weekday", "device"]
    sizes = [field.num_ids for field in data.fields]
    assert max(sizes) > 50_000
    assert min(sizes) == 4
    assert abs(data.train.labels.mean() - 0.25) < 0.02
    assert data.train.dense.shape == (240_000, 0)


def test_options_that_are_the_same_give_the_same_data_on_any_machine(cache):
    data = load_dataset("synthetic", cache_dir=cache, rows=5000, seed=3)
    again = load_dataset("synthetic", cache_dir=cache.with_name("again"), rows=5000, seed=3)
    other = load_dataset("synthetic", cache_dir=cache, rows=5000, seed=4)
    assert digest(data) == digest(again) == PINNED
    assert data.content_hash == again.content_hash != other.content_hash
    assert digest(other) != digest(data)


def test_later_ids_are_unknown_to_a_temporal_split_but_not_to_a_random_one(data, cache):
    unknown = {f.name: (data.test.ids[:, i] == f.unknown_id).mean() for i, f in enumerate(data.fields)}
    assert min(unknown["user"], unknown["item"], unknown["ip"]) > 0.02
    assert unknown["publisher"] == unknown["hour"] == unknown["weekday"] == unknown["device"] == 0
    mixed = load_dataset("synthetic", cache_dir=cache, split="random")
    item = mixed.fields[1]
    assert (mixed.test.ids[:, 1] == item.unknown_id).mean() < 0.01


def test_drawn_ids_follow_the_slope_asked_for():
    for skew, slope in SKEWS.items():
        values, _ = raw(rows=200_000, skew=skew)
        counts = np.array([count for _, count in Counter(values[:, 1].tolist()).most_common(300)])
        ranks = np.arange(1, len(counts) + 1)
        assert np.polyfit(np.log(ranks), np.log(counts), 1)[0] == pytest.approx(-slope, abs=0.08)


def test_raw_values_do_not_give_away_popularity():
    values, _ = raw(rows=50_000)
    distinct, counts = np.unique(values[:, 1], return_counts=True)
    assert abs(np.corrcoef(distinct, counts)[0, 1]) < 0.1


def test_an_item_has_one_category_and_the_clock_runs():
    values, _ = raw(rows=50_000)
    pairs = np.unique(values[:, 1:3], axis=0)
    assert len(pairs) == len(np.unique(pairs[:, 0]))
    hours = [hour for hour, _ in itertools.groupby(values[:, 5].tolist())]
    assert len(hours) == 14 * 24
    assert hours[:24] == hours[24:48]
    assert len(set(hours[:24])) == 24


def test_single_ids_decide_clicks(data):
    """Click rates per id, learned from training, rank the test's clicks; per bucket of a small hash, hardly."""

    def score(buckets: float | None) -> float:
        total = np.zeros(len(data.test))
        base = data.train.labels.mean()
        for i, field in enumerate(data.fields):
            key = np.arange(field.num_ids)
            if buckets and field.num_ids > 100:
                key = np.random.default_rng(i).integers(max(1, round(field.num_ids * buckets)), size=field.num_ids)
            clicks = np.bincount(key[data.train.ids[:, i]], data.train.labels, minlength=field.num_ids)
            shown = np.bincount(key[data.train.ids[:, i]], minlength=field.num_ids)
            rate = (clicks + 10 * base) / (shown + 10)
            total += np.log(rate / (1 - rate))[key[data.test.ids[:, i]]]
        return auc(total, data.test.labels)

    full, hashed = score(None), score(0.01)
    assert full > 0.74
    assert hashed < full - 0.07


def test_interactions_matter_and_clicks_are_not_certain():
    reader = Synthetic()
    plan = reader.plan()
    world = _World(plan, 0)
    generator = np.random.default_rng(0)
    values = world.draw(generator.random(50_000), generator)
    odds = world.log_odds(values)
    alone = sum(effect[column] for effect, column in zip(world._effects, values.T, strict=True))
    labels = generator.random(len(odds)) < 1 / (1 + np.exp(1.5 - odds))
    best, without = auc(odds, labels), auc(alone, labels)
    assert 0.85 < best < 0.93
    assert without < best - 0.03


def test_criteo_vocabularies_scale():
    plan = Synthetic(vocabularies="criteo").plan()
    assert len(plan.fields) == 26
    assert sum(planned.size for planned in plan.fields) == 33_762_577
    small = Synthetic(vocabularies="criteo", vocabulary_scale=0.003).plan()
    sizes = {planned.name: planned.size for planned in small.fields}
    assert (sizes["C3"], sizes["C20"], sizes["C2"]) == (30394, 4, 32)
    values, _ = raw(rows=20_000, vocabularies="criteo", vocabulary_scale=0.003)
    assert values.shape == (20_000, 26)
    assert np.all(values.max(axis=0) < [planned.size for planned in small.fields])


def test_rows_beyond_one_chunk_are_in_order_of_time():
    values, labels = raw(rows=300_000)
    assert len(values) == len(labels) == 300_000
    days = [day for day, _ in itertools.groupby(values[:, 6].tolist())]
    assert len(days) == 14
    assert days[:7] == days[7:]
