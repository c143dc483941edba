"""What a cell of a sweep leaves behind: one JSON file, whole or not there, with units in the names."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.errors import ResultError
from recsys_models.ranking import RANDOM_TIES

SCHEMA_VERSION = 1
SUCCESS, INFEASIBLE, FAILED = "success", "infeasible", "failed"
FINISHED = (SUCCESS, INFEASIBLE)
"""Statuses after which a cell is not run again."""


@dataclass(frozen=True)
class Metric:
    """A measure of quality: what people call it, and which way is better."""

    title: str
    higher_is_better: bool


_TITLES = {"ndcg": "NDCG", "hr": "HR", "mrr": "MRR"}
_RANKING = {f"{name}@{cutoff}": f"{title}@{cutoff}" for cutoff in (10, 20) for name, title in _TITLES.items()}

METRICS = {
    "test_auc": Metric("test AUC", True),
    "test_log_loss": Metric("test log loss", False),
    "validation_auc": Metric("validation AUC", True),
    "validation_log_loss": Metric("validation log loss", False),
    "trained_validation_auc": Metric("validation AUC before finalizing", True),
    **{f"test_{name}": Metric(f"test {title}", True) for name, title in _RANKING.items()},
    **{f"test_{name}{RANDOM_TIES}": Metric(f"test {title}, ties at random", True) for name, title in _RANKING.items()},
    **{f"validation_{name}": Metric(f"validation {title}", True) for name, title in _RANKING.items()},
    "trained_validation_ndcg@10": Metric("validation NDCG@10 before finalizing", True),
}
"""Name -> metric; all are of the finalized tables, but for those that say so."""

MAIN = (("test_auc", "test_log_loss"), ("test_ndcg@10", "test_mrr@20"))
"""By task, the metric that decides, and the one that is shown beside it."""

COMPARED = (MAIN[0], ("test_ndcg@10", "test_hr@10", "test_mrr@20", "test_hr@20"))
"""By task, the metrics that models are compared by."""


def main_metrics(names: Collection[str]) -> tuple[str, str]:
    """The two metrics of the task that has some of these names; those of clicks where there is none."""
    return next((pair for pair in MAIN if pair[0] in names), MAIN[0])


@dataclass(frozen=True)
class Sizes:
    """Bytes of a cell; None where it did not get so far.

    Attributes:
        budget_bytes: asked for; None without a budget.
        planned_bytes: serve bytes of the plan.
        built_bytes: serve bytes that the tables report before training.
        served_bytes: sum over the state dict of the finalized tables.
        composing_bytes: what makes items of the finalized tables beside them: the map from items to attributes, and the
            network from those to vectors. None for models that have no items.
        file_bytes: of the saved weights, header included.
        float32_bytes: the same tables as plain float32 rows.
        train_bytes: parameters, dense gradients and optimizer state of the tables.
        model_bytes: the whole finalized model, tables and network.
        peak_memory_bytes: highest resident memory of the process during the cell, data set and libraries included.
        minimum_bytes: smallest feasible budget, where the cell is infeasible.
    """

    budget_bytes: int | None = None
    planned_bytes: int | None = None
    built_bytes: int | None = None
    served_bytes: int | None = None
    composing_bytes: int | None = None
    file_bytes: int | None = None
    float32_bytes: int | None = None
    train_bytes: int | None = None
    model_bytes: int | None = None
    peak_memory_bytes: int | None = None
    minimum_bytes: int | None = None


@dataclass(frozen=True)
class CellResult:
    """The result of a cell.

    Attributes:
        cell: its name, and that of its file.
        digest: of the whole config, but for what changes no result.
        series: digest of the config without budget and seed: cells of one series differ in those alone.
        status: ``"success"``, ``"infeasible"`` (the budget is below the strategy's minimum) or ``"failed"``.
        experiment: name of the experiment, the folder of its cells.
        data: name of the data set.
        model: name of the model.
        strategy: name of the strategy.
        label: what reports call the series.
        budget: as text in canonical form, or None.
        seed: of hash functions, initial weights, order of rows and dropout.
        config: everything that was asked for.
        command: that runs the cell again.
        started: time in UTC, ISO 8601.
        wall_seconds: from there to the end.
        environment: versions, git commit, machine.
        dataset: name, hash and sizes of the data; empty where loading failed.
        tables: the strategy's config with all sizes filled in; empty where planning failed. After training also
            ``mean_widths_by_decile``, table -> mean number of values of the ids of each tenth, the most frequent first,
            and ``sparsity``, the share of the V × D values of plain tables that are not stored; both only where ids
            have values for themselves.
        metrics: name -> ``{"value": float | None, "higher_is_better": bool}``; None where it is undefined.
        slices: part of the test split -> its ``"cases"`` and metrics, of session models.
        sizes: bytes.
        training: epochs, steps, seconds, ``samples_per_second``, phases, and the history of evaluations. A phase that
            is ``shared`` was done by a cell of another budget: its seconds are in that cell's ``wall_seconds`` alone.
        lookup: batch size -> ``p50_microseconds``, ``p99_microseconds`` and ``calls`` of the finalized tables.
        exports: kind of file -> ``file_bytes`` of the exported tables, and why it was ``refused``; one of them is None.
        error: ``type``, ``message`` and ``traceback``; None for successes.
        schema_version: of this format.
    """

    cell: str
    digest: str
    series: str
    status: str
    experiment: str
    data: str
    model: str
    strategy: str
    label: str
    budget: str | None
    seed: int
    config: dict[str, Any]
    command: str = ""
    started: str = ""
    wall_seconds: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=Sizes)
    training: dict[str, Any] = field(default_factory=dict)
    lookup: dict[str, dict[str, Any]] = field(default_factory=dict)
    slices: dict[str, dict[str, float]] = field(default_factory=dict)
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: dict[str, str] | None = None
    schema_version: int = SCHEMA_VERSION

    def metric(self, name: str) -> float | None:
        """The value of a metric, None where it is missing or undefined."""
        value = self.metrics.get(name, {}).get("value")
        return None if value is None else float(value)


def metric_values(values: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Write metrics as they stand in a result, by the names of `METRICS`."""
    return {
        name: {"value": value if math.isfinite(value) else None, "higher_is_better": METRICS[name].higher_is_better}
        for name, value in values.items()
    }


def write_result(path: Path, result: CellResult) -> None:
    """Write a result; whenever the process dies, ``path`` holds the old file or the new one, whole.

    Raises:
        ResultError: if a value is not JSON, or the file can't be written.
    """
    try:
        text = json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ResultError(f"the result of {result.cell} is not JSON: {error}") from error
    write_whole(path, text + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file under another name first, and rename it when it is on the disk.

    Raises:
        ResultError: if the folder can't be written to.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ResultError(f"{path} can't be written: {error}; free space there, or give another results_dir") from error


def read_result(path: Path) -> CellResult:
    """Read a result.

    Raises:
        ResultError: if the file can't be read, is no JSON, or is not a result of this version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} is no readable result: {error}") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise ResultError(f"{path} is no result of version {SCHEMA_VERSION} (schema_version is {version!r})")
    try:
        return CellResult(**{**values, "sizes": Sizes(**values["sizes"])})
    except (KeyError, TypeError) as error:
        raise ResultError(f"{path} lacks a field of a result, or has another: {error}") from error
