"""The report: ``embcomp-report results -o report.html`` reads result files and writes one page that works offline."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from benchmarks.comparisons import compare_models
from benchmarks.errors import ResultError
from benchmarks.frames import read_results
from benchmarks.markdown import markdown_report
from benchmarks.results import METRICS, CellResult, write_whole
from benchmarks.sections import Section, build_sections
from benchmarks.slices import metrics_of_parts, part_value
from embcomp import format_bytes


def write_report(folder: Path, path: Path, metric: str | None = None) -> tuple[list[Section], list[str]]:
    """Read the results in a folder and write their report.

    Args:
        folder: of results.
        path: of the page.
        metric: by which fronts are drawn and choices made, in groups that have it; None for each task's first.

    Returns:
        what it says, and a line on each file that was left out.

    Raises:
        ResultError: if there are no results, or the page can't be written.
    """
    results, skipped = read_results(folder)
    sections = build_sections(results, metric)
    write_whole(path, html_report(sections, results, skipped))
    return sections, skipped


def html_report(sections: Sequence[Section], results: Sequence[CellResult], skipped: Sequence[str]) -> str:
    """Write a report as one HTML page, scripts and styles inside.

    Args:
        sections: of `build_sections`.
        results: all results.
        skipped: a line on each file that was left out.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"bytes": format_bytes, "number": number, "signed": signed, "percent": percent}
    template = environment.from_string(_resource("report.html.j2"))
    return template.render(
        sections=sections,
        comparisons=compare_models(sections),
        part_value=part_value,
        metrics_of_parts=metrics_of_parts,
        metrics=METRICS,
        skipped=skipped,
        counts=pd.Series([result.status for result in results]).value_counts().to_dict(),
        environments=environments(results),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup(_resource("report.css")),
        script=Markup(_resource("report.js")),
        plotly=Markup(get_plotlyjs()) if any(section.figure for section in sections) else "",
    )


def write_pictures(sections: Sequence[Section], folder: Path) -> None:
    """Write the pictures of what was kept, one SVG file per series.

    Raises:
        ResultError: if one can't be written.
    """
    for section in sections:
        for label, picture in section.kept.items():
            parts = (section.names["experiment"], section.names["data"], section.names["model"], label)
            name = re.sub(r"[^\w.+-]+", "_", "-".join(parts))
            write_whole(folder / f"{name}.svg", str(picture))


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


def percent(share: float) -> str:
    """A share for people, ``–`` where there is none."""
    return "–" if pd.isna(share) else f"{share:.1%}".replace("%", " %")


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
    parser.add_argument("--pictures", type=Path, help="folder to also write the pictures of what was kept to, as SVG")
    parser.add_argument("--metric", choices=list(METRICS), help="by which fronts are drawn")
    given = parser.parse_args(arguments)
    path = given.output or given.results / "report.html"
    try:
        sections, skipped = write_report(given.results, path, given.metric)
        if given.markdown and str(given.markdown) != "-":
            write_whole(given.markdown, markdown_report(sections))
        if given.pictures:
            write_pictures(sections, given.pictures)
    except ResultError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)
    if str(given.markdown) == "-":
        print(markdown_report(sections))
    print(f"report: {path.resolve()}", file=sys.stderr)


def _resource(name: str) -> str:
    return (files("benchmarks") / name).read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
