"""Results as tables: cells read from files, seeds averaged, Pareto fronts, the best choice per budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.cells import PLACES
from benchmarks.errors import ResultError
from benchmarks.results import METRICS, SUCCESS, CellResult, read_result
from benchmarks.slices import SHOWN, mean_slices
from recsys_models.ranking import RANDOM_TIES

GROUP = ["experiment", "data", "model", "data_hash"]
"""Cells of one group answer one question, and share a table and a plot."""

_AVERAGED = (
    *METRICS,
    *("sparsity", "steps_to_95", "composing_bytes", "model_bytes", "file_bytes", "samples_per_second", "wall_seconds"),
    *("train_bytes", "peak_memory_bytes"),
    *(f"lookup_{size}_{p}" for size in (1, 4096) for p in ("p50", "p99")),
)


def read_results(folder: Path) -> tuple[list[CellResult], list[str]]:
    """Read every result in a folder and its sub-folders, except hidden ones.

    Returns:
        the results, ordered by file, and a line on each file that is none.

    Raises:
        ResultError: if there is no such folder, or not one result in it.
    """
    if not folder.is_dir():
        raise ResultError(f"{folder} is no folder: give the results_dir of a sweep")
    results, skipped = [], []
    paths = sorted(p for p in folder.rglob("*.json") if not any(part[0] == "." for part in p.relative_to(folder).parts))
    for path in paths:
        try:
            results.append(read_result(path))
        except ResultError as error:
            skipped.append(str(error))
    if not results:
        raise ResultError(
            f"no results in {folder} ({len(skipped)} files left out): run a sweep first, see embcomp-bench -h"
        )
    return results, skipped


def cell_frame(results: Sequence[CellResult]) -> pd.DataFrame:
    """One row per cell."""
    frame = pd.DataFrame([_row(result) for result in results])
    known = frame[frame.data_hash != ""].drop_duplicates(GROUP).drop_duplicates(GROUP[:3], keep=False)
    hashes = {tuple(row[name] for name in GROUP[:3]): row.data_hash for _, row in known.iterrows()}
    lost = frame.data_hash == ""  # loading failed: they belong to the one data set that others loaded
    frame.loc[lost, "data_hash"] = [
        hashes.get(names, "") for names in frame.loc[lost, GROUP[:3]].itertuples(index=False, name=None)
    ]
    frame["label"] = _told_apart(frame, {result.series: result for result in results})
    return frame.drop_duplicates(["experiment", "cell"])


def point_frame(cells: pd.DataFrame, metric: str = "test_auc") -> pd.DataFrame:
    """One row per series and budget of successful cells: means over seeds, and standard deviations as ``<metric>_std``.

    Args:
        cells: of one group.
        metric: by which fronts are drawn.
    """
    done = cells[(cells.status == SUCCESS) & cells[metric].notna()]
    rows = []
    for _, same in done.groupby(["series", "budget"], sort=False, dropna=False):
        first = same.iloc[0]
        row = {
            name: first[name]
            for name in ("label", "strategy", "series", "budget", "budget_bytes", "float32_bytes", "command")
        }
        row |= {"seeds": same.seed.nunique(), "bytes": round(same.served_bytes.mean())}
        row |= {name: same[name].mean() for name in _AVERAGED}
        row |= {f"{name}_std": same[name].std(ddof=1) for name in METRICS}
        row["slices"] = mean_slices(list(same.slices))
        row["exports"] = _mean_exports(list(same.exports))
        rows.append(row)
    points = pd.DataFrame(rows)
    if points.empty:
        return points
    points["share"] = points.bytes / points.float32_bytes
    better = METRICS[metric].higher_is_better
    points["on_front"] = pareto_front(points.bytes.to_numpy(), points[metric].to_numpy(), better)
    points["gap"] = points[metric] - _reference(points, metric)
    return points.sort_values(["bytes", metric], ascending=[False, not better], ignore_index=True)


def with_random_ties(metrics: Sequence[str], points: pd.DataFrame) -> list[str]:
    """The metrics, each followed by the one that breaks ties at random where some point shows another value of it."""
    found = []
    for metric in metrics:
        found.append(metric)
        at_random = f"{metric}{RANDOM_TIES}"
        if at_random in points and (points[at_random] - points[metric]).abs().max() >= SHOWN / 2:
            found.append(at_random)
    return found


def are_composed(points: pd.DataFrame) -> bool:
    """Whether some points have items that are composed, so that more than their tables is served."""
    return len(points) > 0 and bool((points.composing_bytes > 0).any())


def groups_of(cells: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """The groups of cells, each with its names."""
    for names, group in cells.groupby(GROUP, sort=True):
        yield dict(zip(GROUP, names, strict=True)), group


def pareto_front(cost: np.ndarray, quality: np.ndarray, higher_is_better: bool = True) -> np.ndarray:
    """Which points no other point beats: none costs no more and is as good, and is better in one of the two.

    Args:
        cost: float ``(N,)``, lower is better.
        quality: float ``(N,)``, finite.
        higher_is_better: of quality.

    Returns:
        bool ``(N,)``.
    """
    gain = quality if higher_is_better else -quality
    front, best = np.zeros(len(cost), bool), -math.inf
    order = np.lexsort((-gain, cost))
    for start, same in _runs(cost[order]):
        members = order[start : start + same]
        top = gain[members[0]]
        if top > best:
            front[members] = gain[members] == top
            best = top
    return front


@dataclass(frozen=True)
class Choice:
    """What to take for a budget.

    Attributes:
        budget: as it was asked for.
        budget_bytes: the same in bytes.
        best: the row of the best point that fits, whatever budget it was asked for.
        as_good: label and bytes of points that fit and can't be told from it, the smallest of each series: their means
            differ by at most two standard errors of the difference. None where a single seed leaves that unknown.
    """

    budget: str
    budget_bytes: int
    best: Mapping[str, Any]
    as_good: list[tuple[str, int]] | None


def choices(points: pd.DataFrame, metric: str = "test_auc") -> list[Choice]:
    """The best point of every budget that was asked for, the largest budget first."""
    asked = points[points.budget.notna()].drop_duplicates("budget").sort_values("budget_bytes", ascending=False)
    sign, found = 1 if METRICS[metric].higher_is_better else -1, []
    for budget, limit in zip(asked.budget, asked.budget_bytes, strict=True):
        fitting = points[points.bytes <= limit]
        if fitting.empty:
            continue
        best = fitting.loc[(sign * fitting[metric]).idxmax()]
        found.append(Choice(str(budget), int(limit), best.to_dict(), _as_good(fitting, best, metric)))
    return found


def _as_good(fitting: pd.DataFrame, best: pd.Series, metric: str) -> list[tuple[str, int]] | None:
    if best.seeds < 2:
        return None
    others = fitting[(fitting.index != best.name) & (fitting.seeds >= 2)]
    error = np.sqrt(best[f"{metric}_std"] ** 2 / best.seeds + others[f"{metric}_std"] ** 2 / others.seeds)
    near = others[(others[metric] - best[metric]).abs() <= 2 * error].sort_values("bytes")
    smallest = near.drop_duplicates("series")
    smallest = smallest[(smallest.series != best.series) | (smallest.bytes < best.bytes)]
    return list(zip(smallest.label, smallest.bytes.astype(int), strict=True))


def _reference(points: pd.DataFrame, metric: str) -> float:
    """The metric of plain float32 tables, NaN where they were not run."""
    plain = points[(points.strategy == "full") & (points.bytes == points.float32_bytes)]
    best = plain[metric].max() if METRICS[metric].higher_is_better else plain[metric].min()
    return float(best) if len(plain) else math.nan


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1])) if len(values) else np.empty(0, int)
    yield from zip(starts.tolist(), np.diff(np.append(starts, len(values))).tolist(), strict=True)


def _row(result: CellResult) -> dict[str, Any]:
    sizes = {name: value for name, value in vars(result.sizes).items()}
    return {
        "experiment": result.experiment,
        "cell": result.cell,
        "data": result.data,
        "model": result.model,
        "data_hash": result.dataset.get("content_hash") or "",
        "strategy": result.strategy,
        "series": result.series,
        "label": result.label,
        "command": result.command,
        "budget": result.budget,
        "seed": result.seed,
        "status": result.status,
        "error": (result.error or {}).get("message", ""),
        "commit": result.environment.get("git_commit") or "",
        "dirty": bool(result.environment.get("git_dirty")),
        "wall_seconds": result.wall_seconds,
        "sparsity": result.tables.get("sparsity", math.nan),
        "samples_per_second": result.training.get("samples_per_second", math.nan),
        "steps_to_95": _steps_to(result.training.get("history", ())),
        "slices": result.slices,
        "exports": result.exports,
        **{name: math.nan if value is None else value for name, value in sizes.items()},
        **{name: math.nan if (value := result.metric(name)) is None else value for name in METRICS},
        **{
            f"lookup_{size}_{p}": result.lookup.get(str(size), {}).get(f"{p}_microseconds", math.nan)
            for size in (1, 4096)
            for p in ("p50", "p99")
        },
    }


def _mean_exports(exports: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Sizes of files by kind, means over the seeds that have one; else why it was refused."""
    found = {}
    for kind in dict.fromkeys(kind for own in exports for kind in own):
        told = [own[kind] for own in exports if kind in own]
        sizes = [one["file_bytes"] for one in told if one["file_bytes"] is not None]
        mean = round(sum(sizes) / len(sizes)) if sizes else None
        found[kind] = {"file_bytes": mean, "refused": None if sizes else told[0]["refused"]}
    return found


def _steps_to(history: Sequence[Mapping[str, Any]], share: float = 0.95) -> float:
    """Steps until validation MRR@20 was at this share of its best, NaN where it was not looked at."""
    known = [(one["step"], one["mrr@20"]) for one in history if one.get("mrr@20") is not None]
    best = max((value for _, value in known), default=math.nan)
    return next((float(step) for step, value in known if value >= share * best), math.nan)


def _told_apart(cells: pd.DataFrame, by_series: Mapping[str, CellResult]) -> pd.Series:
    """Labels of cells, with the options that differ where series of one group share a label.

    A label that was given by hand, to other options at each budget, names one curve.
    """
    labels = cells.label.copy()
    for _, same in cells.groupby(["experiment", "data", "model", "label"]):
        series = list(dict.fromkeys(same.series))
        by_hand = all(by_series[key].config.get("label") for key in series)
        shared = same.drop_duplicates(["series", "budget"]).duplicated("budget").any()
        if len(series) > 1 and (shared or not by_hand):
            flat = {key: dict(_flat(by_series[key].config)) for key in series}
            names = sorted({name for values in flat.values() for name in values})
            differing = [n for n in names if len({repr(values.get(n)) for values in flat.values()}) > 1]
            for key in series:
                told = ", ".join(f"{name}={flat[key].get(name)}" for name in differing)
                labels[same.index[same.series == key]] += f" ({told})" * bool(told)
    return labels


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        beside = ("seed", "progress") if prefix else (*PLACES, "budget", "seed")
        if isinstance(value, dict) and not prefix:
            yield from _flat(value, f"{name}.")
        elif name not in beside:
            yield f"{prefix}{name}", value
