"""The tables of a report as Markdown, for ``docs/results``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from benchmarks.results import METRICS
from benchmarks.sections import Section
from embcomp import format_bytes

_HEAD = ("", "strategy", "budget", "bytes served", "of float32", "sparsity")


def markdown_report(sections: Sequence[Section]) -> str:
    """The table of every section, with the Pareto front marked, and what could not be run below it."""
    return "\n".join(_section(section) for section in sections)


def _section(section: Section) -> str:
    names = section.names
    lines = [f"## {section.title}\n", f"{section.rows[0].upper()}{section.rows[1:]}."]
    lines += [f"Made by `{section.command}`."] if section.command else [f"Experiment `{names['experiment']}`."]
    lines += ["Means ± standard deviations over seeds; ★ marks the Pareto front of bytes and quality.", ""]
    if len(section.points):
        title, beside = METRICS[section.metric].title, METRICS[section.beside].title
        head = [*_HEAD, title, "to float32", beside, "seeds"]
        lines += [*_table(head, [_row(row, section) for _, row in section.points.iterrows()]), ""]
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
        f"{row.share:.2%}",
        "" if math.isnan(row.sparsity) else f"{row.sparsity:.1%}",
        with_std(row, section.metric),
        "" if math.isnan(row.gap) else f"{row.gap:+.4f}",
        with_std(row, section.beside),
        str(row.seeds),
    ]


def with_std(row: pd.Series, metric: str) -> str:
    """The mean of a metric over seeds, with its standard deviation where there are several."""
    std = row[f"{metric}_std"]
    return f"{row[metric]:.4f}" + ("" if math.isnan(std) else f" ± {std:.4f}")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [list(head), ["---"] * len(head), *rows]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]
