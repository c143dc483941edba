"""Models side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from benchmarks.frames import are_composed, with_random_ties
from benchmarks.results import COMPARED
from benchmarks.sections import Section
from benchmarks.slices import parts_of


@dataclass(frozen=True)
class Comparison:
    """The models of one experiment and data set, on tables without a budget.

    Attributes:
        title: data set.
        anchor: for links.
        experiment: its name.
        rows: sizes of the data set, for people.
        metric: that parts of the test split are compared by.
        metrics: columns, those of the task; with ties at random too where that is another value.
        points: one row per model and series, the best first.
    """

    title: str
    anchor: str
    experiment: str
    rows: str
    metric: str
    metrics: list[str]
    points: pd.DataFrame

    @property
    def are_composed(self) -> bool:
        """Whether items of some models are composed, by bytes beside those of the tables."""
        return are_composed(self.points)

    @property
    def parts(self) -> dict[str, int]:
        """Parts of the test split -> their cases."""
        return parts_of(self.points, self.metric)


def compare_models(sections: Iterable[Section]) -> list[Comparison]:
    """Put the models of every experiment and data set that has several, or one in several ways, side by side.

    Args:
        sections: of a report.
    """
    groups: dict[tuple[str, str, str, str], list[Section]] = {}
    for section in sections:
        names = section.names
        key = (names["experiment"], names["data"], names["data_hash"], section.metric)
        groups.setdefault(key, []).append(section)
    found: list[Comparison] = []
    for (experiment, data, _, metric), group in groups.items():
        plain = [_without_budget(section) for section in group]
        several = [points for points in plain if len(points)]
        if sum(map(len, several)) < 2:
            continue
        points = pd.concat(several, ignore_index=True).sort_values(metric, ascending=False, ignore_index=True)
        compared = [name for task in COMPARED for name in task if points[name].notna().any()]
        metrics = with_random_ties(compared, points)
        anchor = f"models{len(found)}"
        found.append(Comparison(f"{data}: models", anchor, experiment, group[0].rows, metric, metrics, points))
    return found


def _without_budget(section: Section) -> pd.DataFrame:
    if section.points.empty:
        return section.points
    return section.points[section.points.budget.isna()].assign(model=section.names["model"])
