"""Vocabularies that grow: tables get more ids, or `dynamic` other numbers of slots, and trained rows stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from embcomp.budget import Budget, Plan
from embcomp.errors import ConfigError, IncompatibleStateError, NoMatchingTableError, SpecError, did_you_mean
from embcomp.planning import plan_groups
from embcomp.sites import find_groups
from embcomp.specs import TableSpec, as_int
from embcomp.tables import EmbeddingTables
from embcomp.views import TableView, TiedLinear


def resize_(
    module: nn.Module,
    sizes: Mapping[str, int] | None = None,
    budget: str | float | Budget | None = None,
    num_slots: Mapping[str, int] | None = None,
) -> list[Plan]:
    """Give tables more ids, in place; ids that were there keep their vectors, bit for bit.

    New ids come behind the old ones. They get new rows where ids have rows of their own, and are hashed where ids are
    hashed. ``full``, ``quantize``, ``reduced_dim``, ``hash``, ``frequency_cut`` and ``dynamic`` can do this; where
    hashed ids are not ``unseen="hash"``, but share an OOV id, that one may move to another row.

    The parameters are new ones: make optimizers anew. For a moment old and new rows are both in memory. If anything
    raises, everything is as it was.

    Args:
        module: tables, or a model with compressed tables.
        sizes: table name -> its number of ids from now on, V, at least what it was. Other tables stay.
        budget: for all tables of the module together, see `Budget.parse`; a share is one of the float32 bytes after
            growth. ``dynamic`` gets as many slots as it allows, more or fewer than before, and when there are fewer,
            the ids of the highest scores keep theirs. Other strategies keep their sizes, and must fit.
        num_slots: table name -> slots from now on, for tables of ``dynamic``; not with a budget.

    Returns:
        The plan of each group.

    Raises:
        NoMatchingTableError: if there are no compressed tables, or none of a name.
        SpecError: if a table would shrink, or is one that a model addresses by offsets.
        ConfigError: if a strategy can't keep its rows; the message names the way out.
        BudgetError: if the budget can't be met.
        IncompatibleStateError: if tables are finalized, or their rows lie in several processes.
    """
    groups, sizes, num_slots = list(find_groups(module).values()), dict(sizes or {}), dict(num_slots or {})
    _check_request(module, groups, sizes, budget, num_slots)
    views = _views(module, sizes)
    chosen = [tables for tables in groups if budget is not None or {*sizes, *num_slots} & set(tables.names)]
    wanted = []
    for tables in chosen:
        specs = [_grown(spec, sizes) for spec in tables.specs]
        own = {name: count for name, count in num_slots.items() if name in tables.names}
        wanted.append((specs, tables.grown_config(specs, own, budget is not None)))
    plans = plan_groups(wanted, budget)
    grown = [_built(tables, planned) for tables, planned in zip(chosen, plans, strict=True)]
    for tables, new in zip(chosen, grown, strict=True):
        _become(tables, new)
    for view in views:
        view.resize_()
    planned = {id(tables): plan for tables, plan in zip(chosen, plans, strict=True)}
    return [planned.get(id(own)) or Plan(own.specs, own.config, None, own.memory(), {}) for own in groups]


def _check_request(
    module: nn.Module,
    groups: Sequence[EmbeddingTables],
    sizes: Mapping[str, int],
    budget: str | float | Budget | None,
    num_slots: Mapping[str, int],
) -> None:
    if not groups:
        raise NoMatchingTableError(f"{type(module).__name__} has no compressed tables: call compress_ first")
    if not sizes and not num_slots and budget is None:
        raise ConfigError("resize_ was told nothing: give sizes={name: ids}, num_slots={name: slots}, or budget=")
    if num_slots and budget is not None:
        raise ConfigError("resize_ takes num_slots or a budget that chooses them, not both")
    names = [name for tables in groups for name in tables.names]
    for name in (*sizes, *num_slots):
        if name not in names:
            raise NoMatchingTableError(f"resize_: no compressed table {name!r}; {did_you_mean(name, names)}")
    for tables in groups:
        shown = ", ".join(tables.names[:3])
        if tables.is_final:
            raise IncompatibleStateError(f"tables {shown} are finalized: resize the training form, and finalize that")
        if tables.is_sharded:
            raise IncompatibleStateError(f"rows of {shown} lie in several processes: load what save_sharded saved")


def _grown(spec: TableSpec, sizes: Mapping[str, int]) -> TableSpec:
    if spec.name not in sizes:
        return spec
    number = as_int(sizes[spec.name])
    if number is None or number < spec.num_embeddings:
        raise SpecError(
            f"resize_: table {spec.name!r} has {spec.num_embeddings} ids and can't have {sizes[spec.name]!r}: give an "
            "int that is no smaller, since rows in use are not thrown away"
        )
    return replace(spec, num_embeddings=number)


def _views(module: nn.Module, sizes: Mapping[str, int]) -> list[TableView]:
    """Views of tables that grow, which need to know."""
    views = [view for view in module.modules() if isinstance(view, TableView) and set(view.names) & sizes.keys()]
    for view in views:
        if len(view.names) > 1:
            raise SpecError(
                f"resize_: {view.table!r} holds the fields {', '.join(view.names)} one behind another, and the model "
                "adds offsets to their ids, which would no longer be right: give each field a table of its own"
            )
        if isinstance(view, TiedLinear) and view.bias is not None:
            raise SpecError(f"resize_: a linear layer tied to {view.table!r} has a bias per id, which can't grow")
    return views


def _built(tables: EmbeddingTables, planned: Plan) -> EmbeddingTables:
    with torch.no_grad():
        new = planned.build(tables.get_buffer("_sizes").device)
        new.take_rows_(tables)
    trained = [p.requires_grad for p in tables.parameters()]
    return new.requires_grad_(any(trained)).train(tables.training)


def _become(tables: EmbeddingTables, new: EmbeddingTables) -> None:
    """Let an object be another, for all that hold it; hooks of the old one stay."""
    hooks = {name: value for name, value in vars(tables).items() if name.endswith(("_hooks", "_hooks_with_kwargs"))}
    vars(tables).clear()
    vars(tables).update({**vars(new), **hooks})
