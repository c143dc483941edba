"""Prediction of the next item as a task: judged by the ranking of the whole catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from embcomp.errors import ConfigError, InputError
from embcomp.sites import find_groups
from recsys_models.data import Cases, SessionLog
from recsys_models.ranking import EVAL_BATCH_SIZE, evaluate_cases
from recsys_models.session import Examples, SessionModel
from recsys_models.training.config import TrainingConfig
from recsys_models.training.task import RECALIBRATION_BATCHES, Stream, Task, Validate

_COUNTED_AT_ONCE = 4096


class SessionTask(Task):
    """Models of `recsys_models.session` on a session log.

    Args:
        data: sessions to learn from, and cases to validate on; those for tests are not looked at.
    """

    metrics: ClassVar = {f"{name}@{cutoff}": 1 for cutoff in (10, 20) for name in ("ndcg", "hr", "mrr")}

    def __init__(self, data: SessionLog) -> None:
        self.data, self.name, self.content_hash = data, data.name, data.content_hash

    def check(self, model: nn.Module, monitor: str) -> None:
        """Check the catalogue, the splits and the phases; see `Task.check`."""
        if not isinstance(model, SessionModel):
            raise ConfigError(
                f"{type(model).__name__} can't be trained on the sessions {self.name}: take a model of "
                "recsys_models.session, or data of load_dataset for click models"
            )
        if model.num_items != self.data.catalogue.num_items:
            raise ConfigError(
                f"{self.name} has {self.data.catalogue.num_items} items, but the model has {model.num_items}: build it "
                "for this data set"
            )
        if not (self.data.train.lengths > 1).any():
            raise InputError(f"no training session of {self.name} has a second item: there is nothing to learn")
        if not len(self.data.validation):
            raise InputError(
                f"the validation split of {self.name} has no cases, and models are chosen by them: give load_sessions "
                "validation_share above 0 with protocol='last_days', or take protocol='leave_one_out', which validates "
                "on histories of at least three items"
            )
        for tables in find_groups(model).values():
            if any(phase.distill for phase in tables.phases()):
                raise ConfigError(
                    f"{type(tables).__name__} distills predictions, which session models do not give while they "
                    "train: set distill=0"
                )

    def ready_(self, model: nn.Module) -> None:
        """Count targets where the loss corrects for how often they are negatives of each other."""
        assert isinstance(model, SessionModel)
        if model.objective.loss != "sampled":
            return
        counts = torch.zeros(model.num_items, dtype=torch.float64)
        mode, length = model.encoder.targets, model.encoder.max_length
        for batch in self.data.train.batches(_COUNTED_AT_ONCE, length, mode=mode, windows=model.windows):
            items, chances = model.encoder.expected_targets(batch)
            counts.index_add_(0, items, chances)
        model.objective.count_targets_(counts)

    def batches(self, split: str, model: nn.Module, config: TrainingConfig, device: torch.device) -> Stream:
        """Examples as the model's encoder prepares them."""
        assert isinstance(model, SessionModel)
        size, length = config.batch_size, model.encoder.max_length
        if split == "train":
            stream = self.data.train.batches(
                size,
                length,
                mode=model.encoder.targets,
                windows=model.windows,
                shuffle=True,
                seed=config.seed,
                device=device,
            )
        else:
            stream = self.data.validation.batches(size, length, shuffle=True, seed=config.seed, device=device)
        return _Prepared(stream, model)

    def num_rows(self, batch: Examples) -> int:
        """Sessions, or prefixes, of the batch."""
        return len(batch.items)

    def predict(self, model: nn.Module, batch: Examples) -> Tensor:
        """Vectors of the sessions of all targets ``(N, D)``; scores are for the loss, which need not keep them."""
        assert isinstance(model, SessionModel)
        return model.learn(batch)

    def loss(self, model: nn.Module, batch: Examples, logits: Tensor) -> Tensor:
        """The model's loss."""
        assert isinstance(model, SessionModel)
        return model.loss(batch, logits)

    def validation(self, model: nn.Module, config: TrainingConfig, device: torch.device) -> Validate:
        """Ranks of all validation cases."""
        assert isinstance(model, SessionModel)
        size = config.eval_batch_size or EVAL_BATCH_SIZE
        return lambda: evaluate_cases(model, self.data.validation, self.data.filters_seen, batch_size=size)

    def search(self, model: nn.Module, config: TrainingConfig, device: torch.device) -> SessionSearch:
        """Candidates are compared on some of the cases, the best on all."""
        return SessionSearch(self, model, config, device)


class SessionSearch:
    """The callbacks that `embcomp.training.Phases.search_` asks for; see `Task.search`."""

    most_at_once: int | None = 1  # candidates have catalogues of their own

    def __init__(self, task: SessionTask, model: nn.Module, config: TrainingConfig, device: torch.device) -> None:
        assert isinstance(model, SessionModel)
        self.task, self.model, self.config = task, model, config
        self.monitor, _ = task.monitored(config)
        cases = task.data.validation
        number = len(cases) if config.search_rows is None else min(config.search_rows, len(cases))
        chosen = np.sort(np.random.default_rng(config.seed).permutation(len(cases))[:number])
        self._sample = Cases(cases.sequences, cases.rows[chosen], cases.ends[chosen])
        self._train = task.batches("train", model, config, device)

    def evaluate(self) -> float:
        """The monitored metric on all validation cases."""
        return self._value(self.task.data.validation)

    def evaluate_many(self, number: int) -> list[float]:
        """The monitored metric of the candidate that is shown, on the sample."""
        return [self._value(self._sample)]

    def recalibrate(self) -> None:
        """Run the model on some training batches."""
        for batch in islice(self._train.epoch(0), RECALIBRATION_BATCHES):
            self.model.learn(batch)

    def _value(self, cases: Cases) -> float:
        size = self.config.eval_batch_size or EVAL_BATCH_SIZE
        return evaluate_cases(self.model, cases, self.task.data.filters_seen, batch_size=size)[self.monitor]


class _Prepared:
    """Batches made into examples one by one, so that what is drawn for them is drawn in their order."""

    def __init__(self, stream: Stream, model: SessionModel) -> None:
        self._stream, self._model = stream, model

    def __len__(self) -> int:
        return len(self._stream)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Examples]:
        for batch in self._stream.epoch(epoch, start):
            yield self._model.prepare(batch)
