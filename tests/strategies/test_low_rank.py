"""``low_rank``: ranks bought by error per byte, against an exhaustive search, and fits against a plain SVD."""

import itertools

import pytest
import torch

from embcomp import ConfigError, LowRankConfig, TableSpec, build_tables, plan

SPECS = [TableSpec("item", 400, 5), TableSpec("shop", 150, 5), TableSpec("gender", 2, 5)]


def _weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    steep = torch.tensor([4.0, 1.0, 0.1, 0.05, 0.02])
    return {
        "item": torch.randn(400, 5) * steep,
        "shop": torch.randn(150, 5),
        "gender": torch.randn(2, 5),
    }


def _error(ranks: tuple[int, int], weights: dict[str, torch.Tensor]) -> float:
    tails = [torch.linalg.svdvals(weights[name])[rank:] for name, rank in zip(("item", "shop"), ranks, strict=True)]
    return sum(float(tail.square().sum()) for tail in tails)


def test_ranks_bought_by_error_per_byte_are_the_best_for_their_bytes():
    weights = _weights()
    for budget in ("45%", "60%", "75%"):
        planned = plan(SPECS, "low_rank", budget, weights=weights)
        chosen = planned.config.ranks["item"], planned.config.ranks["shop"]
        rivals = [
            ranks
            for ranks in itertools.product(range(1, 6), range(1, 6))
            if plan(SPECS, LowRankConfig(ranks={"item": ranks[0], "shop": ranks[1], "gender": 5})).report.serve_bytes
            <= planned.report.serve_bytes
        ]
        best = min(_error(ranks, weights) for ranks in rivals)
        assert _error(chosen, weights) <= best * 1.001


def test_trained_tables_get_ranks_where_their_spectrum_is():
    planned = plan(SPECS, "low_rank", "60%", weights=_weights())
    assert planned.config.ranks["shop"] > planned.config.ranks["item"]


def test_the_fit_is_a_truncated_svd():
    weights = _weights()
    config = LowRankConfig(ranks={"item": 2, "shop": 3, "gender": 5})
    tables = build_tables(SPECS, config).load_dense_(weights)
    for name, rank in (("item", 2), ("shop", 3)):
        left, values, right = torch.linalg.svd(weights[name], full_matrices=False)
        expected = left[:, :rank] * values[:rank] @ right[:rank]
        torch.testing.assert_close(tables.materialize(name), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tables.materialize("gender"), weights["gender"])


def test_counts_move_the_fit_to_frequent_ids():
    weights = _weights()
    config = LowRankConfig(rank=1)
    counts = {"shop": torch.cat([torch.full((10,), 10_000), torch.ones(140, dtype=torch.int64)])}
    plain = build_tables(SPECS, config).load_dense_(weights).materialize("shop")
    weighted = build_tables(SPECS, config).load_dense_(weights, counts).materialize("shop")

    def head_error(vectors: torch.Tensor) -> float:
        return float((vectors.detach() - weights["shop"])[:10].square().sum())

    assert head_error(weighted) < 0.9 * head_error(plain)


def test_rows_of_few_bits_compose():
    planned = plan(SPECS, LowRankConfig(rows="int8:column"), "25%")
    assert planned.report.serve_bytes <= planned.budget_bytes
    assert max(planned.config.ranks.values()) > 1


def test_wrong_ranks_are_named():
    with pytest.raises(ConfigError, match="not both"):
        LowRankConfig(rank=2, ranks={"item": 2})
    with pytest.raises(ConfigError, match="'item': 0"):
        LowRankConfig(ranks={"item": 0})
    with pytest.raises(ConfigError, match="no rank for table 'shop'"):
        plan(SPECS, LowRankConfig(ranks={"item": 2}))
