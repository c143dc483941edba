"""Losses of session models."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from embcomp.scoring import sampled_cross_entropy
from recsys_models.data import NO_TARGET, SessionBatch
from recsys_models.session.encoders import Examples
from tests.recsys_models.session.tiny import (
    NUM_ITEMS,
    SESSIONS,
    attribute,
    log_with_unseen_items,
    padded,
    tiny_log,
    tiny_model,
)

LOG = tiny_log()


def test_the_binary_loss_is_that_of_a_loop_over_targets(monkeypatch):
    model = tiny_model(LOG, "sasrec", loss="binary").eval()
    examples = model.prepare(next(iter(LOG.train.batches(32, 8))))
    queries = model.learn(examples)
    targets = examples.targets[examples.targets != NO_TARGET]
    drawn = torch.randint(NUM_ITEMS, targets.shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("recsys_models.session.objectives.torch.randint", lambda *args, **kwargs: drawn)
    right, wrong, number = [], [], 0
    for row in range(len(examples.items)):
        targets = examples.targets[row, : examples.lengths[row]].tolist()
        session = {*examples.items[row, : examples.lengths[row]].tolist(), *targets}
        for target in targets:
            query, negative = queries[number], int(drawn[number])
            right.append(math.log1p(math.exp(-float(query.detach() @ model.items(torch.tensor(target)).detach()))))
            if negative not in session:
                wrong.append(math.log1p(math.exp(float(query.detach() @ model.items(torch.tensor(negative)).detach()))))
            number += 1
    assert 0 < len(wrong) < len(right)
    wanted = sum(right) / len(right) + sum(wrong) / len(wrong)
    assert float(model.loss(examples, queries).detach()) == pytest.approx(wanted, rel=1e-5)


def test_the_softmax_is_sampled_beyond_a_number_of_items():
    assert tiny_model(LOG).objective.loss == "softmax"
    assert tiny_model(LOG, most_items=NUM_ITEMS - 1).objective.loss == "sampled"


@pytest.mark.parametrize("number", [1, 4, 20])  # targets of a step: fewer than are drawn, and more
@pytest.mark.parametrize("sampling", ["uniform", "counts", "log_uniform"])
def test_the_sampled_softmax_estimates_the_sum_over_all_items(sampling, number, monkeypatch):
    """Within four standard errors, where items are drawn, and are targets, with very different chances."""
    counts = np.array([round(1000 / (item + 1) ** 1.5) for item in range(NUM_ITEMS)])
    log = dataclasses.replace(LOG, catalogue=dataclasses.replace(LOG.catalogue, counts=counts))
    model = tiny_model(log, loss="sampled", sampling=sampling, num_negatives=8, init_std=0.3)
    by_query = functools.partial(sampled_cross_entropy, reduction="none")
    monkeypatch.setattr("recsys_models.session.objectives.sampled_cross_entropy", by_query)
    query, vectors = torch.randn(16), model.items(torch.arange(NUM_ITEMS)).detach()
    scores, own, estimates = vectors @ query, 5, []
    for _ in range(2000):
        targets = torch.multinomial(torch.from_numpy(counts / counts.sum()), number, replacement=True)
        targets[0] = own
        examples = Examples(targets[:, None], torch.ones_like(targets), targets)
        with torch.no_grad():
            losses = model.objective(model.items, query.expand(number, -1), targets, examples)
        estimates.append((losses[0] + scores[own]).exp())
    found = torch.stack(estimates)
    assert abs(found.mean() - scores.exp().sum()) < 4 * found.std() / len(found) ** 0.5


def test_of_many_targets_some_are_negatives():
    model = tiny_model(LOG, loss="sampled", num_negatives=8)
    targets = torch.arange(NUM_ITEMS)
    seen = [model.objective._negatives(targets).ids[:8] for _ in range(40)]
    assert all(len(own.unique()) == 8 for own in seen)
    assert len(torch.cat(seen).unique()) == NUM_ITEMS
    assert model.objective._negatives(targets[:5]).ids[:5].equal(targets[:5])
    assert len(model.objective._negatives(targets).ids) == 16


def row_gradients(model, name, ids):
    """Gradients of rows of a table that has one for each id."""
    store, rows = model.tables.stored_rows(torch.tensor(ids), model.tables.index_of(name))
    return store.weight.grad[rows]


@pytest.mark.parametrize("loss", ["softmax", "sampled", "binary"])
class TestItemsThatTrainingNeverSaw:
    LOG = log_with_unseen_items()
    UNSEEN, SEEN = list(range(25, NUM_ITEMS)), list(range(25))

    @pytest.mark.parametrize("items", ["id", "metadata", "hybrid"])
    @pytest.mark.parametrize("head", ["tied", "free"])
    @pytest.mark.parametrize("name", ["sasrec", "bert4rec", "m2trec"])
    def test_learn_nothing(self, name, head, items, loss):
        model = tiny_model(self.LOG, name, items=items, head=head, loss=loss, num_negatives=200)
        examples = model.prepare(next(iter(self.LOG.train.batches(64, 8, mode=model.encoder.targets))))
        model.loss(examples, model.learn(examples)).backward()
        for table in set(model.tables.names) & {"item", "item_output"}:
            assert not row_gradients(model, table, self.UNSEEN).any()
            assert row_gradients(model, table, self.SEEN).any()
        if items != "id":
            assert not row_gradients(model, "kind", [6]).any()
            assert row_gradients(model, "kind", [0]).any()

    @pytest.mark.parametrize("options", [{}, {"categories": {"kind": 1.0}}, {"head": "free"}])
    @pytest.mark.parametrize("name", ["sasrec", "m2trec"])
    def test_count_for_nothing_as_targets(self, name, options, loss):
        kind = attribute("kind", *[[item % 6] for item in range(NUM_ITEMS)], num_values=7, is_bag=False)
        catalogue = dataclasses.replace(self.LOG.catalogue, attributes=(kind,))  # which items of training have too
        model = tiny_model(dataclasses.replace(self.LOG, catalogue=catalogue), name, loss=loss, **options).eval()
        sessions = padded([[1, 2], [3], [4, 5], [6]])

        def found(targets, rows):
            torch.manual_seed(0)
            batch = SessionBatch(sessions[0][rows], sessions[1][rows], torch.tensor(targets))
            examples = model.prepare(batch)
            return model.loss(examples, model.learn(examples))

        torch.testing.assert_close(found([26, 7, 29, 8], [0, 1, 2, 3]), found([7, 8], [1, 3]))
        none = found([26, 27], [0, 1])
        none.backward()
        assert none == 0
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_softmax_over_items_of_training_is_that_of_their_scores():
    log = log_with_unseen_items()
    model = tiny_model(log).eval()
    batch = next(iter(log.train.batches(16, 8, mode="prefixes")))
    examples = model.prepare(batch)
    wanted = F.cross_entropy(model(batch.items, batch.lengths)[:, :25], batch.targets)
    torch.testing.assert_close(model.loss(examples, model.learn(examples)), wanted)


def test_a_temperature_divides_scores():
    model, cold = tiny_model(LOG).eval(), tiny_model(LOG, temperature=0.5).eval()
    torch.testing.assert_close(cold(*padded(SESSIONS)), 2 * model(*padded(SESSIONS)))
