"""``embcomp compress``: trained tables from a file into a checkpoint of the form that serves."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from embcomp._checkpoint import CONFIG
from embcomp.budget import Budget
from embcomp.cli import weights
from embcomp.cli.progress import BYTES, progress_bar
from embcomp.config import config_to_dict, make_config
from embcomp.errors import ConfigError, InputError, WriteError
from embcomp.io import save_pretrained
from embcomp.memory import format_bytes, sum_reports
from embcomp.post_training import WHOLE_BYTES, compress_tables, relative_error
from embcomp.reporting import format_rows, table_rows
from embcomp.sites import GROUPS, Groups
from embcomp.specs import Knowledge, TableSpec

Found = dict[str, Any]


def add_arguments(part: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    part.add_argument("weights", type=Path, metavar="CKPT", help=weights.HELP)
    part.add_argument(
        "--strategy", default="compact", metavar="NAME", help="see 'embcomp strategies'; default: compact"
    )
    part.add_argument("--budget", help="such as 10%% 64MiB 20x, of all tables together; needed unless --set says sizes")
    part.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the checkpoint goes")
    part.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    part.add_argument(
        "--table", nargs="+", action="extend", default=[], metavar="NAME", help=weights.RULE.replace("%", "%%")
    )
    part.add_argument("--counts", type=Path, metavar="FILE", help="how often ids occur: .safetensors by table, or .npy")
    part.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="OPTION=VALUE",
        help="options of the strategy, such as rows=int8 seed=3",
    )
    part.add_argument(
        "--memory",
        default=f"{WHOLE_BYTES}B",
        metavar="SIZE",
        help="for strategies that need all rows at once, which others do not; default: 1GiB",
    )


def compress(given: argparse.Namespace) -> Found:
    """Compress the tables of a file, save them, and say what became of them.

    Args:
        given: what `add_arguments` describes.

    Raises:
        EmbcompError: if anything is wrong with what was given; nothing is written then.
    """
    begun = time.perf_counter()
    options = dict(map(_option, given.set))
    if len(options) < len(given.set):
        raise ConfigError(f"--set {' '.join(given.set)}: an option is there twice")
    config = make_config(given.strategy, **options)
    allowed = Budget.parse(given.memory).count
    if allowed is None:
        raise ConfigError(f"--memory {given.memory}: give bytes, such as 8GiB")
    if given.output.exists() and not given.output.is_dir():
        raise InputError(f"{given.output} is a file: -o takes a folder")
    if (given.output / CONFIG).exists() and not given.overwrite:
        raise InputError(f"{given.output} has a checkpoint already: give another folder, or --overwrite")
    if given.output.resolve() == given.weights.resolve().parent:
        raise InputError(f"{given.weights} lies in {given.output}, where checkpoints are replaced: give another folder")
    read = weights.read_weights(given.weights, given.table)
    specs = [TableSpec(name, *rows.shape) for name, rows in read.tables.items()]
    counts = {} if given.counts is None else weights.read_counts(given.counts, [spec.name for spec in specs])
    counts = {name: count for name, count in Knowledge.of(specs, counts).counts.items() if count.any()}
    with _made(given.output):
        with progress_bar("reading", total=sum(spec.full_bytes for spec in specs), **BYTES) as watch:
            tables = {name: weights.watched(rows, watch) for name, rows in read.tables.items()}
            groups = compress_tables(tables, config, given.budget, counts, allowed)
            errors = relative_error(groups, tables, counts)
        model = nn.Module()
        model.add_module(GROUPS, Groups(groups))
        save_pretrained(model, given.output)
    report = sum_reports(tables.memory() for tables in groups)
    return {
        "source": str(given.weights),
        "output": str(given.output),
        "strategy": given.strategy,
        "float32_bytes": report.full_bytes,
        "serve_bytes": report.serve_bytes,
        "relative_error": errors[""],
        "weighted_by_counts": sorted(counts),
        "seconds": round(time.perf_counter() - begun, 3),
        "tables": [row | {"relative_error": errors.get(row["table"])} for row in table_rows(groups)],
        "configs": [config_to_dict(tables.config) for tables in groups],
        "left_out": read.left_out,
    }


def compress_text(found: Found) -> str:
    """Of `compress`."""
    full, serve = found["float32_bytes"], found["serve_bytes"]
    weighted = ", ids weighted by their counts" if found["weighted_by_counts"] else ""
    lines = [
        f"{found['source']} -> {found['output']}: {found['strategy']}, {format_bytes(full)} as float32 -> "
        f"{format_bytes(serve)} ({serve / full:.2%}), {found['seconds']:.1f} s",
        f"relative error {found['relative_error']:.4f} (0: exact, 1: as far off as zeros{weighted})",
        "",
        format_rows(found["tables"]),
        "",
        *(f"  {row['table']}: relative error {row['relative_error']:.4f}" for row in _with_errors(found)),
    ]
    lines += [f"  left out: {name} ({why})" for name, why in found["left_out"].items()]
    return "\n".join(lines)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and see that files can be written there; if what is done inside fails, it goes again."""
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise WriteError(f"{folder} can't be written ({error}): choose a folder that can") from error
        yield
    except BaseException:
        for one in new:
            with contextlib.suppress(OSError):  # it was not made, or somebody has put something there
                one.rmdir()
        raise


def _with_errors(found: Found) -> list[Found]:
    rows = [row for row in found["tables"] if row["relative_error"] is not None]
    return rows if len(rows) > 1 else []


def _option(text: str) -> tuple[str, Any]:
    """``name=value``, where a value is JSON, or else a string."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ConfigError(f"--set {text!r}: write OPTION=VALUE, such as rows=int8")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value
