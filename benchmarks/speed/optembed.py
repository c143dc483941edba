"""OptEmbed beside the same model on full tables: a step of its supernet, and its search beside plain validation."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.speed.contest import Contestant, Row, Seconds, Versus, rows_of, take_turns
from embcomp import StrategyConfig, build_tables, make_config
from embcomp.strategies.optembed import OptEmbedConfig
from embcomp.training import Phases, SearchResult
from recsys_models.ctr import DeepFM
from recsys_models.data import Batches, ClickLog
from recsys_models.metrics import EVAL_BATCH_SIZE, evaluate
from recsys_models.training import TrainingConfig
from recsys_models.training.clicks import ClickTask
from recsys_models.training.groups import make_optimizers
from recsys_models.training.optimizers import clip_gradients

FULL = "full tables"
SUPERNET = "optembed's supernet"
SEARCH = "optembed's search"
STEP_LIMIT, SEARCH_LIMIT = 1.5, 0.1
DIM = 16
BUDGET = "25%"
RECIPE = TrainingConfig(device="cpu", progress=False)
SKIPPED = "skipped: EMBCOMP_DATA names no folder with a folder frappe"


@dataclass(frozen=True)
class Amounts:
    """How much is measured.

    Attributes:
        steps: of each contestant.
        searches: how many, each from the same weights.
        passes: plain validation passes before and after each search; their median counts.
        config: of the tables and their search; the default one has 600 candidates.
    """

    steps: int = 150
    searches: int = 3
    passes: int = 5
    config: OptEmbedConfig = field(default_factory=OptEmbedConfig)

    @property
    def candidates(self) -> int:
        """Candidates of all generations.

        A first generation has more where there are more seeds, later ones have less where no new candidates are found:
        ratios are not scaled by that, but a note says how many were evaluated.
        """
        return self.config.generations * (self.config.mutations + self.config.crossovers)

    @property
    def rival(self) -> str:
        """What a search is compared with."""
        return f"{self.candidates} validation passes on full tables"


QUICK_AMOUNTS = Amounts(2, 1, 1, OptEmbedConfig(generations=2))
"""Enough for a test of the benchmark itself; its figures mean nothing."""


def measure_optembed(amounts: Amounts, data: ClickLog | None) -> Iterator[Row]:
    """Measure training steps, then searches with the weights that those have led to.

    Args:
        amounts: how much.
        data: to train and search on; None where there is none, so that nothing is measured.
    """
    if data is None:
        yield from _rows("Frappe", amounts, {}, SKIPPED)
        return
    plain, supernet = Training(data, make_config("full")), Training(data, amounts.config, BUDGET)
    seconds = take_turns([Contestant(FULL, plain.step), Contestant(SUPERNET, supernet.step)], amounts.steps)
    searches, found = _searches(amounts, plain, supernet)
    note = f"{found.num_evaluated} candidates evaluated, none twice"
    yield from _rows(data.name, amounts, {**seconds, **searches}, note)


class Training:
    """A model in the first phase of its strategy, trained as `fit` does, on batches that are there already.

    Args:
        data: whose train split it learns from, and whose validation split it searches on.
        config: of the tables.
        budget: of the tables.
    """

    def __init__(self, data: ClickLog, config: StrategyConfig, budget: str | None = None) -> None:
        torch.manual_seed(0)
        counts = {one.name: torch.from_numpy(np.array(one.counts)) for one in data.fields}
        tables = build_tables(DeepFM.table_specs(data.fields, DIM), config, budget, counts)
        self.data, self.model = data, DeepFM(tables).train()
        self.phases = Phases(self.model)
        self.phases.enter_(self.phases.phases[0])
        self.parameters = self.phases.parameters()
        self.optimizers = make_optimizers(self.model, RECIPE, self.parameters)
        is_whole = len(data.train) > RECIPE.batch_size  # so that no step is on a rest
        self.batches = [*data.train.batches(RECIPE.batch_size, shuffle=True, drop_last=is_whole)]

    def step(self, turn: int) -> None:
        """Take one step."""
        ids, dense, labels = self.batches[turn % len(self.batches)]
        loss = self.phases.loss(
            lambda: self.model(ids, dense), lambda logits: F.binary_cross_entropy_with_logits(logits, labels)
        )
        loss.backward()
        clip_gradients(self.parameters, RECIPE.clip_norm or float("inf"))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.phases.step_()

    def search(self) -> SearchResult:
        """Search as `fit` does, all that belongs to it included; it may be repeated."""
        [phase] = [phase for phase in self.phases if phase.is_search]
        self.phases.leave_(self.phases.phase)
        self.phases.enter_(phase)
        validation = ClickTask(self.data).search(self.model, RECIPE, torch.device("cpu"))
        return self.phases.search_(
            validation.evaluate, validation.evaluate_many, validation.recalibrate, at_once=RECIPE.search_at_once
        )


def _searches(amounts: Amounts, plain: Training, supernet: Training) -> tuple[dict[str, Seconds], SearchResult]:
    """Seconds of searches and of as many validation passes as they have candidates, and what the last came to."""
    batches = plain.data.validation.batches(EVAL_BATCH_SIZE)
    seconds = {name: np.zeros(amounts.searches) for name in (amounts.rival, SEARCH)}
    for turn in range(amounts.searches):
        gc.collect()
        passes = _passes(plain, batches, amounts.passes)
        started = time.perf_counter()
        found = supernet.search()
        seconds[SEARCH][turn] = time.perf_counter() - started
        passes += _passes(plain, batches, amounts.passes)
        seconds[amounts.rival][turn] = amounts.candidates * np.median(passes)
    return seconds, found


def _passes(plain: Training, batches: Batches, number: int) -> list[float]:
    """Seconds of plain validation passes."""
    seconds = []
    for _ in range(number):
        started = time.perf_counter()
        evaluate(plain.model, batches)
        seconds.append(time.perf_counter() - started)
    return seconds


def _rows(name: str, amounts: Amounts, seconds: Mapping[str, Seconds], note: str) -> Iterator[Row]:
    """The rows of both contests; without seconds those of contests that did not take place."""
    skipped = "" if seconds else note
    steps = [Contestant(FULL, note=skipped), Contestant(SUPERNET, versus=(Versus((FULL,), STEP_LIMIT),), note=skipped)]
    search = Contestant(SEARCH, versus=(Versus((amounts.rival,), SEARCH_LIMIT),), note=note)
    model = f"{name}, DeepFM, D={DIM}, budget {BUDGET}"
    yield from rows_of("optembed", f"{model}: steps of batch {RECIPE.batch_size}", steps, seconds, "ms/step", 1e3)
    yield from rows_of("optembed", f"{model}: search", [Contestant(amounts.rival, note=skipped), search], seconds, "s")
