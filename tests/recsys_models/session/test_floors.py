"""Popularity and item-to-item neighbours, against brute force."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from embcomp.errors import ConfigError, InputError
from embcomp.scoring import rank_bounds, ranks
from embcomp.testing.training import LargestTensor
from recsys_models.ranking import rank_cases
from recsys_models.session.floors import ItemKNN, Popularity
from tests.recsys_models.session.tiny import NUM_ITEMS, sequences, tiny_log


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


@pytest.mark.parametrize("changes", [{"neighbours": 2.5}, {"neighbours": 0}, {"regularization": math.inf}])
def test_wrong_options_of_item_knn(changes):
    with pytest.raises(ConfigError, match="an int of at least 1, and a finite number of at least 0"):
        ItemKNN(sequences([1, 2]), NUM_ITEMS, **changes)


@pytest.mark.parametrize("counts", [np.array([1, -2]), np.array([np.nan]), np.array([]), np.array([[1]])])
def test_counts_of_popularity_that_are_none(counts):
    with pytest.raises(InputError, match="must be"):
        Popularity(counts)


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


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_bug_every_score_of_a_floor_is_its_query(chunk):
    """It could not be asked for: what hands scores out did not write them to where they are put together."""
    log = tiny_log()
    for model in (Popularity(log.catalogue.counts), ItemKNN(log.train, NUM_ITEMS)):
        queries = model.queries(torch.tensor([[3, 4], [9, 0]]), torch.tensor([2, 1]))
        for context in (torch.enable_grad, torch.inference_mode):
            with context():
                assert torch.equal(model.scorer().every_score(queries, chunk), queries)
                assert torch.equal(model.scorer().scores(queries, 2, 5), queries[:, 2:5])


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
