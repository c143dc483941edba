"""Training DeepFM: our interface, data reader and loop against a loop of plain torch on one stacked table."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.contest import WARM_UP, Contestant, Row, Versus, rows_of
from embcomp import build_tables
from recsys_models.ctr import DeepFM
from recsys_models.data import ClickLog, Field, Split, load_dataset
from recsys_models.training import Callback, TrainingConfig, fit

logger = logging.getLogger(__name__)

BARE = "plain torch, one nn.Embedding"
OURS = "recsys_models.fit on full tables"
LIMIT = 1.05
DIM = 10
HIDDEN_UNITS = (400, 400, 400)
DROPOUT = 0.2
FRAPPE_SIZES = (958, 4083, 8, 8, 3, 4, 3, 10, 81, 234)
"""Ids of Frappe's ten fields, the unknown ones included."""
FRAPPE_ROWS = (202_027, 57_722)
"""Rows of Frappe's training and validation split."""
RECIPE = TrainingConfig(embedding_l2=0.05, device="cpu", restore_best=False, progress=False)
"""BARS' recipe for this model and data set."""


def measure_deepfm(steps: int, rows: tuple[int, int] = FRAPPE_ROWS) -> Iterator[Row]:
    """Measure training steps, batches included.

    Args:
        steps: of each contestant.
        rows: of the made training and validation split, where there is no Frappe.
    """
    data = frappe()
    if data is None:
        logger.info("EMBCOMP_DATA names no folder with a folder frappe: made data of its shape instead")
        data = made_log(rows)
    torch.manual_seed(0)
    tables = build_tables(DeepFM.table_specs(data.fields, DIM))
    model = DeepFM(tables, hidden_units=HIDDEN_UNITS, batch_norm=True, dropout=DROPOUT)
    turns = _Turns(data, RECIPE)
    limits = {**vars(RECIPE), "epochs": steps + WARM_UP + 1, "max_steps": steps + WARM_UP + 1, "eval_steps": 1 << 40}
    fit(model, data, TrainingConfig(**limits), callbacks=[turns])
    contestants = [Contestant(BARE), Contestant(OURS, versus=(Versus((BARE,), LIMIT),))]
    seconds = {BARE: np.array(turns.bare_seconds[WARM_UP:]), OURS: np.array(turns.our_seconds[WARM_UP:])}
    case = f"{data.name}, batch {RECIPE.batch_size}, D={DIM}, fused Adam"
    yield from rows_of("deepfm", case, contestants, seconds, "ms/step", 1e3)


def made_log(rows: tuple[int, int]) -> ClickLog:
    """Make a click log of Frappe's shape from nothing but random numbers: a stand-in for times, not for quality."""
    rng = np.random.default_rng(0)

    def split(count: int) -> Split:
        ids = np.column_stack([rng.integers(0, size, count) for size in FRAPPE_SIZES]).astype(np.int32)
        labels = (np.arange(count) % 3 == 0).astype(np.float32)
        return Split(ids, np.empty((count, 0), np.float32), labels)

    fields = tuple(Field(f"field_{i}", size, np.ones(size, np.int64)) for i, size in enumerate(FRAPPE_SIZES))
    train, validation = (split(count) for count in rows)
    return ClickLog("made, of Frappe's shape", fields, (), train, validation, validation, "made")


class BareDeepFM(nn.Module):
    """DeepFM as one would write it without embcomp: one table, whose column 0 is the first-order weight."""

    offsets: Tensor

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.register_buffer("offsets", starts)
        self.embedding = nn.Embedding(sum(sizes), DIM + 1)
        nn.init.normal_(self.embedding.weight, 0.0, 1e-4)
        layers: list[nn.Module] = []
        width = len(sizes) * DIM
        for units in HIDDEN_UNITS:
            layers += [nn.Linear(width, units), nn.BatchNorm1d(units), nn.ReLU(), nn.Dropout(DROPOUT)]
            width = units
        self.mlp = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(B,)`` of ids ``(B, F)``."""
        vectors = self.embedding(ids + self.offsets)
        weights, factors = vectors[..., 0], vectors[..., 1:]
        total = factors.sum(1)
        pairs = 0.5 * ((total * total).sum(1) - (factors * factors).sum((1, 2)))
        return weights.sum(1) + pairs + self.mlp(factors.flatten(1)).squeeze(1)


class BareTraining:
    """The same recipe as `fit`'s, in the fewest lines."""

    def __init__(self, data: ClickLog, recipe: TrainingConfig) -> None:
        self.ids = torch.from_numpy(np.array(data.train.ids)).long()
        self.labels = torch.from_numpy(np.array(data.train.labels))
        self.model = BareDeepFM([field.num_ids for field in data.fields]).train()
        self.recipe = recipe
        groups: list[dict[str, Any]] = [
            {"params": self.model.embedding.parameters(), "weight_decay": recipe.embedding_l2},
            {"params": self.model.mlp.parameters()},
        ]
        self.optimizer = torch.optim.Adam(groups, lr=recipe.learning_rate, fused=True)
        self.batches = self._batches()

    def step(self) -> None:
        """Take one step on the next batch."""
        rows = next(self.batches)
        loss = F.binary_cross_entropy_with_logits(self.model(self.ids[rows]), self.labels[rows])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _batches(self) -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(len(self.labels)).split(self.recipe.batch_size)


class _Turns(Callback):
    """After each of our steps, takes one of the bare loop, and times both."""

    def __init__(self, data: ClickLog, recipe: TrainingConfig) -> None:
        self.bare = BareTraining(data, recipe)
        self.our_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self._since: float | None = None

    def on_step_end(self, model: nn.Module, step: int) -> None:
        ours_ended = time.perf_counter()
        self.bare.step()
        ended = time.perf_counter()
        if self._since is not None:  # nobody saw the first step begin
            self.our_seconds.append(ours_ended - self._since)
            self.bare_seconds.append(ended - ours_ended)
        self._since = time.perf_counter()


def frappe() -> ClickLog | None:
    """Load Frappe; None where ``EMBCOMP_DATA`` names no folder that has it."""
    root = os.environ.get("EMBCOMP_DATA")
    if root and (Path(root) / "frappe").is_dir():
        return load_dataset("frappe", root)
    return None
