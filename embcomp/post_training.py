"""Trained tables straight into their serving form, some rows at a time: without a model, and without training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from embcomp.budget import Budget, Plan
from embcomp.config import StrategyConfig, make_config, strategy_of
from embcomp.errors import BudgetError
from embcomp.memory import format_bytes
from embcomp.planning import plan_groups
from embcomp.row_source import CHUNK_VALUES, RowSource, ids_of
from embcomp.sites import measured_std
from embcomp.specs import TableSpec
from embcomp.storage.base import rows_are_lent
from embcomp.tables import EmbeddingTables

WHOLE_BYTES = 2**30
"""Memory that strategies which need all rows at once may take, where nothing else is said."""


def compress_tables(
    weights: Mapping[str, Tensor | RowSource],
    strategy: str | StrategyConfig,
    budget: str | float | Budget | None = None,
    counts: Mapping[str, Any] | None = None,
    whole_bytes: int = WHOLE_BYTES,
) -> list[EmbeddingTables]:
    """Compress trained tables after training, into the form that serves.

    Tables are read some rows at a time, several times over: a `RowSource` may be a file larger than memory. What is
    taken is memory for the compressed form, for float32 values of rows that ids share, and for some rows. Strategies
    that can't do so (their class does not say ``can_be_streamed``) need all rows at once, and are refused where those
    take more than ``whole_bytes``.

    Args:
        weights: table name -> float ``(V, D)``. Tables of one D become one group.
        strategy: a strategy's name or config; of options by table, each group gets those of its own tables.
        budget: one for all tables together, see `Budget.parse`.
        counts: table name -> ``(V,)`` how often ids occur: errors are weighted by them.
        whole_bytes: see above.

    Returns:
        The groups, finalized, in the order in which their dimensions first occur.

    Raises:
        SpecError: if weights are no finite matrices with rows, or counts don't fit them.
        ConfigError: if the config is wrong.
        BudgetError: if the budget can't be met, or memory for a strategy that needs all rows at once.
    """
    config, sources = make_config(strategy), {name: RowSource.of(rows) for name, rows in weights.items()}
    groups: dict[int, list[TableSpec]] = {}
    for name, source in sources.items():
        spec = TableSpec(name, *source.shape, init_std=_std(source))
        groups.setdefault(spec.embedding_dim, []).append(spec)
    _check_memory(config, [spec for specs in groups.values() for spec in specs], whole_bytes)
    wanted = [(specs, _own_options(config, specs, sources)) for specs in groups.values()]
    plans = plan_groups(wanted, budget, counts, sources)
    return [_served(planned, sources) for planned in plans]


def relative_error(
    groups: Sequence[EmbeddingTables],
    weights: Mapping[str, Tensor | RowSource],
    counts: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """How far compressed tables are from trained ones: ``√(Σ c‖e − w‖² / Σ c‖w‖²)`` over all ids of each table.

    Args:
        groups: that have all tables.
        weights: table name -> ``(V, D)``.
        counts: table name -> ``(V,)``, c; 1 for tables that are not in it, or of which no id is counted.

    Returns:
        Table name -> error, 0 being exact and 1 that of zeros; under ``""`` that of all tables together.
    """
    owners = {name: tables for tables in groups for name in tables.names}
    sums = {
        name: _squares(owners[name], name, RowSource.of(rows), (counts or {}).get(name))
        for name, rows in weights.items()
    }
    sums[""] = (sum(error for error, _ in sums.values()), sum(whole for _, whole in sums.values()))
    return {name: _ratio(error, whole) for name, (error, whole) in sums.items()}


@torch.no_grad()
def _squares(tables: EmbeddingTables, name: str, source: RowSource, counts: Tensor | None) -> tuple[float, float]:
    """Squared errors and squares of a table, summed in float64."""
    error = whole = 0.0
    if counts is not None and not counts.any():
        counts = None
    for rows in source.chunks():
        wanted = source[rows].double()  # whose squares float32 may not hold
        wrong = tables(ids_of(rows, source.device), name) - wanted
        share = torch.ones(len(wanted)) if counts is None else counts[rows]
        error += float(wrong.square_().sum(1) @ share.double())
        whole += float(wanted.square_().sum(1) @ share.double())
    return error, whole


def _ratio(error: float, whole: float) -> float:
    return math.sqrt(error / whole) if whole else math.inf if error else 0.0


def _served(planned: Plan, sources: Mapping[str, RowSource]) -> EmbeddingTables:
    own = {spec.name: sources[spec.name] for spec in planned.specs}
    if not strategy_of(planned.config).tables_class.can_be_streamed:
        return planned.build().load_dense_(own, planned.counts).finalize_()
    with rows_are_lent():
        tables = planned.build()
    return tables.load_dense_(own, planned.counts).finalize_()


def _own_options(config: StrategyConfig, specs: Sequence[TableSpec], names: Iterable[str]) -> StrategyConfig:
    """A config without what its options by table say of the tables of other groups."""
    others = set(names) - {spec.name for spec in specs}
    given = {field.name: getattr(config, field.name) for field in fields(config)}
    own: dict[str, Any] = {
        option: {key: value for key, value in values.items() if key not in others}
        for option, values in given.items()
        if isinstance(values, Mapping)
    }
    return replace(config, **own)


def _std(source: RowSource) -> float:
    """Standard deviation of a sample of a table's entries; any, where they are not finite, which is told later."""
    most = max(1, 4 * CHUNK_VALUES // max(source.shape[1], 1))
    std = measured_std(source[:: -(-len(source) // most) or 1], None) if len(source) else math.nan
    return std if math.isfinite(std) else TableSpec.init_std


def _check_memory(config: StrategyConfig, specs: Sequence[TableSpec], allowed: int) -> None:
    entry, needed = strategy_of(config), 2 * sum(spec.full_bytes for spec in specs)
    if entry.tables_class.can_be_streamed or needed <= allowed:
        return
    raise BudgetError(
        f"strategy {entry.name!r} needs all rows at once, as float32 and in its training form: {format_bytes(needed)} "
        f"({needed} B) of memory, allowed are {format_bytes(allowed)}. Allow more (--memory), or take a strategy that "
        "reads tables some rows at a time ('embcomp strategies' lists them)"
    )
