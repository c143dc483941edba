"""``reduced_dim``: its equations by hand, its best fit against a plain SVD, and which tables it leaves whole."""

import pytest
import torch

from embcomp import ConfigError, ReducedDimConfig, TableSpec, build_tables, plan

SPECS = [TableSpec("item", 500, 8), TableSpec("gender", 2, 8), TableSpec("shop", 90, 8)]


def test_a_vector_is_its_row_times_its_tables_matrix():
    tables = build_tables(SPECS, ReducedDimConfig(dim=3))
    part = tables.parts[0]
    ids = torch.tensor([[7, 1, 3], [499, 0, 89]])
    vectors = tables(ids)
    for b in range(2):
        row = part.rows.weight[ids[b, 2] + 500]  # shops lie behind the 500 items
        expected = sum(row[j] * part.projection[1, j] for j in range(3))
        torch.testing.assert_close(vectors[b, 2], expected)


def test_without_a_projection_the_tail_is_zero():
    tables = build_tables(SPECS, ReducedDimConfig(dim=3, projection="none"))
    vectors = tables.materialize("item")
    assert torch.equal(vectors[:, 3:], torch.zeros(500, 5))
    assert vectors[:, :3].abs().min() > 0


def test_a_table_that_a_projection_would_enlarge_is_kept_whole():
    by_table = plan(SPECS, ReducedDimConfig(dim=3)).report.by_table()
    assert by_table["gender"] == 2 * 8 * 4
    assert by_table["item"] == 500 * 3 * 4 + 3 * 8 * 4


def test_the_fit_is_the_best_rank_d_approximation():
    torch.manual_seed(0)
    weights = {spec.name: torch.randn(spec.num_embeddings, 8) for spec in SPECS}
    counts = {"item": torch.arange(1, 501)}
    tables = build_tables(SPECS, ReducedDimConfig(dim=3)).load_dense_(weights, counts)
    scale = torch.arange(1, 501).float().sqrt()[:, None]
    tail = torch.linalg.svdvals(weights["item"] * scale)[3:].square().sum()  # Eckart–Young
    error = ((tables.materialize("item") - weights["item"]) * scale).square().sum()
    assert error.item() == pytest.approx(tail.item(), rel=1e-3)


def test_the_budget_chooses_the_largest_dimension_that_fits():
    planned = plan(SPECS, "reduced_dim", "50%")
    bigger = plan(SPECS, ReducedDimConfig(dim=planned.config.dim + 1))
    assert planned.report.serve_bytes <= planned.budget_bytes < bigger.report.serve_bytes


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"dim": -3}, {"projection": "lineer"}, {"dim": 2.5}])
def test_a_wrong_option_is_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ReducedDimConfig(**wrong)


def test_no_size_and_no_budget_says_what_to_give():
    with pytest.raises(ConfigError, match="budget="):
        plan(SPECS, "reduced_dim")
