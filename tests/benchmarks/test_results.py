"""Result files, locks and the identity of cells."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest

from benchmarks.errors import ResultError
from benchmarks.locks import try_lock
from benchmarks.results import metric_values, read_result, write_result
from tests.benchmarks.small import ROOT, cell_of, made_result


def test_a_result_comes_back_as_it_was_written(tmp_path):
    result = made_result("hash", "10%", 1, 0.75, 999)
    write_result(tmp_path / "new" / "cell.json", result)
    assert read_result(tmp_path / "new" / "cell.json") == result


def test_results_from_before_composing_bytes_were_counted_can_be_read(tmp_path):
    path = tmp_path / "cell.json"
    write_result(path, made_result("hash", "10%", 1, 0.75, 999))
    values = json.loads(path.read_text())
    del values["sizes"]["composing_bytes"]
    path.write_text(json.dumps(values))
    assert read_result(path).sizes.composing_bytes is None


def test_undefined_metrics_are_null_and_other_numbers_that_json_lacks_are_refused(tmp_path):
    assert metric_values({"test_auc": math.nan})["test_auc"] == {"value": None, "higher_is_better": True}
    result = made_result("hash", "10%", 1, 0.75, 999)
    result.training["samples_per_second"] = math.inf
    with pytest.raises(ResultError, match="not JSON"):
        write_result(tmp_path / "cell.json", result)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "cell.json"
    write_result(path, made_result("hash", "10%", 1, 0.75, 999))
    before = path.read_text()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ResultError, match="No space left"):
        write_result(path, made_result("hash", "10%", 1, 0.76, 999))
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no readable result"),
        ('{"schema_version": 1', "no readable result"),
        ("[1, 2]", "no result of version 1"),
        ('{"schema_version": 99}', "schema_version is 99"),
        ('{"schema_version": 1, "sizes": {}}', "lacks a field"),
    ],
)
def test_damaged_results_are_named(tmp_path, text, message):
    path = tmp_path / "cell.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=message) as caught:
        read_result(path)
    assert str(path) in str(caught.value)


def test_cells_are_the_same_where_results_would_be():
    cell = cell_of()
    for same in (
        {"budget": "10x"},
        {"budget": 0.1},
        {"results_dir": "/elsewhere"},
        {"overwrite": True},
        {"label": "other"},
        {"training": {**cell.config["training"], "progress": False}},
        {"training": {**cell.config["training"], "plateau_patience": 1}},  # of results before there was the option
    ):
        assert cell_of(**same).digest == cell.digest, same
    for other in (
        {"budget": "11%"},
        {"seed": 2},
        {"embedding_dim": 8},
        {"strategy": {"name": "hash", "seed": 0, "num_hashes": 2}},
        {"training": {**cell.config["training"], "batch_size": 128}},
        {"training": {**cell.config["training"], "plateau_patience": 2}},
    ):
        assert cell_of(**other).digest != cell.digest, other


def test_initial_embeddings_are_the_models_own_where_nothing_is_said():
    assert cell_of(init_std=None).identity["init_std"] == 1e-4
    assert cell_of(init_std=None).digest == cell_of(init_std=1e-4).digest != cell_of().digest
    assert cell_of(init_std=None, model={"name": "narm"}).identity["init_std"] == 0.1


def test_series_differ_in_neither_budget_nor_seed():
    assert cell_of(budget="1%", seed=5).series == cell_of().series
    assert cell_of(embedding_dim=8).series != cell_of().series


def test_strategies_without_a_budget_are_one_cell_per_seed():
    cells = [cell_of(budget=budget, without_budget=["hash"]) for budget in ("10%", "50%", None)]
    assert len({cell.path for cell in cells}) == 1
    assert cells[0].budget is None


def test_names_are_fit_for_files():
    name = cell_of(budget="64MiB", data={"name": "../a b/c"}).name
    assert "/" not in name
    assert " " not in name


def test_a_lock_is_held_by_one_and_freed_by_death(tmp_path):
    path = tmp_path / "locks" / "cell.lock"
    code = (
        "import sys, time; from pathlib import Path; from benchmarks.locks import try_lock\n"
        "with try_lock(Path(sys.argv[1])) as owner:\n  print(owner, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "None\n"
        with try_lock(path) as owner:
            assert str(process.pid) in owner
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with try_lock(path) as owner:
        assert owner is None
        assert json.loads(path.read_text())["pid"] == os.getpid()
