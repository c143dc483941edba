"""One cut through several groups of tables, as if they were one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from embcomp.budget import Budget
from embcomp.errors import BudgetError, ConfigError
from embcomp.tables import EmbeddingTables
from embcomp.training.greedy import GreedyCut
from embcomp.training.search import Candidate, FrontPoint


class JointCut:
    """Groups that are searched together: each step is taken in the group where it loses the least per byte.

    Args:
        groups: of one model.
        searches: of each.

    Attributes:
        search: through all of them; its candidates are those of the groups, one behind the other.
        built_config: of each.
    """

    def __init__(self, groups: Sequence[EmbeddingTables], searches: Sequence[GreedyCut]) -> None:
        self.groups, self._costs = list(groups), [own.cost for own in searches]
        bounds = accumulate((len(own.ladders) for own in searches), initial=0)
        self._own = [slice(start, stop) for start, stop in pairwise(bounds)]
        limits = [own.limit for own in searches if own.limit is not None]
        limit = sum(limits) if len(limits) == len(searches) else None
        self.search = GreedyCut([ladder for own in searches for ladder in own.ladders], self.candidate_bytes, limit)
        self.built_config: Any = [tables.built_config for tables in groups]

    def show_(self, candidates: Sequence[Candidate]) -> None:
        """Let lookups of every group show its part of candidates."""
        for tables, own in zip(self.groups, self._own, strict=True):
            tables.show_([candidate[own] for candidate in candidates])

    def hide_(self) -> None:
        """Show no candidates any more."""
        for tables in self.groups:
            tables.hide_()

    def candidate_bytes(self, candidate: Candidate) -> int:
        """Serve bytes of all groups."""
        return sum(cost(candidate[own]) for cost, own in zip(self._costs, self._own, strict=True))

    def adopt_(self, candidate: Candidate) -> None:
        """Let every group take its part."""
        fronts = [
            [FrontPoint(point.candidate[own], cost(point.candidate[own]), point.value) for point in self.search.front()]
            for cost, own in zip(self._costs, self._own, strict=True)
        ]
        _adopt_cuts_(self.groups, fronts, self.search.path.index(candidate), self.search.limit)


def cut_groups_(groups: Sequence[EmbeddingTables], budget: str | float | Budget) -> None:
    """Go to another budget on the front of groups; see `embcomp.Compression.cut_`."""
    if final := [name for tables in groups if tables.is_final for name in tables.names]:
        raise ConfigError(
            f"cut_({budget!r}): tables {', '.join(final)} are finalized, and have lost what was cut; "
            "cut before finalize_, or cut the training form and finalize that"
        )
    fronts = [tables.pareto() for tables in groups]
    limit = Budget.parse(budget).bytes(sum(spec.full_bytes for tables in groups for spec in tables.specs))
    _adopt_cuts_(groups, fronts, _place_within(joint_front(fronts), limit, budget), limit)


def _adopt_cuts_(
    groups: Sequence[EmbeddingTables], fronts: Sequence[Sequence[FrontPoint]], place: int, limit: int | None
) -> None:
    """Let groups take their forms at a place of their fronts; what the limit leaves goes to those cut last."""
    spare = None if limit is None else max(limit - sum(front[place].bytes for front in fronts), 0)
    for _, number in sorted((-_last_step(front, place), number) for number, front in enumerate(fronts)):
        tables, size = groups[number], fronts[number][place].bytes
        tables.adopt_cut_(fronts[number], place, None if spare is None else size + spare)
        if spare is not None:
            spare -= tables.memory().serve_bytes - size


def _last_step(front: Sequence[FrontPoint], place: int) -> int:
    """The last place, up to one, to which a step of this group leads; 0 if there is none."""
    steps = enumerate(pairwise(front[: place + 1]), start=1)
    return max((number for number, (old, new) in steps if old.candidate != new.candidate), default=0)


def joint_front(fronts: Sequence[Sequence[FrontPoint]]) -> list[FrontPoint]:
    """The front of groups that were cut together.

    Raises:
        ConfigError: if they were not.
    """
    if len({tuple(point.value for point in front) for front in fronts}) > 1:
        raise ConfigError(
            f"the {len(fronts)} groups of tables were not cut together, so each has a front of its own: call pareto "
            "and cut_ of each, for tables in handle.tables"
        )
    return [
        FrontPoint(
            tuple(gene for point in points for gene in point.candidate),
            sum(point.bytes for point in points),
            points[0].value,
        )
        for points in zip(*fronts, strict=True)
    ]


def _place_within(front: Sequence[FrontPoint], limit: int, budget: str | float | Budget) -> int:
    """The first place of a front that takes at most ``limit`` bytes.

    Raises:
        BudgetError: if none does.
    """
    found = next((place for place, point in enumerate(front) if point.bytes <= limit), None)
    if found is None:
        smallest = front[-1].bytes
        raise BudgetError(f"the smallest form takes {smallest} B, budget {budget} is {limit} B", smallest)
    return found
