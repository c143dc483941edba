"""``mixed_dim``: the more ids a table has, the smaller its dimension, by a power law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from embcomp.config import StrategyConfig, register_strategy
from embcomp.errors import ConfigError
from embcomp.mixed import MixedTables, Piece
from embcomp.specs import Knowledge, TableSpec
from embcomp.strategies._allocation import check_table_names
from embcomp.strategies.reduced_dim import projected_piece


@dataclass(frozen=True)
class MixedDimConfig(StrategyConfig):
    """The power law, or the dimensions themselves.

    Attributes:
        alpha: how fast dimensions fall with the number of ids, at least 0; above 1 for the smallest budgets. None to
            let the budget choose; where it is given, a budget is only checked.
        power_of_two: round dimensions to powers of two, as the authors' code does. Steps get coarser, so less of a
            budget is used.
        dims: table name -> d, 1 to D, in place of the power law; None to follow it.
    """

    alpha: float | None = None
    power_of_two: bool = False
    dims: dict[str, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not 0 <= self.alpha < math.inf:
            raise ConfigError(f"MixedDimConfig(alpha={self.alpha!r}): must be a finite number of at least 0")
        if self.alpha is not None and self.dims is not None:
            raise ConfigError("MixedDimConfig: give alpha= for the power law or dims= for each table, not both")


@register_strategy("mixed_dim", MixedDimConfig)
class MixedDimTables(MixedTables):
    """Tables with many ids get few dimensions: ``d = D (V / V_min)^-alpha``, rounded, at least 1.

    "Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems" (arXiv 1909.11810). A row
    of d values is brought to D by a ``(d, D)`` matrix per table, and the table with the fewest ids keeps D. A large
    alpha leaves every larger table one dimension, and alpha 0 leaves all of them D; in between, each value at which
    some table's d changes is a step that the budget can stop at. Tables of one size can't be told apart: where all are
    equal, nothing is compressed.

    We differ from the paper as follows. Its other form counts ``V / k`` ids, for a table that an example looks up k
    times; fields of click logs are looked up once, so we leave it out, and for others there is ``dims``. Nor is a table
    split into blocks by the frequency of its ids (``compact`` does that). Rounding to powers of two is an option, off
    by default, since its steps leave more of a budget unused. A table whose projection would cost what its narrow rows
    save is kept at D. Composed vectors start with the tables' ``init_std``, where the authors' code draws rows and
    matrices by Xavier's rule. Trained tables are fitted by a count-weighted SVD.
    """

    knob = "steps of alpha"
    knob_is_fine = False
    can_be_streamed = True

    def pieces(self) -> list[Piece]:
        dims = self.config.dims
        if dims is None:
            raise ConfigError("MixedDimConfig(dims=None): give dims, or plan with alpha or a budget")
        check_table_names(self.config, "dims", self.names)
        for name in self.names:
            if not 1 <= dims[name] <= self.embedding_dim:
                raise ConfigError(
                    f"MixedDimConfig(dims={{{name!r}: {dims[name]}}}): must be in [1, {self.embedding_dim}]"
                )
        return [
            projected_piece(index, spec, rows, self.config, dims[spec.name], "linear")
            for index, (spec, rows) in enumerate(zip(self.specs, self.num_ids, strict=True))
        ]

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: MixedDimConfig, known: Knowledge) -> tuple[int, int]:
        is_given = config.alpha is not None or config.dims is not None
        return (0, 0) if is_given else (0, len(_alphas(specs, config, known)) - 1)

    @classmethod
    def resize(cls, specs: Sequence[TableSpec], config: MixedDimConfig, size: int, known: Knowledge) -> MixedDimConfig:
        if config.dims is not None:
            return config
        alpha = _alphas(specs, config, known)[size] if config.alpha is None else config.alpha
        by_rule = power_rule(
            [spec.num_embeddings for spec in specs], specs[0].embedding_dim, alpha, config.power_of_two
        )
        dims = {spec.name: dim for spec, dim in zip(specs, by_rule, strict=True)}
        return replace(config, alpha=None, dims=dims)

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: MixedDimConfig, known: Knowledge) -> MixedDimConfig:
        if config.alpha is None and config.dims is None:
            return super().complete(specs, config, known)
        return cls.resize(specs, config, 0, known)


def power_rule(num_ids: Sequence[int], dim: int, alpha: float, power_of_two: bool = False) -> list[int]:
    """Dimensions of tables: ``dim * (V / V_min) ** -alpha``, rounded, in ``[1, dim]``; halves are rounded up.

    Args:
        num_ids: V of each table.
        dim: D, what the smallest table gets.
        alpha: at least 0; infinity leaves 1 to all but the smallest.
        power_of_two: round to the nearest power of two on a logarithmic scale, or to ``dim``; the authors' code rounds
            to a whole number before that.
    """
    levels = _levels(dim, power_of_two)
    steps = _breakpoints(num_ids, dim, power_of_two)
    return [levels[sum(step >= alpha for step in own)] for own in steps]


def _levels(dim: int, power_of_two: bool) -> list[int]:
    """Dimensions that a table can have, rising."""
    return [*(2**power for power in range((dim - 1).bit_length())), dim] if power_of_two else [*range(1, dim + 1)]


def _breakpoints(num_ids: Sequence[int], dim: int, power_of_two: bool) -> list[list[float]]:
    """For each table the largest alphas at which it still has at least its second, third, … level; falling."""
    levels, smallest = _levels(dim, power_of_two), min(num_ids)
    halfway = [math.sqrt(low * high) if power_of_two else (low + high) / 2 for low, high in pairwise(levels)]
    falls = [math.log(dim / half) for half in halfway]
    logs = [math.log1p((number - smallest) / smallest) for number in num_ids]
    return [[fall / log if log else math.inf for fall in falls] for log in logs]


def _alphas(specs: Sequence[TableSpec], config: MixedDimConfig, known: Knowledge) -> list[float]:
    """One alpha per vector of dimensions that the power law can give, from the narrowest to D for all."""
    num_ids, dim = tuple(spec.num_embeddings for spec in specs), specs[0].embedding_dim
    memo = ("mixed_dim alphas", num_ids, dim, config.power_of_two)
    if memo not in known.derived:
        steps = {step for own in _breakpoints(num_ids, dim, config.power_of_two) for step in own}
        known.derived[memo] = sorted(steps | {math.inf}, reverse=True)
    alphas: list[float] = known.derived[memo]
    return alphas
