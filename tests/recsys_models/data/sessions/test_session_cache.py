"""The cache of sessions: found again, rebuilt when damaged, and another for every option."""

import logging
import os

import numpy as np
import pytest

from recsys_models.data import DataError, load_sessions
from recsys_models.data.sessions import registry
from tests.recsys_models.data.sessions.memory import in_keys, values_of


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "amazon-beauty"
    folder.mkdir()
    (folder / "sequences.txt").write_text("1 10 20 30 40\n2 20 10 30\n")
    (folder / "item_attributes.json").write_text('{"10": [5, 6], "20": [6]}')
    return tmp_path


@pytest.fixture
def builds(monkeypatch):
    """How often data were built."""
    done = []
    build = registry.build_sessions

    def counting(*args):
        done.append(args)
        return build(*args)

    monkeypatch.setattr(registry, "build_sessions", counting)
    return done


def entry(cache):
    (folder,) = [path for path in cache.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return folder


def test_the_second_time_comes_from_the_cache_memory_mapped(root, cache, builds):
    first = load_sessions("amazon_beauty", root, cache)
    second = load_sessions("amazon_beauty", root, str(cache))
    assert len(builds) == 1
    assert first.content_hash == second.content_hash
    assert in_keys(first) == in_keys(second)
    assert values_of(first, "attribute") == values_of(second, "attribute")
    arrays = [second.train.items, second.train.offsets, second.test.rows, second.test.ends, second.test.sequences.items]
    for array in (*arrays, second.catalogue.attributes[0].values):
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
    assert entry(cache).name.startswith("amazon_beauty-")


def test_types_are_those_promised(root, cache):
    data = load_sessions("amazon_beauty", root, cache)
    (attribute,) = data.catalogue.attributes
    for array in (data.train.items, data.test.sequences.items, data.test.rows, data.validation.ends, attribute.values):
        assert array.dtype == np.int32
    for array in (
        data.train.offsets,
        data.test.sequences.offsets,
        data.catalogue.counts,
        attribute.offsets,
        attribute.counts,
    ):
        assert array.dtype == np.int64


DAMAGE = {
    "missing file": lambda folder: (folder / "train.items.npy").unlink(),
    "cut file": lambda folder: os.truncate(folder / "test.rows.npy", 100),
    "longer file": lambda folder: (folder / "attribute0.counts.npy").open("ab").write(b"x"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "another manifest": lambda folder: (folder / "manifest.json").write_text("[]"),
    "overwritten file": lambda folder: (folder / "items.counts.npy").write_bytes(
        b"\xff" * (folder / "items.counts.npy").stat().st_size
    ),
    "nothing left": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_built_again(root, cache, builds, damage, caplog):
    expected = in_keys(load_sessions("amazon_beauty", root, cache))
    DAMAGE[damage](entry(cache))
    with caplog.at_level(logging.WARNING):
        again = load_sessions("amazon_beauty", root, cache)
    assert (len(builds), in_keys(again)) == (2, expected)
    assert "damaged" in caplog.text
    load_sessions("amazon_beauty", root, cache)
    assert len(builds) == 2


def test_options_and_content_make_other_entries(root, cache, builds, monkeypatch):
    hashes = {load_sessions("amazon_beauty", root, cache).content_hash}
    hashes.add(load_sessions("amazon_beauty", root, cache, min_length=4).content_hash)
    hashes.add(load_sessions("amazon_beauty", root, cache, merge_repeats=True).content_hash)
    (root / "amazon-beauty" / "item_attributes.json").write_text('{"10": [5]}')
    hashes.add(load_sessions("amazon_beauty", root, cache).content_hash)
    monkeypatch.setattr(registry.SESSION_READERS["amazon_beauty"], "version", 2)
    hashes.add(load_sessions("amazon_beauty", root, cache).content_hash)
    assert len(hashes) == len(builds) == 5


def test_the_limit_of_malformed_lines_holds_for_cached_data_too(root, cache, caplog):
    with (root / "amazon-beauty" / "sequences.txt").open("a") as file:
        file.write("3\n")
    loose = load_sessions("amazon_beauty", root, cache, max_malformed=0.5)
    with pytest.raises(DataError, match=r"sequences\.txt: 1 of 3 lines .*more than the allowed 1\.00%"):
        load_sessions("amazon_beauty", root, cache)
    caplog.clear()
    again = load_sessions("amazon_beauty", root, cache, max_malformed=0.4)
    assert (again.content_hash, again.num_malformed) == (loose.content_hash, 1)
    assert "amazon_beauty: 1 malformed lines were left out" in caplog.text


def test_too_many_malformed_lines_are_told_before_what_follows_from_them(root, cache):
    (root / "amazon-beauty" / "sequences.txt").write_text("1 10\n2 20\n3\n")
    with pytest.raises(DataError, match=r"sequences\.txt: 1 of 3 lines"):
        load_sessions("amazon_beauty", root, cache)


def test_an_option_that_came_later_leaves_the_names_of_caches_as_they_were(tmp_path, cache):
    data = load_sessions("synthetic_sessions", cache_dir=cache, sessions=50, items=20)
    assert data.content_hash.startswith("4ea201f2fc0390d2")
    assert load_sessions("synthetic_sessions", cache_dir=cache, sessions=50, items=20, all_items=True).content_hash != (
        data.content_hash
    )
