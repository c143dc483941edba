"""One budget over several groups."""

import time

import pytest

import embcomp
from embcomp.planning import share_budget


def specs(dim, *sizes):
    return [embcomp.TableSpec(f"t{dim}_{i}", size, dim) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("budget", ["50%", "10%", "1%", 12345 / 1e6])
def test_groups_of_fine_steps_use_the_budget_up_and_never_pass_it(budget):
    groups = [(specs(16, 10_000, 500), "hash"), (specs(1, 10_000, 500), "hash"), (specs(6, 2_000), "hash")]
    plans = embcomp.plan_groups(groups, budget)
    full = sum(plan.report.full_bytes for plan in plans)
    allowed = embcomp.Budget.parse(budget).bytes(full)
    used = sum(plan.report.serve_bytes for plan in plans)
    assert 0.98 * allowed < used <= allowed
    assert used == sum(sum(t.nbytes for t in plan.build().finalize().state_dict().values()) for plan in plans)
    for plan in plans:
        assert plan.report.serve_bytes == pytest.approx(plan.report.full_bytes * allowed / full, rel=0.1, abs=100)


def test_a_group_that_cannot_go_low_takes_its_minimum_and_the_rest_shares_what_is_left():
    plain, hashed = embcomp.plan_groups([(specs(1, 10_000), "full"), (specs(16, 10_000), "hash")], "20%")
    assert plain.report.serve_bytes == 40_000
    assert 0.98 * (0.2 * 680_000 - 40_000) < hashed.report.serve_bytes <= 0.2 * 680_000 - 40_000


def test_what_coarse_steps_leave_over_flows_on():
    coarse, fine = embcomp.plan_groups([(specs(3, 10_000), "reduced_dim"), (specs(16, 10_000), "hash")], "50%")
    assert coarse.report.serve_bytes < 0.4 * coarse.report.full_bytes  # one of three dimensions
    assert fine.report.serve_bytes > 0.52 * fine.report.full_bytes
    assert 0.98 * 380_000 < coarse.report.serve_bytes + fine.report.serve_bytes <= 380_000


def test_an_infeasible_budget_names_the_joint_minimum_and_that_is_feasible():
    groups = [(specs(1, 1_000), "full"), (specs(16, 1_000), "reduced_dim")]
    with pytest.raises(embcomp.BudgetError, match=r"full of 1 tables with D=1: 4000 B; reduced_dim") as caught:
        embcomp.plan_groups(groups, "1%")
    minimum = caught.value.minimum_bytes
    assert sum(plan.report.serve_bytes for plan in embcomp.plan_groups(groups, f"{minimum}B")) <= minimum
    with pytest.raises(embcomp.BudgetError):
        embcomp.plan_groups(groups, f"{minimum - 1}B")


def test_without_a_budget_every_config_says_its_sizes_itself():
    reduced = embcomp.make_config("reduced_dim", dim=2)
    plans = embcomp.plan_groups([(specs(16, 1_000), reduced), (specs(4, 10), "full")])
    assert [plan.config for plan in plans] == [reduced, embcomp.make_config("full")]
    with pytest.raises(embcomp.ConfigError, match="budget="):
        embcomp.plan_groups([(specs(16, 1_000), "reduced_dim")])


def test_counts_go_to_the_group_that_has_the_table():
    plans = embcomp.plan_groups([(specs(16, 3), "full"), (specs(4, 2), "full")], counts={"t4_0": [1, 2]})
    assert [list(plan.counts) for plan in plans] == [[], ["t4_0"]]
    with pytest.raises(embcomp.SpecError, match=r"'t4_1'.*did you mean 't4_0'"):
        embcomp.plan_groups([(specs(4, 2), "full")], counts={"t4_1": [1, 2]})


def test_plans_for_billions_of_ids_take_no_time():
    groups = [(specs(dim, *[10**9] * 13), "hash") for dim in (1, 64)]
    started = time.perf_counter()
    embcomp.plan_groups(groups, "1%")
    assert time.perf_counter() - started < 5.0


@pytest.mark.parametrize(
    ("allowed", "full", "least", "expected"),
    [
        (100, [100, 100], [1, 1], [50, 50]),
        (100, [300, 100], [1, 1], [75, 25]),
        (100, [100, 100], [80, 1], [80, 20]),
        (100, [100, 100, 800], [50, 40, 10], [50, 40, 10]),
        (100, [100, 0], [0, 0], [100, 0]),
    ],
)
def test_shares(allowed, full, least, expected):
    assert share_budget(allowed, full, least) == expected
