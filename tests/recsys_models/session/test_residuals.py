"""Rows of items beside their attributes, in one group with them or in a group of their own."""

import dataclasses

import numpy as np
import pytest
import torch

from embcomp import FrequencyCutConfig, build_tables
from embcomp.errors import ConfigError
from embcomp.training import Phases
from recsys_models.session import build_session_model, session_specs, table_counts
from recsys_models.training import TrainingConfig, fit
from tests.recsys_models.session.tiny import NUM_ITEMS, tiny_log, tiny_model


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
