"""What training returns, and what it tells callbacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from recsys_models.metrics import Metrics

if TYPE_CHECKING:
    from recsys_models.ctr import CTRModel


@dataclass(frozen=True)
class Evaluation:
    """One look at the validation split.

    Attributes:
        step: training steps done.
        epoch: epochs completed.
        auc: of the validation split; NaN where all its labels are equal.
        log_loss: of the validation split.
        train_loss: mean binary cross-entropy of the training batches since the last evaluation, as they were seen.
        learning_rate: of the network, in the steps before.
        improved: whether it was the best so far.
    """

    step: int
    epoch: int
    auc: float
    log_loss: float
    train_loss: float
    learning_rate: float
    improved: bool


@dataclass(frozen=True)
class TrainingResult:
    """What came out of training.

    Attributes:
        validation: metrics of the best evaluation, by the monitored metric.
        best: the best evaluation.
        history: all evaluations.
        steps: training steps done.
        epochs: epochs completed.
        stopped: why training ended: ``"patience"``, ``"epochs"`` or ``"max_steps"``.
        train_seconds: time spent in training steps, evaluations and checkpoints excluded; over all resumed parts.
        samples_per_second: training rows per second of that time.
    """

    validation: Metrics
    best: Evaluation
    history: tuple[Evaluation, ...]
    steps: int
    epochs: int
    stopped: str
    train_seconds: float
    samples_per_second: float


class Callback:
    """Something to do while training: hooks of a strategy, a tracker, a pruning schedule.

    Callbacks are stateless as far as `fit` knows: what they must remember over a resume belongs into the model.
    """

    def on_step_end(self, model: CTRModel, step: int) -> None:
        """Called after the optimizer's step; ``step`` counts from 1."""

    def on_epoch_end(self, model: CTRModel, epoch: int) -> None:
        """Called after an epoch's last step, before its evaluation; ``epoch`` counts from 1."""

    def on_evaluation(self, model: CTRModel, evaluation: Evaluation) -> None:
        """Called after each look at the validation split."""
