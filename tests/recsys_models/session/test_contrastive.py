"""The contrastive loss of items, and distillation into metadata."""

import copy
import math

import numpy as np
import pytest
import torch

from embcomp.errors import ConfigError, InputError
from embcomp.testing.training import LargestTensor
from recsys_models.session.contrastive import Contrastive, draw_distinct, mutual_information
from recsys_models.session.distillation import distill_
from tests.recsys_models.session.tiny import NUM_ITEMS, attribute, tiny_log, tiny_model


def log_with(*attributes, **options):
    log = tiny_log(**options)
    object.__setattr__(log.catalogue, "attributes", attributes)
    return log


def single(name, values, number):
    return attribute(name, *([int(value)] for value in values), num_values=number, is_bag=False)


def four():
    """Two pairs of attributes, each of which says the same twice."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, NUM_ITEMS), rng.integers(0, 5, NUM_ITEMS)
    return tuple(single(n, v, 6) for n, v in (("a", first), ("b", second), ("c", first), ("d", second)))


def test_mutual_information_is_that_of_its_definition():
    found = mutual_information(four())
    for i, one in enumerate(four()):
        for j, other in enumerate(four()):
            total = 0.0
            for x in range(5):
                for y in range(5):
                    both = np.mean((one.values == x) & (other.values == y))
                    if both:
                        total += both * math.log(both / (np.mean(one.values == x) * np.mean(other.values == y)))
            assert found[i, j] == pytest.approx(total, abs=1e-9)


def test_correlated_masks_hide_what_tells_about_one_another():
    model = tiny_model(log_with(*four()), "m2trec", ssl_weight=1.0)
    hidden = model.contrastive._hidden(200)
    assert (hidden.sum(1) == 2).all()
    assert torch.equal(hidden[:, 0], hidden[:, 2])
    assert torch.equal(hidden[:, 1], hidden[:, 3])
    assert 40 < int(hidden[:, 0].sum()) < 160
    random = tiny_model(log_with(*four()), "m2trec", ssl_weight=1.0, ssl_masking="random").contrastive._hidden(200)
    assert (random.sum(1) == 2).all()
    assert (random[:, 0] != random[:, 2]).any()


def test_the_loss_is_that_of_a_loop(monkeypatch):
    model = tiny_model(tiny_log(), "m2trec", ssl_weight=0.7, ssl_temperature=0.3, ssl_dropout=0.0)
    hidden = torch.rand(NUM_ITEMS, 2, generator=torch.Generator().manual_seed(0)).argsort(1).bool()
    order = torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(Contrastive, "_hidden", lambda self, number: hidden)
    monkeypatch.setattr("recsys_models.session.contrastive.torch.randperm", lambda *a, **k: order)

    def unit(item, kept):
        vector = model.items.view(torch.tensor([item]), kept[None], 0.0)[0]
        return (vector / vector.norm()).detach()

    first = [unit(int(item), ~hidden[row]) for row, item in enumerate(order)]
    second = [unit(int(item), hidden[row]) for row, item in enumerate(order)]
    total = 0.0
    for row in range(NUM_ITEMS):
        forth = [float(first[row] @ other) / 0.3 for other in second]
        back = [float(other @ second[row]) / 0.3 for other in first]
        for scores in (forth, back):
            total += math.log(sum(map(math.exp, scores))) - scores[row]
    found = model.contrastive(model.items).detach()
    assert float(found) == pytest.approx(total / NUM_ITEMS / 2, rel=1e-4)
    plain = tiny_model(tiny_log(), "m2trec").eval()
    model.eval()
    examples = model.prepare(next(iter(tiny_log().train.batches(8, 8, mode="prefixes"))))
    queries = model.learn(examples)
    torch.testing.assert_close(model.loss(examples, queries), plain.loss(examples, queries) + 0.7 * found)


@pytest.mark.parametrize(("num_items", "number"), [(7, 10), (10, 10), (40, 10), (41, 10), (200, 10), (1000, 2)])
def test_items_are_drawn_uniformly_and_once(num_items, number):
    torch.manual_seed(0)
    drawn = torch.stack([draw_distinct(num_items, number) for _ in range(4000)])
    assert drawn.shape[1] == min(number, num_items)
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
    share = drawn.shape[1] / num_items
    found = torch.bincount(drawn.flatten(), minlength=num_items)
    assert ((found - 4000 * share).abs() <= 5 * (4000 * share * (1 - share)) ** 0.5).all()


def test_the_loss_is_of_items_drawn_anew_and_uniformly_from_the_whole_catalogue(monkeypatch):
    model, seen = tiny_model(tiny_log(), "m2trec", ssl_weight=1.0, ssl_items=5), []
    view = model.items.view
    monkeypatch.setattr(model.items, "view", lambda ids, *rest: seen.append(ids) or view(ids, *rest))
    for _ in range(600):
        model.contrastive(model.items)
    assert all(torch.equal(first, second) for first, second in zip(seen[::2], seen[1::2], strict=True))
    assert all(ids.unique().numel() == 5 for ids in seen)
    found, share = torch.bincount(torch.cat(seen[::2]), minlength=NUM_ITEMS), 5 / NUM_ITEMS
    assert ((found - 600 * share).abs() <= 5 * (600 * share * (1 - share)) ** 0.5).all()


def test_drawing_takes_no_memory_for_the_catalogue():
    with (largest := LargestTensor()):
        draw_distinct(10**9, 512)
    assert largest.size <= 8 * 4 * 512, largest.by


def test_values_of_bags_are_dropped_and_others_never():
    items = tiny_model(tiny_log(), "m2trec").items
    ids, kept = torch.arange(NUM_ITEMS), torch.ones(NUM_ITEMS, 2, dtype=torch.bool)
    whole, some = items._pooled(ids), items._pooled(ids, 0.5)
    assert torch.equal(whole[:, 0], some[:, 0])
    assert not torch.equal(whole[:, 1], some[:, 1])
    torch.testing.assert_close(items.view(ids, kept, 0.0), items(ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"items": "id"},
            "at least two attributes; these have 0: set items='metadata' or 'hybrid', or set ssl_weight=0",
        ),
        ({"attributes": "kind"}, "these have 1: name another in attributes, or set ssl_weight=0"),
        ({"ssl_masking": "half"}, "ssl_masking='half'"),
        ({"ssl_temperature": 0.0}, "above 0"),
        ({"ssl_temperature": float("inf")}, "above 0 and finite"),
        ({"ssl_weight": float("nan")}, "ssl_weight=nan"),
        ({"ssl_weight": float("inf")}, "and finite"),
        ({"ssl_items": 1}, "ssl_items=1"),
        ({"ssl_dropout": 1.0}, "dropout=1.0"),
        ({"ssl_weight": -1.0}, "ssl_weight=-1.0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_model(tiny_log(), "m2trec", **{"ssl_weight": 1.0, **options})


# ---- distillation --------------------------------------------------------------------------------------------------


def test_vectors_that_follow_from_attributes_are_distilled_and_others_as_far_as_they_do():
    log = tiny_log()
    counts = torch.from_numpy(log.catalogue.counts)
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(6, 16, generator=generator)
    vectors = kinds[torch.arange(NUM_ITEMS) % 6]
    items = tiny_model(log, "m2trec", attributes="kind").items
    assert distill_(items, vectors, counts) < 0.02
    torch.testing.assert_close(items(torch.arange(6)), kinds, atol=0.6, rtol=0)
    noise = torch.randn(NUM_ITEMS, 16, generator=generator)
    share = (counts / counts.sum())[:, None]
    mixed = vectors + noise
    means = torch.stack([(mixed * share)[k::6].sum(0) / share[k::6].sum() for k in range(6)])
    left = (share * (mixed - means[torch.arange(NUM_ITEMS) % 6]).square()).sum()
    least = float(left / (share * (mixed - (share * mixed).sum(0)).square()).sum())
    found = distill_(tiny_model(log, "m2trec", attributes="kind").items, mixed, counts)
    assert least <= found + 1e-6
    assert found < least + 0.05
    assert distill_(tiny_model(log, "m2trec", items="hybrid").items, mixed, counts, steps=3000) < least / 2


def test_items_that_differ_in_nothing_but_how_often_they_occur_share_the_vector_of_the_frequent_one():
    """The mean by counts is the best vector of a kind, and what is left of it is weighted so too."""
    generator, place = torch.Generator().manual_seed(0), torch.arange(NUM_ITEMS)
    kinds, apart = torch.randn(2, 6, 16, generator=generator)
    is_frequent = place < 6
    vectors = kinds[place % 6] + torch.where(is_frequent, 1, -1)[:, None] * apart[place % 6]
    counts = torch.where(is_frequent, 100, 1)
    items = tiny_model(tiny_log(), "m2trec", attributes="kind").items
    assert distill_(items, vectors, counts) < 0.12
    along = ((items(torch.arange(6)) - kinds) * apart).sum(1) / apart.square().sum(1)
    torch.testing.assert_close(along, torch.full((6,), (100 - 4) / 104), atol=0.2, rtol=0)  # -0.6 where all count alike


def test_bug_a_trained_table_is_distilled_as_its_model_and_catalogue_give_it():
    """Its rows have gradients, which the second step went through again, and counts are of NumPy."""
    log = tiny_log()
    trained = tiny_model(log)
    before = copy.deepcopy(trained.state_dict())
    arguments = (trained.tables.materialize("item"), log.catalogue.counts)
    assert arguments[0].requires_grad
    left = distill_(tiny_model(log, "m2trec").items, *arguments, steps=3)
    plain = (arguments[0].detach(), torch.from_numpy(log.catalogue.counts))
    assert distill_(tiny_model(log, "m2trec").items, *plain, steps=3) == left
    assert all(p.grad is None for p in trained.parameters())
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


NAN, INF = float("nan"), float("inf")
VECTORS, COUNTS = torch.arange(NUM_ITEMS * 16.0).view(NUM_ITEMS, 16), torch.arange(NUM_ITEMS)


@pytest.mark.parametrize(
    ("vectors", "counts", "message"),
    [
        (VECTORS[:5], COUNTS, r"must be float32 tensors \(30, 16\)"),
        (VECTORS.long(), COUNTS, r"vectors torch.int64 \(30, 16\).*must be float32"),
        (VECTORS.tolist(), COUNTS, "vectors list"),
        (VECTORS, COUNTS[:5], r"must be float32 tensors \(30, 16\)"),
        (VECTORS, 0 * COUNTS, "one of them above 0"),
        (VECTORS, COUNTS - 1, "at least 0"),
        (VECTORS.masked_fill(COUNTS[:, None] == 3, NAN), COUNTS, "1 items are not finite"),
        (VECTORS.masked_fill(COUNTS[:, None] < 2, INF), COUNTS, "2 items are not finite"),
        (torch.ones(NUM_ITEMS, 16), COUNTS, "all 29 items that occur are the same"),
        (VECTORS, (COUNTS == 3).long(), "all 1 items that occur are the same"),
    ],
)
def test_vectors_that_cannot_be_distilled(vectors, counts, message):
    model = tiny_model(tiny_log(), "m2trec")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        distill_(model.items, vectors, counts)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"steps": -1},
        {"steps": 3.5},
        {"learning_rate": 0.0},
        {"learning_rate": NAN},
        {"learning_rate": INF},
    ],
)
def test_distillation_options_out_of_range(options):
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        distill_(tiny_model(tiny_log(), "m2trec").items, VECTORS, COUNTS, **options)


def test_counts_may_be_a_list():
    model = tiny_model(tiny_log(), "m2trec")
    assert distill_(model.items, VECTORS, COUNTS.tolist(), steps=0) == distill_(model.items, VECTORS, COUNTS, steps=0)


def test_distilling_no_steps_says_how_far_items_are():
    assert 0 < distill_(tiny_model(tiny_log(), "m2trec").items, VECTORS, COUNTS, steps=0) < INF


def test_finalized_tables_cannot_be_distilled_to():
    model = tiny_model(tiny_log())
    model.tables.finalize_()
    with pytest.raises(InputError, match="distill first"):
        distill_(model.items, VECTORS, COUNTS)
