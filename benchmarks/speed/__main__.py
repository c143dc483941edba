"""The command line: ``python -m benchmarks.speed [--only lookup] [--dim 16] [--quick]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.speed import report
from benchmarks.speed.contest import Row
from benchmarks.speed.deepfm import FRAPPE_ROWS, frappe, made_log, measure_deepfm
from benchmarks.speed.lookup_memory import measure_memory
from benchmarks.speed.lookups import measure_lookups
from benchmarks.speed.machine import Machine
from benchmarks.speed.optembed import QUICK_AMOUNTS, Amounts, measure_optembed
from benchmarks.speed.scores import measure_scores
from benchmarks.speed.sessions import measure_sessions
from benchmarks.speed.setting import ORDERS, QUICK, Setting
from benchmarks.speed.training_steps import measure_steps

SECTIONS = ("lookup", "step", "memory", "scores", "deepfm", "optembed", "sessions")
_DEEPFM_STEPS = 100
_SESSION_STEPS = 100
_QUICK_ROWS = (300, 100)
_QUICK_USERS = 20
_QUICK_DEEPFM = (2, _QUICK_ROWS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the JSON file; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    setting = _setting(options)
    machine = Machine.measure(1 << 20, 2) if options.quick else Machine.measure()
    print(f"{machine}\n{setting.tables} tables x {setting.rows} ids, batch {setting.batch}, Zipf ids\n", flush=True)
    rows = []
    for section in options.only or SECTIONS:
        print(f"measuring {section} ...", file=sys.stderr, flush=True)
        rows += list(_measure(section, setting, options.quick))
    report.write(options.output, machine, setting, rows)
    verdict = "tiny sizes: these figures mean nothing" if options.quick else report.verdict(rows)
    print(f"{report.table(rows)}\n\n{verdict}\nwritten to {options.output}")
    return 0


def _measure(section: str, setting: Setting, quick: bool) -> Iterable[Row]:
    if section == "deepfm":
        return measure_deepfm(*_QUICK_DEEPFM) if quick else measure_deepfm(_DEEPFM_STEPS, FRAPPE_ROWS)
    if section == "optembed":
        return (
            measure_optembed(QUICK_AMOUNTS, made_log(_QUICK_ROWS)) if quick else measure_optembed(Amounts(), frappe())
        )
    if section == "sessions":
        return measure_sessions(2, _QUICK_USERS) if quick else measure_sessions(_SESSION_STEPS)
    measure: dict[str, Callable[[Setting], Iterable[Row]]] = {
        "lookup": measure_lookups,
        "step": measure_steps,
        "memory": measure_memory,
        "scores": measure_scores,
    }
    return measure[section](setting)


def _setting(options: argparse.Namespace) -> Setting:
    setting = QUICK if options.quick else Setting()
    chosen = {"dims": options.dim, "orders": options.order, "rounds": options.rounds}
    return replace(setting, **{name: value for name, value in chosen.items() if value})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.speed", description="Measure lookups, training steps and scores."
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections; default: all")
    parser.add_argument("--dim", nargs="+", type=_positive, help="dimensions D; default: 16 64")
    parser.add_argument("--order", nargs="+", choices=ORDERS, help="where frequent ids lie; default: both ways")
    parser.add_argument("--rounds", type=_positive, help="repeats of a lookup; steps a third; default: 60")
    parser.add_argument("--threads", type=_positive, help="of torch; default: all cores")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; figures mean nothing")
    parser.add_argument("--output", type=Path, default=Path("results/speed.json"), help="default: %(default)s")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
