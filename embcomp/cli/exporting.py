"""Exports of checkpoints."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embcomp.errors import ExportError, did_you_mean
from embcomp.io import load_tables
from embcomp.memory import format_bytes
from embcomp.tables import EmbeddingTables

KINDS = ("pt2", "aoti", "onnx", "fbgemm", "npy", "parquet")


def export(
    folder: Path, kind: str, output: Path, table: str | None = None, bag: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Export a group of tables of a checkpoint; training forms are finalized before.

    Args:
        folder: that `save_pretrained` has written.
        kind: one of `KINDS`.
        output: the file.
        table: whose vectors; None for those of the only group, or the only table.
        bag: how lookups pool; None for not at all.
        overwrite: whether a file that is there may be replaced.
    """
    from embcomp.integrations import export as exports  # torch's exporters take seconds to import

    tables = _group_of(folder, table)
    was_final = tables.is_final
    tables.finalize_()
    if bag is not None and kind not in ("pt2", "aoti", "onnx"):
        raise ExportError(f"--bag is of lookups, in 'pt2', 'aoti' and 'onnx', not of {kind!r}")
    if kind in ("npy", "parquet"):
        if output.suffix != f".{kind}":
            raise ExportError(f"{output}: the file must end with '.{kind}', by which it is recognised")
        found = exports.dump_vectors(
            tables, _only(tables, table), output, overwrite=overwrite, progress=_progress if _is_watched() else None
        )
    elif kind == "fbgemm":
        found = exports.export_fbgemm(tables, output, table=table, overwrite=overwrite)
    else:
        graphs: dict[str, Callable[..., exports.Exported]] = {
            "pt2": exports.export_pt2,
            "aoti": exports.export_aoti,
            "onnx": exports.export_onnx,
        }
        if _is_watched():
            print(f"embcomp export: tracing {len(tables.names)} tables ...", file=sys.stderr)
        found = graphs[kind](tables, output, table=table, bag=bag, overwrite=overwrite)
    told = dataclasses.asdict(found) | {"path": str(found.path), "source": str(folder), "table": table}
    return told | {"finalized_now": not was_final}


def export_text(found: dict[str, Any]) -> str:
    """Of `export`."""
    what = f"table {found['table']!r}" if found["table"] else "all tables"
    lines = [
        f"{found['path']}: {found['kind']} of {what} of {found['source']}, {format_bytes(found['file_bytes'])}; the "
        f"tables take {format_bytes(found['serve_bytes'])} to serve",
        f"{', '.join(found['inputs'])}" + (f" -> {', '.join(found['outputs'])}" if found["outputs"] else ""),
        f"unseen ids: {found['unseen']}",
    ]
    if found["finalized_now"]:
        lines.append("the checkpoint has the training form, which was finalized for this; the checkpoint is as it was")
    return "\n".join(lines)


def _group_of(folder: Path, table: str | None) -> EmbeddingTables:
    groups = load_tables(folder)
    names = [name for group in groups for name in group.names]
    if table is None:
        if len(groups) > 1:
            raise ExportError(
                f"{folder} holds {len(groups)} groups of tables, and a file has one: give --table, one of "
                f"{', '.join(names)}"
            )
        return groups[0]
    if table not in names:
        raise ExportError(f"{folder} has no table {table!r}; {did_you_mean(table, names)}")
    return next(group for group in groups if table in group.names)


def _only(tables: EmbeddingTables, table: str | None) -> str:
    if table is None and tables.num_tables > 1:
        raise ExportError(f"vectors are of one table: give --table, one of {', '.join(tables.names)}")
    return tables.names[0] if table is None else table


def _is_watched() -> bool:
    return sys.stderr.isatty()


def _progress(done: int, total: int) -> None:
    print(f"\rembcomp export: {done:,} of {total:,} vectors", end="" if done < total else "\n", file=sys.stderr)
