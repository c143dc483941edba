"""``make bench``: the default sweep, its table and its report. A second run takes what is there, and ends at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import sweep
from benchmarks.errors import ResultError
from benchmarks.report import write_report
from benchmarks.terminal import text_table

EXPERIMENT = "embedded"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the default sweep and report on it; the process ends with status 1 if a cell failed.

    Args:
        arguments: of the command line; None for the process's own.
    """
    parser = argparse.ArgumentParser("python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"), help="where results go; default: results")
    parser.add_argument("overrides", nargs="*", help="of the sweep, such as seed=1 budget=5%%,1%%")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each; default: 2")
    given = parser.parse_args(arguments)
    status = 0
    try:
        launcher = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={given.jobs}", "hydra.launcher.batch_size=1"]
        own = [f"experiment={EXPERIMENT}", f"results_dir={given.results}"]
        sweep.main(["-m", *own, *launcher, *given.overrides])
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
    folder = given.results / EXPERIMENT
    if status > 1 or not folder.is_dir():
        raise SystemExit(status)
    path = folder / "report.html"
    try:
        sections, _ = write_report(folder, path)
    except ResultError as error:
        print(error, file=sys.stderr)
        raise SystemExit(status or 1) from None
    print(f"{text_table(sections)}\n\nreport: {path.resolve()}")
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
