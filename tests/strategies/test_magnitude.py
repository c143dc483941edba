"""The mathematics of ``magnitude``: which values are kept, when lookups show it, and what serving them takes."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcomp import ConfigError, MagnitudeConfig, TableSpec, make_config, plan
from embcomp.phases import Phase
from embcomp.storage import packing, stored_bytes
from embcomp.storage.largest import mark_largest
from embcomp.storage.pruned import repeat_kept
from embcomp.storage.sparse import SparseRows

SIZES = {"user": 40, "flag": 2, "item": 9}


def make_specs(sizes=None, dim=4, padded=()):
    return [TableSpec(name, size, dim, 0 if name in padded else None) for name, size in (sizes or SIZES).items()]


def make_weights(specs, seed=0, step=0.0):
    """Random tables without zeros; with a step its multiples, so that many magnitudes are equal."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for spec in specs:
        weight = torch.randn(spec.num_embeddings, spec.embedding_dim, generator=generator)
        weights[spec.name] = torch.sign(weight) * ((weight.abs() / step).ceil() * step if step else weight.abs() + 1e-3)
    return weights


def make_tables(num_values, specs=None, counts=None, **options):
    return plan(specs or make_specs(), MagnitudeConfig(num_values=num_values, **options), counts=counts).build()


def every_vector(tables):
    return torch.cat([tables.materialize(name) for name in tables.names]).detach()


def slow_mask(weights, number, min_per_row=0, importance=None, last=()):
    """Kept values by sorting all of them: by score, then by place; the last rows behind all others."""
    rows, dim = weights.shape
    score = {}
    for place in range(rows * dim):
        row = place // dim
        score[place] = abs(weights[row, place % dim].item()) * (1.0 if importance is None else importance[row].item())
    kept = set()
    for row in range(rows):
        if row not in last:
            kept |= set(sorted(range(row * dim, row * dim + dim), key=lambda p: (-score[p], p))[:min_per_row])
    others = [place for place in score if place not in kept]
    others.sort(key=lambda p: (p // dim in last, 0 if p // dim in last else -score[p], p))
    kept |= set(others[: number - len(kept)])
    return torch.tensor([[row * dim + column in kept for column in range(dim)] for row in range(rows)])


# ---- which values are kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 3, 50, 150, 203])
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_the_largest_values_of_all_tables_are_kept(number, step):
    specs = make_specs(padded=("item",))
    weights = make_weights(specs, step=step)
    dense = torch.cat(list(weights.values()))
    mask = slow_mask(dense, number, last=[42])
    assert mask.sum() == number
    tables = make_tables(number, specs).load_dense_(weights)
    mask[42] = False  # padding vectors are zero, kept or not
    assert torch.equal(every_vector(tables), dense * mask)
    assert torch.equal(every_vector(tables.finalize()), dense * mask)


@pytest.mark.parametrize("least", [1, 2, 3])
def test_every_row_keeps_its_largest_values(least):
    specs = make_specs(padded=("item",))
    weights = make_weights(specs, step=0.5)
    dense = torch.cat(list(weights.values()))
    for number in (51 * least, 51 * least + 20):
        tables = make_tables(number, specs, min_per_row=least).load_dense_(weights)
        mask = slow_mask(dense, number, least, last=[42])
        mask[42] = False
        assert torch.equal(every_vector(tables), dense * mask)
        assert mask[torch.arange(51) != 42].sum(1).min() >= least


@pytest.mark.parametrize("unseen", ["error", "oov_row"])
def test_counts_weigh_magnitudes(unseen):
    specs = make_specs()
    counts = {name: 1000 // torch.arange(1, size + 1) ** 2 for name, size in SIZES.items()}
    weights = make_weights(specs)
    tables = make_tables(60, specs, counts, weighted=True, unseen=unseen).load_dense_(weights)
    rows, importance = [], []
    for name in SIZES:
        rows.append(weights[name])
        importance.append(counts[name].float().sqrt())
        if unseen == "oov_row":
            share = counts[name].float().clamp_min(1e-3 * counts[name].float().mean())
            rows.append((weights[name] * torch.ones_like(share)[:, None]).mean(0, keepdim=True))
            importance.append(counts[name].float().mean().sqrt()[None])
    dense, importance = torch.cat(rows), torch.cat(importance)
    mask = slow_mask(dense, 60, importance=importance)
    got = tables.rows(torch.arange(len(dense))).detach()
    torch.testing.assert_close(got, dense * mask)
    assert not torch.equal(mask, slow_mask(dense, 60))
    unweighted = make_tables(60, specs, weighted=True, unseen=unseen).load_dense_(weights)  # no counts
    assert torch.equal(unweighted.rows(torch.arange(len(dense))) != 0, slow_mask(dense, 60))


@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(1, 150),
    dim=st.sampled_from([1, 2, 3, 8, 30]),
    share=st.floats(0, 1),
    step=st.sampled_from([0.0, 0.5, 3.0]),
    least=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_marking_in_chunks_is_sorting(rows, dim, share, step, least, seed):
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10.0 ** torch.randint(-30, 30, (rows, 1), generator=generator).float()
    scores = torch.randn(rows, dim, generator=generator).abs() ** 5 * magnitudes
    scores = (scores / step).round() * step if step else scores
    last = set(torch.randint(0, rows, (rows // 10,), generator=generator).tolist())
    least = min(least, dim)
    number = least * rows + round(share * (rows * dim - least * rows))
    expected = slow_mask(scores, number, least, last=last)
    scores[list(last)] = -1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embcomp.row_source.CHUNK_VALUES", 64 * dim)
        marked = mark_largest(lambda start, stop: scores[start:stop], rows, dim, number, least)
    assert torch.equal(packing.gather(marked, torch.arange(rows), dim, 1).bool(), expected)
    assert len(marked) == packing.packed_bytes(rows, dim, 1)


# ---- when lookups show it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["float32", "float16", "bfloat16:pure", "int8", "int4:row", "int2:column"])
def test_training_sees_all_values_and_evaluation_what_would_be_served(rows):
    tables = make_tables(60, rows=rows)
    whole = every_vector(tables)
    assert every_vector(tables).ne(0).float().mean() > 0.9
    shown = every_vector(tables.eval())
    mask = slow_mask(tables.rows.weight.float(), 60)
    assert torch.equal(shown, torch.where(mask, whole, 0.0))
    assert torch.equal(every_vector(tables.finalize()), shown)
    assert torch.equal(every_vector(tables.train().finalize()), shown)
    assert torch.equal(every_vector(tables), whole)
    assert torch.equal(every_vector(tables.prune_()), shown)
    assert torch.equal(every_vector(tables.finalize()), shown)
    assert isinstance(tables.finalize().rows, SparseRows)


def test_evaluation_follows_weights_that_change():
    tables = make_tables(60).eval()
    for change in (
        lambda: tables.rows.weight.mul_(torch.linspace(-1, 1, 204).view(51, 4)),
        lambda: tables.rows.write_(3, torch.ones(5, 4)),
        lambda: tables.load_state_dict(make_tables(60, seed=1).state_dict()),
        lambda: tables.load_state_dict(make_tables(60, seed=2).state_dict(), assign=True),
        tables.reset_parameters,
    ):
        with torch.no_grad():
            change()
        weight = tables.rows.weight.detach()
        assert torch.equal(every_vector(tables), weight * slow_mask(weight, 60))


def test_what_is_kept_is_worked_out_once_per_switch(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(1)
        return mark_largest(*args)

    monkeypatch.setattr("embcomp.storage.pruned.mark_largest", counted)
    tables = make_tables(60)
    for _ in range(3):
        every_vector(tables)
    assert not calls
    tables.eval()
    for _ in range(3):
        every_vector(tables.eval())
    assert len(calls) == 1
    tables.train().prune_().eval()
    every_vector(tables.prune_())
    tables.finalize()
    assert len(calls) == 2


def test_tables_made_in_inference_mode_work():
    with torch.inference_mode():
        tables = make_tables(60).eval()
        assert int(every_vector(tables).ne(0).sum()) == 60


# ---- fine-tuning ----------------------------------------------------------------------------------------------------


def train(tables, optimizer, steps=5):
    for step in range(steps):
        target = torch.randn(51, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (tables.rows(torch.arange(51), torch.tensor([0] * 40 + [1] * 2 + [2] * 9)) - target).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("rows", ["float32", "int4:column"])
def test_fine_tuning_trains_kept_values_and_leaves_the_others_pruned(rows):
    tables = make_tables(60, rows=rows, finetune_epochs=3)
    first, second = tables.phases()
    assert first == Phase("train", any_budget=True)
    assert (second.name, second.epochs) == ("finetune", 3)
    optimizer = torch.optim.Adam(tables.parameters(), lr=0.1, weight_decay=0.1)
    tables.enter_phase_(first)
    train(tables, optimizer)
    assert not tables.rows.is_pruned
    mask = slow_mask(tables.rows.weight.detach(), 60)
    tables.enter_phase_(second)
    before = every_vector(tables)
    assert torch.equal(before != 0, mask)
    train(tables, optimizer, 20)  # its momentum still pulls at the values that are pruned
    after = every_vector(tables)
    assert torch.equal(after != 0, mask)
    assert (after != before)[mask].float().mean() > 0.9
    for form in (tables.eval(), tables.finalize()):
        assert torch.equal(every_vector(form), after)


def test_without_fine_tuning_there_is_one_phase():
    assert make_tables(60).phases() == (Phase("train"),)


@pytest.mark.parametrize("phase", ["train", "finetune"])
def test_training_is_resumed_exactly(phase):
    tables = make_tables(60, finetune_epochs=1)
    optimizer = torch.optim.SGD(tables.parameters(), lr=0.05)
    train(tables, optimizer)
    tables.enter_phase_(Phase(phase))
    train(tables, optimizer)
    again = make_tables(60, finetune_epochs=1)
    again.enter_phase_(Phase(phase))
    again.load_state_dict(copy.deepcopy(tables.state_dict()))
    assert again.rows.is_pruned == tables.rows.is_pruned == (phase == "finetune")
    for one in (tables, again):
        train(one, torch.optim.SGD(one.parameters(), lr=0.05))
    assert torch.equal(every_vector(again), every_vector(tables))
    assert torch.equal(every_vector(again.finalize()), every_vector(tables.finalize()))


def test_fitting_again_prunes_anew():
    specs = make_specs()
    tables = make_tables(60, specs).load_dense_(make_weights(specs))
    weights = make_weights(specs, seed=1)
    dense = torch.cat(list(weights.values()))
    assert torch.equal(every_vector(tables.load_dense_(weights)), dense * slow_mask(dense, 60))


def test_scales_are_fitted_to_kept_values():
    """A bit per value is enough for values of two sizes, whatever lies between them."""
    weights = {"user": torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).clamp(-0.5, 0.5)}
    weights["user"][::3, 1], weights["user"][1::3, 2] = 1.0, -1.0
    for rows in ("int1:table", "int1:column", "int1:table:after", "int2:table:offset"):
        tables = make_tables(27, make_specs({"user": 40}), rows=rows).load_dense_(weights)
        expected = torch.where(weights["user"].abs() == 1, weights["user"], 0.0)
        torch.testing.assert_close(every_vector(tables.finalize()), expected, rtol=0.02, atol=0)


def test_kept_values_are_repeated():
    values = torch.tensor([[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10], [1, 2, 3, 4, 5]])
    kept = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    assert repeat_kept(values, kept).tolist() == [[2, 4, 2, 4, 2], [6, 7, 8, 9, 10], [1, 2, 3, 4, 5]]
    assert repeat_kept(values[:, :0], kept[:, :0]).shape == (3, 0)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def slow_sizes(specs, rows, number):
    """Bytes of every layout, one number after the other."""
    row_count, dim = sum(spec.num_embeddings for spec in specs), specs[0].embedding_dim
    bits = {"float32": 32, "bfloat16": 16, "int4:row": 4, "int2:column": 2}[rows]
    stored, slots = math.ceil(number * bits / 8), min(row_count, number)
    scales = {"int4:row": 4 * row_count, "int2:column": 4 * dim * len(specs)}.get(rows, 0)
    scales_of_slots = 4 * slots if rows == "int4:row" else scales
    index = number * (1 if dim <= 256 else 2)
    return {
        "bitmap": stored + scales + 12 * math.ceil(row_count * dim / 64),
        "csr": stored + scales + 4 * (row_count + 1) + index,
        "dcsr": stored + scales_of_slots + 12 * math.ceil(row_count / 64) + 4 * (slots + 1) + index,
    }


@pytest.mark.parametrize("dim", [4, 16, 64, 300])
@pytest.mark.parametrize("rows", ["float32", "bfloat16", "int4:row", "int2:column"])
def test_budgets_buy_as_many_values_as_any_layout_can_hold(rows, dim):
    specs = make_specs({"user": 700, "item": 30}, dim)
    full = sum(spec.full_bytes for spec in specs)
    plain = sum(stored_bytes(spec.num_embeddings, dim, rows) for spec in specs)
    for share in (0.005, 0.02, 0.04, 0.1, 0.3, 0.7, 1.0):
        budget = max(int(share * full), 400)
        made = plan(specs, make_config("magnitude", rows=rows), f"{budget}B")
        config, used = made.config, made.report.serve_bytes
        if plain <= budget:
            assert (config.layout, config.num_values, used) == ("dense", 730 * dim, plain)
            continue
        sizes = slow_sizes(specs, rows, config.num_values)
        assert used == sizes[config.layout] == min(sizes.values()) <= budget
        more = min(slow_sizes(specs, rows, config.num_values + 1).values())
        assert more > budget or more >= plain
        assert config.num_slots == (min(730, config.num_values) if config.layout == "dcsr" else 0)


def test_a_budget_of_a_tenth():
    made = plan([TableSpec("user", 64000, 16)], "magnitude", "10%")
    assert made.config == MagnitudeConfig(num_values=(409600 - 12 * 16000) // 4, num_slots=0, layout="bitmap")
    made = plan([TableSpec("user", 64000, 16)], "magnitude", "1%")
    assert (made.config.layout, made.config.num_values) == ("dcsr", (40960 - 12 * 1000 - 4) // 9)


def test_all_values_need_no_index():
    tables = plan(make_specs(), "magnitude", "100%").build()
    assert list(tables.state_dict()) == ["rows.weight"]
    assert tables.config == MagnitudeConfig(num_values=204, num_slots=0, layout="dense")
    tables.prune_().enter_phase_(Phase("finetune"))
    assert every_vector(tables.eval()).all()


def test_layouts_can_be_chosen():
    for layout, slots in (("bitmap", 0), ("csr", 0), ("dcsr", 51)):
        made = plan(make_specs(), MagnitudeConfig(num_values=100, layout=layout))
        assert made.config == MagnitudeConfig(num_values=100, num_slots=slots, layout=layout)
        assert every_vector(made.build().finalize()).ne(0).sum() == 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "csr"}, "num_values"),
        ({"num_slots": 3}, "num_values"),
        ({"layout": "coo", "num_values": 3}, "'coo'"),
        ({"num_values": 0}, "num_values"),
        ({"num_values": 205}, "0 to 204"),
        ({"num_values": 101, "min_per_row": 2}, "102, 204"),
        ({"num_values": 204, "min_per_row": 5}, "min_per_row"),
        ({"num_values": 204, "layout": "csr"}, "dense"),
        ({"num_values": 203, "layout": "dense"}, "dense"),
        ({"num_values": 60, "layout": "csr", "num_slots": 3}, "num_slots"),
        ({"num_values": 60, "layout": "dcsr", "num_slots": 50}, "51"),
        ({"rows": "int4:group8"}, "int4:column"),
        ({"finetune_epochs": -1}, "finetune_epochs"),
    ],
)
def test_sizes_that_do_not_go_together_raise(options, words):
    with pytest.raises(ConfigError, match=words):
        plan(make_specs(), MagnitudeConfig(**options))
