"""``optembed``: the supernet's equations against slow references by loops, and the forms it shows, adopts and serves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from embcomp import (
    BudgetError,
    ConfigError,
    OptEmbedConfig,
    TableSpec,
    build_tables,
    from_pretrained,
    plan,
    save_pretrained,
)
from embcomp.strategies.optembed import Step
from embcomp.training import Phases

DIM = 4
SIZES = {"user": 50, "movie": 9, "flag": 2}


def make_tables(sizes=None, budget=None, dim=DIM, counts=None, scale=0.15, **options):
    """Tables with rows of different norms, as after a supernet; ids are not ordered by anything."""
    specs = [TableSpec(name, size, dim) for name, size in (sizes or SIZES).items()]
    config = OptEmbedConfig(**{"projection": "none", **options})
    tables = plan(specs, config, budget, counts=counts).build()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        weight = tables.rows.weight
        weight.normal_(generator=generator).mul_(scale * 4 * torch.rand(len(weight), 1, generator=generator))
    return tables


def supernet(tables, thresholds=None):
    phases = Phases(tables)
    phases.enter_(phases.phases[0])
    if thresholds is not None:
        with torch.no_grad():
            tables.thresholds.copy_(torch.as_tensor(thresholds))
    return phases


def searching(tables, thresholds=None):
    phases = supernet(tables, thresholds)
    phases.leave_(phases.phases[0])
    phases.enter_(phases.phases[1])
    return phases


def some_ids(tables, number=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(size, (number,), generator=generator) for size in tables.num_ids], 1)


def norm_of(row, p):
    return sum(abs(v) for v in row) if p == 1 else math.sqrt(sum(v * v for v in row))


def slope(x):
    """The long-tailed surrogate of the step's derivative."""
    if abs(x) <= 0.4:
        return 2 - 4 * abs(x)
    return 0.4 if abs(x) <= 1 else 0.0


# ---- the step ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20), st.floats(-3, 3))
def test_the_step_is_0_or_1_and_its_derivative_has_a_long_tail(values, gradient):
    x = torch.tensor([*values, 0.0, 0.4, -0.4, 1.0, -1.0, 0.41, 1.01], dtype=torch.float64, requires_grad=True)
    stepped = Step.apply(x)
    assert stepped.tolist() == [1.0 if value > 0 else 0.0 for value in x.tolist()]
    (gradient * stepped).sum().backward()
    assert x.grad.tolist() == pytest.approx([gradient * slope(value) for value in x.tolist()])


# ---- the supernet --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("per_id", [False, True])
@pytest.mark.parametrize("pruned", ["zero", "oov"])
def test_evaluation_of_the_supernet_applies_the_row_mask_alone(norm, per_id, pruned):
    tables = make_tables(norm=norm, threshold_per_id=per_id, pruned=pruned)
    number = tables.rows.num_rows if per_id else 3
    supernet(tables, torch.linspace(0.2, 1.2, number))
    tables.eval()
    ids, rows, thresholds = some_ids(tables), tables.rows.weight.tolist(), tables.thresholds.tolist()
    starts, dropped = tables.rows.starts(), 0
    for table, (start, size) in enumerate(zip(starts, SIZES.values(), strict=True)):
        vectors = tables(ids[:, table], table)
        assert torch.equal(vectors, tables(ids)[:, table])
        assert torch.equal(vectors, tables(ids[:, table], torch.full((len(ids),), table)))
        for value, vector in zip(ids[:, table].tolist(), vectors.tolist(), strict=True):
            threshold = thresholds[start + value if per_id else table]
            kept = norm_of(rows[start + value], norm) > threshold
            dropped += not kept
            otherwise = [0.0] * DIM if pruned == "zero" else rows[start + size]
            assert vector == pytest.approx(rows[start + value] if kept else otherwise)
    assert 10 < dropped < 110


def widths_seen(tables, samples):
    """Widths of the prefixes in a training lookup of rows without zeros: ``(samples, T)``."""
    shown = tables(torch.zeros(samples, tables.num_tables, dtype=torch.long)) != 0
    widths = shown.sum(-1)
    assert torch.equal(shown, torch.arange(tables.embedding_dim) < widths[..., None])
    return widths


def test_training_shows_every_sample_every_field_at_a_width_drawn_uniformly_from_1_to_D():
    dim, samples = 8, 8000
    tables = make_tables(dim=dim)
    supernet(tables, [-1.0, -1.0, -1.0])
    torch.manual_seed(0)
    widths = widths_seen(tables.train(), samples)
    again = widths_seen(tables, samples)
    counts = torch.stack([(widths == width).sum(0) for width in range(1, dim + 1)]).double()
    chi_square = ((counts - samples / dim) ** 2 / (samples / dim)).sum(0)
    assert counts.sum() == samples * 3
    assert bool((chi_square < 24.3).all())  # 7 degrees of freedom: one time in a thousand above it
    flat = torch.cat([widths.T, again.T, widths[:-1].T[:, [*range(1, samples - 1), 0]].new_zeros(0)]).double()
    correlation = torch.corrcoef(flat) - torch.eye(6)
    assert correlation.abs().max() < 0.05
    neighbours = torch.corrcoef(torch.stack([widths[:-1, 0], widths[1:, 0]]).double())[0, 1]
    assert abs(neighbours) < 0.05


def test_without_a_search_training_shows_all_dimensions_and_without_pruning_all_rows():
    tables = make_tables(search_dims=False)
    supernet(tables, [-1.0, -1.0, -1.0])
    assert bool((widths_seen(tables.train(), 50) == DIM).all())
    tables = make_tables(prune_rows=False)
    supernet(tables)
    ids = some_ids(tables)
    assert torch.equal(tables.eval()(ids), tables.rows.weight[ids + torch.tensor(tables.rows.starts())])
    assert not hasattr(tables, "thresholds")
    assert tables.architecture() == []


@pytest.mark.parametrize("pruned", ["zero", "oov"])
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_rows_and_thresholds_through_the_surrogate(pruned, norm, training):
    tables = make_tables(pruned=pruned, norm=norm, scale=0.4)
    supernet(tables, [0.5, 1.0, 0.9])
    tables.train(training)
    ids, costs = some_ids(tables, 30), torch.randn(30, 3, DIM, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(4)
    (tables(ids) * costs).sum().backward()
    torch.manual_seed(4)
    widths = torch.randint(1, DIM + 1, ids.shape) if training else torch.full(ids.shape, DIM)

    rows, starts, regimes = tables.rows.weight.tolist(), tables.rows.starts(), set()
    of_rows = [[0.0] * DIM for _ in rows]
    of_thresholds = [0.0] * 3
    for sample in range(30):
        for table, (start, size) in enumerate(zip(starts, SIZES.values(), strict=True)):
            row = rows[start + int(ids[sample, table])]
            shared = rows[start + size] if pruned == "oov" else [0.0] * DIM
            cost = [c if k < widths[sample, table] else 0.0 for k, c in enumerate(costs[sample, table].tolist())]
            margin = norm_of(row, norm) - tables.thresholds[table].item()
            gate = 1.0 if margin > 0 else 0.0
            regimes.add(slope(margin) if slope(margin) in (0.0, 0.4) else "steep")
            of_gate = slope(margin) * sum(c * (v - s) for c, v, s in zip(cost, row, shared, strict=True))
            of_thresholds[table] -= of_gate
            for k, (c, v) in enumerate(zip(cost, row, strict=True)):
                of_norm = math.copysign(1.0, v) if norm == 1 else v / norm_of(row, 2)
                of_rows[start + int(ids[sample, table])][k] += gate * c + of_gate * of_norm
                if pruned == "oov":
                    of_rows[start + size][k] += (1 - gate) * c
    assert regimes == {"steep", 0.4, 0.0}
    torch.testing.assert_close(tables.thresholds.grad, torch.tensor(of_thresholds), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tables.rows.weight.grad, torch.tensor(of_rows), atol=1e-4, rtol=1e-4)


def test_the_penalty_is_alpha_times_the_sum_of_exp_of_minus_thresholds():
    tables = make_tables(alpha=0.25)
    phases = supernet(tables, [0.5, -1.0, 0.0])
    tables.penalty().backward()
    assert tables.penalty().item() == pytest.approx(0.25 * (math.exp(-0.5) + math.exp(1.0) + 1.0))
    assert tables.thresholds.grad.tolist() == pytest.approx([-0.25 * math.exp(-t) for t in (0.5, -1.0, 0.0)])
    phases.leave_(phases.phases[0])
    assert tables.penalty().item() == 0.0
    per_id = make_tables(alpha=0.25, threshold_per_id=True, pruned="zero")
    supernet(per_id, torch.arange(61) / 10)
    parts = (torch.arange(61) / 10).split(list(SIZES.values()))
    expected = 0.25 * sum(sum(math.exp(-t) for t in part.tolist()) / len(part) for part in parts)
    assert per_id.penalty().item() == pytest.approx(expected)


def test_phases_of_the_whole_method_and_of_its_halves():
    every = {
        "whole": OptEmbedConfig(bilevel=True, supernet_epochs=3, supernet_patience=1),
        "E": OptEmbedConfig(search_dims=False),
        "D": OptEmbedConfig(prune_rows=False, bilevel=True, retrain_from="supernet"),
    }
    phases = {name: build_tables([TableSpec("user", 5, 4)], config).phases() for name, config in every.items()}
    assert [[p.name for p in own] for own in phases.values()] == [
        ["supernet", "search", "retrain"],
        ["supernet", "retrain"],
        ["supernet", "search", "retrain"],
    ]
    assert [("architecture" in own[0].trains, own[0].bilevel) for own in phases.values()] == [
        (True, True),
        (True, False),
        (False, False),
    ]
    assert [own[-1].rewind for own in phases.values()] == [True, True, False]
    assert [(own[0].penalty, own[-1].penalty) for own in phases.values()] == [(True, False)] * 3
    assert (phases["whole"][0].epochs, phases["whole"][0].patience) == (3, 1)
    with pytest.raises(ConfigError, match="nothing is left to choose"):
        OptEmbedConfig(prune_rows=False, search_dims=False)


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


@pytest.mark.parametrize("score", ["norm", "norm_frequency", "frequency", "taylor", "auto", "auto without counts"])
def test_under_a_budget_the_rows_of_the_highest_score_per_value_stay_and_pruned_ones_come_last(score):
    counts = {name: torch.arange(size).flip(0) ** 2 + 1 for name, size in SIZES.items()}
    score, given = score.split()[0], None if " " in score else counts
    tables = make_tables(budget="55%", score=score, counts=given, pruned="zero")
    phases = searching(tables, [0.3, 0.3, 0.3])
    if score == "taylor":
        tables.importance.uniform_()
    widths = (4, 2, 1)
    tables.adopt_(widths)
    frequency, norms = torch.cat(list(counts.values())).float(), tables.rows.weight.abs().sum(1)
    worth = {"norm": norms, "frequency": frequency, "taylor": getattr(tables, "importance", None)}
    worth |= {"norm_frequency": norms * frequency, "auto": norms * frequency if given else norms}
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(list(SIZES.values())))
    per_value = worth[score] / torch.tensor(widths)[owner]
    stays = norms > 0.3
    assert 0 < tables.kept.sum() < stays.sum()
    assert not bool((tables.kept & ~stays).any())
    lowest = per_value[tables.kept].min()
    better = stays & (per_value > lowest) & ~tables.kept
    assert not bool(better.any())
    phases.leave_(phases.phase)


def test_a_score_by_frequency_needs_counts():
    for score in ("frequency", "norm_frequency"):
        with pytest.raises(ConfigError, match="needs counts of all tables"):
            supernet(make_tables(score=score))
