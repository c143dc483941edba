"""Phases: what a method asks of a training loop, as data, so that any loop can run any method."""

from __future__ import annotations

from dataclasses import dataclass

from embcomp.errors import ConfigError, did_you_mean

KINDS = ("train", "search")
PARAMETERS = ("network", "tables", "architecture")


@dataclass(frozen=True)
class Phase:
    """One stage of a method's training. Most methods have a single one, ``Phase("train")``.

    Attributes:
        name: what it is, for people and checkpoints; different within a method.
        kind: ``"train"``: steps by gradients; ``"search"``: the tables choose among candidates by asking for
            evaluations, and no weight changes.
        trains: which parameters are trained: ``"network"`` (all that are not the tables'), ``"tables"`` (rows, scales,
            projections), ``"architecture"`` (those of `EmbeddingTables.architecture`, by optimizers of their own).
        penalty: whether the tables' `penalty` is added to the loss.
        rewind: whether the whole model begins from the weights it had before the first phase.
        bilevel: whether architecture parameters learn from validation batches, in turn with the others' steps on
            training batches.
        passes: names of the lookup modes that every step runs the model in, one after the other on the same batch; the
            loss is the mean over them. Empty for one plain pass. Statistics of batch norms follow the first.
        distill: weight of the divergence of the other passes' predictions from those of the first.
        epochs: at most so many; None for as many as the loop is told.
        patience: evaluations without improvement after which the phase stops; None for as the loop is told.
        any_budget: whether it is the same for every budget, so that of a sweep over budgets one run can do it for all.
            `Phases.weights` is then all that the phases after it need of it.
    """

    name: str
    kind: str = "train"
    trains: tuple[str, ...] = ("network", "tables")
    penalty: bool = True
    rewind: bool = False
    bilevel: bool = False
    passes: tuple[str, ...] = ()
    distill: float = 0.0
    epochs: int | None = None
    patience: int | None = None
    any_budget: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"Phase({self.name!r}, kind={self.kind!r}): {did_you_mean(self.kind, KINDS)}")
        for parameters in self.trains:
            if parameters not in PARAMETERS:
                raise ConfigError(f"Phase({self.name!r}, trains={self.trains!r}): choose from {', '.join(PARAMETERS)}")
        if self.bilevel and "architecture" not in self.trains:
            raise ConfigError(f"Phase({self.name!r}, bilevel=True) trains no architecture: add it to trains=")

    @property
    def is_search(self) -> bool:
        """Whether it is a search."""
        return self.kind == "search"


PLAIN = (Phase("train"),)
"""The phases of a method that trains in one go."""
