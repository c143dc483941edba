"""Groups that are cut together, against one group of all their tables."""

import pytest
import torch
from torch import nn

from embcomp import TableSpec, build_tables, make_config
from embcomp.strategies.full import FullConfig, FullTables
from embcomp.training import Phase, Phases
from embcomp.training.greedy import GreedyCut

SIZES, COUNTS = {"user": 90, "item": 40, "flag": 20}, torch.arange(100, 0, -1)
WEIGHTS = {name: torch.randn(size, 8, generator=torch.Generator().manual_seed(size)) for name, size in SIZES.items()}
IMPORTANCE = {"user": 1.0, "item": 4.0, "flag": 2.0}


class Model(nn.Module):
    """Groups of the tables that are named, all of the same weights."""

    def __init__(self, groups, budget):
        super().__init__()
        self.groups = nn.ModuleList()
        for names in groups:
            specs = [TableSpec(name, SIZES[name], 8) for name in names]
            counts = {name: COUNTS[: SIZES[name]] for name in names}
            tables = build_tables(specs, make_config("nested", projection="none"), budget, counts)
            self.groups.append(tables.load_dense_({name: WEIGHTS[name] for name in names}))

    def value(self):
        """Higher the nearer lookups are to what they were."""
        lost = 0.0
        for tables in self.groups:
            for name in tables.names:
                error = tables(torch.arange(SIZES[name]), name).detach() - WEIGHTS[name]
                lost += IMPORTANCE[name] * float((error.double() ** 2).mean())
        return -lost


def cut(groups, budget, **search):
    model = Model(groups, budget)
    phases = Phases(model)
    phases.enter_(phases.phases[1])
    result = phases.search_(model.value, **search)
    phases.leave_(phases.phases[1])
    return list(model.groups), result


def steps(groups):
    """For each step the form of all tables and its value, by the groups' own fronts."""
    fronts = zip(*(tables.pareto() for tables in groups), strict=True)
    return [(tuple(gene for point in points for gene in point.candidate), points[0].value) for points in fronts]


@pytest.mark.parametrize("split", [[["user"], ["item", "flag"]], [["user"], ["item"], ["flag"]]])
def test_the_way_down_is_that_of_one_group(split):
    (whole,), alone = cut([["user", "item", "flag"]], "30%")
    parts, together = cut(split, "30%")
    assert steps(parts) == steps([whole])
    assert together.num_evaluated == alone.num_evaluated
    assert together.value == alone.value


@pytest.mark.parametrize("budget", ["60%", "30%", "9%"])
def test_the_budget_is_that_of_all_groups_and_is_used_up_to_within_a_row(budget):
    groups, result = cut([["user"], ["item"], ["flag"]], budget)
    full = sum(tables.memory().full_bytes for tables in groups)
    limit = full * float(budget[:-1]) / 100
    served = sum(tables.memory().serve_bytes for tables in groups)
    assert limit - 8 * 4 < served <= limit
    assert max(tables.memory().ratio for tables in groups) > 1.2 * float(budget[:-1]) / 100
    assert (result.candidate, result.value) in steps(groups)


def test_a_search_that_is_broken_off_goes_on_from_its_file(tmp_path):
    whole, wanted = cut([["user"], ["item"]], "20%")
    calls, file = [], tmp_path / "search.json"
    model = Model([["user"], ["item"]], "20%")

    def sometimes():
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return model.value()

    for _ in range(2):
        phases = Phases(model)
        phases.enter_(phases.phases[1])
        try:
            result = phases.search_(sometimes, checkpoint=file)
        except KeyboardInterrupt:
            assert [path.name for path in tmp_path.iterdir()] == ["search.json"]
    assert result == wanted
    assert steps(model.groups) == steps(whole)
    assert not list(tmp_path.iterdir())


class Cut(FullTables):
    """Tables that keep no front, and remember what they adopted."""

    def phases(self):
        return (Phase("cut", kind="search"),)

    def make_search(self):
        return GreedyCut([(8, 4, 0)], lambda candidate: 10 * candidate[0], 40)

    def show_(self, candidates):
        self.adopt_(candidates[0])

    def adopt_(self, candidate):
        self.adopted = candidate


def test_groups_that_keep_no_front_adopt_what_they_are_given():
    model = nn.ModuleList(Cut([TableSpec(name, 5, 8)], FullConfig()) for name in ("user", "item"))
    phases = Phases(model)
    phases.enter_(phases.phases[0])
    result = phases.search_(lambda: float(model[0].adopted[0] + 3 * model[1].adopted[0]))
    phases.leave_(phases.phases[0])
    assert result.candidate == (0, 8)
    assert [tables.adopted for tables in model] == [(0,), (8,)]
