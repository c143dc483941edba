"""Sweeps small enough for tests: a made click log of 2000 rows, and results made by hand."""

import logging
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import sweep
from benchmarks.cells import Cell
from benchmarks.results import SUCCESS, Sizes, metric_values, read_result, write_result

ROOT = Path(__file__).resolve().parents[2]
CLICKS = ("model=fm", "data.rows=2000", "data.vocabulary_scale=0.02")
SMALL = ("embedding_dim=4", "threads=1", "training=quick", "training.epochs=1", "training.batch_size=256")


def run_sweep(folder, *overrides, sessions=False):
    """Run a sweep in this process; returns its exit status. Logging is left as it was found."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        sweep.main([*(() if sessions else CLICKS), *SMALL, f"results_dir={folder}", "name=small", *overrides])
    except SystemExit as stopped:
        return stopped.code
    finally:
        root.handlers[:], root.level = handlers, level
    return 0


def start_sweep(folder, *overrides):
    """Start a sweep in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.sweep",
        *CLICKS,
        *SMALL,
        f"results_dir={folder}",
        "name=small",
        *overrides,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def results_in(folder):
    """Results by file, every one of which must be whole."""
    return {path: read_result(path) for path in sorted((Path(folder) / "small").glob("*.json"))}


def cell_of(**fields):
    """A cell with a config like those that Hydra composes."""
    config = {
        "budget": "10%",
        "embedding_dim": 4,
        "init_std": 0.01,
        "seed": 1,
        "name": "made",
        "label": None,
        "results_dir": "results",
        "overwrite": False,
        "threads": None,
        "without_budget": [],
        "data_root": None,
        "data_cache": None,
        "strategy": {"name": "hash", "seed": 0, "num_hashes": 1},
        "model": {"name": "fm"},
        "data": {"name": "synthetic", "rows": 2000},
        "training": {"batch_size": 256, "seed": 0, "progress": True},
    }
    return Cell({**config, **fields})


def made_result(strategy, budget, seed, auc, served, status=SUCCESS, full=10_000, **fields):
    """A result made by hand."""
    options = {"name": strategy, "seed": 0, **fields.pop("options", {})}
    cell = cell_of(strategy=options, budget=budget, seed=seed, **fields.pop("config", {}))
    values = {"test_auc": auc, "test_log_loss": 1 - auc} if status == SUCCESS else {}
    wanted = cell.budget and round(float(cell.budget.rstrip("%")) / 100 * full)
    return cell.empty_result(
        status,
        environment={"embcomp": "0.1.0", "git_commit": "f" * 40, "packages": {"torch": "2.13.0"}},
        dataset={
            **{"content_hash": "abc", "train_rows": 80, "validation_rows": 10, "test_rows": 10},
            **{"num_fields": 2, "num_dense": 0, "num_ids": 500},
        },
        sizes=Sizes(budget_bytes=wanted, served_bytes=served, float32_bytes=full, file_bytes=served, **fields),
        metrics=metric_values(values),
        error=None if status == SUCCESS else {"type": "Error", "message": "<b>it broke</b>", "traceback": "…"},
    )


def write_results(folder, results):
    """Write results made by hand to where a sweep would have."""
    for result in results:
        write_result(Path(folder) / result.experiment / f"{result.cell}.json", result)
