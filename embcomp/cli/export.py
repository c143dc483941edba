"""``embcomp export``: a checkpoint as a file that other runtimes serve."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from embcomp.cli.progress import progress_bar
from embcomp.errors import ExportError, did_you_mean
from embcomp.io import load_tables
from embcomp.memory import format_bytes
from embcomp.tables import EmbeddingTables

KINDS = ("pt2", "aoti", "onnx", "fbgemm", "npy", "parquet")


def add_arguments(part: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    part.description = (
        "Export the tables of a checkpoint; a training form is finalized before, in memory. Lookups (pt2, aoti, onnx) "
        "take ids (B, T), a column per table, or (N,) of one table with --table."
    )
    part.add_argument("path", type=Path, metavar="PATH", help="folder that save_pretrained has written")
    part.add_argument(
        "--to",
        required=True,
        choices=KINDS,
        help="pt2: torch.export; aoti: compiled for this kind of CPU, takes a C++ compiler; onnx: for ONNX Runtime; "
        "fbgemm: rows for TorchRec's quantized collections; npy, parquet: all vectors of a table",
    )
    part.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="the file")
    part.add_argument("--table", metavar="NAME", help="one table; default: all of the only group")
    part.add_argument("--bag", choices=("sum", "mean"), help="lookups of bags of one table, with offsets")
    part.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def export(given: argparse.Namespace) -> dict[str, Any]:
    """Export a group of tables of a checkpoint; training forms are finalized before.

    Args:
        given: what `add_arguments` describes.

    Raises:
        EmbcompError: if anything is wrong with what was given; nothing is written then.
    """
    from embcomp.integrations import export as exports  # torch's exporters take seconds to import

    kind, output, table, overwrite = given.to, given.output, given.table, given.overwrite
    tables = _group_of(given.path, table)
    was_final = tables.is_final
    tables.finalize_()
    if given.bag is not None and kind not in ("pt2", "aoti", "onnx"):
        raise ExportError(f"--bag is of lookups, in 'pt2', 'aoti' and 'onnx', not of {kind!r}")
    if kind in ("npy", "parquet"):
        if output.suffix != f".{kind}":
            raise ExportError(f"{output}: the file must end with '.{kind}', by which it is recognised")
        index = _only(tables, table)
        with progress_bar("writing", unit=" vectors", total=tables.specs[index].num_embeddings) as progress:
            found = exports.dump_vectors(tables, index, output, overwrite=overwrite, progress=progress)
    elif kind == "fbgemm":
        found = exports.export_fbgemm(tables, output, table=table, overwrite=overwrite)
    else:
        with progress_bar(f"tracing {len(tables.names)} tables", bar_format="{desc} ... {elapsed}"):
            found = exports.GRAPHS[kind](tables, output, table=table, bag=given.bag, overwrite=overwrite)
    told = dataclasses.asdict(found) | {"path": str(found.path), "source": str(given.path), "table": table}
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


def _only(tables: EmbeddingTables, table: str | None) -> int:
    if table is None and tables.num_tables > 1:
        raise ExportError(f"vectors are of one table: give --table, one of {', '.join(tables.names)}")
    return 0 if table is None else tables.index_of(table)
