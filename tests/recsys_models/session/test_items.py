"""Items composed of their attributes, against a loop over items; and the floors, against brute force."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from embcomp import FrequencyCutConfig, FullConfig, NestedConfig, build_tables, range_scores
from embcomp.errors import ConfigError, InputError, UnseenIdError
from embcomp.scoring import cross_entropy, rank_bounds, ranks, softmax
from embcomp.testing.training import LargestTensor
from embcomp.training import Phases
from recsys_models.data import Catalogue
from recsys_models.ranking import rank_cases
from recsys_models.session import (
    ItemTable,
    MetadataItems,
    build_session_model,
    distillation,
    session_specs,
    table_counts,
)
from recsys_models.session.distillation import distill_
from recsys_models.session.floors import ItemKNN, Popularity
from recsys_models.training import TrainingConfig, fit
from tests.recsys_models.session.tiny import NUM_ITEMS, attribute, attributes, sequences, tiny_log, tiny_model


def items_of(catalogue, strategy="full", residual=False, **options):
    torch.manual_seed(0)
    name = "hybrid" if residual else "metadata"
    tables = build_tables(session_specs("m2trec", catalogue, 8, 0.5, items=name), strategy)
    items = MetadataItems(tables, catalogue.attributes, tables if residual else None, **options)
    torch.nn.init.normal_(items.norm.weight)
    return tables, items


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


@pytest.mark.parametrize("items", ["metadata", "hybrid"])
@pytest.mark.parametrize("strategy", ["full", "unified"])
def test_bug_composing_many_items_takes_no_more_memory_than_gradients_do(strategy, items, monkeypatch):
    """All of them were composed at once where tables are large: of a million items 5.6 GiB."""
    monkeypatch.setattr(softmax, "_PIECE", 100)
    number, rng = 20_000, np.random.default_rng(0)
    bags = [np.unique(rng.integers(0, number, 8)) for _ in range(number)]
    known = (attribute("words", *bags, num_values=number + 1), attribute("more", *bags, num_values=number + 1))
    catalogue = Catalogue(number, np.ones(number, np.int64), np.arange(number), known)
    specs = session_specs("m2trec", catalogue, 16, items=items)
    tables = build_tables(specs, strategy, None if strategy == "full" else "50%")
    made = MetadataItems(tables, known, tables if items == "hybrid" else None)
    queries, targets = torch.randn(4, 16, requires_grad=True), torch.arange(4)
    with (largest := LargestTensor()):
        cross_entropy(made.scorer(), queries, targets, chunk=100).backward()
    assert largest.size <= 1.1 * sum(p.nbytes for p in tables.parameters()), largest.by


@pytest.mark.parametrize(
    ("residual", "budget"),
    [("optembed", "40%"), (FrequencyCutConfig(tail="zero"), "20%"), ("hash", "20%"), ("quantize", "40%")],
)
def test_a_residual_can_have_a_strategy_and_a_budget_of_its_own(residual, budget):
    log = tiny_log()
    specs = session_specs("m2trec", log.catalogue, 16, items="hybrid")
    counts = table_counts(specs, log.catalogue)
    words, rows = build_tables(specs[:-1]), build_tables(specs[-1:], residual, budget, {"item": counts["item"]})
    model = build_session_model("m2trec", words, log.catalogue, items="hybrid", max_length=8, residual=rows)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainingConfig(epochs=1, batch_size=64, device="cpu", learning_rate=0.01, progress=False, patience=1)
    fit(model, log, config)
    trained = dict(model.named_parameters())
    assert any((trained[name] != old).any() for name, old in first.items() if name.startswith("residual_tables."))
    assert any((trained[name] != old).any() for name, old in first.items() if name.startswith("tables."))
    every = torch.arange(NUM_ITEMS)
    model.eval()
    before = model.items(every)
    for tables in (words, rows):
        tables.finalize_()
    assert rows.memory().serve_bytes <= rows.memory().full_bytes * float(budget.strip("%")) / 100
    assert words.memory().serve_bytes == words.memory().full_bytes
    torch.testing.assert_close(model.items(every), before, rtol=1e-3, atol=1e-3)
    alone = model.items._of(model.items._pooled(every))
    torch.testing.assert_close(model.items(every) - alone, rows(every, "item"), rtol=1e-4, atol=1e-5)


def test_the_penalties_of_both_groups_are_the_model_s():
    log = tiny_log()
    specs = session_specs("m2trec", log.catalogue, 16, items="hybrid")
    words, rows = build_tables(specs[:-1], "optembed", "50%"), build_tables(specs[-1:], "optembed", "50%")
    model = build_session_model("m2trec", words, log.catalogue, items="hybrid", residual=rows)
    phases = Phases(model)
    phases.enter_(phases.phases[0])
    assert model.penalty() == words.penalty() + rows.penalty() > words.penalty()


@pytest.mark.parametrize(
    ("dim", "items", "message"),
    [(8, "hybrid", "rows of items have 8 dimensions, and attributes 16"), (16, "metadata", "residual= is of items=")],
)
def test_residuals_that_do_not_fit(dim, items, message):
    log = tiny_log()
    words = build_tables(session_specs("m2trec", log.catalogue, 16))
    rows = build_tables(session_specs("sasrec", log.catalogue, dim))
    with pytest.raises(ConfigError, match=message):
        build_session_model("m2trec", words, log.catalogue, items=items, residual=rows)


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
    large = dataclasses.replace(words, num_values=num_values)
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


def occurrences(attribute, counts):
    """How often each value of an attribute occurs, given how often items do."""
    worth = np.repeat(counts, attribute.lengths)
    return np.bincount(attribute.values, worth, attribute.num_values).astype(np.int64)


def test_a_residual_can_belong_to_the_most_frequent_items_alone():
    catalogue = tiny_log().catalogue
    counts = np.sort(catalogue.counts)[::-1]  # ids by frequency, as readers number them
    known = [dataclasses.replace(a, counts=occurrences(a, counts)) for a in catalogue.attributes]
    log = dataclasses.replace(tiny_log(), catalogue=dataclasses.replace(catalogue, counts=counts, attributes=known))
    model = tiny_model(log, "m2trec", FrequencyCutConfig(tail="zero"), "70%", items="hybrid", init_std=0.5).eval()
    kept, every = model.tables.config.num_kept, torch.arange(NUM_ITEMS)
    assert 0 < kept["item"] < NUM_ITEMS
    assert kept["kind"] + kept["words"] < 7 + 13  # tables of attributes are cut from the same budget
    metadata = model.items._of(model.items._pooled(every))
    added = (model.items(every) - metadata).abs().amax(1) > 0
    assert torch.equal(added, every < kept["item"])
    scores = model.items.scorer().scores(torch.eye(16)).T
    torch.testing.assert_close(scores[kept["item"] :], metadata[kept["item"] :])
    model.tables.finalize_()
    assert model.tables.memory().serve_bytes <= model.tables.memory().full_bytes * 0.7
    torch.testing.assert_close(model.items(every)[kept["item"] :], metadata[kept["item"] :])


# ---- attributes that say little ------------------------------------------------------------------------------------


def constant(num_items, known=True):
    """A category that all items share, or none has, and two words that all have."""
    one = attribute("kind", *[[0 if known else 1]] * num_items, num_values=2, is_bag=False)
    return one, attribute("words", *[[0, 1]] * num_items, num_values=3)


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
    object.__setattr__(log.catalogue, "attributes", constant(num_items, known))
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


# ---- floors --------------------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    sessions = [list(rng.integers(0, 12, rng.integers(1, 7))) for _ in range(80)]
    model = ItemKNN(sequences(*sessions), 12, neighbours=4, regularization=3.0)
    occurs = [{s for s, session in enumerate(sessions) if item in session} for item in range(12)]
    for item in range(12):
        cosine = [
            0.0
            if other == item
            else len(occurs[item] & occurs[other]) / math.sqrt((len(occurs[item]) + 3) * (len(occurs[other]) + 3))
            for other in range(12)
        ]
        best = sorted(range(12), key=lambda other: (-cosine[other], other))[:4]
        wanted = torch.tensor([value if other in best else 0.0 for other, value in enumerate(cosine)])
        found = model.queries(torch.tensor([[5, item, 0]]), torch.tensor([2]))[0]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert not model.queries(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([0])).any()


def test_floors_are_ranked_like_models():
    log = tiny_log()
    popular = Popularity(log.catalogue.counts)
    found = rank_cases(popular, log.test)
    counts = log.catalogue.counts
    for rank, target in zip(found, log.test.targets, strict=True):
        assert rank == (counts >= counts[target]).sum() - 1
    knn = ItemKNN(log.train, NUM_ITEMS)
    assert (rank_cases(knn, log.test) < 3).mean() > 2 * (found < 3).mean()
    assert F.one_hot(torch.tensor([2]), 3).float().equal(popular.scorer().vectors(torch.tensor([2]))[:, :3])


@pytest.mark.parametrize("item", [31, NUM_ITEMS, -1])
def test_bug_items_that_item_knn_does_not_know_are_named(item):
    """The process died of them in training; asked for, they were a raw IndexError, and -1 was the last item."""
    log = tiny_log()
    message = rf"have item {item}, but there are items in \[0, 30\)"
    with pytest.raises(InputError, match=f"sessions to learn from {message}"):
        ItemKNN(sequences([1, 2, 3], [4, item, 5]), NUM_ITEMS)
    model = ItemKNN(log.train, NUM_ITEMS)
    with pytest.raises(InputError, match=f"ItemKNN: sessions {message}"):
        model.queries(torch.tensor([[3, 4], [3, item]]), torch.tensor([2, 2]))
    behind = model.queries(torch.tensor([[3, 4], [3, item], [item, 0]]), torch.tensor([2, 1, 0]))
    assert torch.equal(behind, model.queries(torch.tensor([[3, 4], [3, 0], [0, 0]]), torch.tensor([2, 1, 0])))


@pytest.mark.parametrize(
    "make", [lambda log: Popularity(log.catalogue.counts), lambda log: ItemKNN(log.train, NUM_ITEMS)]
)
def test_bug_floors_check_sessions_as_models_do(make):
    """A length beyond the width was a raw RuntimeError."""
    model, items = make(tiny_log()), torch.tensor([[3, 4, 5]])
    for wrong in (4, -1):
        with pytest.raises(InputError, match=rf"session 0 has length {wrong}, but must have one in \[0, 3\]"):
            model.queries(items, torch.tensor([wrong]))
    with pytest.raises(InputError, match=r"\(B, L\) and \(B,\)"):
        model.queries(items[0], torch.tensor([3]))
    with pytest.raises(InputError, match="must be int64"):
        model.queries(items.float(), torch.tensor([3]))
    assert torch.equal(model.queries(items.int(), torch.tensor([3]).int()), model.queries(items, torch.tensor([3])))


def test_counts_are_told_apart_however_large_they_are():
    popular = Popularity(np.array([2**24, 2**24 - 1, 2**24 - 1, 5]))
    queries = popular.queries(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, dtype=torch.int64))
    best, worst = rank_bounds(popular.scorer(), queries, torch.arange(4))
    assert best.tolist() == [0, 1, 1, 3]
    assert worst.tolist() == [0, 2, 2, 3]


def test_ranks_by_floors_take_no_matrix_of_their_own():
    popular = Popularity(np.arange(100_000))
    queries = popular.queries(torch.zeros(64, 1, dtype=torch.int64), torch.ones(64, dtype=torch.int64))
    with (largest := LargestTensor()):
        found = ranks(popular.scorer(), queries, torch.arange(64), chunk=1000)
    assert found.tolist() == [99_999 - item for item in range(64)]
    assert largest.size <= 4 * 64 * 1000, largest.by


@pytest.mark.parametrize("items", ["id", "metadata", "hybrid"])
def test_bug_scores_of_models_take_no_matrix_of_all_items(items, monkeypatch):
    monkeypatch.setattr(range_scores, "ids_at_once", lambda queries: 500)
    number = 20_000
    catalogue = Catalogue(number, np.ones(number, np.int64), np.arange(number), (constant(number)[1],))
    specs = session_specs("m2trec", catalogue, 16, items=items)
    tables = build_tables(specs, "compositional", "20%") if items == "id" else build_tables(specs)
    model = build_session_model("m2trec", tables, catalogue, items=items, max_length=8).eval()
    sessions = torch.tensor([[1, 2]]), torch.tensor([2])
    with (largest := LargestTensor()):
        scores = model(*sessions)
    assert scores.shape == (1, number)
    if items == "id":  # of metadata a matrix is composed once, where there are no gradients
        assert largest.size < 16 * number, largest.by
    with torch.no_grad():
        torch.testing.assert_close(model(*sessions), scores.detach(), rtol=1e-4, atol=1e-6)


def test_bug_distilling_composes_no_matrix_of_all_items(monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", 100)
    number = 5000
    catalogue = Catalogue(number, np.ones(number, np.int64), np.arange(number), constant(number))
    _, items = items_of(catalogue)
    vectors = torch.randn(number, 8)
    with (largest := LargestTensor()):
        left = distill_(items, vectors, np.ones(number, np.int64), steps=0)
    assert largest.size <= 8 * 4 * number, largest.by  # two attributes of all items would take twice that
    with torch.no_grad():
        total = (items(torch.arange(number)) - vectors).square().sum() / (vectors - vectors.mean(0)).square().sum()
    assert left == pytest.approx(float(total), rel=1e-5)


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
