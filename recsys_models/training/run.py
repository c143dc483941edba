"""One phase of training by gradients: epochs over the train split, evaluations, early stopping."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from embcomp.errors import IncompatibleStateError
from embcomp.training import Phases, resetting_rows
from recsys_models.errors import TrainingError
from recsys_models.training import checkpoint
from recsys_models.training.config import TrainingConfig
from recsys_models.training.groups import make_optimizers
from recsys_models.training.optimizers import clip_gradients
from recsys_models.training.result import Callback, Evaluation, PhaseResult
from recsys_models.training.task import Stream, Task

logger = logging.getLogger(__name__)


@dataclass
class _Progress:
    """Where a run is; saved in checkpoints as JSON."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    rows: int = 0
    bad_evaluations: int = 0
    train_seconds: float = 0.0
    history: list[Evaluation] = field(default_factory=list)

    @property
    def best(self) -> Evaluation | None:
        improved = [evaluation for evaluation in self.history if evaluation.improved]
        return improved[-1] if improved else None


class Run:
    """A phase under way.

    Args:
        name: for the progress bar and the log.
        phases: entered already.
        model: on the device.
        task: what to learn.
        config: of this phase.
        device: where batches go.
        callbacks: called in order.
        save: called after every evaluation.
    """

    def __init__(
        self,
        name: str,
        phases: Phases,
        model: nn.Module,
        task: Task,
        config: TrainingConfig,
        device: torch.device,
        callbacks: Sequence[Callback],
        save: Callable[[], None],
    ) -> None:
        self.name, self.phases, self.model, self.task, self.config = name, phases, model, task, config
        self.device, self.callbacks, self.save = device, callbacks, save
        self.parameters = phases.parameters()
        self.optimizers = make_optimizers(model, config, self.parameters)
        self.monitor, self.sign = task.monitored(config)
        self.batches = task.batches("train", model, config, device)
        self.validate = task.validation(model, config, device)
        self.upper = task.batches("validation", model, config, device) if phases.phase.bilevel else None
        self.progress = _Progress()
        self.best_weights: dict[str, Tensor] = {}
        self._upper_stream: Iterator[Any] | None = None

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> PhaseResult:
        """Train to the end."""
        stream = self._stream()
        total = self.config.epochs * len(self.batches)
        total = total if self.config.max_steps is None else min(total, self.config.max_steps)
        disable = None if self.config.progress else True
        with tqdm(total=total, initial=self.progress.step, desc=self.name, unit="step", disable=disable) as bar:
            self._set_rounding()
            while (stopped := self._stopped()) is None:
                train_loss = self._train(stream, bar)
                self._set_rounding()
                evaluation = self._evaluate(train_loss)
                bar.set_postfix_str(f"epoch {evaluation.epoch}, {self.monitor} {evaluation.metrics[self.monitor]:.5f}")
        if self.config.restore_best and self.best_weights:
            self.model.load_state_dict(self.best_weights)
        return self._result(stopped)

    def _is_rounding(self) -> bool:
        return self.progress.epoch >= self.config.float_epochs or self.progress.step == self.config.max_steps

    def _set_rounding(self) -> None:
        for tables in self.phases.groups:
            tables.set_rounding_(self._is_rounding())

    def _stream(self) -> Iterator[tuple[Any, bool]]:
        """All batches to come, each with whether it is its epoch's last."""
        start, last = self.progress.batch, len(self.batches) - 1
        for epoch in range(self.progress.epoch, self.config.epochs):
            for index, batch in enumerate(self.batches.epoch(epoch, start), start):
                yield batch, index == last
            start = 0

    def _train(self, stream: Iterator[tuple[Any, bool]], bar: tqdm) -> float:
        """Train until the next evaluation is due; return the mean loss."""
        self.model.train()
        progress, started, rows = self.progress, time.perf_counter(), 0
        total = torch.zeros((), device=self.device)
        for batch, ends_epoch in stream:
            size = self.task.num_rows(batch)
            total.add_(self._step(batch), alpha=size)
            rows += size
            progress.step += 1
            progress.batch = 0 if ends_epoch else progress.batch + 1
            progress.epoch += int(ends_epoch)
            bar.update()
            self._tell_step(ends_epoch)
            if self._is_due(ends_epoch):
                break
        mean = float(total) / rows
        progress.train_seconds += time.perf_counter() - started
        progress.rows += rows
        if not math.isfinite(mean):
            raise TrainingError(
                f"the training loss is {mean} before step {progress.step}: lower learning_rate "
                f"({self.config.learning_rate}), or set clip_norm ({self.config.clip_norm})"
            )
        return mean

    def _step(self, batch: Any) -> Tensor:
        losses: list[Tensor] = []

        def loss(logits: Tensor) -> Tensor:
            losses.append(self.task.loss(self.model, batch, logits))
            return losses[-1]

        self.phases.loss(lambda: self.task.predict(self.model, batch), loss).backward()
        if self.config.clip_norm is not None:
            clip_gradients(self.parameters, self.config.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.phases.step_(*self.optimizers)
        if self.upper is not None:
            self._upper_step(self.upper)
        return losses[0].detach()

    def _upper_step(self, batches: Stream) -> None:
        """In a bilevel phase: architecture parameters learn from the next validation batch."""
        epoch, index = divmod(self.progress.step, len(batches))
        if self._upper_stream is None or index == 0:
            self._upper_stream = batches.epoch(epoch, index)
        batch = next(self._upper_stream)
        self.phases.architecture_step_(
            lambda: self.task.predict(self.model, batch), lambda logits: self.task.loss(self.model, batch, logits)
        )

    def _tell_step(self, ends_epoch: bool) -> None:
        for callback in self.callbacks:
            callback.on_step_end(self.model, self.progress.step)
            if ends_epoch:
                callback.on_epoch_end(self.model, self.progress.epoch)

    def _is_due(self, ends_epoch: bool) -> bool:
        if self.progress.step == self.config.max_steps or self.progress.epoch == self.config.epochs:
            return True
        every = self.config.eval_steps
        return ends_epoch if every is None else self.progress.step % every == 0

    def _stopped(self) -> str | None:
        progress, config = self.progress, self.config
        if config.patience is not None and progress.bad_evaluations >= config.patience:
            return "patience"
        if config.max_steps is not None and progress.step >= config.max_steps:
            return "max_steps"
        return "epochs" if progress.epoch >= config.epochs else None

    # ---- evaluations ------------------------------------------------------------------------------------------------

    def _evaluate(self, train_loss: float) -> Evaluation:
        metrics, progress = self.validate(), self.progress
        rate = self.optimizers[-1].param_groups[-1]["lr"]
        improved = self._is_rounding() and self._is_improvement(metrics)
        evaluation = Evaluation(
            progress.step,
            progress.epoch,
            metrics,
            train_loss,
            rate,
            improved,
            self.phases.phase.name,
        )
        told = ", ".join(f"{name} {value:.5f}" for name, value in metrics.items())
        logger.info("%s: step %d, epoch %d: %s", self.name, progress.step, progress.epoch, told)
        progress.history.append(evaluation)
        if improved:
            progress.bad_evaluations = 0
            if self.config.restore_best or self.config.plateau_rewind:
                self.best_weights = {name: checkpoint.to_cpu(t) for name, t in self.model.state_dict().items()}
        elif self._is_rounding():
            progress.bad_evaluations += 1
            if progress.bad_evaluations % self.config.plateau_patience == 0:
                self._leave_plateau()
        for callback in self.callbacks:
            callback.on_evaluation(self.model, evaluation)
        self.save()
        return evaluation

    def _is_improvement(self, metrics: dict[str, float]) -> bool:
        best = self.progress.best
        if best is None:
            return True
        return self.sign * (metrics[self.monitor] - best.metrics[self.monitor]) > self.config.min_delta

    def _leave_plateau(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                lowered = max(group["lr"] * self.config.plateau_factor, self.config.min_learning_rate)
                group["lr"] = min(group["lr"], lowered)
        if self.config.plateau_rewind and self.best_weights:
            with resetting_rows(self.phases.groups, *self.optimizers):
                self.model.load_state_dict(self.best_weights)

    def _result(self, stopped: str) -> PhaseResult:
        progress, best = self.progress, self.progress.best
        if best is None:
            raise IncompatibleStateError(f"{self.name}: a run without a single evaluation; delete its checkpoint")
        return PhaseResult(
            self.phases.phase.name,
            progress.step,
            progress.epoch,
            progress.rows,
            progress.train_seconds,
            stopped,
            best,
            tuple(progress.history),
        )

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that is needed to go on, beside the model."""
        return {
            "progress": dataclasses.asdict(self.progress),
            "best": self.best_weights,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        state = checkpoint.unpack(info["run"], tensors)
        saved = state["progress"]
        saved["history"] = [Evaluation(**evaluation) for evaluation in saved["history"]]
        self.progress = _Progress(**saved)
        self.best_weights = state["best"]
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        logger.info("%s: resumed at step %d, epoch %d", self.name, self.progress.step, self.progress.epoch)
