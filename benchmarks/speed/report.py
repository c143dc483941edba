"""The result: one aligned table to read, one JSON file to quote."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.speed.contest import Row
from benchmarks.speed.machine import Machine
from benchmarks.speed.setting import Setting

_TITLES = ("", "median", "min", "unit", "B/id", "GB/s", "ratio", "to", "wanted", "")


def table(rows: Sequence[Row]) -> str:
    """Lay rows out: a heading per contest, columns of one width all over."""
    lines: list[tuple[str, ...] | str] = [_TITLES]
    for (section, case), members in groupby(rows, key=lambda row: (row.section, row.case)):
        lines.append(f"\n{section}, {case}")
        before = None
        for row in members:
            lines.append(_cells(row, is_repeated=row.name == before))
            before = row.name
    widths = [max(len(line[column]) for line in lines if not isinstance(line, str)) for column in range(len(_TITLES))]
    return "\n".join(line if isinstance(line, str) else _aligned(line, widths) for line in lines)


def verdict(rows: Sequence[Row]) -> str:
    """Say how many of the goals were met, and which were not."""
    judged = [row for row in rows if row.met is not None]
    missed = [f"  {row.case}: {row.name}: {_judged(row)}, wanted {_wanted(row)}" for row in judged if not row.met]
    open_ones = sum(row.limit is not None and row.met is None for row in rows)
    lines = [f"{len(judged) - len(missed)} of {len(judged)} goals met"]
    if missed:
        lines += ["missed:", *missed]
    if open_ones:
        lines.append(f"{open_ones} not judged: they, or what they compare with, did not run")
    return "\n".join(lines)


def write(path: Path, machine: Machine, setting: Setting, rows: Sequence[Row]) -> None:
    """Write machine, setting and rows as JSON, the whole file at once; folders are made."""
    content = {
        "machine": dataclasses.asdict(machine),
        "setting": dataclasses.asdict(setting),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _cells(row: Row, is_repeated: bool) -> tuple[str, ...]:
    measured = (f"  {row.name}", *_measured(row))
    mark = {True: "met", False: "MISSED", None: ""}[row.met]
    note = "" if is_repeated else row.note
    compared = (_number(row.ratio, 2), row.peer or "", _wanted(row), f"{mark} {note}".strip())
    return (*(("",) * len(measured) if is_repeated else measured), *compared)


def _measured(row: Row) -> tuple[str, ...]:
    moved = _number(row.bytes_per_id, 0), _number(row.gigabytes_per_second, 1)
    if row.median is None:
        return "-", "-", row.unit, *moved
    return _number(row.median, 2), _number(row.minimum, 2), row.unit, *moved


def _judged(row: Row) -> str:
    return f"{row.ratio:.2f} of {row.peer}" if row.peer else f"{_number(row.median, 2)} {row.unit}"


def _wanted(row: Row) -> str:
    if row.limit is None:
        return ""
    return f"<= {row.limit:.2f}" + ("" if row.peer else f" {row.unit}")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _aligned(cells: tuple[str, ...], widths: Sequence[int]) -> str:
    to_the_left = {0, 3, 7, 9}
    padded = [
        cell.ljust(width) if column in to_the_left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()
