"""How a search's candidates are compared: on the validation split, many at once on few rows, the best on all."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

from recsys_models.data import Batch, Batches, ClickLog
from recsys_models.metrics import CLIP, EVAL_BATCH_SIZE, evaluate
from recsys_models.training.config import TrainingConfig
from recsys_models.training.task import RECALIBRATION_BATCHES

ROWS_AT_ONCE = 8192
"""At most, of all candidates that are evaluated together: with more, activations leave the caches of a CPU."""


class ClickSearch:
    """The callbacks that `embcomp.training.Phases.search_` asks for, higher being better.

    Args:
        model: on the device.
        data: whose validation split decides.
        train: batches that recalibrate batch norms.
        config: how many rows, and the seed that chooses them.
        monitor: ``"auc"`` or ``"log_loss"``.
        device: where batches go.
    """

    most_at_once: int | None = None

    def __init__(
        self,
        model: nn.Module,
        data: ClickLog,
        train: Batches,
        config: TrainingConfig,
        monitor: str,
        device: torch.device,
    ) -> None:
        self.model, self.config, self.monitor, self._train = model, config, monitor, train
        self.validation = data.validation.batches(config.eval_batch_size or EVAL_BATCH_SIZE, device=device)
        number = len(data.validation) if config.search_rows is None else min(config.search_rows, len(data.validation))
        self._sample = self._one_batch(data, number, device)
        self._labels = self._sample.labels.cpu().numpy()

    def evaluate(self) -> float:
        """The monitored metric on the whole split."""
        metrics = evaluate(self.model, self.validation)
        return metrics.auc if self.monitor == "auc" else -metrics.log_loss

    def evaluate_many(self, number: int) -> list[float]:
        """The monitored metric of the candidates that are shown, on the sample."""
        size = max(min(self.config.eval_batch_size or EVAL_BATCH_SIZE, ROWS_AT_ONCE) // number, 1)
        was_training, parts = self.model.training, []
        self.model.eval()
        try:
            with torch.inference_mode():
                for start in range(0, len(self._labels), size):
                    rows = slice(start, start + size)
                    ids, dense = self._sample.ids[rows], self._sample.dense[rows]
                    logits = self.model(ids.repeat(number, 1), dense.repeat(number, 1))
                    parts.append(logits.view(number, -1).double().cpu().numpy())
        finally:
            self.model.train(was_training)
        return [self._value(logits) for logits in np.concatenate(parts, axis=1)]

    def recalibrate(self) -> None:
        """Run the model on some training batches."""
        for batch in islice(self._train.epoch(0), RECALIBRATION_BATCHES):
            self.model(batch.ids, batch.dense)

    def _value(self, logits: np.ndarray) -> float:
        if not np.isfinite(logits).all():
            return math.nan
        if self.monitor == "auc":
            return float(roc_auc_score(self._labels, logits))
        probabilities = np.clip(1 / (1 + np.exp(-logits)), CLIP, 1 - CLIP)
        return -float(log_loss(self._labels, probabilities, labels=[0, 1]))

    def _one_batch(self, data: ClickLog, number: int, device: torch.device) -> Batch:
        """A sample of the split, with both labels in it where the split has both."""
        everything = data.validation.batches(len(data.validation), shuffle=True, seed=self.config.seed, device=device)
        batch = next(everything.epoch(0))
        labels = batch.labels[:number]
        if bool((labels == labels[0]).all()):
            other = (batch.labels != labels[0]).nonzero().flatten()[:1]
            rows = torch.cat([torch.arange(number - len(other), device=device), other])
            return Batch(batch.ids[rows], batch.dense[rows], batch.labels[rows])
        return Batch(batch.ids[:number], batch.dense[:number], labels)
