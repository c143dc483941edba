"""The report: ``embcomp-report results -o report.html`` reads result files and writes one page that works offline."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from benchmarks.errors import ResultError
from benchmarks.figures import quality_plot, styles_of
from benchmarks.frames import Choice, cell_frame, choices, groups_of, point_frame, read_results
from benchmarks.markdown import markdown_report
from benchmarks.overrides import options_of
from benchmarks.results import FAILED, INFEASIBLE, METRICS, CellResult, write_whole
from embcomp import format_bytes


@dataclass(frozen=True)
class Section:
    """What a report says about one group of cells.

    Attributes:
        title: data set, model and experiment.
        anchor: for links.
        names: of the group, see `benchmarks.frames.GROUP`.
        cells: one row per cell.
        points: one row per series and budget.
        choices: the best point of every budget.
        command: that runs all of it again.
        rows: sizes of the data set, for people.
        figure: the plot as HTML; empty where there is nothing to plot.
    """

    title: str
    anchor: str
    names: dict[str, str]
    cells: pd.DataFrame
    points: pd.DataFrame
    choices: list[Choice]
    command: str
    rows: str
    figure: Markup

    @property
    def failed(self) -> pd.DataFrame:
        """Cells that failed."""
        return self.cells[self.cells.status == FAILED]

    @property
    def infeasible(self) -> pd.DataFrame:
        """Series and budgets below the strategy's minimum, with the largest minimum of their seeds."""
        cells = self.cells[self.cells.status == INFEASIBLE]
        return cells.sort_values("minimum_bytes").drop_duplicates(["series", "budget"], keep="last")


def build_sections(results: Sequence[CellResult], metric: str = "test_auc") -> list[Section]:
    """Group results by experiment, data set and model, and work out what to say about each."""
    cells = cell_frame(results)
    styles = styles_of(list(cells.label))
    sections = []
    for number, (names, group) in enumerate(groups_of(cells)):
        points = point_frame(group, metric)
        figure = Markup()
        if len(points) > 1:
            plot = quality_plot(points, styles, metric)
            config = {"displaylogo": False, "responsive": True}
            figure = Markup(
                plot.to_html(full_html=False, include_plotlyjs=False, div_id=f"plot{number}", config=config)
            )
        chosen = choices(points, metric) if len(points) else []
        sizes = next((r.dataset for r in results if r.dataset.get("content_hash") == names["data_hash"]), {})
        title = f"{names['data']}, {names['model']}"
        sections.append(
            Section(title, f"group{number}", names, group, points, chosen, _command(names), _sizes(sizes), figure)
        )
    return sections


def write_report(folder: Path, path: Path, metric: str = "test_auc") -> tuple[list[Section], list[str]]:
    """Read the results in a folder and write their report.

    Args:
        folder: of results.
        path: of the page.
        metric: by which fronts are drawn and choices made.

    Returns:
        what it says, and a line on each file that was left out.

    Raises:
        ResultError: if there are no results, or the page can't be written.
    """
    results, skipped = read_results(folder)
    sections = build_sections(results, metric)
    write_whole(path, html_report(sections, results, skipped, metric))
    return sections, skipped


def html_report(
    sections: Sequence[Section], results: Sequence[CellResult], skipped: Sequence[str], metric: str = "test_auc"
) -> str:
    """Write a report as one HTML page, scripts and styles inside.

    Args:
        sections: of `build_sections`.
        results: all results.
        skipped: a line on each file that was left out.
        metric: by which fronts are drawn and choices made.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"bytes": format_bytes, "number": number, "signed": signed}
    template = environment.from_string(_resource("report.html.j2"))
    return template.render(
        sections=sections,
        metric=metric,
        metrics=METRICS,
        skipped=skipped,
        counts=pd.Series([result.status for result in results]).value_counts().to_dict(),
        environments=environments(results),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup(_resource("report.css")),
        script=Markup(_resource("report.js")),
        plotly=Markup(get_plotlyjs()) if any(section.figure for section in sections) else "",
    )


def environments(results: Sequence[CellResult]) -> list[tuple[dict[str, Any], int]]:
    """The different environments that cells ran in, and how many ran in each, most first."""
    texts: dict[str, tuple[dict[str, Any], int]] = {}
    for result in results:
        key = repr(sorted(result.environment.items(), key=lambda item: item[0]))
        texts[key] = (result.environment, texts.get(key, ({}, 0))[1] + 1)
    return sorted(texts.values(), key=lambda pair: -pair[1])


def number(value: float, digits: int = 0) -> str:
    """A number for people, ``–`` where there is none."""
    return "–" if pd.isna(value) else f"{value:,.{digits}f}"


def signed(value: float, digits: int = 4) -> str:
    """A difference for people, with its sign."""
    return "–" if pd.isna(value) else f"{value:+.{digits}f}".replace("-", "−")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a report; the process ends with status 2 if there is nothing to report, or it can't be written.

    Args:
        arguments: of the command line; None for the process's own.
    """
    parser = argparse.ArgumentParser("embcomp-report", description="Report of a sweep: one page, and Markdown tables.")
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"), help="results_dir of sweeps")
    parser.add_argument("-o", "--output", type=Path, help="the page; default: RESULTS/report.html")
    parser.add_argument("--markdown", type=Path, help="also write the tables as Markdown; - for the terminal")
    parser.add_argument("--metric", choices=list(METRICS), default="test_auc", help="by which fronts are drawn")
    given = parser.parse_args(arguments)
    path = given.output or given.results / "report.html"
    try:
        sections, skipped = write_report(given.results, path, given.metric)
        if given.markdown and str(given.markdown) != "-":
            write_whole(given.markdown, markdown_report(sections, given.metric))
    except ResultError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)
    if str(given.markdown) == "-":
        print(markdown_report(sections, given.metric))
    print(f"report: {path.resolve()}", file=sys.stderr)


def _command(names: dict[str, str]) -> str:
    if names["experiment"] in options_of("experiment"):
        return f"embcomp-bench -m experiment={names['experiment']}"
    return ""


def _sizes(dataset: dict[str, Any]) -> str:
    if not dataset:
        return "the data set could not be loaded"
    rows = " / ".join(f"{dataset[f'{split}_rows']:,}" for split in ("train", "validation", "test"))
    dense = f", {dataset['num_dense']} dense features" if dataset["num_dense"] else ""
    return f"{rows} rows to train / validate / test, {dataset['num_fields']} fields{dense}, {dataset['num_ids']:,} ids"


def _resource(name: str) -> str:
    return (files("benchmarks") / name).read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
