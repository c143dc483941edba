"""What training returns, and what it tells callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from embcomp.training import Phase


@dataclass(frozen=True)
class Evaluation:
    """One look at the validation split.

    Attributes:
        step: training steps done.
        epoch: epochs completed.
        metrics: of the validation split, by name; NaN where one is undefined.
        train_loss: mean loss of the training batches since the last evaluation, as they were seen.
        learning_rate: of the network, in the steps before.
        improved: whether it was the best so far.
        phase: name of the phase, within which steps and epochs are counted.
    """

    step: int
    epoch: int
    metrics: dict[str, float]
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


@dataclass(frozen=True)
class TrainingResult:
    """What came out of training.

    Attributes:
        best: the best evaluation of the last phase that trained, by the monitored metric.
        history: all evaluations of all phases.
        steps: training steps done.
        epochs: epochs completed.
        stopped: why the last phase that trained ended: ``"patience"``, ``"epochs"`` or ``"max_steps"``.
        train_seconds: time spent in training steps, evaluations and checkpoints excluded; over all resumed parts.
        samples_per_second: training rows per second of that time.
        phases: what came out of each phase.
    """

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

    def on_phase_start(self, model: nn.Module, phase: Phase) -> None:
        """Called when a phase begins, and when a run is resumed within it."""

    def on_step_end(self, model: nn.Module, step: int) -> None:
        """Called after the optimizer's step; ``step`` counts from 1."""

    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        """Called after an epoch's last step, before its evaluation; ``epoch`` counts from 1."""

    def on_evaluation(self, model: nn.Module, evaluation: Evaluation) -> None:
        """Called after each look at the validation split."""
