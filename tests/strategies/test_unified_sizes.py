"""The sizes of ``unified``: budgets, exempt tables, lookups, and options that are refused."""

import pytest
import torch

from embcomp import BudgetError, ConfigError, TableSpec, UnifiedConfig, build_tables, plan
from embcomp.hashing import MAX_RANGE
from embcomp.strategies._unified_sizes import auto_lookups
from embcomp.strategies.unified import UnifiedTables
from tests.strategies.unified_tables import make_specs


@pytest.mark.parametrize("budget", ["0.3%", "2%", "10%", "50%", "97%"])
@pytest.mark.parametrize("options", [{}, {"lookups": 4}, {"exempt": "none", "sub_tables": 7}, {"reader": "diagonal"}])
def test_a_budget_is_used_to_within_one_row(budget, options):
    made = plan(make_specs(7, 90, 3000, 20000, dim=16), UnifiedConfig(**options), budget=budget)
    row = 4 * made.config.chunk_dim
    assert made.budget_bytes - row < made.report.serve_bytes <= made.budget_bytes


@pytest.mark.parametrize("budget", ["2%", "50%"])
def test_scales_of_tables_are_within_the_budget(budget):
    specs = [TableSpec(f"t{i}", 3000, 16, init_std=std) for i, std in enumerate((0.1, 0.9))]
    made = plan(specs, UnifiedConfig(), budget=budget)
    tables = build_tables(specs, made.config)
    assert sum(tensor.nbytes for tensor in tables.state_dict().values()) == made.report.serve_bytes
    assert made.budget_bytes - 4 * made.config.chunk_dim < made.report.serve_bytes <= made.budget_bytes


def test_small_tables_are_exempt_up_to_their_share_and_all_where_all_fit():
    def exempt(budget, **options):
        config = plan(make_specs(7, 90, 90, 3000, 20000), UnifiedConfig(**options), budget=budget).config
        return [name for name, kept in config.exempt.items() if kept]

    assert exempt("0.5%") == []  # 115 rows, 5 % of them are 5
    assert exempt("1%") == ["t0"]
    assert exempt("15%") == ["t0"]  # 173 rows are for one table of 90, but not for two
    assert exempt("16.2%") == ["t0", "t1", "t2"]
    assert exempt("15%", exempt_share=0.3) == ["t0", "t1", "t2"]
    assert exempt("99.9%") == ["t0", "t1", "t2"]
    assert exempt("100%") == ["t0", "t1", "t2", "t3", "t4"]
    assert exempt("100%", exempt="none") == []
    assert exempt("50%", exempt={"t3": True}) == ["t3"]


def test_exempt_tables_do_not_collide_and_are_fitted_exactly():
    specs = make_specs(30, 2000, 20)
    tables = build_tables(specs, UnifiedConfig(lookups=2), budget="50%")
    assert tables.config.exempt == {"t0": True, "t1": False, "t2": True}
    weights = {spec.name: torch.randn(spec.num_embeddings, 4) for spec in specs}
    tables.load_dense_(weights)
    for name in ("t0", "t2"):
        torch.testing.assert_close(tables.materialize(name), weights[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("num_ids", "pool_rows", "expected"),
    [
        (100, 20000, 1),  # 6 · 100^¼ = 19 values, 0.005 twins
        (100, 10000, 2),  # exactly 0.01 twins is not below 0.01
        (100, 5000, 2),
        (1000, 10**9, 2),  # 33.7 values do not fit into 32
        (10**6, 10**9, 4),  # 190 values
        (10**6, 10**3, 4),
        (1000, 50, 3),  # 1000 / 50² = 0.4, 1000 / 50³ = 0.008
        (5, 1, 4),  # one row tells nobody apart, however often it is looked up
    ],
)
def test_the_rule_for_lookups(num_ids, pool_rows, expected):
    assert auto_lookups(TableSpec("t", num_ids, 128), 32, pool_rows, 0.01) == expected


def test_lookups_are_written_into_the_complete_config():
    specs = make_specs(100, 10**6, dim=64)
    config = plan(specs, UnifiedConfig(pool_rows=20000, chunk_dim=32, exempt="none")).config
    assert config.lookups == {"t0": 1, "t1": 2}
    assert plan(specs, config).config == config
    partly = UnifiedConfig(pool_rows=20000, chunk_dim=16, exempt="none", lookups={"t1": 3})
    assert plan(specs, partly).config.lookups == {"t0": 2, "t1": 3}


def test_pools_beyond_the_range_of_one_hash_are_cut_into_parts():
    config = plan([TableSpec("huge", 10**11, 4)], UnifiedConfig(), budget="10%").config
    assert config.pool_rows == 10**10
    assert config.sub_tables == 5
    assert config.pool_rows / config.sub_tables <= MAX_RANGE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_dim": 3}, "must be one of"),
        ({"lookups": 3}, "must be one of"),
        ({"chunk_dim": 4, "lookups": 2}, "at most 1 lookups"),
        ({"lookups": 0}, "at least 1"),
        ({"lookups": "many"}, "'auto'"),
        ({"lookups": {"t0": True}}, "at least 1"),
        ({"lookups": {"t00": 1}}, "did you mean 't0'"),
        ({"exempt": "some"}, "'none'"),
        ({"exempt": {"t9": True}}, "names table 't9'"),
        ({"exempt": {"t0": 1}}, "to bool"),
        ({"exempt_share": 1.0}, "exempt_share"),
        ({"twin_limit": 0.0}, "twin_limit"),
        ({"reader": "diag"}, "did you mean 'diagonal'"),
        ({"sub_tables": 11}, "every part needs a row"),
        ({"pool_rows": 0}, "every part needs a row"),
        ({"pool_rows": None}, "budget="),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build_tables(make_specs(100, 200), UnifiedConfig(**{"pool_rows": 10, **options}))


def test_a_config_that_is_open_or_of_other_tables_builds_nothing():
    with pytest.raises(ConfigError, match="open sizes"):
        UnifiedTables(make_specs(9), UnifiedConfig(pool_rows=9))
    complete = plan(make_specs(9, 20), UnifiedConfig(pool_rows=9, exempt="none")).config
    with pytest.raises(ConfigError, match="other tables"):
        UnifiedTables(make_specs(9, 20, 30), complete)


def test_a_budget_below_the_exempt_tables_names_the_minimum():
    with pytest.raises(BudgetError) as caught:
        plan(make_specs(50, 1000), UnifiedConfig(exempt={"t0": True}), budget="100B")
    assert caught.value.minimum_bytes == 51 * 16
