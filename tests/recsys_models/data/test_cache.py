"""The cache: found again, never half there, rebuilt when damaged."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from recsys_models.data import DataError, fingerprint, load_dataset, registry

ROOT = Path(__file__).resolve().parents[3]
LINES = ["1 0:1 2:1\n", "-1 1:1 3:1\n", "-1 1:1 2:1\n"]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "frappe"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.libfm").write_text("".join(LINES))
    return folder


@pytest.fixture
def builds(monkeypatch):
    """The folders that were built, in order."""
    done = []
    build = registry.build

    def counting(reader, files, folder, log):
        done.append(folder)
        return build(reader, files, folder, log)

    monkeypatch.setattr(registry, "build", counting)
    return done


def entry(cache) -> Path:
    (folder,) = [path for path in cache.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return folder


def test_the_second_time_comes_from_the_cache_memory_mapped(root, cache, builds):
    first = load_dataset("frappe", root, cache)
    second = load_dataset("frappe", root, str(cache))
    assert len(builds) == 1
    assert first.content_hash == second.content_hash
    assert isinstance(second.train.ids, np.memmap)
    assert not second.train.ids.flags.writeable
    assert second.train.ids.tolist() == first.train.ids.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert sorted(path.name for path in cache.iterdir()) == sorted([entry(cache).name, f"{entry(cache).name}.lock"])
    assert not list(entry(cache).glob("spill*"))


def test_the_default_cache_is_named_by_the_environment(root, tmp_path):
    load_dataset("frappe", root)
    assert entry(tmp_path / "default-cache").name.startswith("frappe-")


def test_options_content_and_version_make_other_entries_but_names_do_not(root, cache, builds, monkeypatch):
    hashes = {load_dataset("frappe", root, cache).content_hash}
    moved = root.with_name("elsewhere")
    root.rename(moved)
    assert load_dataset("frappe", moved, cache).content_hash in hashes
    hashes.add(load_dataset("frappe", moved, cache, min_count=2).content_hash)
    (moved / "test.libfm").write_text(LINES[0])
    hashes.add(load_dataset("frappe", moved, cache).content_hash)
    monkeypatch.setattr(registry.READERS["frappe"], "version", 2)
    hashes.add(load_dataset("frappe", moved, cache).content_hash)
    assert len(hashes) == len(builds) == 4
    assert all(len(found) == 64 for found in hashes)


DAMAGE = {
    "missing file": lambda folder: (folder / "train.ids.npy").unlink(),
    "cut file": lambda folder: os.truncate(folder / "test.labels.npy", 100),
    "longer file": lambda folder: (folder / "field0.counts.npy").open("ab").write(b"x"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "cut manifest": lambda folder: os.truncate(folder / "manifest.json", 20),
    "another manifest": lambda folder: (folder / "manifest.json").write_text("[]"),
    "another layout": lambda folder: (folder / "manifest.json").write_text(json.dumps({"layout": 0})),
    "overwritten file": lambda folder: (folder / "train.ids.npy").write_bytes(
        b"\xff" * (folder / "train.ids.npy").stat().st_size
    ),
    "nothing left": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_built_again(root, cache, builds, damage, caplog):
    first = load_dataset("frappe", root, cache)
    expected = first.train.ids.tolist()
    del first
    DAMAGE[damage](entry(cache))
    with caplog.at_level(logging.WARNING):
        again = load_dataset("frappe", root, cache)
    assert len(builds) == 2
    assert "damaged" in caplog.text
    assert again.train.ids.tolist() == expected
    load_dataset("frappe", root, cache)
    assert len(builds) == 2
    assert not list(cache.glob(".*"))


def test_a_failed_build_leaves_nothing(root, cache, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recsys_models.data.build._encode", fail)
        with pytest.raises(KeyboardInterrupt):
            load_dataset("frappe", root, cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    load_dataset("frappe", root, cache)


def test_a_folder_that_cannot_be_written_is_an_error_with_the_way_out(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"could not be built: .*cache_dir or the environment variable EMBCOMP_CACHE"):
        load_dataset("frappe", root, tmp_path / "file" / "cache")


def test_hashes_of_large_files_are_remembered_until_the_file_changes(root, cache, monkeypatch):
    monkeypatch.setattr(fingerprint, "_LARGE", 0)
    hashed = []
    hash_file = fingerprint.hash_file
    monkeypatch.setattr(fingerprint, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    first = load_dataset("frappe", root, cache)
    assert load_dataset("frappe", root, cache).content_hash == first.content_hash
    assert sorted(hashed) == ["test.libfm", "train.libfm", "validation.libfm"]
    (root / "test.libfm").write_text(LINES[1])
    assert load_dataset("frappe", root, cache).content_hash != first.content_hash
    assert hashed[3:] == ["test.libfm"]


def start(code: str, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


SLOW_LOAD = """
    import sys, time
    from pathlib import Path
    from recsys_models.data import load_dataset, registry

    root, cache, mark, seconds = sys.argv[1:]
    build = registry.build

    def slow(reader, files, folder, log):
        raw = build(reader, files, folder, log)
        with Path(mark).open("a") as file:
            file.write("built\\n")
        time.sleep(float(seconds))
        return raw

    registry.build = slow
    data = load_dataset("frappe", root, cache)
    print(data.train.ids.tolist())
"""


def test_a_killed_build_leaves_no_entry_and_the_next_cleans_up(root, cache, tmp_path):
    mark = tmp_path / "mark"
    process = start(SLOW_LOAD, root, cache, mark, 60)
    deadline = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert mark.exists()
    leftovers = [path.name for path in cache.iterdir() if path.is_dir()]
    assert len(leftovers) == 1
    assert leftovers[0].startswith(".frappe-")
    assert load_dataset("frappe", root, cache).train.ids.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert not list(cache.glob(".*"))


def test_two_processes_at_once_build_once_and_agree(root, cache, tmp_path):
    mark = tmp_path / "mark"
    processes = [start(SLOW_LOAD, root, cache, mark, 0.5) for _ in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output.strip() == "[[1, 0], [0, 1], [0, 0]]"
    assert mark.read_text() == "built\n"


def test_without_file_locks_the_first_to_finish_wins(root, cache, monkeypatch):
    """Another process publishes the same entry while this one is still building."""
    monkeypatch.setattr("recsys_models.data.cache._lock", lambda file: False)
    build = registry.build
    inner = []

    def raced(reader, files, folder, log):
        if not inner:
            inner.append(True)
            inner.append(load_dataset("frappe", root, cache))
        return build(reader, files, folder, log)

    monkeypatch.setattr(registry, "build", raced)
    outer = load_dataset("frappe", root, cache)
    assert outer.train.ids.tolist() == inner[1].train.ids.tolist()
    assert not list(cache.glob(".*"))
