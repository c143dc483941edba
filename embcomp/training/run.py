"""Phases in any training loop: what is trained when, the loss of a step, and searches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embcomp.config import strategy_of
from embcomp.errors import ConfigError, InputError
from embcomp.hooks import Loss, Predict, TrainingStep
from embcomp.phases import PLAIN, Phase
from embcomp.sites import find_groups, unwrapped
from embcomp.tables import EmbeddingTables
from embcomp.training.batch_norms import unmoved
from embcomp.training.greedy import GreedyCut
from embcomp.training.joint_cut import JointCut
from embcomp.training.reassigned import step_tables_
from embcomp.training.search import Search
from embcomp.training.searching import (
    Evaluate,
    EvaluateMany,
    Report,
    Searched,
    SearchLoop,
    SearchResult,
    make_folder,
    search_files,
)

_WITHOUT_ROWS = "without such rows choose a strategy that has no search, such as optembed with search_dims=False"


class Phases:
    """Takes a model through the phases of its tables' strategy, whatever loop trains it.

        phases = Phases(model)
        for phase in phases:
            phases.enter_(phase)
            if phase.is_search:
                phases.search_(evaluate)
            else:
                ...                          # make an optimizer of phases.parameters(); then, for every batch:
                phases.loss(predict, loss).backward()
                optimizer.step()
                phases.step_()
            phases.leave_(phase)

    Args:
        model: with compressed tables; several groups of them may go through the same phases, those that have only one
            train along with the network.

    Raises:
        ConfigError: if the model has no compressed tables, or two strategies with different phases.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.groups = list(find_groups(model).values())
        if not self.groups:
            raise ConfigError(f"{type(model).__name__} has no compressed tables: call compress_ first")
        self._unfinished = [tables for tables in self.groups if not tables.is_final]  # others are as they are
        self.phases = _common_phases(self._unfinished)
        self.phase = self.phases[0]
        self._architecture = [group for tables in self._unfinished for group in tables.architecture()]
        chosen = {id(p) for group in self._architecture for p in group["params"]}
        of_tables = {id(p): p for tables in self.groups for p in tables.parameters()}
        trained = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
        self._own = {
            "network": [p for p in trained if id(p) not in of_tables],
            "tables": [p for p in trained if id(p) in of_tables],
            "architecture": [p for group in self._architecture for p in group["params"]],
        }
        self._optimizer: torch.optim.Optimizer | None = None
        self._searches: list[tuple[Searched, Search]] = []
        self._found: list[SearchResult] = []
        self._is_searched = False
        self.initial = self._first_weights() if any(phase.rewind for phase in self.phases) else {}

    def __iter__(self) -> Iterator[Phase]:
        return iter(self.phases)

    # ---- phases -----------------------------------------------------------------------------------------------------

    def enter_(self, phase: Phase) -> None:
        """Begin a phase: rewind if it says so, and let only what it trains have gradients.

        Raises:
            ConfigError: if it is none of `phases`.
        """
        if phase not in self.phases:
            names = ", ".join(repr(own.name) for own in self.phases)
            raise ConfigError(f"enter_({phase!r}): give a phase of this model; Phases(model).phases has {names}")
        self.phase, self._is_searched = phase, False
        self._searches, self._found = [], []
        if phase.rewind:
            self.load_weights_(self.initial)
        for name, parameters in self._own.items():
            for p in parameters:
                p.requires_grad_(name in phase.trains and not phase.is_search)
        self._mark_(phase)
        for tables in self._concerned(phase):
            tables.enter_phase_(phase)
        self._optimizer = None
        if self._own["architecture"] and "architecture" in phase.trains:
            self._optimizer = torch.optim.SGD(self._architecture)

    def leave_(self, phase: Phase) -> None:
        """End a phase; afterwards all but architecture parameters has gradients again.

        Raises:
            ConfigError: if it is a search, and nothing was searched: what training came to would be lost.
        """
        if phase.is_search and not self._is_searched:
            raise ConfigError(
                f"phase {phase.name!r} ends without a search: call search_(evaluate) in it, with evaluate judging the "
                f"model on validation rows; {_WITHOUT_ROWS}"
            )
        for tables in self._concerned(phase):
            tables.leave_phase_(phase)
        self.release_()
        if phase != self.phases[-1]:
            for tables in self._unfinished:
                tables.current_phase = phase.name  # until the next one: what later ones go back to is still needed

    def release_(self) -> None:
        """Give gradients back to all but architecture parameters, as `leave_` does, where a phase was broken off."""
        for name, parameters in self._own.items():
            for p in parameters:
                p.requires_grad_(name != "architecture")
                p.grad = None
        self._mark_(None)

    def parameters(self) -> list[nn.Parameter]:
        """What the loop's optimizer trains in this phase; architecture parameters have their own, inside `step_`."""
        chosen = {id(p) for name in ("network", "tables") if name in self.phase.trains for p in self._own[name]}
        return [p for p in self.model.parameters() if id(p) in chosen]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model: first weights, and optimizers of architecture parameters."""
        return {
            "initial": self.initial,
            "architecture": None if self._optimizer is None else self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict`, in the phase that it is of."""
        self.initial = dict(state["initial"])
        if self._optimizer is not None and state["architecture"] is not None:
            self._optimizer.load_state_dict(state["architecture"])

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of architecture parameters in this phase, one or none."""
        return [] if self._optimizer is None else [self._optimizer]

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters and buffers by name, but for tables' buffers, which hold what was chosen.

        Names are those of the model itself, where ``torch.compile`` or ``DistributedDataParallel`` wraps it.
        """
        buffers = {id(b) for tables in self.groups for b in tables.buffers()}
        state = unwrapped(self.model).state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if id(tensor) not in buffers}

    @torch.no_grad()
    def load_weights_(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what `weights` gave, or some of it."""
        own = unwrapped(self.model).state_dict(keep_vars=True)
        for name, tensor in weights.items():
            own[name].copy_(tensor)

    # ---- steps ------------------------------------------------------------------------------------------------------

    def loss(self, predict: Predict, loss: Loss) -> Tensor:
        """The loss of a training step.

        Args:
            predict: runs the model on the batch: logits ``(B,)``, or ``(B, C)`` of one class in C. Called once per pass
                of the phase, or as often as the tables' `EmbeddingTables.training_loss` wants it.
            loss: the task's loss of such logits, a scalar.

        Returns:
            The mean over passes, plus distillation and the tables' penalty where the phase has them: a scalar.

        Raises:
            ConfigError: if a strategy's ``training_loss`` leaves out the step that it is given.
        """
        calls: list[Predict] = []

        def plain(predict: Predict, loss: Loss) -> Tensor:
            calls.append(predict)
            with contextlib.nullcontext() if len(calls) == 1 else unmoved(self.model):
                return self._over_passes(predict, loss) if self.phase.passes else loss(predict())

        step: TrainingStep = plain
        owners = [tables for tables in self.groups if tables.has_own_step]
        for tables in owners:
            step = partial(tables.training_loss, self.phase, step)
        total = step(predict, loss)
        if not calls:
            names = " and ".join(type(tables).__name__ for tables in owners)
            raise ConfigError(
                f"training_loss of {names} never calls the step that it is given, which leaves out passes of the phase "
                "and steps of other tables: call it with predict and loss, or with others made of them"
            )
        if self.phase.penalty:
            total = total + torch.stack([tables.penalty() for tables in self.groups]).sum()
        return total

    def _over_passes(self, predict: Predict, loss: Loss) -> Tensor:
        passes, losses = self.phase.passes, list[Tensor]()
        teacher: Tensor | None = None
        for name in passes:
            for tables in self.groups:
                tables.set_pass_(name)
            # Statistics of batch norms are those of the first pass, in whose form the model is evaluated.
            with contextlib.nullcontext() if teacher is None else unmoved(self.model):
                logits = predict()
            losses.append(loss(logits))
            if teacher is None:
                teacher = logits.detach()
            elif self.phase.distill:
                losses[-1] = losses[-1] + self.phase.distill * _divergence(teacher, logits)
        for tables in self.groups:
            tables.set_pass_(passes[0])
        return torch.stack(losses).mean()

    def step_(self, *optimizers: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
        """After the loop's optimizers: the step of architecture parameters, and what strategies do after one.

        Args:
            optimizers: the loop's; of rows that went to other ids they remember nothing afterwards. Strategies other
                than ``dynamic`` need none.
            scaler: by which the loss was scaled, if it was, before its ``update``: architecture parameters learn from
                gradients as they are without it, and not at all where those overflow.
        """
        if self._optimizer is not None and not self.phase.bilevel:
            if scaler is None or not any(p.grad is not None for p in self._own["architecture"]):
                self._optimizer.step()
            else:
                scaler.step(self._optimizer)
            self._optimizer.zero_grad(set_to_none=True)
        step_tables_(self.groups, *optimizers)

    def architecture_step_(self, predict: Predict, loss: Loss) -> None:
        """In a bilevel phase, after `step_`: a step of the architecture parameters alone, on a validation batch."""
        if self._optimizer is None or not self.phase.bilevel:
            raise ConfigError(f"phase {self.phase.name!r} is not bilevel: there is no step on validation batches")
        self._optimizer.zero_grad(set_to_none=True)
        others = self.parameters()
        try:
            for p in others:
                p.requires_grad_(False)
            with unmoved(self.model):  # statistics are those of training batches
                self.loss(predict, loss).backward()
        finally:
            for p in others:
                p.requires_grad_(True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    # ---- searches ---------------------------------------------------------------------------------------------------

    def search_(
        self,
        evaluate: Evaluate,
        evaluate_many: EvaluateMany | None = None,
        recalibrate: Callable[[], None] | None = None,
        at_once: int = 8,
        num_finalists: int = 5,
        checkpoint: str | Path | None = None,
        report: Report | None = None,
        keep_checkpoint: bool = False,
    ) -> SearchResult:
        """Run the search of this phase, and adopt what it finds.

        Several groups that are cut, as those of ``nested``, are cut together; others are searched one after the other.

        Where an evaluation raises, or is interrupted, nothing is lost: call it again to go on from the last round.

        Args:
            evaluate: how good the model is with the tables as they are, higher being better, on validation rows.
            evaluate_many: ``(P) -> P values`` for P candidates at once, for a model that is called with ids
                ``(P·B, …)`` that are P copies of each batch; may look at fewer rows, the same ones for all. None to
                call ``evaluate`` for each.
            recalibrate: runs the model on training batches; for finalists, and for what is adopted, batch-norm
                statistics are taken from that.
            at_once: P, at most.
            num_finalists: candidates that are compared by ``evaluate``, once ``evaluate_many`` has found them.
            checkpoint: JSON file that every round is saved to, whole, and that a later call goes on from; its folder is
                created. Further searches have files beside it, `embcomp.training.search_files`.
            report: called after every round with rounds done, rounds at most, and the value and the serve bytes (None
                where tables don't know) of the form that would be chosen now.
            keep_checkpoint: leave the checkpoint's files when the search is over, for a loop that saves the model next
                and deletes them then: killed in between, it goes on from what was found. False deletes them.

        Returns:
            What the search came to; of several, the last one, whose value is that of all together.

        Raises:
            ConfigError: if the phase is no search.
            InputError: if ``evaluate`` can't be called, an evaluation is no finite number, ``at_once`` or
                ``num_finalists`` is below 1, or ``checkpoint`` can't be a file.
            IncompatibleStateError: if the checkpoint is of another search: of other weights, or another config.
            WriteError: if the checkpoint can't be written.
        """
        if not self.phase.is_search:
            raise ConfigError(f"phase {self.phase.name!r} is no search: there is nothing to search for")
        if not callable(evaluate):
            raise InputError(
                f"search_(evaluate={evaluate!r}): give a function that returns how good the model is on validation "
                f"rows; {_WITHOUT_ROWS}"
            )
        loop = SearchLoop(self.model, evaluate, evaluate_many, recalibrate, at_once, num_finalists, report)
        self._searches = self._searches or self._make_searches()
        paths = self._search_paths(checkpoint, len(self._searches))
        for number in range(len(self._found), len(self._searches)):  # those before were found before it was interrupted
            self._found.append(loop.run(*self._searches[number], paths[number]))
        for path in paths:
            if path is not None and not keep_checkpoint:
                path.unlink(missing_ok=True)
        result = self._found[-1]
        self._searches, self._found, self._is_searched = [], [], True
        return result

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _mark_(self, phase: Phase | None) -> None:
        """Tell tables the phase, so that a checkpoint does not take them for frozen ones, or lacks first weights."""
        trained = {id(p) for p in self._own["tables"]}
        is_paused = phase is not None and (phase.is_search or "tables" not in phase.trains)
        for tables in self._unfinished:
            tables.is_paused = is_paused and any(id(p) in trained for p in tables.parameters())
            tables.current_phase = None if phase is None or len(self.phases) == 1 else phase.name

    def _make_searches(self) -> list[tuple[Searched, Search]]:
        groups = self._concerned(self.phase)
        searches = [tables.make_search() for tables in groups]
        cuts = [search for search in searches if isinstance(search, GreedyCut)]
        if len(groups) > 1 and len(cuts) == len(groups):
            joint = JointCut(groups, cuts)
            return [(joint, joint.search)]
        return list(zip(groups, searches, strict=True))

    def _search_paths(self, checkpoint: str | Path | None, number: int) -> Sequence[Path | None]:
        if checkpoint is None:
            return [None] * number
        make_folder(Path(checkpoint))
        return search_files(checkpoint, number)

    def _concerned(self, phase: Phase) -> list[EmbeddingTables]:
        return [tables for tables in self._unfinished if phase in tables.phases()]

    def _first_weights(self) -> dict[str, Tensor]:
        """What a rewind restores: all weights but architecture parameters."""
        chosen = {id(p) for p in self._own["architecture"]}
        return {name: tensor.detach().clone() for name, tensor in self.weights().items() if id(tensor) not in chosen}


def _divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """Kullback–Leibler divergence from the teacher: of Bernoulli logits ``(B,)`` or ``(B, 1)``, or categorical ones.

    Those are ``(B, C)``, C being at least 2.
    """
    if logits.dim() == 1 or logits.shape[1:] == (1,):
        wanted = torch.sigmoid(teacher)
        entropy = F.binary_cross_entropy_with_logits(teacher, wanted)
        return F.binary_cross_entropy_with_logits(logits, wanted) - entropy
    return F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")


def _common_phases(groups: Sequence[EmbeddingTables]) -> tuple[Phase, ...]:
    found = {tables.phases(): strategy_of(tables.config).name for tables in groups if tables.phases() != PLAIN}
    if len(found) > 1:
        raise ConfigError(
            f"the strategies {' and '.join(found.values())} train in different phases, so one model can't have both: "
            "give all its tables one of them"
        )
    return next(iter(found), PLAIN)
