"""Training steps of the tables alone: forward, backward from a given gradient, and update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.speed import fbgemm
from benchmarks.speed.contest import NOT_INSTALLED, Contestant, Row, Versus, rows_of, take_turns
from benchmarks.speed.setting import Setting
from embcomp import build_tables, make_config
from embcomp.training import RowwiseAdagrad

FULL = "full + RowwiseAdagrad"
HASH = "hash, 10 % + RowwiseAdagrad"
TORCH = "nn.Embedding(sparse=True) + torch's Adagrad"
SGD = "nn.Embedding(sparse=True) + torch's SGD"
EXACT, ROWWISE = FBGEMM = tuple(f"FBGEMM, {name}" for name in fbgemm.OPTIMIZERS)
LIMIT = 1.0
_RATE = 0.01


def measure_steps(setting: Setting) -> Iterator[Row]:
    """Measure all steps, for every dimension and order of ids."""
    for dim in setting.dims:
        for order in setting.orders:
            yield from _contest(setting, dim, order)


def _contest(setting: Setting, dim: int, order: str) -> list[Row]:
    batches = setting.draw(order)
    rows = [setting.stacked(ids) for ids in batches]
    shape = (setting.batch, setting.tables, dim)
    gradient = 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def ours(strategy: str, budget: str | None) -> Callable[[int], None]:
        tables = build_tables(setting.specs(dim), make_config(strategy, sparse=True), budget)
        return _step(tables, RowwiseAdagrad(tables.parameters(), lr=_RATE), batches, gradient)

    def stacked(optimizer: type[Optimizer]) -> Callable[[int], None]:
        table = nn.Embedding(setting.tables * setting.rows, dim, sparse=True)
        return _step(table, optimizer(table.parameters(), lr=_RATE), rows, gradient)  # type: ignore[call-arg]

    contestants = [
        Contestant(FULL, ours("full", None), (Versus((EXACT, TORCH), LIMIT), Versus((ROWWISE,)))),
        Contestant(HASH, ours("hash", "10%"), (Versus((FULL,), LIMIT),)),
        Contestant(TORCH, stacked(torch.optim.Adagrad)),
        *_fbgemm(setting, dim, batches, gradient),
        Contestant(SGD, stacked(torch.optim.SGD), note="no state: what Adagrad could cost at best"),
    ]
    with torch.sparse.check_sparse_tensor_invariants(False):  # torch's Adagrad leaves it open, and is warned of it
        seconds = take_turns(contestants, max(1, setting.rounds // 3))
    return rows_of(
        "training step", f"D={dim}, ids {order}", contestants, seconds, per_second=1e9 / setting.ids_per_batch
    )


def _step(
    tables: nn.Module, optimizer: Optimizer, batches: Sequence[Tensor], gradient: Tensor
) -> Callable[[int], None]:
    def step(turn: int) -> None:
        tables(batches[turn % len(batches)]).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _fbgemm(setting: Setting, dim: int, batches: Sequence[Tensor], gradient: Tensor) -> Iterator[Contestant]:
    for name, optimizer in zip(FBGEMM, fbgemm.OPTIMIZERS, strict=True):
        run = fbgemm.training_step(setting, dim, optimizer, batches, gradient)
        yield Contestant(name, run, note="" if run else NOT_INSTALLED)
