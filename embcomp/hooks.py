"""What strategies may write beside their lookups: training in phases, searches, rows that change hands, growth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from embcomp.config import strategy_of
from embcomp.errors import ConfigError
from embcomp.phases import PLAIN, Phase
from embcomp.specs import TableSpec

if TYPE_CHECKING:
    from embcomp.budget import Budget
    from embcomp.training.search import Candidate, FrontPoint, Search

Predict = Callable[[], Tensor]
Loss = Callable[[Tensor], Tensor]
TrainingStep = Callable[[Predict, Loss], Tensor]
Repeat = Callable[[], contextlib.AbstractContextManager[None]]


class TableHooks(nn.Module):
    """The part of `embcomp.EmbeddingTables` that most strategies leave as it is: nothing happens, or it is refused."""

    specs: tuple[TableSpec, ...]
    names: tuple[str, ...]
    num_ids: tuple[int, ...]
    config: Any
    built_config: Any
    chosen_by_budget: ClassVar[tuple[str, ...]] = ()
    """Fields of the config that the budget settles, in strategies with phases that are the same for every budget."""

    def config_of_any_budget(self) -> Any:
        """The config that tables were built with, without what their budget settled."""
        return replace(self.built_config, **dict.fromkeys(self.chosen_by_budget))

    # ---- what strategies with more to train than weights write ------------------------------------------------------

    def phases(self) -> tuple[Phase, ...]:
        """The stages that training goes through; `embcomp.training.Phases` runs them in any loop."""
        return PLAIN

    def enter_phase_(self, phase: Phase) -> None:
        """Get ready for a phase. A run that is resumed within it enters first, and loads its state then."""

    def leave_phase_(self, phase: Phase) -> None:
        """Settle what a phase decides, such as which rows are kept."""

    def architecture(self) -> list[dict[str, Any]]:
        """Parameters that choose the tables' form, as groups of SGD: ``params`` and ``lr``."""
        return []

    def training_loss(self, phase: Phase, step: TrainingStep, predict: Predict, loss: Loss) -> Tensor:
        """The loss of a training step, for strategies that make more of it than passes; the `penalty` is added later.

        Where several groups write this, each gets the step of those before it, so none replaces another.

        Args:
            phase: the one that is trained. Of a bilevel one, steps on validation batches come here too, when only
                architecture parameters have gradients.
            step: ``(predict, loss) -> scalar``, the step as it would be without these tables. To be called once or more
                often, with ``predict`` and ``loss`` or others made of them, and never left out. Batch norms take their
                statistics from the first call.
            predict: runs the model on the batch: logits.
            loss: of such logits, a scalar.

        Returns:
            A scalar that has gradients. Lookups must be back to normal by then.
        """
        return step(predict, loss)

    def set_pass_(self, name: str) -> None:
        """Switch lookups to one of the phase's ``passes``."""

    def repeatable(self) -> Repeat | None:
        """What makes lookups give later in the step what they give from now on, in its backward pass above all.

        Chunks of a catalogue are composed again there, so that only one of them takes memory at a time. Strategies that
        show passes, or draw what they show, write this, or have all their ids composed at once.

        Returns:
            A context in which lookups begin where they are now; None if there is none.
        """
        if not self.training or (self.phases() == PLAIN and not self.has_own_step):
            return contextlib.nullcontext
        return None

    def seen_(self, ids: Tensor, table: Tensor | int | None, blank: Tensor | None) -> None:
        """Note the ids of a lookup in training, with gradients; for strategies that count them.

        Args:
            ids: int64 ``(...)``, as `lookup` gets them.
            table: as in `lookup`.
            blank: bool ``(...)``, ids whose vectors are zero whatever is stored; None for none.
        """

    def step_(self) -> None:
        """What is to be done after every step of the optimizers."""

    def reassigned_(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Rows that went to other ids since this was asked last: parameter, and int64 ``(n,)`` rows of it.

        The optimizer's state of these rows is that of other ids: `embcomp.training.reset_rows_` clears it.
        """
        return []

    def row_owners(self) -> tuple[nn.Parameter, Tensor] | None:
        """A parameter whose rows change hands, and the id that each is of, int64 ``(R,)``; None where none does."""
        return None

    def make_search(self) -> Search:
        """What chooses among candidates in a phase of kind ``"search"``."""
        raise NotImplementedError

    def show_(self, candidates: Sequence[Candidate]) -> None:
        """Let lookups show candidates until `hide_`: of P, ids ``(P·B, …)`` are P copies of a batch, one for each."""
        raise NotImplementedError

    def hide_(self) -> None:
        """Show no candidates any more; called when a search ends, before `adopt_`, and when it breaks off."""

    def candidate_bytes(self, candidate: Candidate) -> int | None:
        """Serve bytes of the form that `show_` shows; cheap, for reports. None where nobody knows."""
        return None

    def adopt_(self, candidate: Candidate) -> None:
        """Take the form that a search has chosen."""
        raise NotImplementedError

    def adopt_cut_(self, front: Sequence[FrontPoint], place: int, limit: int | None) -> None:
        """Take the form that a cut of several groups has come to; strategies may keep the front, and give steps back.

        Args:
            front: this group's form at each step of any group, with the value of all of them together.
            place: which of them.
            limit: bytes that this group may take, so that some of the last steps can be given back; None for any.
        """
        self.adopt_(front[place].candidate)

    def pareto(self) -> list[FrontPoint]:
        """Forms of falling size that one training has led to, with bytes and validation values, the largest first.

        Groups that were cut together have an entry for each step of any of them, so that forms of one come several
        times; values are those of all groups.

        `embcomp.save_pretrained` keeps them with the training form; a state dict alone does not, nor the serving form.
        Values are those that the search evaluated, with batch-norm statistics as training had left them.

        Raises:
            ConfigError: if the strategy has no such front, or it is not there yet.
        """
        raise ConfigError(f"strategy {strategy_of(self.config).name!r} has no front of sizes: 'nested' has one")

    def cut_(self, budget: str | float | Budget) -> None:
        """Go to the form of the front that a budget allows; nothing is trained or evaluated.

        Batch norms of the model keep the statistics of the form before: `embcomp.training.recalibrate_` takes those of
        the new one.

        Raises:
            ConfigError: as `pareto`, and if the tables are finalized.
            BudgetError: if the budget can't be read, or the smallest form takes more.
        """
        self.pareto()

    def front_state(self) -> dict[str, Any] | None:
        """What `pareto` and `cut_` need beside a state dict, as JSON values, to be saved; None where nothing."""
        return None

    def take_specs_(self, specs: Sequence[TableSpec]) -> None:
        """Take over specs of the same tables that began with other deviations, before a state of theirs is loaded."""
        self.specs = tuple(specs)

    def adapt_(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make room for what a saved state of these tables has, and return it with what an older embcomp left out."""
        return state

    def load_front_(self, state: Mapping[str, Any] | None) -> None:
        """Take over a `front_state` of the same tables; None for no front.

        Raises:
            ValueError, KeyError or TypeError: if it is no such state.
        """

    def widths_of(self, table: int | str) -> Tensor | None:
        """Values that are stored for each id alone, int64 ``(V,)``, 0 to D; None where ids share what is stored."""
        return None

    @property
    def has_own_step(self) -> bool:
        """Whether the strategy writes `training_loss`."""
        return type(self).training_loss is not TableHooks.training_loss

    # ---- what strategies that keep rows of tables that grow write ----------------------------------------------------

    def grown_config(self, specs: Sequence[TableSpec], num_slots: Mapping[str, int], is_open: bool) -> Any:
        """The config of the same tables with more ids, for `embcomp.resize_`: whatever has a size keeps it.

        Args:
            specs: as they will be.
            num_slots: table name -> slots that are asked for.
            is_open: whether a budget will choose the number of slots.

        Raises:
            ConfigError: if trained rows can't be kept.
        """
        if num_slots:
            raise ConfigError(
                f"resize_: tables of strategy {strategy_of(self.config).name!r} have no slots, those of 'dynamic' do: "
                f"leave {', '.join(num_slots)} out of num_slots"
            )
        return self._grown_config(specs)

    def _grown_config(self, specs: Sequence[TableSpec]) -> Any:
        raise self.no_growth("keeps ids in ways that depend on how many there are")

    def take_rows_(self, old: Any) -> None:
        """Take over the trained rows of the same tables with fewer ids, whose `grown_config` this has.

        Raises:
            ConfigError: if they can't be kept.
        """
        for index, (spec, ids) in enumerate(zip(self.specs, self.num_ids, strict=True)):
            self.take_table_(index, old, index, ids - spec.num_embeddings)

    def take_table_(self, index: int, old: Any, own: int, last: int) -> None:
        """Take over the trained rows of one table.

        Args:
            index: of the table.
            old: a group of the same class, that keeps the table with fewer ids.
            own: index of the table there.
            last: how many ids stay behind all others: 1 where there is an OOV id, else 0.
        """
        raise NotImplementedError

    def no_growth(self, why: str) -> ConfigError:
        """The error for tables whose trained rows can't be kept when they grow."""
        return ConfigError(
            f"strategy {strategy_of(self.config).name!r} (tables {self._some_names()}) {why}, so trained rows can't be "
            "kept in tables that grow: take to_dense(), add rows for the new ids, plan tables of the new sizes, and "
            "load_dense_ the rows into them; or use unseen='hash' from the start, which takes new ids as they are"
        )

    def _some_names(self) -> str:
        shown = ", ".join(repr(name) for name in self.names[:3])
        return shown if len(self.names) <= 3 else f"{shown} and {len(self.names) - 3} more"
