"""One budget over several groups: each gets its share, and what one can't use flows on to the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from embcomp.budget import Budget, Plan, cost, plan, solve
from embcomp.config import StrategyConfig, make_config, strategy_of
from embcomp.errors import BudgetError, SpecError, did_you_mean
from embcomp.memory import format_bytes
from embcomp.specs import Knowledge, TableSpec, check_group


@dataclass(frozen=True)
class _Wish:
    """A group to be planned: its tables, its strategy with sizes open, and what is known of its data."""

    specs: tuple[TableSpec, ...]
    config: StrategyConfig
    known: Knowledge
    budget_on: str

    @property
    def full_bytes(self) -> int:
        return sum(spec.full_bytes for spec in self.specs)

    def minimum(self) -> int:
        """The smallest feasible budget in bytes."""
        try:
            return self.cost(self.plan(0))
        except BudgetError as error:
            if error.minimum_bytes is None:
                raise
            return error.minimum_bytes

    def plan(self, allowed: int) -> Plan:
        config, report = solve(self.specs, self.config, allowed, self.known, self.budget_on)
        return Plan(self.specs, config, allowed, report, self.known.counts)

    def cost(self, planned: Plan) -> int:
        return cost(planned.report, self.budget_on)


def plan_groups(
    groups: Sequence[tuple[Sequence[TableSpec], str | StrategyConfig]],
    budget: str | float | Budget | None = None,
    counts: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    budget_on: str = "serve",
) -> list[Plan]:
    """Choose the sizes of several groups so that together they fit one budget; nothing is allocated.

    Every group gets the budget's share of its float32 bytes. A group that can't go that low takes its minimum, and the
    others share the rest; bytes that a group's steps are too coarse to use go to the groups that can use them.

    Args:
        groups: tables and strategy of each group.
        budget: see `Budget.parse`; a share is one of the float32 bytes of all groups together.
        counts: table name -> ``(V,)`` counts, over all groups.
        weights: table name -> ``(V, D)`` trained tables, over all groups.
        budget_on: see `plan`.

    Raises:
        BudgetError: if the budget can't be read or met; ``minimum_bytes`` is the smallest feasible one of all together.
        SpecError: if counts or weights are of a table that no group has.
    """
    names = [spec.name for specs, _ in groups for spec in specs]
    _check_names(names, counts or {}, "counts")
    _check_names(names, weights or {}, "weights")
    if budget is None:
        return [
            plan(specs, config, None, _own(specs, counts), _own(specs, weights), budget_on) for specs, config in groups
        ]
    wishes = [
        _Wish(check_group(specs), make_config(config), known, budget_on)
        for specs, config in groups
        for known in [Knowledge.of(specs, _own(specs, counts), _own(specs, weights))]
    ]
    allowed = Budget.parse(budget).bytes(sum(wish.full_bytes for wish in wishes), budget_on)
    least = [wish.minimum() for wish in wishes]
    if sum(least) > allowed:
        raise _too_small(wishes, least, allowed)
    shares = share_budget(allowed, [wish.full_bytes for wish in wishes], least)
    plans = [wish.plan(share) for wish, share in zip(wishes, shares, strict=True)]
    spare = allowed - sum(wish.cost(planned) for wish, planned in zip(wishes, plans, strict=True))
    for index, (wish, planned) in enumerate(zip(wishes, plans, strict=True)):
        if spare > 0 and len(wishes) > 1:
            used = wish.cost(planned)
            plans[index] = wish.plan(used + spare)
            spare -= wish.cost(plans[index]) - used
    if budget_on != "serve":
        return plans
    # Groups that choose their form in training may use up what they have here, and the first of them what is left.
    for index, (wish, planned) in enumerate(zip(wishes, plans, strict=True)):
        limited = strategy_of(planned.config).tables_class.within(planned.config, wish.cost(planned) + spare)
        if limited != planned.config:
            plans[index], spare = replace(planned, config=limited), 0
    return plans


def share_budget(allowed: int, full: Sequence[int], least: Sequence[int]) -> list[int]:
    """Share bytes out in proportion to ``full``, but to nobody less than its ``least``.

    Args:
        allowed: bytes, at least the sum of ``least``.
        full: each group's bytes uncompressed.
        least: each group's smallest feasible bytes.
    """
    fixed: set[int] = set()
    while True:
        rest = allowed - sum(least[i] for i in fixed)
        total = sum(size for i, size in enumerate(full) if i not in fixed)
        shares = [least[i] if i in fixed else rest * size // total for i, size in enumerate(full)]
        short = {i for i, share in enumerate(shares) if share < least[i]}
        if not short:
            return shares
        fixed |= short


def _own(specs: Sequence[TableSpec], values: Mapping[str, Any] | None) -> dict[str, Any]:
    return {spec.name: values[spec.name] for spec in specs if values and spec.name in values}


def _check_names(names: Sequence[str], values: Mapping[str, Any], what: str) -> None:
    for name in values:
        if name not in names:
            raise SpecError(f"{what} for table {name!r}, which does not exist; {did_you_mean(name, names)}")


def _too_small(wishes: Sequence[_Wish], least: Sequence[int], allowed: int) -> BudgetError:
    full, minimum = sum(wish.full_bytes for wish in wishes), sum(least)
    number = sum(len(wish.specs) for wish in wishes)
    groups = "; ".join(
        f"{strategy_of(wish.config).name} of {len(wish.specs)} tables with D={wish.specs[0].embedding_dim}: {least_} B"
        for wish, least_ in zip(wishes, least, strict=True)
    )
    return BudgetError(
        f"{number} tables ({format_bytes(full)} as float32) can't fit into {allowed} B ({allowed / full:.3%}); their "
        f"smallest feasible budget is {minimum} B ({minimum / full:.3%}), of which {groups}. "
        f"Ask for '{minimum}B', fewer bits (rows='int4'), or another strategy",
        minimum_bytes=minimum,
    )
