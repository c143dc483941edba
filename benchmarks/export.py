"""Sizes of exported files and the latency of lookups in them: ``python -m benchmarks.export``.

Every strategy at one budget on the same tables, exported to everything it can be; beside them TorchRec's float32
collection and its int8 and int4 quantization, in the same run, on one thread. Prints Markdown, writes JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import export_peers
from benchmarks.markdown import markdown_table
from benchmarks.results import write_whole
from benchmarks.speed.contest import Contestant, take_turns
from benchmarks.speed.machine import Machine
from benchmarks.speed.setting import zipf_ids
from embcomp import EmbcompError, EmbeddingTables, TableSpec, build_tables, list_strategies, make_config
from embcomp.config import StrategyConfig
from embcomp.integrations.export import SERVED, SUFFIXES, load_fbgemm

_ROWS = ("float32", "float16", "int8:row", "int8:column", "int4:row", "int4:column", "int2:column")
"""Formats of plain rows, one per id, that stand beside the strategies."""
_BATCHES = {1: 200, 4096: 20}
"""Batch size -> rounds."""
_TURNS = 4
Lookup = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        tables: T.
        rows: ids of the largest table; the n-th has an n-th of them, as vocabularies differ.
        dim: D.
        budget: of the strategies.
        batches: batch size -> rounds of lookups.
    """

    tables: int = 26
    rows: int = 100_000
    dim: int = 16
    budget: str = "10%"
    batches: dict[int, int] = field(default_factory=lambda: dict(_BATCHES))

    def specs(self) -> list[TableSpec]:
        """Describe the tables."""
        return [TableSpec(f"table_{n:02d}", self.rows // (n + 1), self.dim, init_std=1.0) for n in range(self.tables)]

    def draw(self) -> dict[int, list[Tensor]]:
        """Draw Zipf ids: batch size -> int64 ``(B, T)``, as many as rounds take turns with."""
        generator = torch.Generator().manual_seed(0)
        sizes = [spec.num_embeddings for spec in self.specs()]
        return {
            batch: [torch.stack([zipf_ids((batch,), size, generator) for size in sizes], dim=1) for _ in range(_TURNS)]
            for batch in self.batches
        }


QUICK = Sizes(3, 200, 8, "30%", {1: 2, 7: 2})
"""Small enough for a test of the benchmark itself; its latencies mean nothing."""


@dataclass(frozen=True)
class Result:
    """One form of one contestant.

    Attributes:
        name: strategy or row format, or a peer.
        kind: ``"eager"`` or one of `SERVED`.
        serve_bytes: by the memory report; of peers, of the saved state dict.
        file_bytes: of the exported file; None where there is none.
        latency: batch size -> median microseconds of a lookup of all tables.
        difference: largest difference to eager, of vectors whose entries have a standard deviation of 1.
        note: why there is no file.
    """

    name: str
    kind: str
    serve_bytes: int
    file_bytes: int | None = None
    latency: dict[int, float] = field(default_factory=dict)
    difference: float = 0.0
    note: str = ""


def measure(sizes: Sizes, strategies: Sequence[str], kinds: Sequence[str]) -> Iterator[Result]:
    """Build, export and time everything."""
    specs, drawn = sizes.specs(), sizes.draw()
    for name, config, budget in _contestants(sizes, strategies):
        _say(f"{name} ...")
        try:
            tables = build_tables(specs, config, budget).finalize_()
        except EmbcompError as error:
            yield Result(name, "eager", 0, note=str(error))
            continue
        with tempfile.TemporaryDirectory() as folder:
            yield from _forms(name, tables, kinds, Path(folder), drawn, sizes)
    _say("TorchRec ...")
    for name, file_bytes, lookup in export_peers.peers(specs):
        yield Result(name, "eager", file_bytes, file_bytes, _times({"eager": lookup}, drawn, sizes)["eager"])


def _contestants(sizes: Sizes, strategies: Sequence[str]) -> Iterator[tuple[str, StrategyConfig, str | None]]:
    for rows in _ROWS:
        if "full" in strategies:
            yield f"full, {rows}", make_config("full", rows=rows, unseen="zero"), None
    for strategy in strategies:
        if strategy != "full":
            yield strategy, make_config(strategy, unseen="zero"), sizes.budget


def _forms(
    name: str, tables: EmbeddingTables, kinds: Sequence[str], folder: Path, drawn: dict[int, list[Tensor]], sizes: Sizes
) -> Iterator[Result]:
    served = tables.memory().serve_bytes
    lookups: dict[str, Lookup] = {"eager": tables}
    found = {"eager": Result(name, "eager", served)}
    for kind in kinds:
        try:
            file_bytes, lookups[kind] = _exported(tables, kind, folder / f"{kind}{SUFFIXES[kind]}")
            found[kind] = Result(name, kind, served, file_bytes)
        except EmbcompError as error:
            found[kind] = Result(name, kind, served, note=str(error))
    times = _times(lookups, drawn, sizes)
    ids = drawn[max(drawn)][0]
    for kind, result in found.items():
        if kind in lookups:
            off = float((lookups[kind](ids) - tables(ids)).abs().max())
            result = dataclasses.replace(result, latency=times[kind], difference=off)
        yield result


def _exported(tables: EmbeddingTables, kind: str, path: Path) -> tuple[int, Lookup]:
    """Size of the file, and a lookup in it."""
    size = SERVED[kind](tables, path).file_bytes
    if kind == "fbgemm":
        return size, export_peers.looking_up(load_fbgemm(path), list(tables.names))
    if kind == "onnx":
        return size, _onnx_lookup(path)
    if kind == "aoti":
        return size, torch._inductor.aoti_load_package(str(path))
    return size, torch.export.load(path).module()


def _onnx_lookup(path: Path) -> Lookup:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda ids: torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0])


@torch.no_grad()
def _times(lookups: dict[str, Lookup], drawn: dict[int, list[Tensor]], sizes: Sizes) -> dict[str, dict[int, float]]:
    """Median microseconds by lookup and batch size; lookups take turns."""
    found: dict[str, dict[int, float]] = {kind: {} for kind in lookups}
    for size, batches in drawn.items():
        contestants = [Contestant(kind, _turns(lookup, batches)) for kind, lookup in lookups.items()]
        for kind, seconds in take_turns(contestants, sizes.batches[size]).items():
            found[kind][size] = float(np.median(seconds)) * 1e6
    return found


def _turns(lookup: Lookup, batches: list[Tensor]) -> Callable[[int], object]:
    return lambda turn: lookup(batches[turn % len(batches)])


# ---- output ---------------------------------------------------------------------------------------------------------


def markdown(sizes: Sizes, machine: Machine, results: Sequence[Result]) -> str:
    """Sizes, then a table of latencies for each batch size, then what was refused and how exact the rest is."""
    specs, kinds = sizes.specs(), list(dict.fromkeys(result.kind for result in results))
    lines = [
        f"{sizes.tables} tables of {specs[0].num_embeddings:,} to {specs[-1].num_embeddings:,} ids, D = {sizes.dim}, "
        f"strategies at {sizes.budget}. {machine}.".replace("\n", "; "),
        "",
        "### File sizes, bytes",
        "",
        "To serve: by our memory report; of TorchRec's collections, the saved state dict.",
        "",
        *_table(results, ["to serve", *kinds[1:]], lambda one: f"{one.file_bytes:,}" if one.file_bytes else ""),
    ]
    for size in sizes.batches:
        lines += ["", f"### Median latency at batch {size}, µs", ""]
        lines += _table(results, kinds, lambda one, size=size: f"{one.latency[size]:,.0f}" if one.latency else "")
    exact = {kind: max((r.difference for r in results if r.kind == kind), default=0.0) for kind in kinds[1:]}
    told = ", ".join(f"{kind} {off:.1e}" for kind, off in exact.items())
    lines += ["", f"Largest difference to eager, of entries with a standard deviation of 1: {told}.", ""]
    refused = [f"- {one.name}, {one.kind}: {one.note}" for one in results if one.note]
    return "\n".join([*lines, *(["Refused:", "", *refused] if refused else [])])


def _table(results: Sequence[Result], columns: list[str], cell: Callable[..., str]) -> list[str]:
    rows = []
    for name in dict.fromkeys(one.name for one in results):
        own = {one.kind: one for one in results if one.name == name}
        if not own["eager"].serve_bytes:
            continue
        cells = [f"{own['eager'].serve_bytes:,}"] if columns[0] == "to serve" else [cell(own["eager"])]
        cells += [cell(own[kind]) if kind in own else "" for kind in columns[1:]]
        rows.append([name, *cells])
    return markdown_table(["", *columns], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print Markdown and write JSON; returns the exit code."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    sizes = QUICK if options.quick else Sizes()
    machine = Machine.measure(1 << 20, 2) if options.quick else Machine.measure()
    results = list(measure(sizes, options.strategy or list_strategies(), options.kinds))
    content = {"machine": machine, "sizes": sizes, "results": results}
    text = json.dumps({name: _plain(value) for name, value in content.items()}, indent=1)
    write_whole(options.output, text + "\n")
    print(markdown(sizes, machine, results))
    _say(f"written to {options.output}")
    return 0


def _plain(value: Any) -> Any:
    return [dataclasses.asdict(one) for one in value] if isinstance(value, list) else dataclasses.asdict(value)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.export", description="Measure exported files.")
    parser.add_argument("--strategy", nargs="+", choices=list_strategies(), help="default: all")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(SERVED), default=list(SERVED), help="default: all; aoti takes longest"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; latencies mean nothing")
    parser.add_argument("--output", type=Path, default=Path("results/export.json"), help="default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
