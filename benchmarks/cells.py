"""A cell of a sweep: one strategy, budget, model, data set and seed; its identity, and where its result lies."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.errors import ResultError
from benchmarks.results import FINISHED, INFEASIBLE, CellResult, read_result
from benchmarks.workloads import initial_std
from embcomp import Budget
from embcomp.errors import BudgetError

PLACES = (
    "results_dir",
    "data_root",
    "data_cache",
    "name",
    "label",
    "overwrite",
    "threads",
    "without_budget",
    "exports",
)
"""What a config says beside the cell: it changes no result, and is not part of the identity."""

_WITHIN = (("training", "progress"), ("training", "seed"), ("strategy", "seed"))
"""The same one level deeper; the seeds are those of the cell."""

_LATER = {("training", "plateau_patience"): 1, ("model", "targets"): None, ("data", "all_items"): False}
"""Options that came when there were results already -> the value that means what was done before.

With that value they are not part of the identity, so that those results stand."""


@dataclass(frozen=True)
class Cell:
    """A cell, by its resolved config.

    Attributes:
        config: JSON values, as composed from ``configs/``.
        overrides: of the command line that it was composed by.
    """

    config: dict[str, Any]
    overrides: tuple[str, ...] = ()

    @cached_property
    def budget(self) -> str | None:
        """The budget in canonical form, so that 0.1, 10% and 10x are one; as written where it can't be read."""
        if self.config["budget"] is None or self.strategy in (self.config.get("without_budget") or ()):
            return None
        try:
            budget = Budget.parse(self.config["budget"])
        except BudgetError:
            return str(self.config["budget"])
        return f"{budget.count}B" if budget.share is None else f"{100 * budget.share:.6g}%"

    @property
    def seed(self) -> int:
        """The seed of everything random but the split of the data."""
        return int(self.config["seed"])

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return str(self.config["strategy"]["name"])

    @property
    def exports(self) -> tuple[str, ...]:
        """Kinds of files whose sizes are asked for; one may be given without brackets."""
        asked = self.config.get("exports") or ()
        return (asked,) if isinstance(asked, str) else tuple(map(str, asked))

    @property
    def label(self) -> str:
        """What reports call the cell's series."""
        return str(self.config.get("label") or self.strategy)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The part of the config that results depend on."""
        values = {name: copy.deepcopy(value) for name, value in self.config.items() if name not in PLACES}
        for group, name in _WITHIN:
            values[group].pop(name, None)
        for (group, name), before in _LATER.items():
            if name in values[group] and values[group][name] == before:
                del values[group][name]
        if values.get("init_std") is None:
            values["init_std"] = initial_std(str(values["model"]["name"]))
        return {**values, "budget": self.budget}

    @cached_property
    def digest(self) -> str:
        """Digest of the identity, 16 hexadecimal digits."""
        return _digest(self.identity)

    @cached_property
    def series(self) -> str:
        """Digest of the identity without budget and seed."""
        return _digest({name: value for name, value in self.identity.items() if name not in ("budget", "seed")})

    @cached_property
    def name(self) -> str:
        """What a person would call the cell, and enough of the digest to tell it from all others."""
        budget = "all" if self.budget is None else self.budget.replace("%", "pct")
        parts = (self.config["data"]["name"], self.config["model"]["name"], self.strategy, budget, f"seed{self.seed}")
        return re.sub(r"[^\w.+-]", "_", "-".join(map(str, parts))) + f"-{self.digest[:8]}"

    @property
    def folder(self) -> Path:
        """The folder of the cell's experiment."""
        return Path(self.config["results_dir"]).expanduser() / str(self.config["name"])

    @property
    def path(self) -> Path:
        """The result."""
        return self.folder / f"{self.name}.json"

    @property
    def log_path(self) -> Path:
        """The traceback of a failure."""
        return self.folder / f"{self.name}.log"

    @property
    def lock_path(self) -> Path:
        """The lock of the process that runs the cell."""
        return self.folder / ".locks" / f"{self.name}.lock"

    def empty_result(self, status: str, **fields: Any) -> CellResult:
        """A result that says what was asked for, and ``fields``."""
        return CellResult(
            cell=self.name,
            digest=self.digest,
            series=self.series,
            status=status,
            experiment=str(self.config["name"]),
            data=str(self.config["data"]["name"]),
            model=str(self.config["model"]["name"]),
            strategy=self.strategy,
            label=self.label,
            budget=self.budget,
            seed=self.seed,
            config=self.config,
            command=shlex.join(["embcomp-bench", *self.overrides]),
            **fields,
        )

    def finished(self) -> CellResult | None:
        """The result of an earlier run that need not be repeated; failures, damaged files and lacking exports are."""
        try:
            result = read_result(self.path)
        except ResultError:
            return None
        if result.digest != self.digest or result.status not in FINISHED:
            return None
        return result if result.status == INFEASIBLE or set(self.exports) <= set(result.exports) else None


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
