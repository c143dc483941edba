"""The tables of a report as Markdown, for ``docs/results``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from benchmarks.comparisons import Comparison, compare_models
from benchmarks.results import METRICS
from benchmarks.sections import Section
from benchmarks.slices import metrics_of_parts, part_value, parts_of
from embcomp import format_bytes

_HEAD = ("", "strategy", "budget", "bytes served")
_COMPOSING = "to compose items"


def markdown_report(sections: Sequence[Section]) -> str:
    """Models side by side; then every section's table, with the Pareto front marked, and what could not be run."""
    return "\n".join([*map(_comparison, compare_models(sections)), *map(_section, sections)])


def _comparison(comparison: Comparison) -> str:
    points, metrics = comparison.points, comparison.metrics
    timed = points.steps_to_95.notna().any()
    head = ["model", "strategy", "bytes served", *[_COMPOSING] * comparison.are_composed]
    head += [METRICS[name].title for name in metrics]
    head += ["steps to 95 % of MRR"] * bool(timed) + ["seeds"]
    rows = [
        [row.model, row.label, f"{row.bytes:,}", *[_number(row.composing_bytes)] * comparison.are_composed]
        + [with_std(row, name) for name in metrics]
        + [f"{row.steps_to_95:,.0f}"] * bool(timed)
        + [str(row.seeds)]
        for _, row in points.iterrows()
    ]
    lines = [f"## {comparison.title}\n", f"{comparison.rows[0].upper()}{comparison.rows[1:]}.", ""]
    lines += [*markdown_table(head, rows), ""]
    return "\n".join([*lines, *parts_table(["model", "strategy"], points, comparison.metric)])


def parts_table(names: Sequence[str], points: pd.DataFrame, metric: str) -> list[str]:
    """The lines of a table of a metric by part of the test split, if there are any, and one of it with ties at random.

    Args:
        names: columns that say whose row it is: ``"model"``, ``"strategy"`` or ``"budget"``.
        points: with what is known of parts as ``slices``.
        metric: of `METRICS`.
    """
    if not (parts := parts_of(points, metric)):
        return []
    head = [*names, *(f"{part} ({cases:,})" for part, cases in parts.items())]
    of_names = {"model": "model", "strategy": "label", "budget": "budget"}
    lines = []
    for shown in metrics_of_parts(points, metric):
        rows = [
            [*(str(row[of_names[name]]) if pd.notna(row[of_names[name]]) else "none" for name in names)]
            + [_value(part_value(row, part, shown)) for part in parts]
            for _, row in points.iterrows()
        ]
        title = f"{METRICS[shown].title} by part of the test split, and its cases:"
        lines += [title, "", *markdown_table(head, rows), ""]
    return lines


def _value(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.0f}"


def _section(section: Section) -> str:
    names = section.names
    lines = [f"## {section.title}\n", f"{section.rows[0].upper()}{section.rows[1:]}."]
    lines += [f"Made by `{section.command}`."] if section.command else [f"Experiment `{names['experiment']}`."]
    lines += ["Means ± standard deviations over seeds; ★ marks the Pareto front of bytes and quality.", ""]
    if len(section.points):
        title, beside = METRICS[section.metric].title, METRICS[section.beside].title
        files = [f"{kind} file" for kind in section.export_kinds]
        at_random = [METRICS[name].title for name in section.random_ties]
        head = [*_HEAD, *[_COMPOSING] * section.are_composed, "of float32", "sparsity", *files]
        head += [title, "to float32", beside, *at_random, "seeds"]
        lines += [*markdown_table(head, [_row(row, section) for _, row in section.points.iterrows()]), ""]
        lines += parts_table(["strategy", "budget"], section.points, section.metric)
    if len(infeasible := section.infeasible):
        told = [
            f"{cell.label} at {cell.budget} (≥ {format_bytes(cell.minimum_bytes)})" for cell in infeasible.itertuples()
        ]
        lines += [f"Below the strategy's minimum: {'; '.join(told)}.", ""]
    if len(section.failed):
        lines += [f"Failed: {', '.join(section.failed.cell)}.", ""]
    return "\n".join(lines)


def _row(row: pd.Series, section: Section) -> list[str]:
    return [
        "★" if row.on_front else "",
        str(row.label),
        row.budget if isinstance(row.budget, str) else "none",
        f"{row.bytes:,}",
        *[_number(row.composing_bytes)] * section.are_composed,
        f"{row.share:.2%}",
        "" if math.isnan(row.sparsity) else f"{row.sparsity:.1%}",
        *(_file(row.exports.get(kind)) for kind in section.export_kinds),
        with_std(row, section.metric),
        "" if math.isnan(row.gap) else f"{row.gap:+.4f}",
        with_std(row, section.beside),
        *(with_std(row, name) for name in section.random_ties),
        str(row.seeds),
    ]


def _file(told: Mapping[str, Any] | None) -> str:
    if told is None:
        return ""
    return "refused" if told["file_bytes"] is None else f"{told['file_bytes']:,}"


def with_std(row: pd.Series, metric: str) -> str:
    """The mean of a metric over seeds, with its standard deviation where there are several; empty if it is unknown."""
    if math.isnan(row[metric]):
        return ""
    std = row[f"{metric}_std"]
    return f"{row[metric]:.4f}" + ("" if math.isnan(std) else f" ± {std:.4f}")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [list(head), ["---"] * len(head), *rows]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]
