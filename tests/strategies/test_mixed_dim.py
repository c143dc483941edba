"""``mixed_dim``: its rule against plain Python and known ratios, its steps under budgets, its equations by hand."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from embcomp import BudgetError, ConfigError, Knowledge, MixedDimConfig, TableSpec, build_tables, plan
from embcomp.budget import measure
from embcomp.strategies.mixed_dim import MixedDimTables, power_rule

SPECS = [TableSpec("item", 500, 8), TableSpec("gender", 2, 8), TableSpec("shop", 90, 8)]
# The vocabularies of the Criteo display advertising challenge, no id left out.
CRITEO = [1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194]
CRITEO += [27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]
FORMATS = ("float32", "float16", "int8:column:offset", "int4:group3:offset", "int3:row", "int1:group8:offset")

vocabularies = st.lists(st.integers(1, 10**7), min_size=1, max_size=8)


def criteo(dim: int = 16) -> list[TableSpec]:
    return [TableSpec(f"field_{index}", size, dim) for index, size in enumerate(CRITEO)]


def raw_dims(sizes: list[int], dim: int, alpha: float) -> list[float]:
    """The power law before rounding, the factor from the smallest table."""
    factor = dim * min(sizes) ** alpha
    return [factor * size**-alpha for size in sizes]


@settings(max_examples=200, deadline=None)
@given(vocabularies, st.integers(1, 40), st.floats(0, 4))
def test_dimensions_are_the_rounded_power_law(sizes, dim, alpha):
    expected = []
    for raw in raw_dims(sizes, dim, alpha):
        assume(abs(raw % 1 - 0.5) > 1e-9)
        expected.append(min(max(round(raw), 1), dim))
    assert power_rule(sizes, dim, alpha) == expected


@settings(max_examples=200, deadline=None)
@given(vocabularies, st.integers(0, 6), st.floats(0, 4))
def test_the_staircase_has_the_nearest_powers_of_two(sizes, power, alpha):
    expected = []
    for raw in raw_dims(sizes, 2**power, alpha):
        assume(abs(math.log2(raw) % 1 - 0.5) > 1e-9)
        expected.append(2 ** min(max(round(math.log2(raw)), 0), power))
    assert power_rule(sizes, 2**power, alpha, power_of_two=True) == expected


def test_the_staircase_ends_at_a_dimension_that_is_no_power_of_two():
    assert power_rule([10, 10, 20, 60, 10**9], 6, 0.5, power_of_two=True) == [6, 6, 4, 2, 1]
    assert power_rule([10, 20, 60], 6, 0.0, power_of_two=True) == [6, 6, 6]


@pytest.mark.parametrize(("alpha", "ratio"), [(0.05, 0.500), (0.10, 0.251), (0.15, 0.127), (0.20, 0.064)])
def test_the_staircase_on_criteo_has_the_known_ratios(alpha, ratio):
    report = plan(criteo(), MixedDimConfig(alpha=alpha, power_of_two=True)).report
    assert report.serve_bytes / (4 * 16 * sum(CRITEO)) == pytest.approx(ratio, abs=0.002)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("budget", ["50%", "25%", "10%", "5%"])
def test_criteo_meets_budgets(budget, power_of_two):
    for specs, rows in ((criteo(64), "float32"), (criteo(), "int8")):
        planned = plan(specs, MixedDimConfig(power_of_two=power_of_two, rows=rows), budget)
        assert planned.report.serve_bytes <= planned.budget_bytes
        assert rows != "float32" or planned.report.serve_bytes > (0.8 if power_of_two else 0.98) * planned.budget_bytes


def test_no_alpha_between_two_steps_is_left_out():
    planned = plan(SPECS, "mixed_dim", "45%")
    rivals = [plan(SPECS, MixedDimConfig(alpha=step / 1000)) for step in range(3000)]
    best = max(rival.report.serve_bytes for rival in rivals if rival.report.serve_bytes <= planned.budget_bytes)
    assert planned.report.serve_bytes == best
    assert planned.config.dims in [rival.config.dims for rival in rivals]


def test_the_smallest_budget_leaves_larger_tables_one_dimension():
    with pytest.raises(BudgetError) as error:
        plan(criteo(), "mixed_dim", "5%")
    smallest = plan(criteo(), "mixed_dim", f"{error.value.minimum_bytes}B").config.dims
    assert smallest["field_2"] == smallest["field_1"] == 1
    assert smallest["field_8"] == 16


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=2, max_size=6),
    st.integers(2, 9),
    st.sampled_from(FORMATS),
    st.sampled_from(["error", "oov_row"]),
)
def test_no_step_takes_bytes_away(sizes, dim, rows, unseen):
    specs, config = [TableSpec(f"t{i}", size, dim) for i, size in enumerate(sizes)], MixedDimConfig(rows, unseen)
    known = Knowledge()
    low, high = MixedDimTables.size_range(specs, config, known)
    sized = [MixedDimTables.resize(specs, config, size, known) for size in range(low, high + 1)]
    found = [measure(specs, config).serve_bytes for config in sized]
    assert found == sorted(found)
    assert set(sized[-1].dims.values()) == {dim}


def test_a_vector_is_its_row_times_its_tables_matrix():
    tables = build_tables(SPECS, MixedDimConfig(dims={"item": 2, "gender": 8, "shop": 5}))
    by_table = {part.names[0]: part for part in tables.parts}
    ids = torch.tensor([[7, 1, 3], [499, 0, 89]])
    vectors = tables(ids)
    for b in range(2):
        for t, (name, dim) in enumerate((("item", 2), ("gender", 8), ("shop", 5))):
            row = by_table[name].rows.weight[ids[b, t]]
            assert len(row) == dim
            matrix = by_table[name].projection[0] if dim < 8 else torch.eye(8)
            expected = sum(row[j] * matrix[j] for j in range(dim))
            torch.testing.assert_close(vectors[b, t], expected)


def test_bytes_are_rows_and_projections_and_no_projection_at_the_full_dimension():
    planned = plan(SPECS, MixedDimConfig(alpha=0.25))
    assert planned.config.dims == {"item": 2, "gender": 8, "shop": 3}  # 8 · 250^-¼ = 2.01, 8 · 45^-¼ = 3.09
    assert planned.report.by_table() == {
        "item": 4 * (500 * 2 + 2 * 8),
        "gender": 4 * 2 * 8,
        "shop": 4 * (90 * 3 + 3 * 8),
    }


def test_a_table_that_a_projection_would_enlarge_keeps_its_dimension():
    specs = [TableSpec("flag", 2, 8), TableSpec("month", 12, 8), TableSpec("item", 500, 8)]
    wide, narrow = (plan(specs, MixedDimConfig(alpha=alpha)).report.by_table()["month"] for alpha in (0.1, 0.5))
    assert wide == 4 * 12 * 8  # 7 dimensions by the rule: 7 · (12 + 8) > 12 · 8
    assert narrow == 4 * 3 * (12 + 8)


def test_a_given_alpha_is_checked_by_a_budget_and_not_changed():
    alone = plan(SPECS, MixedDimConfig(alpha=0.25))
    assert plan(SPECS, MixedDimConfig(alpha=0.25), "90%").config == alone.config
    with pytest.raises(BudgetError, match=str(alone.report.serve_bytes)):
        plan(SPECS, MixedDimConfig(alpha=0.25), "20%")


@pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf])
def test_a_wrong_alpha_is_named(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        MixedDimConfig(alpha=alpha)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"item": 2, "gender": 8}, "no entry for tables shop"),
        ({"item": 2, "gender": 8, "shop": 5, "shops": 5}, "'shops', which does not exist"),
        ({"item": 9, "gender": 8, "shop": 5}, r"'item': 9.*must be in \[1, 8\]"),
        ({"item": 0, "gender": 8, "shop": 5}, r"'item': 0.*must be in \[1, 8\]"),
    ],
)
def test_wrong_dims_are_named(dims, message):
    with pytest.raises(ConfigError, match=message):
        plan(SPECS, MixedDimConfig(dims=dims))


def test_what_is_missing_or_too_much_is_named():
    with pytest.raises(ConfigError, match="not both"):
        MixedDimConfig(alpha=0.3, dims={"item": 2})
    with pytest.raises(ConfigError, match="budget="):
        plan(SPECS, "mixed_dim")
    with pytest.raises(ConfigError, match="give dims, or plan with alpha"):
        MixedDimTables(SPECS, MixedDimConfig(alpha=0.3))
