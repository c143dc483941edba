"""The tables of a report for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from benchmarks.markdown import with_std
from benchmarks.results import METRICS
from embcomp import format_bytes

if TYPE_CHECKING:
    from benchmarks.sections import Section


def text_table(sections: Sequence[Section]) -> str:
    """A table per section: every point, and the best for each budget."""
    return "\n\n".join(_section(section) for section in sections)


def _section(section: Section) -> str:
    title, beside = METRICS[section.metric].title, METRICS[section.beside].title
    head = ("", "strategy", "asked", "bytes", "of float32", title, beside, "4096 rows")
    if section.points.empty:
        return f"{section.title}: {section.rows}\nno cell was successful"
    lines = [head, *(_row(row, section) for _, row in section.points.iterrows())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    best = [
        f"best within {choice.budget}: {choice.best['label']}, {title} {choice.best[section.metric]:.4f}, "
        f"{format_bytes(choice.best['bytes'])}"
        for choice in section.choices
    ]
    return "\n".join([f"{section.title}: {section.rows}", *text, "* on the Pareto front", *best])


def _row(row: pd.Series, section: Section) -> tuple[str, ...]:
    return (
        "*" if row.on_front else "",
        str(row.label),
        row.budget if isinstance(row.budget, str) else "",
        format_bytes(row.bytes),
        f"{row.share:.2%}",
        with_std(row, section.metric),
        with_std(row, section.beside),
        f"{row.lookup_4096_p50:.0f} µs",
    )
