"""The training loop: ``fit(model, data, TrainingConfig(...))``."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from embcomp.errors import ConfigError, IncompatibleStateError
from recsys_models.ctr import CTRModel
from recsys_models.data import Batch, ClickLog
from recsys_models.errors import TrainingError
from recsys_models.metrics import Metrics, evaluate
from recsys_models.training import checkpoint
from recsys_models.training.checks import check_data, device_named
from recsys_models.training.config import TrainingConfig
from recsys_models.training.groups import make_optimizers
from recsys_models.training.optimizers import clip_gradients
from recsys_models.training.result import Callback, Evaluation, TrainingResult

logger = logging.getLogger(__name__)

MAY_CHANGE = ("epochs", "max_steps", "patience", "eval_batch_size", "device", "progress")
"""Fields of the config that may differ between a run and its continuation."""


def fit(
    model: CTRModel,
    data: ClickLog,
    config: TrainingConfig | None = None,
    *,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Train a click model in place, on binary cross-entropy plus the tables' penalty.

    The order of rows depends on the seed and the epoch alone. A last batch of a single row is left out, as batch
    norm can't train on it. On the CPU with one thread, the weights are the same bit for bit from run to run, and
    whether or not training was killed and resumed. Torch's global generators of the CPU and of the device are left as
    they were found.

    Args:
        model: with one table per field of ``data``; moved to the config's device.
        data: train split to learn from, validation split to select by.
        config: how to train.
        checkpoint_dir: where to write a checkpoint after every evaluation; None for nowhere.
        resume: go on from the checkpoint in ``checkpoint_dir``, or from the beginning where there is none.
        callbacks: called in order.

    Raises:
        ConfigError: if config, model and data do not go together.
        InputError: if a split is empty, or the AUC is monitored and validation labels are all equal.
        IncompatibleStateError: if the checkpoint is damaged, or of another model, data set or config.
        TrainingError: if the loss is no longer finite.
    """
    config = config or TrainingConfig()
    if resume and checkpoint_dir is None:
        raise ConfigError("fit(resume=True) needs checkpoint_dir")
    check_data(model, data, config)
    device = device_named(config.device)
    path = None if checkpoint_dir is None else Path(checkpoint_dir) / checkpoint.FILE_NAME
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        run = _Run(model.to(device), data, config, device, path, callbacks)
        if resume and path is not None and path.is_file():
            run.load(path)
        return run.run()


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


class _Run:
    def __init__(
        self,
        model: CTRModel,
        data: ClickLog,
        config: TrainingConfig,
        device: torch.device,
        path: Path | None,
        callbacks: Sequence[Callback],
    ) -> None:
        self.model, self.data, self.config, self.device = model, data, config, device
        self.path, self.callbacks = path, callbacks
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(model, config)
        single_left = len(data.train) % config.batch_size == 1 and len(data.train) > 1
        self.batches = data.train.batches(
            config.batch_size, shuffle=True, seed=config.seed, drop_last=single_left, device=device
        )
        self.validation = data.validation.batches(config.eval_batch_size, device=device)
        self.progress = _Progress()
        self.best_weights: dict[str, Tensor] = {}

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> TrainingResult:
        """Train to the end."""
        stream = self._stream()
        total = self.config.epochs * len(self.batches)
        total = total if self.config.max_steps is None else min(total, self.config.max_steps)
        disable = None if self.config.progress else True
        with tqdm(total=total, initial=self.progress.step, desc=self.data.name, unit="step", disable=disable) as bar:
            self._set_rounding()
            while (stopped := self._stopped()) is None:
                train_loss = self._train(stream, bar)
                self._set_rounding()
                evaluation = self._evaluate(train_loss)
                bar.set_postfix_str(f"epoch {evaluation.epoch}, {self.config.monitor} {self._value(evaluation):.5f}")
        if self.config.restore_best and self.best_weights:
            self.model.load_state_dict(self.best_weights)
        return self._result(stopped)

    def _is_rounding(self) -> bool:
        return self.progress.epoch >= self.config.float_epochs or self.progress.step == self.config.max_steps

    def _set_rounding(self) -> None:
        self.model.tables.set_rounding_(self._is_rounding())

    def _stream(self) -> Iterator[tuple[Batch, bool]]:
        """All batches to come, each with whether it is its epoch's last."""
        start, last = self.progress.batch, len(self.batches) - 1
        for epoch in range(self.progress.epoch, self.config.epochs):
            for index, batch in enumerate(self.batches.epoch(epoch, start), start):
                yield batch, index == last
            start = 0

    def _train(self, stream: Iterator[tuple[Batch, bool]], bar: tqdm) -> float:
        """Train until the next evaluation is due; return the mean loss."""
        self.model.train()
        progress, started, rows = self.progress, time.perf_counter(), 0
        total = torch.zeros((), device=self.device)
        for batch, ends_epoch in stream:
            size = len(batch.labels)
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

    def _step(self, batch: Batch) -> Tensor:
        logits = self.model(batch.ids, batch.dense)
        loss = F.binary_cross_entropy_with_logits(logits, batch.labels)
        (loss + self.model.penalty()).backward()
        if self.config.clip_norm is not None:
            clip_gradients(self.parameters, self.config.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

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
        metrics, progress = evaluate(self.model, self.validation), self.progress
        rate = self.optimizers[-1].param_groups[-1]["lr"]
        improved = self._is_rounding() and self._is_improvement(metrics)
        evaluation = Evaluation(
            progress.step, progress.epoch, metrics.auc, metrics.log_loss, train_loss, rate, improved
        )
        logger.info("%s: step %d, epoch %d: %s", self.data.name, progress.step, progress.epoch, metrics)
        progress.history.append(evaluation)
        if improved:
            progress.bad_evaluations = 0
            if self.config.restore_best or self.config.plateau_rewind:
                self.best_weights = {name: checkpoint.to_cpu(t) for name, t in self.model.state_dict().items()}
        elif self._is_rounding():
            progress.bad_evaluations += 1
            self._lower_learning_rates()
            if self.config.plateau_rewind and self.best_weights:
                self.model.load_state_dict(self.best_weights)
        for callback in self.callbacks:
            callback.on_evaluation(self.model, evaluation)
        self._save()
        return evaluation

    def _is_improvement(self, metrics: Metrics) -> bool:
        best = self.progress.best
        if best is None:
            return True
        return self.config.sign * (self._value(metrics) - self._value(best)) > self.config.min_delta

    def _value(self, metrics: Metrics | Evaluation) -> float:
        return metrics.auc if self.config.monitor == "auc" else metrics.log_loss

    def _lower_learning_rates(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                lowered = max(group["lr"] * self.config.plateau_factor, self.config.min_learning_rate)
                group["lr"] = min(group["lr"], lowered)

    def _result(self, stopped: str) -> TrainingResult:
        progress, best = self.progress, self.progress.best
        if best is None:
            raise IncompatibleStateError(f"{self.path} holds a run without a single evaluation: delete it")
        return TrainingResult(
            validation=Metrics(best.auc, best.log_loss, len(self.data.validation)),
            best=best,
            history=tuple(progress.history),
            steps=progress.step,
            epochs=progress.epoch,
            stopped=stopped,
            train_seconds=progress.train_seconds,
            samples_per_second=progress.rows / max(progress.train_seconds, 1e-9),
        )

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What must not differ between a run and its continuation."""
        config = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in MAY_CHANGE}
        return {
            **config,
            "data": self.data.content_hash,
            "model": type(self.model).__name__,
            "tables": repr(self.model.tables.config),
        }

    def _save(self) -> None:
        if self.path is None:
            return
        tensors: dict[str, Tensor] = {}
        optimizers = checkpoint.pack([o.state_dict() for o in self.optimizers], "optimizer", tensors)
        tensors |= checkpoint.with_prefix("model.", self.model.state_dict())
        tensors |= checkpoint.with_prefix("best.", self.best_weights)
        tensors |= checkpoint.with_prefix("random.", checkpoint.random_state(self.device))
        info = {
            "identity": self._identity(),
            "progress": dataclasses.asdict(self.progress),
            "optimizers": optimizers,
        }
        checkpoint.write_checkpoint(self.path, tensors, info)

    def load(self, path: Path) -> None:
        """Take over the state of a checkpoint."""
        tensors, info = checkpoint.read_checkpoint(path)
        for name, value in self._identity().items():
            if info["identity"].get(name) != value:
                raise IncompatibleStateError(
                    f"{path} was trained with {name}={info['identity'].get(name)!r}, not {value!r}: "
                    "use the same, or another checkpoint_dir"
                )
        saved = info["progress"]
        saved["history"] = [Evaluation(**evaluation) for evaluation in saved["history"]]
        self.progress = _Progress(**saved)
        self.best_weights = checkpoint.without_prefix("best.", tensors)
        try:
            self.model.load_state_dict(checkpoint.without_prefix("model.", tensors))
        except RuntimeError as error:
            raise IncompatibleStateError(f"{path} is of a model of another shape: {error}") from error
        for optimizer, state in zip(self.optimizers, checkpoint.unpack(info["optimizers"], tensors), strict=True):
            optimizer.load_state_dict(state)
        checkpoint.set_random_state(checkpoint.without_prefix("random.", tensors), self.device)
        logger.info("resumed %s at step %d, epoch %d", path, self.progress.step, self.progress.epoch)
