"""Items composed of their attributes, against a loop over items."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from embcomp import FullConfig, NestedConfig
from embcomp.errors import ConfigError, InputError, UnseenIdError
from embcomp.scoring import cross_entropy, softmax
from embcomp.training import Phases
from recsys_models.data import Catalogue
from recsys_models.ranking import rank_cases
from recsys_models.session import ItemTable, MetadataItems, session_specs
from recsys_models.session.floors import Popularity
from recsys_models.training import TrainingConfig, fit
from tests.recsys_models.session.tiny import (
    NUM_ITEMS,
    attribute,
    attributes,
    constant_attributes,
    items_of,
    tiny_log,
    tiny_model,
)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bag_pooling", ["mean", "idf"])
def test_items_are_those_of_a_loop(bag_pooling, residual):
    catalogue = tiny_log().catalogue
    tables, items = items_of(catalogue, residual=residual, bag_pooling=bag_pooling)
    number = {}
    for own in catalogue.attributes:
        for item in range(NUM_ITEMS):
            for value in own.values[own.offsets[item] : own.offsets[item + 1]]:
                number[own.name, value] = number.get((own.name, value), 0) + 1
    for item in range(NUM_ITEMS):
        parts = []
        for own in catalogue.attributes:
            values = own.values[own.offsets[item] : own.offsets[item + 1]]
            weights = [math.log(NUM_ITEMS / number[own.name, v]) for v in values]
            if bag_pooling == "mean" or not own.is_bag:
                weights = [1.0] * len(values)
            pooled = torch.zeros(8)
            for value, weight in zip(values, weights, strict=True):
                pooled += weight / sum(weights) * tables(torch.tensor(int(value)), own.name)
            parts.append(pooled)
        wanted = items.out(items.norm(items.projection(torch.cat(parts))))
        if residual:
            wanted = wanted + tables(torch.tensor(item), "item")
        torch.testing.assert_close(items(torch.tensor(item)), wanted, rtol=1e-4, atol=1e-5)
    every = torch.arange(NUM_ITEMS)
    torch.testing.assert_close(items.scorer().scores(torch.eye(8), 0, NUM_ITEMS).T, items(every))
    torch.testing.assert_close(items(every.view(5, 6)).view(-1, 8), items(every))


def test_idf_is_that_of_items_of_training_and_new_items_change_no_other():
    catalogue = tiny_log().catalogue
    bags = [[0, 1], [0, 2], [0, 1, 3], [3], [4], [2, 4]]  # the last three are not in training, nor is word 4
    words = attribute("words", *bags, num_values=5)

    def pooled(number):
        own = dataclasses.replace(
            words, values=words.values[: words.offsets[number]], offsets=words.offsets[: number + 1]
        )
        object.__setattr__(catalogue, "attributes", (own,))
        tables, items = items_of(catalogue, bag_pooling="idf", num_seen=3)
        return tables, items._pooled(torch.arange(number))[:, 0]

    tables, found = pooled(6)
    rows = tables.materialize("words")
    one, three = math.log(3 / 2), math.log(3)
    torch.testing.assert_close(found[2], (one * rows[1] + three * rows[3]) / (one + three), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[4], rows[4])
    torch.testing.assert_close(found[5], rows[2], rtol=1e-4, atol=1e-4)  # word 4 tells nothing
    assert torch.equal(pooled(4)[1], found[:4])


def test_twins_have_one_vector_and_a_residual_tells_them_apart():
    catalogue = tiny_log().catalogue
    kind, words = attributes()
    first, second = (item for item in np.flatnonzero(kind.values == 1)[:2])
    same = [list(words.values[words.offsets[i] : words.offsets[i + 1]]) for i in range(NUM_ITEMS)]
    same[second] = same[first]
    object.__setattr__(catalogue, "attributes", (kind, attribute("words", *same, num_values=13)))
    twins = torch.tensor([int(first), int(second)])
    one, other = items_of(catalogue)[1](twins)
    assert torch.equal(one, other)
    one, other = items_of(catalogue, residual=True)[1](twins)
    assert not torch.equal(one, other)


def test_an_item_of_which_nothing_is_known_has_a_vector_all_the_same():
    empty = attribute("words", *([[]] * NUM_ITEMS), num_values=1)
    catalogue = tiny_log().catalogue
    object.__setattr__(catalogue, "attributes", (empty,))
    _, items = items_of(catalogue)
    assert items(torch.arange(3)).isfinite().all()


@pytest.mark.parametrize(("num_values", "width"), [(2**15, 2), (2**15 + 1, 4)])
@pytest.mark.parametrize("bag_pooling", ["mean", "idf"])
def test_what_composes_items_is_counted_and_small(num_values, width, bag_pooling):
    catalogue = tiny_log().catalogue
    kind, words = attributes()
    large = dataclasses.replace(words, num_values=num_values, counts=np.resize(words.counts, num_values))
    object.__setattr__(catalogue, "attributes", (kind, large))
    tables, items = items_of(catalogue, bag_pooling=bag_pooling)
    network = 4 * sum(parameter.numel() for parameter in items.parameters())
    values, cells = len(kind.values) + len(words.values), 2 * (NUM_ITEMS + 1)
    weights = 4 * values if bag_pooling == "idf" else 0
    of_attributes = 2 * (8 + 1)  # table and kind of each
    assert items.composing_bytes == network + width * values + weights + 2 * (cells + 1) + of_attributes
    assert items_of(catalogue, residual=True, bag_pooling=bag_pooling)[1].composing_bytes == items.composing_bytes
    assert ItemTable(tables, "kind").composing_bytes == 0


def test_models_say_what_composes_their_items():
    log = tiny_log()
    model = tiny_model(log, "m2trec")
    assert model.composing_bytes == model.items.composing_bytes > 0
    assert tiny_model(log, "sasrec").composing_bytes == Popularity(log.catalogue.counts).composing_bytes == 0


def test_many_cells_and_values_are_composed_as_few_are():
    """Beyond what int16 counts."""
    rng = np.random.default_rng(0)
    words = attribute("words", *[np.unique(rng.integers(0, 50_000, 9)) for _ in range(5000)], num_values=50_001)
    catalogue = Catalogue(5000, np.ones(5000, np.int64), np.arange(5000), (words,))
    tables, items = items_of(catalogue)
    every = torch.arange(5000)
    parts = [
        tables(torch.from_numpy(words.values[words.offsets[item] : words.offsets[item + 1]]).long(), "words").mean(0)
        for item in (0, 4000, 4999)
    ]
    wanted = items.out(items.norm(items.projection(torch.stack(parts))))
    torch.testing.assert_close(items(every)[[0, 4000, 4999]], wanted, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_tables_once_per_distinct_item():
    tables, items = items_of(tiny_log().catalogue)
    weights = torch.randn(3, 8)
    (items(torch.tensor([4, 4, 7])) * weights).sum().backward()
    found = tables.rows.weight.grad.clone()
    tables.zero_grad()
    ((items(torch.tensor([4])) * weights[:2]).sum() + (items(torch.tensor([7])) * weights[2]).sum()).backward()
    torch.testing.assert_close(tables.rows.weight.grad, found)


@pytest.mark.parametrize("wrong", [-(2**40), -2, -1, NUM_ITEMS, NUM_ITEMS + 1, 2**40])
@pytest.mark.parametrize("residual", [False, True])
class TestItemsOutsideTheCatalogue:
    def test_are_an_error(self, residual, wrong):
        _, items = items_of(tiny_log().catalogue, residual=residual)
        with pytest.raises(UnseenIdError, match=rf"item {wrong} is outside the catalogue.*\[0, 30\)"):
            items(torch.tensor([[1, wrong], [3, 4]]))
        model = tiny_model(tiny_log(), "m2trec", items="hybrid" if residual else "metadata")
        with pytest.raises(UnseenIdError, match=f"item {wrong} "):
            model(torch.tensor([[1, wrong, 3]]), torch.tensor([3]))

    @pytest.mark.parametrize("policy", ["zero", "oov_row", "hash"])
    def test_are_items_without_values_by_the_other_policies(self, residual, wrong, policy):
        tables, items = items_of(tiny_log().catalogue, FullConfig(unseen=policy), residual)
        wanted = items.out(items.norm(items.projection(torch.zeros(2 * 8))))
        if residual:
            wanted = wanted + tables(torch.tensor(wrong), "item")
        ids = torch.tensor([1, wrong, NUM_ITEMS - 1])
        found = items(ids)
        torch.testing.assert_close(found[1], wanted)
        torch.testing.assert_close(found[::2], items(ids[::2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_items_are_integers(dtype):
    _, items = items_of(tiny_log().catalogue)
    with pytest.raises(InputError, match="int64"):
        items(torch.ones(3, dtype=dtype))
    assert torch.equal(items(torch.tensor([1, 5], dtype=torch.int32)), items(torch.tensor([1, 5])))
    assert items(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"items": "metadata"},
        {"items": "metadata", "bag_pooling": "idf"},
        {"items": "hybrid"},
        {"items": "hybrid", "bag_pooling": "idf"},
        {"ssl_weight": 0.1},
        {"ssl_weight": 0.1, "ssl_masking": "random", "ssl_dropout": 0.9},
        {"categories": {"kind": 1.0}},
        {"items": "id", "categories": {"kind": 1.0}},
    ],
)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("num_items", [1, NUM_ITEMS])
def test_attributes_with_one_value_and_catalogues_of_one_item(options, known, num_items):
    log = tiny_log(num_items=num_items)
    object.__setattr__(log.catalogue, "attributes", constant_attributes(num_items, known))
    model = tiny_model(log, "m2trec", **options)
    fit(model, log, TrainingConfig(epochs=1, batch_size=64, device="cpu", learning_rate=0.01, progress=False))
    vectors, found = model.items(torch.arange(num_items)), rank_cases(model, log.test)
    assert vectors.isfinite().all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    if model.items.__class__ is MetadataItems and model.items.residual is None:
        assert (vectors == vectors[0]).all()
        assert (found == num_items - 1).all()  # what scores everything alike gets nothing for it
    elif num_items > 1:
        assert (vectors != vectors[0]).any()


@pytest.mark.parametrize("items", ["metadata", "hybrid"])
@pytest.mark.parametrize("strategy", ["hash", "unified", "int8"])
def test_tables_of_attributes_and_residuals_are_compressed_as_others_are(strategy, items):
    log = tiny_log()
    name, budget = ("quantize", "40%") if strategy == "int8" else (strategy, "50%")
    model = tiny_model(log, "m2trec", name, budget, items=items)
    first = {name: parameter.detach().clone() for name, parameter in model.tables.named_parameters()}
    fit(model, log, TrainingConfig(epochs=1, batch_size=64, device="cpu", learning_rate=0.01, progress=False))
    assert all((parameter != first[name]).any() for name, parameter in model.tables.named_parameters())
    model.eval()
    batch = next(iter(log.test.batches(16, 8)))
    before = model(batch.items, batch.lengths)
    model.tables.finalize_()
    assert model.tables.memory().serve_bytes <= model.tables.memory().full_bytes / 2
    torch.testing.assert_close(model(batch.items, batch.lengths), before, rtol=1e-3, atol=1e-3)


def test_an_attribute_must_not_be_called_as_the_table_of_items():
    catalogue = tiny_log().catalogue
    object.__setattr__(catalogue, "attributes", (attribute("item", *[[0]] * NUM_ITEMS),))
    with pytest.raises(ConfigError, match="rename it"):
        session_specs("m2trec", catalogue, 8)


def test_phases_that_switch_what_is_shown_do_so_in_the_backward_pass_too(monkeypatch):
    monkeypatch.setattr(softmax, "_PIECE", 10)
    queries, targets = torch.randn(40, 16), torch.randint(NUM_ITEMS, (40,))

    def gradients(chunk):
        model = tiny_model(tiny_log(), "m2trec", NestedConfig(), "50%")
        phases = Phases(model)
        phases.enter_(phases.phases[0])
        torch.manual_seed(1)
        phases.loss(lambda: queries, lambda own: cross_entropy(model.items.scorer(), own, targets, chunk)).backward()
        return {name: p.grad for name, p in model.tables.named_parameters() if p.grad is not None}

    whole, cut = gradients(None), gradients(7)
    assert whole.keys() == cut.keys() != set()
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
