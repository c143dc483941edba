"""Checks of bytes: what is planned, built, saved and asked for, and what more bytes buy."""

from __future__ import annotations

import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file

from embcomp.budget import measure, plan
from embcomp.config import make_config, strategy_of
from embcomp.errors import BudgetError
from embcomp.memory import SHARED
from embcomp.specs import Knowledge, TableSpec
from embcomp.tables import EmbeddingTables
from embcomp.testing._cases import (
    Strategy,
    byte_range,
    make_counts,
    make_specs,
    make_weights,
    planned,
    require,
    require_error,
)

SHARES = (0.0, 0.03, 0.11, 0.37, 0.74, 1.0)
"""Where in the strategy's range of bytes budgets are asked for."""


def check_bytes(strategy: Strategy) -> None:
    """Planned bytes = built bytes = bytes of the finalized state = bytes of a safetensors file without its header."""
    for with_counts in (False, True):
        made = planned(strategy, make_specs(), with_counts=with_counts)
        tables = made.build()
        final = tables.finalize()
        serve = made.report.serve_bytes
        found = {
            "the built tables": tables.memory().serve_bytes,
            "the finalized tables": final.memory().serve_bytes,
            "the finalized state": sum(tensor.nbytes for tensor in final.state_dict().values()),
            "the saved file": _file_bytes(final),
            "the sum over tables": sum(made.report.by_table().values()),
        }
        for what, count in found.items():
            require(count == serve, f"planned {serve} B, {what} (counts: {with_counts}): {count} B\n{made.report}")
        _require_honest_report(tables)


def _file_bytes(tables: EmbeddingTables) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tables.safetensors"
        save_file(tables.state_dict(), str(path))
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        return path.stat().st_size - 8 - header


def _require_honest_report(tables: EmbeddingTables) -> None:
    report = tables.memory()
    strangers = set(report.by_table()) - {*tables.names, SHARED}
    require(not strangers, f"the report names tables that do not exist: {strangers}")
    trained = sum(p.numel() for p in tables.parameters() if p.requires_grad)
    require(
        abs(sum(part.train_values for part in report.parts) - trained) <= len(report.parts),
        f"the report counts {sum(part.train_values for part in report.parts)} trained values, there are {trained}",
    )
    size = sum(tensor.nbytes for tensor in tables.state_dict().values())
    counted = sum(part.train_bytes for part in report.parts)
    require(abs(counted - size) <= len(report.parts), f"the report counts {counted} B while training, there are {size}")


def check_budgets(strategy: Strategy) -> None:
    """No plan takes a byte more than its budget; where the knob is fine it uses 98 % of it."""
    config, specs = make_config(strategy), make_specs(16, {"user": 20_000, "flag": 2, "item": 3000, "genre": 7})
    full = sum(spec.full_bytes for spec in specs)
    smallest, largest = byte_range(config, specs)
    if smallest > full:
        return
    fine = strategy_of(config).tables_class.knob_is_fine and smallest < largest
    for share in SHARES:
        budget = smallest + int(share * (full - smallest))
        used = plan(specs, config, f"{budget}B").report.serve_bytes
        require(used <= budget, f"budget {budget} B, planned {used} B")
        if fine:
            wanted = 0.98 * min(budget, largest)
            require(used >= wanted, f"budget {budget} B, planned {used} B of at most {largest} B: under 98 %")


def check_smallest_budget(strategy: Strategy) -> None:
    """`BudgetError` names the smallest feasible budget: that one can be met, one byte less can't."""
    config, specs = make_config(strategy), make_specs(16)
    error = require_error(BudgetError, lambda: plan(specs, config, "1B"), "a budget of 1 B")
    minimum = getattr(error, "minimum_bytes", None) or 0
    require(minimum and str(minimum) in str(error), f"the error does not name the smallest feasible budget: {error}")
    if minimum > sum(spec.full_bytes for spec in specs):
        return
    require(plan(specs, config, f"{minimum}B").report.serve_bytes == minimum, f"the smallest plan is not {minimum} B")
    less = require_error(BudgetError, lambda: plan(specs, config, f"{minimum - 1}B"), "one byte below the minimum")
    require(getattr(less, "minimum_bytes", None) == minimum, f"two minimums: {minimum} and {less}")


def check_size_knob(strategy: Strategy) -> None:
    """Serve bytes never fall as the size that the budget turns grows, and a sized config says all: it is complete."""
    config, specs = make_config(strategy), make_specs(16)
    tables_class = strategy_of(config).tables_class
    for counts in ({}, make_counts(specs)):
        known = Knowledge.of(specs, counts)
        low, high = tables_class.size_range(specs, config, known)
        require(low <= high, f"size_range gives {low} to {high}")
        before = 0
        for size in sorted({low + (high - low) * step // 24 for step in range(25)} | {min(low + 1, high)}):
            sized = tables_class.resize(specs, config, size, known)
            count = measure(specs, sized).serve_bytes
            require(count >= before, f"size {size} takes {count} B, a smaller one took {before} B")
            require(tables_class.complete(specs, sized, Knowledge()) == sized, f"not complete: {sized}")
            before = count


def reconstruction_error(strategy: Strategy, share: float, with_counts: bool = False) -> float:
    """Squared error of `load_dense_` as a share of the squared weights, count-weighted where there are counts.

    Args:
        strategy: a strategy's name or config.
        share: where between the strategy's smallest and largest bytes.
        with_counts: whether plan and fit are given counts of ids.
    """
    specs = make_specs(16)
    weights, counts = make_weights(specs), make_counts(specs) if with_counts else None
    tables = planned(strategy, specs, share, with_counts).build()
    tables.load_dense_(weights, counts)
    error = total = 0.0
    for spec in specs:
        weight, got = weights[spec.name], tables.materialize(spec.name).detach()
        count = torch.ones(len(weight)) if counts is None else counts[spec.name].float()
        error += float(((got - weight).square().sum(1) * count).sum())
        total += float((weight.square().sum(1) * count).sum())
    return error / total


def check_reconstruction(strategy: Strategy) -> None:
    """The error of `load_dense_` falls as the budget grows, and is never worse than that of zeros."""
    config = make_config(strategy)
    smallest, largest = byte_range(config, make_specs(16))
    shares = (0.0, 0.25, 0.5, 0.75, 1.0) if smallest < largest else (1.0,)
    for with_counts in (False, True):
        errors = [reconstruction_error(strategy, share, with_counts) for share in shares]
        shown = ", ".join(f"{error:.4f}" for error in errors)
        require(max(errors) < 1.02, f"worse than zeros; errors as the budget grows: {shown}")
        rises = any(after > 1.1 * before + 0.02 for before, after in pairwise(errors))
        require(not rises, f"the error rises with the budget: {shown}")
        require(len(errors) == 1 or errors[-1] < 0.9 * errors[0] + 1e-6, f"more budget buys nothing: {shown}")


def check_huge_tables(strategy: Strategy) -> None:
    """26 tables of 10⁹ ids are planned and built on ``meta`` within a second of processor time, without memory."""
    specs = tuple(TableSpec(f"field_{index}", 10**9, 64) for index in range(26))
    planned(strategy, specs, 0.1)
    seconds = []
    for _ in range(2):
        started = time.process_time()
        made = planned(strategy, specs, 0.1)
        with torch.device("meta"):
            tables = strategy_of(made.config).tables_class(specs, made.config)
        seconds.append(time.process_time() - started)
    require(min(seconds) < 1.0, f"planning 26 tables of 10^9 ids took {min(seconds):.2f} s")
    require(all(p.is_meta for p in tables.parameters()), "a parameter of tables built on meta is not on meta")
    json.dumps(made.report.to_rows())
