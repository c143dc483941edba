"""The contract suite itself: it passes what is right, and each check finds what it is there to find."""

from dataclasses import dataclass, replace

import pytest
import torch

from embcomp import ConfigError, StrategyConfig, register_strategy, testing
from embcomp import config as registry
from embcomp.memory import MemoryReport
from embcomp.strategies.full import FullTables
from embcomp.testing import CHECKS, check_strategy


@dataclass(frozen=True)
class MineConfig(StrategyConfig):
    """A strategy that embcomp does not know.

    Attributes:
        dim: values of a row that are kept; the others are zero.
    """

    dim: int | None = None


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


class Right(FullTables):
    """Plain tables, and so all right."""


class ForgetsTheTable(FullTables):
    def lookup(self, ids, table):
        return self.rows(ids, table)


class TakesTheTableForABatch(FullTables):
    def lookup(self, ids, table):
        return self.rows(ids + (self._starts[: ids.shape[0]] if table is None else self._starts[table]), table)


class UsesTheGlobalGenerator(FullTables):
    def reset_parameters(self):
        self.rows.reset_parameters([spec.init_std for spec in self.specs])


class StartsTooWide(FullTables):
    def reset_parameters(self):
        self.rows.reset_parameters([2 * spec.init_std for spec in self.specs], self.generator())


class CutsGradients(FullTables):
    def lookup(self, ids, table):
        return super().lookup(ids, table).detach().requires_grad_()


class TrainsPadding(FullTables):
    def _apply_unseen(self, ids, table):
        return super()._apply_unseen(ids, table)[0], None


class CopiesTheTable(FullTables):
    def lookup(self, ids, table):
        return (self.rows.weight * 1.0)[ids + self.pick(self._starts, table)]


class GathersAMatrixPerId(FullTables):
    def lookup(self, ids, table):
        vectors = super().lookup(ids, table)
        if not isinstance(table, torch.Tensor):
            return vectors
        rotations = torch.eye(self.embedding_dim).repeat(self.num_tables, 1, 1)
        return torch.einsum("...d,...dk->...k", vectors, rotations[table])


class CountsLookups(FullTables):
    def __init__(self, specs, config, counts=None):
        super().__init__(specs, config)
        self.register_buffer("seen", torch.zeros(1, dtype=torch.long))

    def lookup(self, ids, table):
        self.seen += ids.numel()
        return super().lookup(ids, table)


class HidesBytes(FullTables):
    def __init__(self, specs, config, counts=None):
        super().__init__(specs, config)
        self.register_buffer("remap", torch.zeros(100, dtype=torch.long))

    def memory(self):
        report = super().memory()
        return MemoryReport(tuple(part for part in report.parts if part.name != "remap"), report.full_bytes)


class KeepsDataInNoFile(FullTables):
    def __init__(self, specs, config, counts=None):
        super().__init__(specs, config)
        known = bool(counts)
        self.constant("sign", torch.tensor(-1.0 if known else 1.0, device="cpu"))

    def lookup(self, ids, table):
        return self.sign * super().lookup(ids, table)


class FitsNothing(FullTables):
    def fit(self, weights, counts):
        pass


class ServesOtherVectors(FullTables):
    def lookup(self, ids, table):
        return super().lookup(ids, table) * (1.001 if self.is_final else 1.0)


class ForgetsWidths(FullTables):
    def widths_of(self, table):
        return super().widths_of(table) // (2 if self.is_final else 1)


class ScoresOtherVectors(FullTables):
    def stretches(self, index, queries):
        return super().stretches(index, queries * 1.001)


class ScoresWithoutGradients(FullTables):
    def stretches(self, index, queries):
        [plain] = super().stretches(index, queries)
        return [replace(plain, vectors=lambda ids: self.rows(self.as_ids(ids) + self._starts[index]).detach())]


class ScoresPadding(FullTables):
    def scores(self, table, queries, chunk=None):
        return super().scores(table, queries, chunk) + 1e-6 * queries.sum(-1, keepdim=True)


class ScoresAllAtOnce(FullTables):
    def scores(self, table, queries, chunk=None):
        return queries @ self.materialize(table).T


class LooksAtTheIds(FullTables):
    def lookup(self, ids, table):
        vectors = super().lookup(ids, table)
        return vectors if ids.any() else vectors.clone()


class AllocatesEverything(FullTables):
    def __init__(self, specs, config, counts=None):
        super().__init__(specs, config)
        self.gate = torch.nn.Parameter(torch.ones(1, device="cpu"))


class ShrinksAsItGrows(FullTables):
    def __init__(self, specs, config, counts=None):
        super().__init__(specs, config)
        self.register_buffer("ballast", torch.zeros(100 - 10 * (config.dim or 1)))

    @classmethod
    def size_range(cls, specs, config, known):
        return 1, 4

    @classmethod
    def resize(cls, specs, config, size, known):
        return MineConfig(dim=size)


MUTANTS = {
    ForgetsTheTable: "ids_differ",
    TakesTheTableForABatch: "shapes",
    UsesTheGlobalGenerator: "seeds",
    StartsTooWide: "initial_spread",
    CutsGradients: "gradients",
    TrainsPadding: "padding",
    CopiesTheTable: "lookup_memory",
    GathersAMatrixPerId: "lookup_memory",
    CountsLookups: "evaluation_changes_nothing",
    HidesBytes: "bytes",
    KeepsDataInNoFile: "config",
    FitsNothing: "reconstruction",
    ServesOtherVectors: "finalize",
    ForgetsWidths: "widths",
    ScoresOtherVectors: "scores",
    ScoresWithoutGradients: "scores",
    ScoresPadding: "scores",
    ScoresAllAtOnce: "scores",
    LooksAtTheIds: "compile",
    AllocatesEverything: "huge_tables",
    ShrinksAsItGrows: "size_knob",
}


@pytest.mark.parametrize(("tables_class", "name"), MUTANTS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_finds(tables_class, name):
    register_strategy("mine", MineConfig)(tables_class)
    check = getattr(testing, f"check_{name}")
    with pytest.raises(Exception) as caught:  # noqa: PT011 - some mutants crash where others are found wanting
        check("mine")
    assert isinstance(caught.value, AssertionError) or tables_class in (TakesTheTableForABatch, LooksAtTheIds)


def test_passes_a_strategy_of_somebody_else_by_name_and_by_config():
    register_strategy("mine", MineConfig)(Right)
    check_strategy("mine")
    check_strategy(MineConfig(rows="int8"), skip=["check_compile", "check_export"])


def test_says_which_check_of_which_strategy_failed():
    register_strategy("mine", MineConfig)(ForgetsTheTable)
    with pytest.raises(AssertionError) as caught:
        check_strategy("mine", skip=["check_table_argument", "check_shapes", "check_tiny_tables", "check_bags"])
    assert caught.value.__notes__[0].startswith("in check_")
    assert "'strategy': 'mine'" in caught.value.__notes__[0]


def test_skipping_what_does_not_exist():
    with pytest.raises(ConfigError, match=r"no check 'check_exports'; did you mean 'check_export'\?"):
        check_strategy("full", skip=["check_exports"])


def test_every_check_is_listed_exported_and_documented():
    found = {name for name in dir(testing) if name.startswith("check_")} - {"check_strategy"}
    assert found == {check.__name__ for check in CHECKS} <= set(testing.__all__)
    assert all(check.__doc__ for check in CHECKS)
