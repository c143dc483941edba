"""Parts of the test split of session data: cases told apart by their item and their length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from recsys_models.ranking import RANDOM_TIES

SHOWN = 1e-4
"""The smallest difference of metrics that tables show."""


def parts_of(points: pd.DataFrame, metric: str) -> dict[str, int]:
    """The parts of the test split that points know this metric of, and the number of their cases."""
    if "slices" not in points:
        return {}
    own = metric.removeprefix("test_")
    return {name: int(part["cases"]) for known in points.slices for name, part in known.items() if own in part}


def metrics_of_parts(points: pd.DataFrame, metric: str) -> list[str]:
    """The metric, and the one that breaks ties at random where it has another value on some part."""
    at_random = f"{metric}{RANDOM_TIES}"
    parts = parts_of(points, at_random)
    gaps = [
        abs(part_value(row, part, at_random) - part_value(row, part, metric))
        for _, row in points.iterrows()
        for part in parts
    ]
    return [metric, at_random] if any(gap >= SHOWN / 2 for gap in gaps) else [metric]


def part_value(point: Mapping[str, Any], part: str, metric: str) -> float:
    """A metric of a point on a part of the test split, NaN where it is not known."""
    return float(point["slices"].get(part, {}).get(metric.removeprefix("test_"), float("nan")))


def mean_slices(seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Means over seeds of the metrics of each part of the test split."""
    frames = {
        name: pd.DataFrame([known[name] for known in seeds if name in known]) for known in seeds for name in known
    }
    return {name: frame.mean().to_dict() for name, frame in frames.items()}
