"""Memory budgets, and the solver that meets them: it builds candidates on ``meta``, asks `memory()`, and bisects."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from embcomp.config import StrategyConfig, make_config, strategy_of
from embcomp.errors import BudgetError, ConfigError, SpecError
from embcomp.memory import MemoryReport, format_bytes
from embcomp.specs import Knowledge, TableSpec, check_group
from embcomp.tables import EmbeddingTables

_UNITS = {"b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)}
_HELP = "write '10%', '0.1', '10x' (ten times smaller), '64MiB', '64MB' or '4096B'"


@dataclass(frozen=True)
class Budget:
    """A memory budget: a number of bytes, or a share of the float32 tables.

    Attributes:
        count: bytes, or None.
        share: in ``(0, 1]``, or None.
        text: as it was written.
    """

    count: int | None
    share: float | None
    text: str

    @classmethod
    def parse(cls, value: str | float | Budget) -> Budget:
        """Read a budget: ``"64MiB"``, ``"64MB"``, ``"4096B"``, ``"10%"``, ``"0.1"``, ``0.1`` or ``"10x"``.

        Raises:
            BudgetError: if it can't be read, is not positive, or is above 100 %.
        """
        if isinstance(value, Budget):
            return value
        text = str(value).strip()
        match = re.fullmatch(r"([-+]?[\d.]+(?:e[-+]?\d+)?)\s*(%|x|b|[kmgt]i?b)?", text, re.IGNORECASE)
        if isinstance(value, bool) or match is None:
            raise BudgetError(f"budget {value!r} can't be read; {_HELP}")
        try:
            number = float(match[1])
        except ValueError:
            raise BudgetError(f"budget {value!r} can't be read; {_HELP}") from None
        unit = (match[2] or "").lower()
        if not (number > 0 and math.isfinite(number)):
            raise BudgetError(f"budget {value!r} must be above zero; {_HELP}")
        if unit in _UNITS:
            count = int(number * _UNITS[unit])
            if count < 1:
                raise BudgetError(f"budget {value!r} is less than one byte; {_HELP}")
            return cls(count, None, text)
        share = {"%": number / 100, "x": 1 / number, "": number}[unit]
        if share > 1:
            raise BudgetError(f"budget {value!r} is above 100% of the float32 tables; {_HELP}")
        return cls(None, share, text)

    def bytes(self, full_bytes: int, budget_on: str = "serve") -> int:
        """The budget in bytes, for tables that take ``full_bytes`` as float32.

        Raises:
            BudgetError: if it is more than the float32 tables take to serve; to train they take several times as much.
        """
        if self.count is None:
            return int((self.share or 0) * full_bytes + 1e-6)
        if budget_on == "serve" and self.count > full_bytes:
            raise BudgetError(
                f"budget {self.text} is above 100%: the float32 tables take {format_bytes(full_bytes)} ({full_bytes} B)"
            )
        return self.count

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Plan:
    """What will be built, and its bytes, before anything is allocated.

    Attributes:
        specs: the tables.
        config: the strategy's config with every size filled in.
        budget_bytes: what was asked for, or None.
        report: the bytes of the tables that `build` makes.
        counts: id counts that were given; `build` hands them to strategies that keep a remap.
    """

    specs: tuple[TableSpec, ...]
    config: StrategyConfig
    budget_bytes: int | None
    report: MemoryReport
    counts: Mapping[str, torch.Tensor]

    def build(self, device: torch.device | str | None = None) -> EmbeddingTables:
        """Build the tables.

        Args:
            device: where to; the default device if None. On ``"meta"`` nothing is allocated.
        """
        tables_class = strategy_of(self.config).tables_class
        on_meta = device is not None and torch.device(device).type == "meta"
        with torch.device("meta") if on_meta else nullcontext():
            tables = tables_class(self.specs, self.config, self.counts)
        return tables if device is None else tables.to(device)

    def __str__(self) -> str:
        asked = "no budget" if self.budget_bytes is None else f"budget {format_bytes(self.budget_bytes)}"
        return f"{strategy_of(self.config).name}, {asked}\n{self.report}"


def plan(
    specs: Sequence[TableSpec],
    strategy: str | StrategyConfig,
    budget: str | float | Budget | None = None,
    counts: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    budget_on: str = "serve",
) -> Plan:
    """Choose the sizes of a strategy so that its tables fit a budget; nothing is allocated.

    Args:
        specs: tables of one group (one ``embedding_dim``).
        strategy: a strategy's name or config.
        budget: see `Budget.parse`; None where the config says its sizes itself.
        counts: table name -> ``(V,)`` counts of ids in the training data, where known.
        weights: table name -> ``(V, D)`` trained tables, where the plan may look at them.
        budget_on: ``"serve"``, or ``"train:<optimizer>"`` for parameters, gradients and optimizer state.

    Raises:
        BudgetError: if the budget can't be read or met; ``minimum_bytes`` is the smallest feasible one.
        ConfigError: if the config is wrong, or leaves its size open and there is no budget.
        SpecError: if the tables make no group, or are larger than tensors can be.
    """
    specs, config = check_group(specs), make_config(strategy)
    known = Knowledge.of(specs, counts, weights)
    tables_class = strategy_of(config).tables_class
    if budget is None:
        config = tables_class.complete(specs, config, known)
        return Plan(specs, config, None, measure(specs, config), known.counts)
    allowed = Budget.parse(budget).bytes(sum(spec.full_bytes for spec in specs), budget_on)
    config, report = solve(specs, config, allowed, known, budget_on)
    if budget_on == "serve":
        config = tables_class.within(config, allowed)
    return Plan(specs, config, allowed, report, known.counts)


def build_tables(
    specs: Sequence[TableSpec],
    strategy: str | StrategyConfig = "full",
    budget: str | float | Budget | None = None,
    counts: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> EmbeddingTables:
    """Plan and build in one call; see `plan`."""
    return plan(specs, strategy, budget, counts).build(device)


def measure(specs: Sequence[TableSpec], config: StrategyConfig) -> MemoryReport:
    """The memory report of tables with a complete config, built on ``meta``.

    Raises:
        SpecError: if tensors would have more bytes than int64 counts.
    """
    tables_class = strategy_of(config).tables_class
    try:
        with torch.device("meta"):
            return tables_class(specs, config).memory()
    except (RuntimeError, TypeError, ValueError) as error:
        if "overflow" not in str(error).lower():
            raise
        largest = max(specs, key=lambda spec: spec.num_embeddings)
        raise SpecError(
            f"table {largest.name!r}: num_embeddings={largest.num_embeddings}, embedding_dim={largest.embedding_dim} "
            f"make tensors of strategy {strategy_of(config).name!r} that are larger than int64 can count: give fewer "
            "ids, or a strategy that hashes them, such as 'hash'"
        ) from error


def solve(
    specs: tuple[TableSpec, ...], config: StrategyConfig, allowed: int, known: Knowledge, budget_on: str
) -> tuple[StrategyConfig, MemoryReport]:
    """Find the largest size of one group that takes at most ``allowed`` bytes; see `plan`."""
    tables_class = strategy_of(config).tables_class

    def candidate(size: int) -> tuple[StrategyConfig, MemoryReport]:
        sized = tables_class.resize(specs, config, size, known)
        return sized, measure(specs, sized)

    low, high = tables_class.size_range(specs, config, known)
    best = candidate(low)
    if cost(best[1], budget_on) > allowed:
        raise _too_small(specs, config, allowed, cost(best[1], budget_on))
    while low < high:
        middle = (low + high + 1) // 2
        tried = candidate(middle)
        if cost(tried[1], budget_on) <= allowed:
            low, best = middle, tried
        else:
            high = middle - 1
    return best


def cost(report: MemoryReport, budget_on: str) -> int:
    """The bytes that a budget limits: those to serve, or those to train with a named optimizer."""
    kind, _, optimizer = budget_on.partition(":")
    if kind == "serve" and not optimizer:
        return report.serve_bytes
    if kind == "train":
        return report.train_bytes(optimizer or "adam")
    raise ConfigError(f"budget_on={budget_on!r}: write 'serve', or 'train:adam' with the optimizer's name")


def _too_small(specs: tuple[TableSpec, ...], config: StrategyConfig, allowed: int, minimum: int) -> BudgetError:
    full = sum(spec.full_bytes for spec in specs)
    name = strategy_of(config).name
    return BudgetError(
        f"strategy {name!r} can't fit {len(specs)} tables ({format_bytes(full)} as float32) into {allowed} B "
        f"({allowed / full:.3%}); its smallest feasible budget is {minimum} B ({minimum / full:.3%}): "
        f"ask for '{minimum}B', fewer bits (rows='int4'), or another strategy",
        minimum_bytes=minimum,
    )
