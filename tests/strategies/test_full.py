"""``full``: the plain table itself."""

import pytest
import torch
from torch.nn import functional

from embcomp import BudgetError, FullConfig, TableSpec, build_tables, plan

SPECS = [TableSpec("item", 300, 6), TableSpec("gender", 2, 6)]


def test_it_is_an_embedding_per_table():
    tables = build_tables(SPECS, "full")
    items, genders = tables.rows.weight.split([300, 2])
    ids = torch.stack([torch.randint(0, 300, (40,)), torch.randint(0, 2, (40,))], 1)
    expected = torch.stack([functional.embedding(ids[:, 0], items), functional.embedding(ids[:, 1], genders)], 1)
    assert torch.equal(tables(ids), expected)


def test_trained_tables_are_kept_exactly():
    weights = {spec.name: torch.randn(spec.num_embeddings, 6) for spec in SPECS}
    tables = build_tables(SPECS, "full").load_dense_(weights)
    for name, weight in weights.items():
        assert torch.equal(tables.materialize(name), weight)


def test_it_meets_no_budget_below_its_own_bytes():
    with pytest.raises(BudgetError) as caught:
        plan(SPECS, "full", "99%")
    assert caught.value.minimum_bytes == 302 * 6 * 4


@pytest.mark.parametrize(("rows", "share"), [("float16", 0.5), ("bfloat16", 0.5), ("int8:column", None)])
def test_a_row_format_makes_it_smaller(rows, share):
    ratio = plan(SPECS, FullConfig(rows=rows)).report.ratio
    assert ratio == share if share else 0.25 < ratio < 0.3
