"""What training returns, and what it tells callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embcomp.training import Phase
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
        phase: name of the phase, within which steps and epochs are counted.
    """

    step: int
    epoch: int
    auc: float
    log_loss: float
    train_loss: float
    learning_rate: float
    improved: bool
    phase: str = "train"


@dataclass(frozen=True)
class PhaseResult:
    """What came out of a phase.

    Attributes:
        name: of the phase.
        steps: training steps done.
        epochs: epochs completed.
        rows: training rows seen.
        seconds: time spent in training steps, evaluations and checkpoints excluded; of a search, all its time since it
            was last resumed.
        stopped: why it ended: ``"patience"``, ``"epochs"``, ``"max_steps"``, or ``"search"`` for a search.
        best: the best evaluation; None for a search.
        history: all evaluations.
        candidate: what a search chose; None for training.
        num_evaluated: candidates that a search evaluated.
        shared: whether another run did it, of the same options but for the budget.
    """

    name: str
    steps: int
    epochs: int
    rows: int
    seconds: float
    stopped: str
    best: Evaluation | None
    history: tuple[Evaluation, ...]
    candidate: tuple[int, ...] | None = None
    num_evaluated: int = 0
    shared: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PhaseResult:
        """Read what ``dataclasses.asdict`` wrote, by way of JSON."""
        best, candidate = values["best"], values["candidate"]
        return cls(
            **{
                **values,
                "best": None if best is None else Evaluation(**best),
                "history": tuple(Evaluation(**evaluation) for evaluation in values["history"]),
                "candidate": None if candidate is None else tuple(candidate),
            }
        )

    def metrics(self, num_rows: int) -> Metrics:
        """The best evaluation as metrics of a split of ``num_rows`` rows."""
        assert self.best is not None
        return Metrics(self.best.auc, self.best.log_loss, num_rows)


@dataclass(frozen=True)
class TrainingResult:
    """What came out of training.

    Attributes:
        validation: metrics of the best evaluation of the last phase that trained, by the monitored metric.
        best: that evaluation.
        history: all evaluations of all phases.
        steps: training steps done.
        epochs: epochs completed.
        stopped: why the last phase that trained ended: ``"patience"``, ``"epochs"`` or ``"max_steps"``.
        train_seconds: time spent in training steps, evaluations and checkpoints excluded; over all resumed parts.
        samples_per_second: training rows per second of that time.
        phases: what came out of each phase.
    """

    validation: Metrics
    best: Evaluation
    history: tuple[Evaluation, ...]
    steps: int
    epochs: int
    stopped: str
    train_seconds: float
    samples_per_second: float
    phases: tuple[PhaseResult, ...] = ()


class Callback:
    """Something to do while training: hooks of a strategy, a tracker, a pruning schedule.

    Callbacks are stateless as far as `fit` knows: what they must remember over a resume belongs into the model.
    """

    def on_phase_start(self, model: CTRModel, phase: Phase) -> None:
        """Called when a phase begins, and when a run is resumed within it."""

    def on_step_end(self, model: CTRModel, step: int) -> None:
        """Called after the optimizer's step; ``step`` counts from 1."""

    def on_epoch_end(self, model: CTRModel, epoch: int) -> None:
        """Called after an epoch's last step, before its evaluation; ``epoch`` counts from 1."""

    def on_evaluation(self, model: CTRModel, evaluation: Evaluation) -> None:
        """Called after each look at the validation split."""
