"""Scores of a whole table for some queries, against composing all its rows first; and the two ways of scoring it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.contest import Contestant, Row, Seconds, Versus, rows_of, take_turns
from benchmarks.speed.lookup_memory import peak_bytes
from benchmarks.speed.setting import Setting
from embcomp import BudgetError, EmbeddingTables, TableSpec, build_tables, make_config
from embcomp.range_scores import RangeScores, assemble

STRATEGIES = {
    "full": make_config("full"),
    "hash": make_config("hash"),
    "hash, sum of 2": make_config("hash", num_hashes=2),
    "compositional, sum": make_config("compositional", combine="sum"),
    "compositional, concat": make_config("compositional", combine="concat"),
    "compositional, product": make_config("compositional"),
    "unified": make_config("unified"),
    "low_rank": make_config("low_rank"),
}
BUDGETS = ("10%", "50%")
QUERIES = (1, 16, 64, 256)
MATERIALIZED, ROWS_FIRST, COMPOSED = "materialized", "stored rows first", "composed in chunks"
LIMIT, CHOICE = 1.2, 1.3
"""Largest ratios wanted: to materializing, which writes the same scores once less, and to the faster way."""


def measure_scores(setting: Setting) -> Iterator[Row]:
    """Measure time and memory for one table of ``setting.rows`` ids, by dimension, budget and number of queries."""
    for dim in setting.dims:
        for name, config in STRATEGIES.items():
            for budget in (None,) if name == "full" else BUDGETS:
                case = f"{name}{f', {budget}' if budget else ''}, D={dim}"
                try:
                    tables = build_tables([TableSpec("item", setting.rows, dim)], config, budget).finalize_()
                except BudgetError as error:
                    yield from rows_of("scores", case, [Contestant("scores", note=str(error))], {}, "ns/score")
                    continue
                for number in QUERIES:
                    queries = torch.randn(number, dim, generator=torch.Generator().manual_seed(0))
                    yield from _contest(f"{case}, {number} queries", tables, queries, max(1, setting.rounds // 6))


@torch.no_grad()
def _contest(case: str, tables: EmbeddingTables, queries: Tensor, rounds: int) -> Iterator[Row]:
    ours: Callable[[], object] = partial(tables.scores, 0, queries)
    materialized: Callable[[], object] = partial(_materialized, tables, queries)
    ways = {}
    if any(stretch.terms for stretch in tables.stretches(0, queries)):
        ways = {ROWS_FIRST: partial(_in_one_way, tables, queries, True)}
        ways[COMPOSED] = partial(_in_one_way, tables, queries, False)
    versus = (Versus((MATERIALIZED,), LIMIT), *([Versus(tuple(ways), CHOICE)] if ways else []))
    contestants = [
        Contestant(MATERIALIZED, lambda turn: materialized()),
        *(Contestant(name, _without_turn(way), (Versus((MATERIALIZED,)),)) for name, way in ways.items()),
        Contestant("scores", lambda turn: ours(), versus),
    ]
    number = len(queries) * tables.specs[0].num_embeddings
    yield from rows_of("scores", case, contestants, take_turns(contestants, rounds), "ns/score", 1e9 / number)
    calls = {MATERIALIZED: materialized, "scores": ours}
    peaks: dict[str, Seconds] = {name: np.array([float(peak_bytes(call))]) for name, call in calls.items()}
    remembered = [Contestant(MATERIALIZED), Contestant("scores", versus=(Versus((MATERIALIZED,)),))]
    yield from rows_of("memory of scores", case, remembered, peaks, "B/score", 1 / number)


def _without_turn(call: Callable[[], object]) -> Callable[[int], object]:
    return lambda turn: call()


def _materialized(tables: EmbeddingTables, queries: Tensor) -> Tensor:
    return queries @ tables.materialize(0).transpose(0, 1)


def _in_one_way(tables: EmbeddingTables, queries: Tensor, rows_first: bool) -> Tensor:
    scores = RangeScores(tables.stretches(0, queries), rows_first=rows_first)
    return assemble(scores, queries, tables.specs[0].num_embeddings)
