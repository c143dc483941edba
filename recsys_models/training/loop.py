"""The training loop: ``fit(model, data, TrainingConfig(...))`` takes a model through the phases of its tables."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from embcomp.errors import ConfigError, IncompatibleStateError
from embcomp.memory import format_bytes
from embcomp.training import Phase, Phases, search_files
from recsys_models.data import ClickLog, SessionLog
from recsys_models.training import checkpoint
from recsys_models.training.clicks import ClickTask
from recsys_models.training.config import TrainingConfig
from recsys_models.training.devices import device_named
from recsys_models.training.identity import describe_modules
from recsys_models.training.result import Callback, PhaseResult, TrainingResult
from recsys_models.training.run import Run
from recsys_models.training.sessions import SessionTask
from recsys_models.training.shared import SharedPhases
from recsys_models.training.task import Task

logger = logging.getLogger(__name__)

MAY_CHANGE = ("epochs", "max_steps", "patience", "eval_batch_size", "search_at_once", "device", "progress")
"""Fields of the config that may differ between a run and its continuation."""

SEARCH_FILE = "search.json"
"""Where a search saves every round, beside the checkpoint; kept until a checkpoint has what it found."""


def fit(
    model: nn.Module,
    data: ClickLog | SessionLog,
    config: TrainingConfig | None = None,
    *,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    shared_dir: str | Path | None = None,
) -> TrainingResult:
    """Train a click model or a session model in place, on its loss plus the tables' penalty.

    The model goes through the phases of its tables' strategy, each with an early stopping of its own; searches compare
    candidates on the validation split. Most strategies have a single phase.

    The order of rows depends on the seed and the epoch alone. Of clicks, a last batch of a single row is left out, as
    batch norm can't train on it. On the CPU with one thread, the weights are the same bit for bit from run to run, and
    whether or not training was killed and resumed. Torch's global generators of the CPU and of the device are left as
    they were found.

    Args:
        model: built for ``data``; moved to the config's device.
        data: clicks or sessions; the train split to learn from, the validation split to select by.
        config: how to train.
        checkpoint_dir: where to write a checkpoint after every evaluation; None for nowhere.
        resume: go on from the checkpoint in ``checkpoint_dir``, or from the beginning where there is none. False first
            deletes what is there, so that a run that is killed before its first evaluation is not taken for another.
        callbacks: called in order.
        shared_dir: folder for runs whose options differ in nothing but the budget of the tables: the first phases, as
            far as they are the same for every budget, are done by one run, and the others begin where they end. The
            result is the same, bit for bit. None to do every phase.

    Raises:
        ConfigError: if config, model and data do not go together.
        InputError: if a split is empty, or the AUC is monitored and validation labels are all equal.
        IncompatibleStateError: if the checkpoint is damaged, or of another model, data set or config.
        TrainingError: if the loss is no longer finite.
    """
    config = config or TrainingConfig()
    if resume and checkpoint_dir is None:
        raise ConfigError("fit(resume=True) needs checkpoint_dir")
    if not isinstance(data, ClickLog | SessionLog):
        raise ConfigError(f"fit: data is a {type(data).__name__}, not a ClickLog or SessionLog, which have the splits")
    task: Task = SessionTask(data) if isinstance(data, SessionLog) else ClickTask(data)
    task.check(model, task.monitored(config)[0])
    task.ready_(model)
    device = device_named(config.device)
    path = None if checkpoint_dir is None else Path(checkpoint_dir) / checkpoint.FILE_NAME
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        training = _Training(model.to(device), task, config, device, path, callbacks, shared_dir)
        try:
            return training.run(resume)
        finally:
            training.phases.release_()


class _Training:
    """A model on its way through the phases; saved at the beginning of each, and after every evaluation."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainingConfig,
        device: torch.device,
        path: Path | None,
        callbacks: Sequence[Callback],
        shared_dir: str | Path | None,
    ) -> None:
        self.model, self.task, self.config, self.device = model, task, config, device
        self.path, self.callbacks = path, callbacks
        self.phases = Phases(model)
        self.identity = self._identity()
        self.shared = None
        if shared_dir is not None:
            configs = repr([tables.config_of_any_budget() for tables in self.phases.groups])
            common = {**self.identity, "tables": configs, "limits": _limits(config)}
            self.shared = SharedPhases(Path(shared_dir), common)
        self.done: list[PhaseResult] = []
        self.current: Run | None = None

    def run(self, resume: bool) -> TrainingResult:
        """Go through all phases, from the beginning or from a checkpoint."""
        saved = None
        if resume and self.path is not None and self.path.is_file():
            saved = self._read(self.path)
        elif self.path is not None:
            self.path.unlink(missing_ok=True)  # else a run that is killed early would go on as the one before it
            self._forget_searches()
        for phase in self.phases.phases[len(self.done) :]:
            self.phases.enter_(phase)
            if saved is not None:
                self._load(*saved)
            for callback in self.callbacks:
                callback.on_phase_start(self.model, phase)
            self.done.append(self._run(phase, saved))
            self.phases.leave_(phase)
            saved = None
        return self._result()

    def _run(self, phase: Phase, saved: tuple[dict[str, Tensor], dict[str, Any]] | None) -> PhaseResult:
        if phase.is_search:
            return self._search(phase, saved)
        if self.shared is None or not phase.any_budget:
            return self._train(phase, saved)
        result = None if saved is not None else self.shared.take_(self.phases, self.device)
        if result is None:
            result = self._train(phase, saved)
            self.shared.write(self.phases, self.device, result)
        return result

    def _train(self, phase: Phase, saved: tuple[dict[str, Tensor], dict[str, Any]] | None) -> PhaseResult:
        config = _config_of(self.config, phase)
        name = self.task.name if len(self.phases.phases) == 1 else f"{self.task.name} {phase.name}"
        run = Run(name, self.phases, self.model, self.task, config, self.device, self.callbacks, self._save)
        self.current = run
        if saved is not None:
            run.load(*saved)
        elif self.done:
            self._save()
        result = run.run()
        self.current = None
        return result

    def _search(self, phase: Phase, saved: tuple[dict[str, Tensor], dict[str, Any]] | None) -> PhaseResult:
        if saved is None:
            self._save()
        started = time.perf_counter()
        candidates = self.task.search(self.model, self.config, self.device)
        at_once = min(self.config.search_at_once, candidates.most_at_once or self.config.search_at_once)
        monitor, sign = self.task.monitored(self.config)
        disable = None if self.config.progress else True
        with tqdm(desc=f"{self.task.name} {phase.name}", unit="round", disable=disable) as bar:

            def report(done: int, most: int, best: float, size: int | None) -> None:
                bar.total, bar.n = most, done
                told = f"best {monitor} {sign * best:.5f}" + ("" if size is None else f", {format_bytes(size)}")
                bar.set_postfix_str(told)
                logger.info("%s: round %d of %d, %s", self.task.name, done, most, told)

            found = self.phases.search_(
                candidates.evaluate,
                candidates.evaluate_many,
                candidates.recalibrate,
                at_once=at_once,
                checkpoint=None if self.path is None else self.path.with_name(SEARCH_FILE),
                keep_checkpoint=True,
                report=report,
            )
        size = sum(tables.memory().serve_bytes for tables in self.phases.groups)
        logger.info("%s: %s of %d candidates, %d B", self.task.name, found.candidate, found.num_evaluated, size)
        seconds = time.perf_counter() - started
        return PhaseResult(phase.name, 0, 0, 0, seconds, "search", None, (), found.candidate, found.num_evaluated)

    def _result(self) -> TrainingResult:
        trained = [phase for phase in self.done if phase.best is not None]
        last = trained[-1]
        assert last.best is not None
        seconds = sum(phase.seconds for phase in trained)
        return TrainingResult(
            best=last.best,
            history=tuple(evaluation for phase in self.done for evaluation in phase.history),
            steps=sum(phase.steps for phase in self.done),
            epochs=sum(phase.epochs for phase in self.done),
            stopped=last.stopped,
            train_seconds=seconds,
            samples_per_second=sum(phase.rows for phase in trained) / max(seconds, 1e-9),
            phases=tuple(self.done),
        )

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What must not differ between a run and its continuation."""
        config = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in MAY_CHANGE}
        return {
            **config,
            "data": self.task.content_hash,
            **describe_modules(self.model),
            "tables": repr([tables.built_config for tables in self.phases.groups]),
        }

    def _save(self) -> None:
        if self.path is None:
            return
        tensors: dict[str, Tensor] = {}
        info: dict[str, Any] = {
            "identity": self.identity,
            "done": [dataclasses.asdict(phase) for phase in self.done],
            "phases": checkpoint.pack(self.phases.state_dict(), "phases", tensors),
        }
        if self.current is not None:
            info["run"] = checkpoint.pack(self.current.state(), "run", tensors)
        tensors |= checkpoint.with_prefix("model.", self.model.state_dict())
        tensors |= checkpoint.with_prefix("random.", checkpoint.random_state(self.device))
        checkpoint.write_checkpoint(self.path, tensors, info)
        self._forget_searches()  # what they found is in the checkpoint, which is of a later state

    def _forget_searches(self) -> None:
        if self.path is not None:
            for path in search_files(self.path.with_name(SEARCH_FILE), len(self.phases.groups)):
                path.unlink(missing_ok=True)

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, info = checkpoint.read_checkpoint(path)
        own, saved = self.identity, info["identity"]
        for name in own | saved:
            if saved.get(name) != own.get(name):
                raise IncompatibleStateError(
                    f"{path} was trained with {name}={saved.get(name)!r}, not {own.get(name)!r}: "
                    "use the same, or another checkpoint_dir"
                )
        self.done = [PhaseResult.from_dict(values) for values in info["done"]]
        return tensors, info

    def _load(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Take over the state of a checkpoint, within the phase that it was written in."""
        try:
            self.model.load_state_dict(checkpoint.without_prefix("model.", tensors))
        except RuntimeError as error:
            raise IncompatibleStateError(f"{self.path} is of a model of another shape: {error}") from error
        self.phases.load_state_dict(checkpoint.unpack(info["phases"], tensors))
        checkpoint.set_random_state(checkpoint.without_prefix("random.", tensors), self.device)
        logger.info("resumed %s in phase %s", self.path, self.phases.phase.name)


def _limits(config: TrainingConfig) -> dict[str, Any]:
    """What may change when a run goes on, but not between runs that share a phase."""
    return {"epochs": config.epochs, "max_steps": config.max_steps, "patience": config.patience}


def _config_of(config: TrainingConfig, phase: Phase) -> TrainingConfig:
    """The config of a phase, with the limits that it sets itself."""
    epochs = config.epochs if phase.epochs is None else phase.epochs
    patience = config.patience if phase.patience is None else phase.patience
    return replace(config, epochs=epochs, patience=patience, float_epochs=min(config.float_epochs, epochs - 1))
