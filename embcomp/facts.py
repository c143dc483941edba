"""What can be said of strategies without training anything: smallest sizes, row formats, rows read by a lookup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from embcomp.budget import Plan, plan
from embcomp.config import StrategyConfig, make_config
from embcomp.errors import BudgetError, ConfigError
from embcomp.growth import resize_
from embcomp.specs import TableSpec
from embcomp.storage import RowStore
from embcomp.storage.formats import FLOAT_BITS, INTEGER_BITS
from embcomp.tables import EmbeddingTables

KINDS = (*FLOAT_BITS, *INTEGER_BITS)
"""Kinds of rows."""


def smallest_bytes(specs: Sequence[TableSpec], config: StrategyConfig, counts: Mapping[str, Any] | None = None) -> int:
    """Serve bytes of the smallest form that tables can take.

    Raises:
        BudgetError: as `plan`, but for the smallest budget.
    """
    try:
        return plan(specs, config, "1B", counts).report.serve_bytes
    except BudgetError as error:
        if error.minimum_bytes is None:
            raise
        return error.minimum_bytes


def row_formats(name: str) -> str:
    """The kinds of rows that a strategy's config takes."""
    taken = [kind for kind in KINDS if _takes(name, kind)]
    return "all" if len(taken) == len(KINDS) else ", ".join(taken)


def can_be_sharded(name: str) -> bool:
    """Whether several processes can hold parts of a strategy's rows while they are trained."""
    return _halved(name).can_be_sharded


def can_grow(name: str) -> bool:
    """Whether `resize_` gives a strategy's tables more ids."""
    try:
        resize_(_halved(name), {"large": 1100})
    except ConfigError:
        return False
    return True


def serves_own_rows(name: str) -> bool:
    """Whether every vector is a stored row of its own in the form that serves, as FBGEMM's kernels want them."""
    tables = _halved(name).finalize()
    found = tables.stored_rows(torch.arange(tables.num_ids[0]), 0)
    return found is not None and len(found[1].unique()) == tables.num_ids[0]


def rows_read(planned: Plan) -> int:
    """Stored rows that the lookup of one id reads: of the table where it reads most, whatever the tables' order."""
    total = 0

    def count(store: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal total
        total += arguments[0].numel()

    tables = planned.build("meta")
    for module in tables.modules():
        if isinstance(module, RowStore):
            module.register_forward_pre_hook(count)
    most = 0
    for index in range(tables.num_tables):
        total = 0
        tables.lookup(torch.zeros(1, dtype=torch.int64, device="meta"), index)
        most = max(most, total)
    return most


def _halved(name: str) -> EmbeddingTables:
    """Small tables in half of their bytes, or as few as the strategy takes."""
    specs = (TableSpec("large", 1000, 16), TableSpec("small", 10, 16))
    budget = max(smallest_bytes(specs, make_config(name)), specs[0].full_bytes // 2)
    return plan(specs, name, f"{budget}B").build()


def _takes(name: str, kind: str) -> bool:
    try:
        make_config(name, rows=kind)
    except ConfigError:
        return False
    return True
