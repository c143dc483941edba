"""Predictions over a split, and the two metrics of click prediction: AUC and log loss."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn

from embcomp.errors import InputError
from recsys_models.data import Batches, Split
from recsys_models.errors import TrainingError

logger = logging.getLogger(__name__)

EVAL_BATCH_SIZE = 16384
CLIP = 1e-7
"""Probabilities are clipped to ``[CLIP, 1 - CLIP]`` in the log loss, so that one certain mistake costs at most 16.1."""


@dataclass(frozen=True)
class Metrics:
    """How well a split was predicted.

    Attributes:
        auc: area under the ROC curve; NaN where all labels are equal.
        log_loss: mean binary cross-entropy in nats.
        num_rows: N.
    """

    auc: float
    log_loss: float
    num_rows: int

    def __str__(self) -> str:
        return f"AUC {self.auc:.5f}, log loss {self.log_loss:.5f}"


def click_metrics(labels: np.ndarray, logits: np.ndarray) -> Metrics:
    """Compute AUC and log loss by scikit-learn, in float64.

    Args:
        labels: ``(N,)``, 0 or 1. Where all are equal, the AUC is NaN and a warning is logged.
        logits: float ``(N,)``.

    Raises:
        InputError: if there are no rows, the shapes differ, or a label is neither 0 nor 1.
        TrainingError: if a logit is not finite.
    """
    if labels.ndim != 1 or labels.shape != logits.shape or not len(labels):
        raise InputError(f"labels {labels.shape} and logits {logits.shape} must have one shape (N,), N at least 1")
    positives = int(np.count_nonzero(labels == 1))
    if positives + int(np.count_nonzero(labels == 0)) < len(labels):
        raise InputError(f"labels must be 0 or 1; found {labels[(labels != 0) & (labels != 1)][0]!r}")
    if bad := int(np.count_nonzero(~np.isfinite(logits))):
        raise TrainingError(
            f"{bad} of {len(logits)} logits are not finite: the model diverged; lower the learning rate"
        )
    scores = logits.astype(np.float64)
    probabilities = np.clip(expit(scores), CLIP, 1 - CLIP)
    auc = math.nan
    if 0 < positives < len(labels):
        auc = float(roc_auc_score(labels, scores))
    else:
        logger.warning("all %d labels are %d: the AUC is undefined (NaN)", len(labels), int(positives > 0))
    return Metrics(auc, float(log_loss(labels, probabilities, labels=[0, 1])), len(labels))


def predict(model: nn.Module, data: Split | Batches, batch_size: int = EVAL_BATCH_SIZE) -> np.ndarray:
    """Compute the logits of every row, batch by batch, in evaluation mode; the model's mode is restored.

    Args:
        model: called with ids and dense features of a batch, as models of `recsys_models.ctr` are.
        data: a split, or its batches in order.
        batch_size: rows at once, where ``data`` is a split.

    Returns:
        float32 ``(N,)``.
    """
    return _run(model, data, batch_size)[0]


def evaluate(model: nn.Module, data: Split | Batches, batch_size: int = EVAL_BATCH_SIZE) -> Metrics:
    """Predict every row and compute `click_metrics`; arguments as for `predict`.

    Raises:
        InputError: if the split is empty or has labels other than 0 and 1.
        TrainingError: if a logit is not finite.
    """
    logits, labels = _run(model, data, batch_size)
    return click_metrics(labels, logits)


def _run(model: nn.Module, data: Split | Batches, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    batches = data.batches(batch_size, device=device_of(model)) if isinstance(data, Split) else data
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in batches:
                logits.append(model(batch.ids, batch.dense))
                labels.append(batch.labels)
    finally:
        model.train(was_training)
    return _joined(logits), _joined(labels)


def _joined(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).float().cpu().numpy() if parts else np.empty(0, np.float32)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is: the device of its first parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
