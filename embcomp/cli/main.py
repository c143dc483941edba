"""Arguments, output and exit codes of the command line."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embcomp import __version__
from embcomp.cli import commands, compress, export, sources, weights
from embcomp.config import get_strategy
from embcomp.errors import EmbcompError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; None for the process's own.

    Returns:
        The exit code: 0, or 2 if what was asked for is not possible; the message is on the standard error then; 1 if
        nobody read what was printed; 130 if it was interrupted, as shells have it.
    """
    given = _parser().parse_args(arguments)
    try:
        found, text = given.run(given)
    except (EmbcompError, OSError) as error:  # of the system: paths that can't be asked about, which it names
        return _failed(given, str(error), 2)
    except KeyboardInterrupt:
        return _failed(given, "interrupted", 130)
    try:
        print(json.dumps(_plain(found), indent=1, allow_nan=False) if given.json else text(found), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python flushes what is left at its end
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has enough
            return 1
        return _failed(given, f"what was found can't be printed ({error})", 2)
    return 0


def _failed(given: argparse.Namespace, message: str, code: int) -> int:
    print(f"embcomp {given.command}: {message}", file=sys.stderr)
    return code


def _plain(found: Any) -> Any:
    """JSON has no infinite numbers: null in their place."""
    if isinstance(found, dict):
        return {key: _plain(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_plain(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


_Answer = tuple[commands.Found, Callable[[commands.Found], str]]


def _processes(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _plan(given: argparse.Namespace) -> _Answer:
    for name in given.strategy:
        get_strategy(name)
    budgets = given.budget or ["10%"]  # no default of the option, which would be one more
    found = commands.plan_tables(given.tables, budgets, given.strategy, given.dim, given.processes, given.table)
    return found, commands.plan_text


def _inspect(given: argparse.Namespace) -> _Answer:
    return commands.inspect(given.path), commands.inspect_text


def _compress(given: argparse.Namespace) -> _Answer:
    return compress.compress(given), compress.compress_text


def _strategies(given: argparse.Namespace) -> _Answer:
    return commands.strategies(), commands.strategies_text


def _export(given: argparse.Namespace) -> _Answer:
    return export.export(given), export.export_text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("embcomp", description="Compressed embedding tables for PyTorch recommenders.")
    parser.add_argument("--version", action="version", version=f"embcomp {__version__}")
    parts = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    plan = parts.add_parser("plan", help="bytes of tables with several strategies, before anything is built")
    plan.add_argument("tables", type=Path, metavar="TABLES", help=sources.HELP)
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    plan.add_argument("--budget", **several, help="such as 10%% 64MiB 20x; default: 10%%")
    plan.add_argument("--strategy", **several, default=[], metavar="NAME", help="default: all")
    plan.add_argument("--table", **several, default=[], metavar="NAME", help=f"in a file of weights, {weights.RULE}")
    plan.add_argument("--dim", type=int, help="dimension of tables of which TABLES does not say it")
    plan.add_argument(
        "--processes",
        type=_processes,
        metavar="N",
        help="say also what each of N processes holds where rows are sharded",
    )
    plan.set_defaults(run=_plan)

    smaller = parts.add_parser("compress", help="trained tables from a file into a checkpoint that serves")
    compress.add_arguments(smaller)
    smaller.set_defaults(run=_compress)

    inspect = parts.add_parser("inspect", help="what is in a checkpoint, checked, or in a file of weights")
    inspect.add_argument("path", type=Path, help="folder that save_pretrained has written, .safetensors, .npy or .pt")
    inspect.set_defaults(run=_inspect)

    strategies = parts.add_parser("strategies", help="what every strategy can do")
    strategies.set_defaults(run=_strategies)

    exported = parts.add_parser("export", help="a checkpoint as a file that other runtimes serve")
    export.add_arguments(exported)
    exported.set_defaults(run=_export)

    for part in (plan, smaller, inspect, strategies, exported):
        part.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    return parser
