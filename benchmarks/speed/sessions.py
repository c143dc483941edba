"""SASRec: a training step with the softmax over all items, and the ranking of all users' next items."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.speed import recbole
from benchmarks.speed.contest import NOT_INSTALLED, Contestant, Row, Versus, rows_of, take_turns
from embcomp import build_tables
from recsys_models.data import Cases, Catalogue, Sequences, SessionBatch, load_sessions
from recsys_models.ranking import evaluate_cases
from recsys_models.session import SessionModel, build_session_model, session_specs

logger = logging.getLogger(__name__)

RECBOLE, OURS, ALL_POSITIONS = "RecBole, last position", "sasrec, last position", "sasrec, every position"
ITEMS, LENGTH, DIM, BATCH = 3400, 50, 64, 128
LIMIT = 1.0
MOST_SECONDS = 5.0
"""Wanted of the evaluation, on two cores."""
NETWORK: dict[str, Any] = {"blocks": 2, "heads": 2, "feedforward": 256, "dropout": 0.5, "activation": "gelu"}
"""RecBole's own settings, for both."""
USERS, HISTORY, MOVIES = 6040, 165, 3416
"""MovieLens-1M's, for where it is missing."""


def measure_sessions(steps: int, users: int = USERS) -> Iterator[Row]:
    """Measure steps, then the evaluation.

    Args:
        steps: of each contestant; evaluations a twentieth, at least 3.
        users: whose next items are ranked where there is no MovieLens-1M.
    """
    yield from _steps(steps)
    yield from _evaluation(max(3, steps // 20), users)


def _steps(steps: int) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(ITEMS, (BATCH, LENGTH + 1), generator=generator) for _ in range(8)]
    lengths = torch.full((BATCH,), LENGTH)
    last = [SessionBatch(items[:, :-1], lengths, items[:, -1]) for items in batches]
    every = [SessionBatch(items[:, :-1], lengths, items[:, 1:]) for items in batches]
    theirs = _recbole_step(last)
    contestants = [
        Contestant(RECBOLE, theirs, note="" if theirs else f"{NOT_INSTALLED}: pip install recbole"),
        Contestant(OURS, _step(last), (Versus((RECBOLE,), LIMIT),)),
        Contestant(ALL_POSITIONS, _step(every), (Versus((RECBOLE,)),), note=f"{LENGTH} targets a session, not one"),
    ]
    case = f"SASRec, {ITEMS} items, length {LENGTH}, batch {BATCH}, D={DIM}, fused Adam"
    yield from rows_of("sessions", case, contestants, take_turns(contestants, steps), "ms/step", 1e3)


def _step(batches: list[SessionBatch]) -> Callable[[int], None]:
    model = _sasrec(ITEMS, NETWORK)
    return _trained(model, lambda turn: _loss(model, batches[turn % len(batches)]))


def _loss(model: SessionModel, batch: SessionBatch) -> Tensor:
    examples = model.prepare(batch)
    return model.loss(examples, model.learn(examples))


def _recbole_step(batches: list[SessionBatch]) -> Callable[[int], None] | None:
    options = {
        "n_layers": NETWORK["blocks"],
        "n_heads": NETWORK["heads"],
        "inner_size": NETWORK["feedforward"],
        "hidden_dropout_prob": NETWORK["dropout"],
        "attn_dropout_prob": NETWORK["dropout"],
        "hidden_act": NETWORK["activation"],
    }
    model: Any = recbole.sasrec(ITEMS, LENGTH, DIM, **options)
    if model is None:
        return None
    given = [recbole.interaction(*batch) for batch in batches]
    return _trained(model, lambda turn: model.calculate_loss(given[turn % len(given)]))


def _trained(model: nn.Module, loss_of: Callable[[int], Tensor]) -> Callable[[int], None]:
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step(turn: int) -> None:
        loss_of(turn).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _evaluation(rounds: int, users: int) -> Iterator[Row]:
    root = os.environ.get("EMBCOMP_DATA")
    if root and (Path(root) / "ml-1m").is_dir():
        log = load_sessions("movielens_1m", root)
        name, cases, num_items = log.name, log.test, log.catalogue.num_items
    else:
        logger.info("EMBCOMP_DATA names no folder with a folder ml-1m: made histories of its shape instead")
        name, cases, num_items = "made histories", _made_cases(users), MOVIES
    model = _sasrec(num_items, {})
    wanted = (Versus((), MOST_SECONDS),)
    ours = Contestant("evaluate_cases", lambda turn: evaluate_cases(model, cases, True), wanted, note="on two cores")
    contestants = [ours]
    case = f"SASRec, {len(cases):,} cases of {name} among {num_items} items, length {LENGTH}, D={DIM}"
    yield from rows_of("sessions", case, contestants, take_turns(contestants, rounds), "s")


def _made_cases(users: int) -> Cases:
    items = np.random.default_rng(0).integers(0, MOVIES, users * HISTORY).astype(np.int32)
    histories = Sequences(items, np.arange(users + 1, dtype=np.int64) * HISTORY)
    return Cases(histories, np.arange(users, dtype=np.int32), np.full(users, HISTORY - 1, np.int32))


def _sasrec(num_items: int, network: dict[str, Any]) -> SessionModel:
    catalogue = Catalogue(num_items, np.ones(num_items, np.int64), np.arange(num_items))
    torch.manual_seed(0)
    tables = build_tables(session_specs("sasrec", catalogue, DIM, max_length=LENGTH, **network))
    return build_session_model("sasrec", tables, catalogue, max_length=LENGTH, **network)
