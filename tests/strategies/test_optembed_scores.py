"""``optembed``: what rows are worth, and that decay does not turn that into when they were last seen."""

import pytest
import torch
from torch import nn

from embcomp import ConfigError, OptEmbedConfig
from tests.strategies.test_optembed import DIM, SIZES, make_tables, searching, some_ids, supernet

# ---- decay ---------------------------------------------------------------------------------------------------------


def test_decay_touches_the_rows_of_the_batch_alone_and_each_once():
    tables = make_tables(decay=0.1)
    phases = supernet(tables)
    before = tables.rows.weight.detach().clone()
    ids = torch.tensor([[3, 1, 0], [3, 2, 0], [7, 1, 0]])
    tables.train()(ids)
    tables(ids[:1])
    tables.eval()(torch.tensor([[9, 8, 1]]))
    phases.step_()
    used = [3, 7, 51 + 1, 51 + 2, 51 + 10]
    expected = before.clone()
    expected[used] *= 0.9
    torch.testing.assert_close(tables.rows.weight.detach(), expected)
    phases.step_()
    torch.testing.assert_close(tables.rows.weight.detach(), expected)


def test_a_row_unseen_for_1000_steps_keeps_its_norm_where_coupled_l2_in_dense_adam_erases_it():
    tables, plain = make_tables(decay=1e-3), nn.Embedding(50, DIM)
    with torch.no_grad():
        plain.weight.copy_(tables.rows.weight[:50])
    phases = supernet(tables)
    ours = torch.optim.Adam(phases.parameters(), lr=1e-3)
    theirs = torch.optim.Adam(plain.parameters(), lr=1e-3, weight_decay=1e-3)
    before, generator = plain.weight[7].norm().item(), torch.Generator().manual_seed(0)
    for _ in range(1000):
        gradient = 0.01 * torch.randn(DIM, generator=generator)
        for model, optimizer in ((lambda ids: tables.train()(ids, 0), ours), (plain, theirs)):
            optimizer.zero_grad()
            (model(torch.tensor([3])) * gradient).sum().backward()
            optimizer.step()
        phases.step_()
    assert tables.rows.weight[7].norm().item() == before
    assert tables.rows.weight[3].norm() > 1e-2
    assert plain.weight[7].norm().item() < 1e-3 * before
    assert plain.weight[3].norm() > 1e-2


# ---- scores --------------------------------------------------------------------------------------------------------


def test_taylor_importance_is_the_sum_of_gradient_times_vector():
    tables = make_tables(score="taylor", pruned="zero")
    phases = supernet(tables, [0.4, 0.4, 0.4])
    expected = [0.0] * tables.rows.num_rows
    for number in range(3):
        ids = some_ids(tables.train(), 20, seed=number)
        vectors = tables(ids)
        vectors.retain_grad()
        (vectors.sum(-1).sin().sum() + vectors.square().sum()).backward()
        for vector, gradient, row in zip(
            vectors.flatten(0, 1).tolist(),
            vectors.grad.flatten(0, 1).tolist(),
            (ids + torch.tensor(tables.rows.starts())).flatten().tolist(),
            strict=True,
        ):
            expected[row] += abs(sum(v * g for v, g in zip(vector, gradient, strict=True)))
        phases.step_()
    assert tables.importance.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    tables.eval()(ids).sum().backward()
    assert tables.importance.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert sum(value > 0 for value in expected) > 15


def test_bug_rows_whose_place_the_shared_row_takes_get_no_credit_for_it():
    tables = make_tables(score="taylor", pruned="oov")
    supernet(tables, [0.4, 0.4, 0.4])
    ids = some_ids(tables.train(), 40)
    tables(ids).square().sum().backward()
    rows = (ids + torch.tensor(tables.rows.starts())).flatten()
    gated = tables.rows.weight[rows].abs().sum(1) <= 0.4
    assert 5 < int(gated.sum()) < 115
    assert float(tables.importance[rows[gated]].sum()) == 0.0
    assert float(tables.importance[rows[~gated]].min()) > 0.0


def test_lookups_without_gradients_judge_no_rows():
    tables = make_tables(score="taylor", decay=0.1)
    phases = supernet(tables, [0.0, 0.0, 0.0])
    before = tables.rows.weight.detach().clone()
    with torch.no_grad():
        tables.train()(some_ids(tables, 40))
    phases.step_()
    assert torch.equal(tables.rows.weight, before)


def test_decay_that_would_round_away_is_refused():
    with pytest.raises(ConfigError, match=r"small steps round away.*leave 'pure' out"):
        OptEmbedConfig(decay=1e-3, rows="bfloat16:pure")


@pytest.mark.parametrize("score", ["norm", "norm_frequency", "frequency", "taylor", "auto", "auto without counts"])
def test_under_a_budget_the_rows_of_the_highest_score_per_value_stay_and_pruned_ones_come_last(score):
    counts = {name: torch.arange(size).flip(0) ** 2 + 1 for name, size in SIZES.items()}
    score, given = score.split()[0], None if " " in score else counts
    tables = make_tables(budget="55%", score=score, counts=given, pruned="zero")
    searching(tables, [0.3, 0.3, 0.3])
    if score == "taylor":
        tables.importance.uniform_(generator=torch.Generator().manual_seed(3))
    widths = (4, 2, 1)
    tables.adopt_(widths)
    frequency, norms = torch.cat(list(counts.values())).float(), tables.rows.weight.abs().sum(1)
    worth = {"norm": norms, "frequency": frequency, "taylor": getattr(tables, "importance", None)}
    worth |= {"norm_frequency": norms * frequency, "auto": norms * frequency if given else norms}
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(list(SIZES.values())))
    whole = torch.stack([part.all() for part in tables.kept.split(list(SIZES.values()))])[owner]
    per_value, stays = worth[score] / torch.tensor(widths)[owner], norms > 0.3
    kept = tables.kept & ~whole  # small tables stay whole where it costs less than to say which of their rows do
    assert 5 < kept.sum() < (stays & ~whole).sum()
    assert not bool((kept & ~stays).any())
    assert not bool((stays & ~tables.kept & (per_value > per_value[kept].min())).any())


def test_a_score_by_frequency_needs_counts():
    for score in ("frequency", "norm_frequency"):
        with pytest.raises(ConfigError, match="needs counts of all tables"):
            supernet(make_tables(score=score))
