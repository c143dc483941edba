"""What became of every table, as rows for people and for files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from embcomp.config import strategy_of
from embcomp.memory import SHARED, format_bytes
from embcomp.tables import EmbeddingTables


def table_rows(groups: Sequence[EmbeddingTables]) -> list[dict[str, Any]]:
    """Say of every table, and of what a group's tables share: rows, dim, strategy, parts, bytes before and after."""
    found = []
    for tables in groups:
        strategy, parts = strategy_of(tables.config).name, _parts_by_table(tables)
        for spec in tables.specs:
            own = parts.get(spec.name, {} if SHARED not in parts else {"in the shared parts": 0})
            found.append(_row(spec.name, spec.num_embeddings, spec.embedding_dim, strategy, own, spec.full_bytes))
        if shared := parts.get(SHARED):
            found.append(_row(f"(shared by {tables.num_tables})", None, tables.embedding_dim, strategy, shared, 0))
    return found


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Align `table_rows` for people."""
    lines = [("table", "rows", "dim", "strategy", "before", "after", "parts"), *map(_texts, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(7)]
    return "\n".join("  " + "  ".join(map(_pad, line, widths, range(7))) for line in lines)


def markdown_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write `table_rows` as a Markdown table."""
    lines = [("table", "rows", "dim", "strategy", "before", "after", "parts"), ("---",) * 7, *map(_texts, rows)]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def _texts(row: Mapping[str, Any]) -> tuple[str, ...]:
    number = "" if row["rows"] is None else f"{row['rows']:,}"
    before = format_bytes(row["before"]) if row["before"] else ""
    return row["table"], number, str(row["dim"]), row["strategy"], before, format_bytes(row["after"]), row["parts"]


def _pad(text: str, width: int, column: int) -> str:
    if column == 6:
        return text
    return text.rjust(width) if column in (1, 2, 4, 5) else text.ljust(width)


def _parts_by_table(tables: EmbeddingTables) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for part in tables.memory().parts:
        owner = part.table if part.table in tables.names else re.sub(r"\[\d+:\d+\]$", "", part.table)
        own = found.setdefault(owner, {})
        own[part.name] = own.get(part.name, 0) + part.serve_bytes
    return found


def _row(
    table: str, rows: int | None, dim: int, strategy: str, parts: Mapping[str, int], before: int
) -> dict[str, Any]:
    text = " + ".join(
        f"{name} {format_bytes(size)}" if size else name for name, size in parts.items() if size or len(parts) == 1
    )
    return {
        "table": table,
        "rows": rows,
        "dim": dim,
        "strategy": strategy,
        "before": before,
        "after": sum(parts.values()),
        "parts": text,
    }
