"""What a report says about each group of cells, before it becomes a page or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup

from benchmarks.figures import quality_plot, styles_of
from benchmarks.frames import Choice, are_composed, cell_frame, choices, groups_of, point_frame, with_random_ties
from benchmarks.kept import kept_picture, kept_widths
from benchmarks.overrides import options_of
from benchmarks.results import FAILED, INFEASIBLE, METRICS, CellResult, main_metrics
from benchmarks.slices import parts_of


@dataclass(frozen=True)
class Section:
    """What a report says about one group of cells.

    Attributes:
        title: data set, model and experiment.
        anchor: for links.
        names: of the group, see `benchmarks.frames.GROUP`.
        cells: one row per cell.
        metric: by which the front is drawn and choices are made.
        beside: another, that is shown beside it.
        points: one row per series and budget.
        choices: the best point of every budget.
        command: that runs all of it again.
        rows: sizes of the data set, for people.
        figure: the plot as HTML; empty where there is nothing to plot.
        kept: label -> picture of what was kept as SVG, of the series that chose it.
    """

    title: str
    anchor: str
    names: dict[str, str]
    cells: pd.DataFrame
    metric: str
    beside: str
    points: pd.DataFrame
    choices: list[Choice]
    command: str
    rows: str
    figure: Markup
    kept: dict[str, Markup]

    @property
    def are_composed(self) -> bool:
        """Whether items of some points are composed, by bytes beside those of the tables."""
        return are_composed(self.points)

    @property
    def random_ties(self) -> list[str]:
        """Names of its metrics with ties at random, where they are others."""
        shown = [self.metric, self.beside]
        return [name for name in with_random_ties(shown, self.points) if name not in shown]

    @property
    def parts(self) -> dict[str, int]:
        """Parts of the test split that points are compared on -> their cases."""
        return parts_of(self.points, self.metric)

    @property
    def export_kinds(self) -> list[str]:
        """Kinds of files that some points were exported to, or refused to be."""
        if not len(self.points):
            return []
        return list(dict.fromkeys(kind for own in self.points.exports for kind in own))

    @property
    def failed(self) -> pd.DataFrame:
        """Cells that failed."""
        return self.cells[self.cells.status == FAILED]

    @property
    def infeasible(self) -> pd.DataFrame:
        """Series and budgets below the strategy's minimum, with the largest minimum of their seeds."""
        cells = self.cells[self.cells.status == INFEASIBLE]
        return cells.sort_values("minimum_bytes").drop_duplicates(["series", "budget"], keep="last")


def build_sections(results: Sequence[CellResult], metric: str | None = None) -> list[Section]:
    """Group results by experiment, data set and model, and work out what to say about each.

    Args:
        results: all of them.
        metric: by which fronts are drawn and choices made, in groups that have it; None for the task's first.
    """
    cells = cell_frame(results)
    styles = styles_of(list(cells.label))
    sections = []
    for number, (names, group) in enumerate(groups_of(cells)):
        chosen_by, beside = _metrics(group, metric)
        points = point_frame(group, chosen_by)
        figure = Markup()
        if len(points) > 1:
            plot = quality_plot(points, styles, chosen_by)
            config = {"displaylogo": False, "responsive": True}
            figure = Markup(
                plot.to_html(full_html=False, include_plotlyjs=False, div_id=f"plot{number}", config=config)
            )
        chosen = choices(points, chosen_by) if len(points) else []
        of_data = [r for r in results if r.dataset.get("content_hash") == names["data_hash"]]
        sizes = of_data[0].dataset if of_data else {}
        twins = _twins([r.dataset for r in of_data if r.experiment == names["experiment"]])
        title = f"{names['data']}, {names['model']}"
        kept = _kept(group, results)
        sections.append(
            Section(
                title,
                f"group{number}",
                names,
                group,
                chosen_by,
                beside,
                points,
                chosen,
                _command(names),
                _sizes(sizes) + twins,
                figure,
                kept,
            )
        )
    return sections


def _metrics(cells: pd.DataFrame, metric: str | None) -> tuple[str, str]:
    """The metric that decides in a group, and the one beside it."""
    main, second = main_metrics([name for name in METRICS if cells[name].notna().any()])
    if metric is None or metric == main or cells[metric].isna().all():
        return main, second
    return metric, main


def _kept(cells: pd.DataFrame, results: Sequence[CellResult]) -> dict[str, Markup]:
    found = {}
    for label, same in cells.groupby("label", sort=True):
        names = set(zip(same.experiment, same.cell, strict=True))
        own = [result for result in results if (result.experiment, result.cell) in names]
        if kept := kept_widths(own):
            whole = (own[0].sizes.float32_bytes or 0) // (4 * own[0].dataset["num_ids"])
            found[str(label)] = Markup(kept_picture(kept, whole))
    return found


def _command(names: dict[str, str]) -> str:
    if names["experiment"] in options_of("experiment"):
        return f"embcomp-bench -m experiment={names['experiment']}"
    return ""


def _twins(datasets: Sequence[dict[str, Any]]) -> str:
    """How many test targets have twins in the attributes that models of an experiment use, where some use any."""
    rates = sorted({rate for dataset in datasets if (rate := dataset.get("metadata_twin_rate")) is not None})
    if not rates:
        return ""
    told = " to ".join(f"{rate:.1%}".replace("%", " %") for rate in dict.fromkeys((rates[0], rates[-1])))
    return f", {told} of test targets with the same used attributes as another item"


def _sizes(dataset: dict[str, Any]) -> str:
    if not dataset:
        return "the data set could not be loaded"
    if "num_items" in dataset:
        return (
            f"{dataset['train_sessions']:,} sessions of {dataset['train_events']:,} events to train on, "
            f"{dataset['validation_cases']:,} / {dataset['test_cases']:,} cases to validate / test, "
            f"{dataset['num_items']:,} items, {dataset['num_attributes']} attributes"
        )
    rows = " / ".join(f"{dataset[f'{split}_rows']:,}" for split in ("train", "validation", "test"))
    dense = f", {dataset['num_dense']} dense features" if dataset["num_dense"] else ""
    return f"{rows} rows to train / validate / test, {dataset['num_fields']} fields{dense}, {dataset['num_ids']:,} ids"
