"""Run a cell: load, plan, build, train, finalize, and measure the finalized form, never the training form."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import logging
import shutil
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cells import Cell
from benchmarks.errors import ResultError
from benchmarks.exported import check_kind, exported_files
from benchmarks.locks import try_lock
from benchmarks.measure import (
    environment,
    lookup_latency,
    peak_memory_bytes,
    reset_peak_memory,
    saved_bytes,
    state_bytes,
)
from benchmarks.results import FAILED, INFEASIBLE, SUCCESS, CellResult, Sizes, write_result, write_whole
from benchmarks.workloads import Workload, workload_of
from embcomp import EmbeddingTables, Plan, StrategyConfig, config_to_dict, make_config, plan
from embcomp.errors import BudgetError, ConfigError
from recsys_models.training import TrainingConfig, TrainingResult, fit

logger = logging.getLogger(__name__)

ELSEWHERE = "elsewhere"
"""Status of a cell that another process is running: it has no result yet."""

_MOST_SHARED = 8
"""Cells whose phases are kept for others: as many seeds as run between two budgets, mostly."""


@dataclass(frozen=True)
class Outcome:
    """What became of a cell in this sweep.

    Attributes:
        status: of its result, or `ELSEWHERE`.
        result: None where another process is running the cell.
        reused: whether the result is of an earlier run.
        owner: who is running it, else empty.
    """

    status: str
    result: CellResult | None = None
    reused: bool = False
    owner: str = ""


def run_or_reuse(cell: Cell, overwrite: bool = False) -> Outcome:
    """Run a cell unless its result is there, or another process is at it; write its result, and a log if it failed.

    Args:
        cell: the cell.
        overwrite: run it even if it is finished.

    Raises:
        ResultError: if the result can't be written.
    """
    if not overwrite and (result := cell.finished()):
        return Outcome(result.status, result, reused=True)
    with try_lock(cell.lock_path) as owner:
        if owner is not None:
            return Outcome(ELSEWHERE, owner=owner)
        if not overwrite and (result := cell.finished()):
            return Outcome(result.status, result, reused=True)
        result = run_cell(cell)
        if result.error is not None and result.status == FAILED:
            write_whole(cell.log_path, result.error["traceback"])
        else:
            cell.log_path.unlink(missing_ok=True)
        write_result(cell.path, result)
    return Outcome(result.status, result)


def run_cell(cell: Cell) -> CellResult:
    """Run a cell; whatever goes wrong in it becomes part of the result, so that a sweep goes on."""
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    notes = _Notes()
    reset_peak_memory()
    status, error = SUCCESS, None
    try:
        if cell.config.get("threads"):
            torch.set_num_threads(int(cell.config["threads"]))
        _measure(cell, notes)
    except BudgetError as caught:
        status, error = FAILED if caught.minimum_bytes is None else INFEASIBLE, _describe(caught)
        notes.sizes["minimum_bytes"] = caught.minimum_bytes
    except Exception as caught:  # the one place where a sweep stops errors: they are in the result, with traceback
        logger.exception("%s failed", cell.name)
        status, error = FAILED, _describe(caught)
    return cell.empty_result(
        status,
        started=started,
        wall_seconds=round(time.perf_counter() - clock, 3),
        environment={**environment(), "threads": torch.get_num_threads()},
        error=error,
        sizes=Sizes(**notes.sizes, peak_memory_bytes=peak_memory_bytes()),
        dataset=notes.dataset,
        tables=notes.tables,
        metrics=notes.metrics,
        slices=notes.slices,
        training=notes.training,
        lookup=notes.lookup,
        exports=notes.exports,
    )


@dataclass
class _Notes:
    """What is known of a cell so far; what was measured before an error is kept."""

    dataset: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int | None] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    slices: dict[str, dict[str, float]] = field(default_factory=dict)
    lookup: dict[str, dict[str, Any]] = field(default_factory=dict)
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)


def _measure(cell: Cell, notes: _Notes) -> None:
    strategy, training = _strategy(cell), _training(cell)
    for kind in cell.exports:
        check_kind(kind)
    workload = workload_of(cell.config)
    notes.dataset = workload.about()
    planned = _plan(cell, workload, strategy, notes.sizes)
    notes.tables = config_to_dict(planned.config)
    torch.manual_seed(cell.seed)
    tables = planned.build()
    notes.sizes["built_bytes"] = tables.memory().serve_bytes
    optimizer = training.embedding_optimizer or training.optimizer
    notes.sizes["train_bytes"] = tables.memory().train_bytes(optimizer)
    model = workload.build(tables)
    trained = fit(model, workload.data, training, shared_dir=_shared_folder() / f"{cell.series}-{cell.seed}")
    _forget_old_phases()
    notes.training = _about_training(trained)
    tables.finalize_()
    widths = {name: own for name in tables.names if (own := tables.widths_of(name)) is not None}
    notes.tables = config_to_dict(tables.config) | {"mean_widths_by_decile": _by_decile(widths)}
    if len(widths) == len(tables.names):
        notes.tables["sparsity"] = _sparsity(tables, widths)
    quality = workload.quality(model, trained)
    notes.metrics, notes.slices = quality.metrics, quality.slices
    notes.sizes |= {
        "served_bytes": state_bytes(tables),
        "composing_bytes": workload.composing_bytes(model),
        "model_bytes": state_bytes(model),
        "file_bytes": saved_bytes(tables),
    }
    _check_budget(notes.sizes)
    device = next(iter(tables.state_dict().values())).device
    notes.lookup = lookup_latency(tables, workload.lookup_ids().to(device))
    notes.exports = exported_files(tables, cell.exports)


@functools.lru_cache(maxsize=1)
def _shared_folder() -> Path:
    """Where cells of this process leave the phases that are the same for every budget; gone when it ends."""
    folder = tempfile.TemporaryDirectory(prefix="embcomp-phases-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _forget_old_phases() -> None:
    left = sorted(_shared_folder().iterdir(), key=lambda path: path.stat().st_mtime)
    for path in left[:-_MOST_SHARED]:
        shutil.rmtree(path)


def _by_decile(widths: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Table -> mean number of values that ids of each tenth have, the most frequent first."""
    return {
        name: [round(float(part.mean()), 3) for part in own.float().tensor_split(10) if len(part)]
        for name, own in widths.items()
    }


def _sparsity(tables: EmbeddingTables, widths: Mapping[str, Tensor]) -> float:
    """Share of the V × D values of plain tables that are not stored; of integers as of floats."""
    stored = sum(int(own.sum()) for own in widths.values())
    return 1 - stored / (tables.embedding_dim * sum(spec.num_embeddings for spec in tables.specs))


def _strategy(cell: Cell) -> StrategyConfig:
    options = dict(cell.config["strategy"])
    if options.get("seed", 0) not in (0, cell.seed):
        raise ConfigError(f"strategy.seed={options['seed']} and seed={cell.seed}: the cell's seed is used, set seed=")
    return make_config(options.pop("name"), **{**options, "seed": cell.seed})


def _training(cell: Cell) -> TrainingConfig:
    options = dict(cell.config["training"])
    if options.get("seed", 0) not in (0, cell.seed):
        raise ConfigError(f"training.seed={options['seed']} and seed={cell.seed}: the cell's seed is used, set seed=")
    return TrainingConfig(**{**options, "seed": cell.seed})


def _plan(cell: Cell, workload: Workload, strategy: StrategyConfig, sizes: dict[str, int | None]) -> Plan:
    specs = workload.specs()
    sizes["float32_bytes"] = sum(spec.full_bytes for spec in specs)
    planned = plan(specs, strategy, cell.budget, workload.counts())
    sizes["budget_bytes"], sizes["planned_bytes"] = planned.budget_bytes, planned.report.serve_bytes
    return planned


def _check_budget(sizes: Mapping[str, int | None]) -> None:
    budget, served = sizes["budget_bytes"], sizes["served_bytes"]
    if budget is not None and served is not None and served > budget:
        raise ResultError(f"the finalized tables take {served} B, over the budget of {budget} B: a bug in the strategy")


def _about_training(trained: TrainingResult) -> dict[str, Any]:
    evaluations = [dataclasses.asdict(evaluation) for evaluation in trained.history]
    return {
        "epochs": trained.epochs,
        "steps": trained.steps,
        "best_epoch": trained.best.epoch,
        "stopped": trained.stopped,
        "train_seconds": round(trained.train_seconds, 3),
        "samples_per_second": round(trained.samples_per_second, 1),
        "phases": [
            {
                "name": phase.name,
                "steps": phase.steps,
                "epochs": phase.epochs,
                "seconds": round(phase.seconds, 3),
                "stopped": phase.stopped,
                "candidate": phase.candidate,
                "num_evaluated": phase.num_evaluated,
                "shared": phase.shared,
            }
            for phase in trained.phases
        ],
        "history": [_flat(values) for values in evaluations],
    }


def _flat(evaluation: dict[str, Any]) -> dict[str, Any]:
    """An evaluation with its metrics beside what else it says."""
    values = {**evaluation.pop("metrics"), **evaluation}
    return {name: _finite(value) for name, value in values.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and value != value else value


def _describe(error: BaseException) -> dict[str, str]:
    return {"type": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
