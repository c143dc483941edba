"""``optembed``: the supernet's equations against slow references by loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcomp import ConfigError, OptEmbedConfig, TableSpec, build_tables, plan
from embcomp.strategies.optembed import Step
from embcomp.training import Phases

DIM = 4
SIZES = {"user": 50, "movie": 9, "flag": 2}


def make_tables(sizes=None, budget=None, dim=DIM, counts=None, scale=0.15, **options):
    """Tables with rows of different norms, as after a supernet; ids are not ordered by anything."""
    specs = [TableSpec(name, size, dim) for name, size in (sizes or SIZES).items()]
    config = OptEmbedConfig(**{"projection": "none", "sampling": "uniform", **options})
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


@settings(deadline=None)
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
    fields_steps_and_neighbours = torch.cat([widths[:-1].T, again[:-1].T, widths[1:].T]).double()
    assert (torch.corrcoef(fields_steps_and_neighbours) - torch.eye(9)).abs().max() < 0.05


def test_by_default_widths_are_drawn_in_proportion_to_their_inverse():
    dim, samples = 8, 8000
    tables = make_tables(dim=dim, sampling="log_uniform")
    supernet(tables, [-1.0, -1.0, -1.0])
    torch.manual_seed(0)
    widths = widths_seen(tables.train(), samples)
    harmonic = sum(1 / width for width in range(1, dim + 1))
    expected = torch.tensor([samples / width / harmonic for width in range(1, dim + 1)]).double()[:, None]
    counts = torch.stack([(widths == width).sum(0) for width in range(1, dim + 1)]).double()
    assert bool((((counts - expected) ** 2 / expected).sum(0) < 24.3).all())
    assert torch.corrcoef(widths.T.double())[0, 1].abs() < 0.05
    assert make_tables(dim=1, sampling="log_uniform").train()._drawn_widths((50,)).unique().tolist() == [1]


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


def test_the_search_is_what_the_options_say():
    options = {
        "generations": 7,
        "mutations": 3,
        "crossovers": 5,
        "parents": 4,
        "mutation_probability": 0.25,
        "seed": 11,
    }
    search = make_tables(budget="25%", sampling="log_uniform", **options).make_search()
    found = (search.generations, search.num_mutations, search.num_crossovers, search.num_parents)
    assert found == (7, 3, 5, 4)
    assert search.mutation_probability == 0.25
    assert (search.low, search.high) == ((1, 1, 1), (DIM,) * 3)
    assert search._random.bit_generator.state == np.random.default_rng(11).bit_generator.state
    assert search.seeds[0] == (DIM,) * 3
    assert search._draws[0][1].tolist() == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25])
    papers = make_tables(sampling="uniform").make_search()  # without a budget
    assert (papers.seeds, papers.repair) == ((), None)
    assert papers._draws[0][1].tolist() == [0.25] * DIM


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
