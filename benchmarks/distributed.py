"""DLRM on compressed tables in 1, 2 and 4 processes: ``python -m benchmarks.distributed``.

Every case is a run of ``benchmarks.train_dlrm_distributed`` on the same batches. What is printed is a Markdown table:
bytes of each process, the last loss, how far losses are from those of one process, and rows per second.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.errors import DistributedError
from benchmarks.markdown import markdown_table
from benchmarks.results import write_whole
from benchmarks.speed.machine import Machine

STRATEGIES = ("full", "hash", "compositional", "unified", "low_rank", "quantize")
SHARDINGS = ("table_wise", "row_wise", "column_wise", "data_parallel")
PROCESSES = (1, 2, 4)


@dataclass(frozen=True)
class Measured:
    """A run.

    Attributes:
        strategy: of the tables.
        sharding: TorchRec's name of how their rows are cut.
        processes: number of them.
        order: seed of another order of the rows of each batch; None for that of the other runs.
        bytes_per_rank: of rows and of what is replicated.
        largest_difference: of a step's loss to that of one process with the same strategy and sharding.
        last_loss: of the last step.
        rows_per_second: of all processes together, by the median step.
    """

    strategy: str
    sharding: str
    processes: int
    order: int | None
    bytes_per_rank: tuple[int, ...]
    largest_difference: float
    last_loss: float
    rows_per_second: int


def measure(given: argparse.Namespace) -> Iterator[Measured]:
    """Run every case; the first number of processes is what the others are compared with.

    With ``--control`` that number runs again, with the rows of each batch in another order: so far off are losses that
    differ by the rounding of sums alone.
    """
    for strategy in given.strategy:
        for sharding in given.sharding:
            alone: list[float] = []
            orders: list[int | None] = [None, 1] if given.control else [None]
            cases = [(given.processes[0], order) for order in orders] + [(n, None) for n in given.processes[1:]]
            for processes, order in cases:
                found = _run(given, strategy, sharding, processes, order)
                alone = alone or found["losses"]
                off = max(abs(own - one) for own, one in zip(found["losses"], alone, strict=True))
                sizes, speed = tuple(found["bytes_per_rank"]), found["rows_per_second"]
                yield Measured(strategy, sharding, processes, order, sizes, off, found["losses"][-1], speed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the JSON file.

    A run that fails ends it: what was measured until then is printed and written, and the process ends with status 1.

    Args:
        arguments: of the command line; None for the process's own.
    """
    given = _parser().parse_args(arguments)
    machine = Machine.measure()
    rows: list[Measured] = []
    failure: DistributedError | None = None
    try:
        for row in measure(given):
            rows.append(row)
            print(f"{row.strategy} {row.sharding} {row.processes}: {row.rows_per_second:,} rows/s", file=sys.stderr)
    except DistributedError as error:
        failure = error
    if rows:
        found = {"machine": asdict(machine), "rows": [asdict(row) for row in rows]}
        write_whole(given.output, json.dumps(found, indent=1))
        print(f"{machine}\n\n" + "\n".join(table(rows)))
    if failure is not None:
        print(failure, file=sys.stderr)
        raise SystemExit(1)


def table(rows: Sequence[Measured]) -> list[str]:
    """The lines of a Markdown table."""
    head = ["strategy", "rows cut", "processes", "MiB in each", "last loss", "losses off by", "rows/s"]
    return markdown_table(head, [_cells(row) for row in rows])


def _cells(row: Measured) -> list[str]:
    sizes = " ".join(f"{size / 2**20:.2f}" for size in row.bytes_per_rank)
    told = [sizes, f"{row.last_loss:.6f}", f"{row.largest_difference:.1e}"]
    processes = str(row.processes) if row.order is None else f"{row.processes}, other order"
    return [row.strategy, row.sharding, processes, *told, f"{row.rows_per_second:,}"]


def _run(given: argparse.Namespace, strategy: str, sharding: str, processes: int, order: int | None) -> dict[str, Any]:
    """One run of the example, started by torchrun."""
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    options = ["--strategy", strategy, "--sharding", sharding, "--optimizer", given.optimizer, "--data", given.data]
    options += [] if strategy == "full" else ["--budget", given.budget]
    options += ["--batch-size", str(given.batch_size), "--steps", str(given.steps)]
    options += [] if order is None else ["--order", str(order)]
    options += [] if given.cache is None else ["--cache", str(given.cache)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        module = ["-m", "benchmarks.train_dlrm_distributed", *options, "--output", str(output)]
        done = subprocess.run(
            [sys.executable, "-m", *launch, *module],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            cause = re.search(r"^(\[rank\d+\]: )?[\w.]+(Error|Exception): .*$", done.stderr, re.MULTILINE)
            told = f"{cause[0]}\n" if cause else ""
            raise DistributedError(f"{' '.join(module)} failed in {processes} processes:\n{told}{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--strategy", nargs="+", default=STRATEGIES, help="default: %(default)s")
    parser.add_argument("--sharding", nargs="+", choices=SHARDINGS, default=SHARDINGS)
    parser.add_argument("--processes", nargs="+", type=int, default=PROCESSES, help="default: 1 2 4")
    parser.add_argument("--budget", default="25%", help="of all strategies but full; default: 25%%")
    parser.add_argument("--optimizer", default="sgd", help="of the rows; default: %(default)s")
    parser.add_argument("--data", default="synthetic_criteo", help="a click log; default: %(default)s")
    parser.add_argument("--cache", type=Path, help="folder of encoded data")
    parser.add_argument("--batch-size", type=int, default=4096, help="of all processes together; default: %(default)s")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--control", action="store_true", help="also in the first number of processes with rows in another order"
    )
    parser.add_argument("--output", type=Path, default=Path("results/distributed.json"), help="default: %(default)s")
    return parser


if __name__ == "__main__":
    main()
