"""What M2TRec has that others have not: metadata, prefixes, categories, pooling, heads."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recsys_models.data import NO_TARGET, SessionBatch
from recsys_models.session import build_session_model, used_attributes
from tests.recsys_models.session.tiny import (
    NUM_ITEMS,
    SESSIONS,
    attribute,
    padded,
    sequences,
    tiny_log,
    tiny_model,
)

LOG = tiny_log()
EITHER = [("sasrec", {}), ("gru4rec", {}), ("narm", {}), ("m2trec", {"causal": True})]


@pytest.mark.parametrize("pooling", ["mean", "last", "attention"])
def test_m2trec_pools_as_it_is_told(pooling):
    model = tiny_model(LOG, "m2trec", pooling=pooling).eval()
    encoder, session = model.encoder, [1, 2, 3, 4]
    mask = torch.ones(1, 4, dtype=torch.bool)
    hidden = encoder.transformer(model.items(torch.tensor([session])), mask)[0]
    if pooling == "attention":
        hidden = (encoder.weight(hidden).softmax(0) * hidden).sum(0)
    else:
        hidden = hidden.mean(0) if pooling == "mean" else hidden[-1]
    torch.testing.assert_close(model.queries(*padded([session]))[0], encoder.query(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last", "attention"])
def test_a_causal_m2trec_learns_in_one_pass_what_prefixes_would_teach(pooling):
    model = tiny_model(LOG, "m2trec", pooling=pooling, causal=True).eval()
    with torch.no_grad():
        for parameter in model.encoder.transformer.blocks.parameters():
            parameter.mul_(10)  # what positions see is to show in what they say
    examples = model.prepare(next(iter(LOG.train.batches(16, 8))))
    sessions = [row[:length].tolist() for row, length in zip(examples.items, examples.lengths, strict=True)]
    prefixes = [session[: end + 1] for session in sessions for end in range(len(session))]
    learned = model.encoder.to_queries(model.learn(examples))
    torch.testing.assert_close(learned, model.queries(*padded(prefixes)), rtol=1e-4, atol=1e-5)
    both_ways = tiny_model(LOG, "m2trec", pooling=pooling).eval()
    both_ways.load_state_dict(model.state_dict())
    assert not torch.allclose(both_ways.queries(*padded(prefixes)), model.queries(*padded(prefixes)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), [("sasrec", {"blocks": 1, "heads": 2}), *EITHER[:3]])
def test_the_last_position_alone_gives_what_all_positions_do(name, options):
    model = tiny_model(LOG, name, **options).eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(3)
    items, lengths = padded(SESSIONS)
    sessions = model.embed(model.prepare(SessionBatch(items, lengths, torch.full_like(items, NO_TARGET))))
    rows = torch.arange(len(SESSIONS))
    every = model.encoder.hidden(sessions)[rows, sessions.lengths - 1]
    torch.testing.assert_close(model.encoder(sessions), every, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), EITHER)
def test_what_learns_from_every_position_can_learn_from_prefixes_too(name, options):
    model = tiny_model(LOG, name, **options).eval()
    batch = next(iter(LOG.train.batches(16, 8, mode="prefixes")))
    learned = model.encoder.to_queries(model.learn(model.prepare(batch)))
    torch.testing.assert_close(learned, model.queries(batch.items, batch.lengths))


@pytest.mark.parametrize(("name", "options"), EITHER)
def test_a_prefix_has_the_same_query_whatever_is_learned_from(name, options):
    whole, cut = (tiny_model(LOG, name, targets=targets, **options).eval() for targets in ("positions", "prefixes"))
    assert (whole.encoder.targets, cut.encoder.targets) == ("positions", "prefixes")
    assert tiny_model(LOG, name, **options).encoder.targets == ("prefixes" if name == "narm" else "positions")
    log = dataclasses.replace(LOG, train=sequences(*(session for session in LOG.train if 1 < len(session) <= 8)))
    positions = next(iter(log.train.batches(len(log.train), 8)))
    prefixes = next(iter(log.train.batches(10_000, 8, mode="prefixes")))
    queries, examples = whole.learn(whole.prepare(positions)), cut.prepare(prefixes)
    torch.testing.assert_close(cut.learn(examples), queries, rtol=1e-4, atol=1e-5)
    assert torch.equal(examples.targets, positions.targets[positions.targets != NO_TARGET])
    loss = whole.loss(whole.prepare(positions), queries)
    torch.testing.assert_close(cut.loss(examples, cut.learn(examples)), loss)


def test_categories_are_learned_along():
    plain = tiny_model(LOG, "m2trec").eval()
    model = tiny_model(LOG, "m2trec", categories={"kind": 0.5}).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    examples = model.prepare(next(iter(LOG.train.batches(32, 8, mode="prefixes"))))
    queries = model.learn(examples)
    kinds = F.cross_entropy(model.category_heads[0](queries), examples.targets % 6)
    torch.testing.assert_close(model.loss(examples, queries), plain.loss(examples, queries) + 0.5 * kinds)


@pytest.mark.parametrize("options", [{}, {"pooling": "attention"}, {"causal": True}])
def test_bug_categories_are_predicted_from_sessions_not_from_what_is_compared_with_items(options):
    """PAPERS C1: softmax(U_l h) per level, of the session's vector h, while items are scored by W_q h / tau."""
    kind, words = LOG.catalogue.attributes
    half = attribute("half", *([item // 15] for item in range(NUM_ITEMS)), is_bag=False)
    log = dataclasses.replace(LOG, catalogue=dataclasses.replace(LOG.catalogue, attributes=(kind, half, words)))
    weights, losses = {"kind": 0.5, "half": 2.0}, []
    for temperature in (1.0, 0.05):
        plain = tiny_model(log, "m2trec", temperature=temperature, **options).eval()
        model = tiny_model(log, "m2trec", temperature=temperature, categories=weights, **options).eval()
        plain.load_state_dict(model.state_dict(), strict=False)
        examples = model.prepare(next(iter(log.train.batches(32, 8, mode=model.encoder.targets))))
        seen = []
        model.encoder.query.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(inputs[0]))
        loss = model.loss(examples, model.learn(examples))
        losses.append(float((loss - plain.loss(examples, plain.learn(examples))).detach()))
        targets, wanted = examples.targets[examples.targets != NO_TARGET], 0.0
        for head, weight, values in zip(model.category_heads, weights.values(), (kind, half), strict=True):
            scores = seen[0] @ head.weight.T + head.bias
            right = scores[torch.arange(len(targets)), torch.from_numpy(values.values).long()[targets]]
            wanted += weight * float((scores.exp().sum(1).log() - right).mean().detach())
        assert losses[-1] == pytest.approx(wanted, rel=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("known", [3, 0])
def test_categories_that_nobody_knows_are_not_learned(known):
    kinds = [[item % 6 if item < known else 6] for item in range(NUM_ITEMS)]
    own = (attribute("kind", *kinds, num_values=7, is_bag=False), LOG.catalogue.attributes[1])
    log = dataclasses.replace(LOG, catalogue=dataclasses.replace(LOG.catalogue, attributes=own))
    plain, model = tiny_model(log, "m2trec").eval(), tiny_model(log, "m2trec", categories={"kind": 0.5}).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    examples = model.prepare(next(iter(LOG.train.batches(64, 8, mode="prefixes"))))
    queries, targets = model.learn(examples), examples.targets
    loss, scores = model.loss(examples, queries), model.category_heads[0](queries)[targets < known]
    wanted = F.cross_entropy(scores, targets[targets < known]) if known else 0.0
    torch.testing.assert_close(loss, plain.loss(examples, queries) + 0.5 * wanted)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert bool(model.category_heads[0].weight.grad.any()) == bool(known)


@pytest.mark.parametrize("name", ["price.bucket", "type", "category_heads"])
def test_attributes_of_any_name_are_predicted(name):
    log = tiny_log()
    kind, words = log.catalogue.attributes
    object.__setattr__(log.catalogue, "attributes", (words, dataclasses.replace(kind, name=name)))
    model, plain = (tiny_model(log, "m2trec", categories=own).eval() for own in ({name: 2.0}, None))
    examples = model.prepare(next(iter(log.train.batches(32, 8, mode="prefixes"))))
    queries = model.learn(examples)
    loss = 2 * F.cross_entropy(model.category_heads[0](queries), examples.targets % 6)
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model.loss(examples, queries), plain.loss(examples, queries) + loss)


@pytest.mark.parametrize("bag_pooling", ["mean", "idf"])
@pytest.mark.parametrize(("strategy", "budget"), [("full", None), ("unified", "60%")])
def test_a_new_item_scores_like_its_twin_in_a_model_that_was_trained_without_it(strategy, budget, bag_pooling):
    named = (dataclasses.replace(a, names=np.arange(a.num_values - 1)) for a in LOG.catalogue.attributes)
    log = dataclasses.replace(LOG, catalogue=dataclasses.replace(LOG.catalogue, attributes=tuple(named)))
    options = {"max_length": 8, "categories": {"kind": 1.0}, "bag_pooling": bag_pooling}
    model = tiny_model(log, "m2trec", strategy, budget, **options).eval()
    model.tables.finalize_()
    kind, words = log.catalogue.attributes
    twin = int(np.flatnonzero(words.lengths == 2)[0])
    own = words.values[words.offsets[twin] : words.offsets[twin + 1]].tolist()
    values = {"kind": [kind.values[twin], 3], "words": [own, None]}
    catalogue = log.catalogue.with_items([100, 101], values)
    larger = build_session_model("m2trec", model.tables, catalogue, **options).eval()
    larger.load_state_dict(model.state_dict())
    scores = larger(*padded(SESSIONS))
    assert scores.shape == (len(SESSIONS), NUM_ITEMS + 2)
    torch.testing.assert_close(scores[:, :NUM_ITEMS], model(*padded(SESSIONS)))
    torch.testing.assert_close(scores[:, NUM_ITEMS], scores[:, twin])
    assert not torch.allclose(scores[:, NUM_ITEMS + 1], scores[:, twin])


def test_m2trec_has_no_row_per_item_unless_it_is_told_to():
    assert tiny_model(LOG, "m2trec").tables.names == ("kind", "words")
    assert tiny_model(LOG, "m2trec", items="hybrid").tables.names == ("kind", "words", "item")
    assert tiny_model(LOG, "m2trec", items="id").tables.names == ("item",)
    assert tiny_model(LOG, "m2trec", head="free").tables.names == ("kind", "words", "item_output")


def test_the_attributes_that_a_model_uses():
    catalogue = LOG.catalogue
    assert used_attributes("m2trec", catalogue) == catalogue.attributes
    assert used_attributes("m2trec", catalogue, items="hybrid", attributes="words") == catalogue.attributes[1:]
    assert used_attributes("sasrec", catalogue, attributes="words") == ()


def test_a_free_head_scores_by_its_own_table():
    model = tiny_model(LOG, "sasrec", head="free").eval()
    scores = model(*padded(SESSIONS))
    rows = model.tables.materialize("item_output")
    torch.testing.assert_close(scores, model.queries(*padded(SESSIONS)) @ rows.T, rtol=1e-4, atol=1e-5)
