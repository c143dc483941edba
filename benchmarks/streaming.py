"""Ids that come and go at equal bytes: ``python -m benchmarks.streaming --output results/streaming.json``.

A model learns from a stream of clicks whose ids drift (`benchmarks.drift`). Every chunk is predicted before it is
learned from, so all figures are of data that the model has not seen. `dynamic` is compared with plain hashing and with
a vocabulary that is cut by frequency once, by the first chunks; raw ids that a method keeps count 8 bytes each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.drift import Chunk, DriftingClicks
from benchmarks.markdown import markdown_table
from benchmarks.measure import environment
from benchmarks.results import write_whole
from embcomp import EmbeddingTables, TableSpec, build_tables
from embcomp.errors import EmbcompError
from embcomp.hashing import hash_to_range
from embcomp.strategies.dynamic import DynamicConfig, DynamicTables
from embcomp.strategies.frequency_cut import FrequencyCutConfig
from embcomp.strategies.full import FullConfig
from embcomp.strategies.hash import HashConfig
from embcomp.training import RowwiseAdagrad, reset_rows_
from recsys_models.ctr import build_model, get_model
from recsys_models.metrics import click_metrics

MODEL = "deepfm"
OTHERS = 2**20
"""Numbers that ids outside a vocabulary are hashed to, before they are hashed to the rows of its tail."""


class Setup(NamedTuple):
    """A method on its stream.

    Attributes:
        tables: what it keeps.
        map_bytes: bytes of raw ids that it keeps beside the tables.
        encode: chunk to the ids that its tables are asked for, int64 ``(N, F)``.
        owned: those ids to which of them have a row of their own, bool ``(N, F)``.
    """

    tables: EmbeddingTables
    map_bytes: int
    encode: Callable[[Chunk], Tensor]
    owned: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    """One method, budget and seed: its bytes, and by chunk its AUC and the share of lookups with a row of their own."""

    method: str
    budget: str
    seed: int
    serve_bytes: int
    auc: list[float]
    owned: list[float]


def dynamic(
    specs: list[TableSpec], budget: str, clicks: DriftingClicks, given: argparse.Namespace, **options: Any
) -> Setup:
    """Slots that ids compete for."""
    config = DynamicConfig(unseen="hash", sparse=True, interval=given.interval, **options)
    tables = build_tables(specs, config, budget)
    assert isinstance(tables, DynamicTables)
    return Setup(tables, 0, lambda chunk: chunk.ids, lambda ids: tables.residents.map(ids, None)[0])


def hashed(specs: list[TableSpec], budget: str, clicks: DriftingClicks, given: argparse.Namespace) -> Setup:
    """Raw ids hashed to rows."""
    tables = build_tables(specs, HashConfig(unseen="hash", sparse=True), budget)
    return Setup(tables, 0, lambda chunk: chunk.ids, lambda ids: torch.zeros_like(ids, dtype=torch.bool))


def frequency_cut(specs: list[TableSpec], budget: str, clicks: DriftingClicks, given: argparse.Namespace) -> Setup:
    """The most frequent ids of the first chunks keep rows for good, as many as ``dynamic`` has slots for."""
    sizes = dynamic(specs, budget, clicks, given).tables.config
    warm = torch.cat([chunk.ids for chunk in clicks.chunks(given.warm_up)])
    kept = [_most_frequent(warm[:, f], sizes.num_slots[spec.name]) for f, spec in enumerate(specs)]
    numbers = {spec.name: len(ids) for spec, ids in zip(specs, kept, strict=True)}
    remapped = dict.fromkeys(numbers, False)
    own = [TableSpec(s.name, numbers[s.name] + OTHERS, s.embedding_dim, None, s.init_std) for s in specs]
    config = FrequencyCutConfig(
        num_kept=numbers, tail="hash", num_tail=sizes.num_fallback, remapped=remapped, sparse=True
    )
    limits = torch.tensor(list(numbers.values()))
    return Setup(
        build_tables(own, config),
        8 * sum(numbers.values()),
        lambda chunk: torch.stack([_number(ids, chunk.ids[:, f]) for f, ids in enumerate(kept)], dim=1),
        lambda ids: ids < limits,
    )


def full(specs: list[TableSpec], budget: str, clicks: DriftingClicks, given: argparse.Namespace) -> Setup:
    """A row for every id that ever comes up: the ceiling, which no budget limits."""
    sizes = clicks.num_ids(given.chunks)
    own = [TableSpec(s.name, sizes[s.name], s.embedding_dim, None, s.init_std) for s in specs]
    tables = build_tables(own, FullConfig(sparse=True))
    return Setup(tables, 0, lambda chunk: chunk.numbers, lambda ids: torch.ones_like(ids, dtype=torch.bool))


def _dynamic_by(**options: Any) -> Callable[..., Setup]:
    return lambda *arguments: dynamic(*arguments, **options)


METHODS: dict[str, Callable[..., Setup]] = {
    "full": full,
    "hash": hashed,
    "frequency_cut": frequency_cut,
    "dynamic": _dynamic_by(),
    "dynamic start=fallback": _dynamic_by(start="fallback"),
    "dynamic policy=lru": _dynamic_by(policy="lru"),
    "dynamic policy=lfu": _dynamic_by(policy="lfu"),
    "dynamic admission=count": _dynamic_by(admission="count"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything, write the JSON after every run, and print the table.

    Args:
        arguments: of the command line; None for the process's own.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    runs: list[Run] = []
    try:
        for seed in range(given.seeds):
            for method in given.methods:
                for budget in given.budgets if method != "full" else given.budgets[:1]:
                    runs.append(run(method, budget, seed, given))
                    if given.output:
                        _write(given, runs)
    except EmbcompError as error:
        parser.error(str(error))
    print("\n".join(table(runs)))


def run(method: str, budget: str, seed: int, given: argparse.Namespace) -> Run:
    """One method, budget and seed: predict every chunk, then learn from it."""
    clicks = DriftingClicks(dict(zip("ab", given.live, strict=True)), given.rows, given.new_share, seed)
    dim = get_model(MODEL).table_dim(given.dim)
    specs = [TableSpec(name, size, dim, None, 0.01) for name, size in clicks.live.items()]
    setup = METHODS[method](specs, budget, clicks, given)
    torch.manual_seed(seed)
    model = build_model(MODEL, setup.tables, 0, hidden_units=(32, 16))
    of_tables = {id(p) for p in setup.tables.parameters()}
    optimizers = (
        RowwiseAdagrad(setup.tables.parameters(), lr=given.table_rate, initial_accumulator_value=1e-4),
        torch.optim.Adam([p for p in model.parameters() if id(p) not in of_tables], lr=given.rate),
    )
    auc, owned = [], []
    for chunk in clicks.chunks(given.chunks):
        ids, dense = setup.encode(chunk), chunk.labels.new_zeros(len(chunk.labels), 0)
        with torch.no_grad():
            logits = model.eval()(ids, dense)
        auc.append(click_metrics(chunk.labels.numpy(), logits.numpy()).auc)
        owned.append(float(setup.owned(ids).float().mean()))
        for start in range(0, len(ids), given.batch_size):
            rows = slice(start, start + given.batch_size)
            logits = model.train()(ids[rows], dense[rows])
            loss = F.binary_cross_entropy_with_logits(logits, chunk.labels[rows])
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            setup.tables.step_()
            reset_rows_([setup.tables], *optimizers)
    size = setup.tables.memory().serve_bytes + setup.map_bytes
    return Run(method, "none" if method == "full" else budget, seed, size, auc, owned)


def table(runs: Sequence[Run]) -> list[str]:
    """The lines of a Markdown table, by quarters of the stream: mean ± standard deviation over seeds.

    Seeds are streams of their own, which differ more than methods do, so there is a column of differences to ``hash``
    on the same stream.
    """
    head = ["method", "budget", "bytes", *(f"AUC, quarter {number}" for number in (1, 2, 3, 4))]
    head += ["to hash, quarter 4", "own rows, quarter 4"]
    plain = {(run.budget, run.seed): _quarters(run.auc)[3] for run in runs if run.method == "hash"}
    rows = []
    for method, budget in dict.fromkeys((run.method, run.budget) for run in runs):
        own = [run for run in runs if (run.method, run.budget) == (method, budget)]
        auc = np.array([_quarters(run.auc) for run in own])
        gains = np.array(
            [quarters[3] - plain.get((budget, run.seed), np.nan) for run, quarters in zip(own, auc, strict=True)]
        )
        share = np.mean([_quarters(run.owned)[3] for run in own])
        gain = "" if np.isnan(gains).any() else _with_std(gains, "+")
        rows.append([method, budget, f"{own[0].serve_bytes:,}", *map(_with_std, auc.T), gain, f"{share:.0%}"])
    return markdown_table(head, rows)


def _quarters(values: Sequence[float]) -> np.ndarray:
    return np.array([part.mean() if len(part) else np.nan for part in np.array_split(np.array(values), 4)])


def _with_std(values: np.ndarray, sign: str = "") -> str:
    """The mean over seeds, with its standard deviation where there are several."""
    return f"{values.mean():{sign}.4f}" + (f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else "")


def _most_frequent(ids: Tensor, number: int) -> Tensor:
    """The most frequent ids, sorted: int64 ``(number,)``, or fewer where there are no more."""
    values, counts = ids.unique(return_counts=True)
    return values[counts.argsort(stable=True, descending=True)[:number]].sort().values


def _number(kept: Tensor, ids: Tensor) -> Tensor:
    """The place of ids in a vocabulary; others get numbers behind it, by a hash."""
    place = torch.searchsorted(kept, ids.contiguous()).clamp_max(len(kept) - 1)
    return torch.where(kept[place] == ids, place, len(kept) + hash_to_range(ids, 0, OTHERS))


def _write(given: argparse.Namespace, runs: Sequence[Run]) -> None:
    options = {name: value for name, value in vars(given).items() if name != "output"}
    content = {"options": options, "environment": environment(), "runs": [asdict(run) for run in runs]}
    write_whole(given.output, json.dumps(content) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.streaming")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--budgets", nargs="+", default=["10%"], help="of float32 rows for the live ids")
    parser.add_argument("--seeds", type=_positive, default=3)
    parser.add_argument("--live", nargs=2, type=_positive, default=[20_000, 5_000], help="live ids of the two fields")
    parser.add_argument("--new-share", type=float, default=0.01, help="of the live ids, in each chunk")
    parser.add_argument("--chunks", type=_positive, default=60)
    parser.add_argument("--rows", type=_positive, default=10_000, help="of a chunk")
    parser.add_argument("--warm-up", type=_positive, default=5, help="chunks that frequency_cut counts ids of")
    parser.add_argument("--batch-size", type=_positive, default=500)
    parser.add_argument("--interval", type=_positive, default=20, help="steps between competitions of dynamic")
    parser.add_argument("--dim", type=_positive, default=8)
    parser.add_argument("--table-rate", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=_positive, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 1")
    return int(text)


if __name__ == "__main__":
    main()
