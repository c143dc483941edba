"""Ranking metrics against their definitions, and slices of cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcomp import FullConfig, build_tables
from embcomp.errors import InputError
from embcomp.scoring import MatrixScorer, top_k
from recsys_models.data import Cases, Catalogue
from recsys_models.ranking import (
    bound_cases,
    evaluate_cases,
    metadata_bounds,
    rank_cases,
    ranking_metrics,
    seen_items,
    sliced_metrics,
    slices_of,
)
from recsys_models.session import build_session_model, session_specs
from tests.recsys_models.session.tiny import NUM_ITEMS, sequences, tiny_log, tiny_model


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=40))
def test_metrics_are_those_of_a_loop(ranks):
    found = ranking_metrics(np.array(ranks), (1, 10))
    for cutoff in (1, 10):
        hits = [rank < cutoff for rank in ranks]
        assert found[f"hr@{cutoff}"] == pytest.approx(sum(hits) / len(ranks))
        gains = [1 / math.log2(rank + 2) for rank in ranks if rank < cutoff]
        assert found[f"ndcg@{cutoff}"] == pytest.approx(sum(gains) / len(ranks))
        assert found[f"mrr@{cutoff}"] == pytest.approx(sum(1 / (r + 1) for r in ranks if r < cutoff) / len(ranks))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=20))
def test_ties_at_random_are_the_mean_over_all_ranks_that_they_leave_open(bounds):
    best, worst = (np.array([pick(pair) for pair in bounds]) for pick in (min, max))
    found = ranking_metrics(worst, best=best)
    assert {name: value for name, value in found.items() if "ties" not in name} == ranking_metrics(worst)
    for name in ranking_metrics(worst):
        means = [
            np.mean([ranking_metrics(np.array([rank]))[name] for rank in range(low, high + 1)])
            for low, high in zip(best, worst, strict=True)
        ]
        assert found[f"{name}_random_ties"] == pytest.approx(np.mean(means))


@pytest.mark.parametrize("ranks", [np.empty(0, np.int64), np.array([[1]]), np.array([-1])])
def test_wrong_ranks(ranks):
    with pytest.raises(InputError, match="at least"):
        ranking_metrics(ranks)


def test_ranks_and_cutoffs_of_other_kinds():
    assert ranking_metrics([0, 1, 2], [np.int64(2)])["hr@2"] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="ranks of float64 must be integers"):
        ranking_metrics(np.array([0.0, 1.5]))
    with pytest.raises(InputError, match="cutoffs=10 must be a sequence"):
        ranking_metrics(np.array([0, 1]), 10)


@pytest.mark.parametrize("best", [np.array([4, 4]), np.array([-1, 0]), np.array([3])])
def test_wrong_best_ranks(best):
    with pytest.raises(InputError, match="nowhere above"):
        ranking_metrics(np.array([3, 5]), best=best)


@pytest.mark.parametrize("cutoff", [-1, 0, 2.5, True])
def test_bug_cutoffs_that_are_no_numbers_of_items_are_named(cutoff):
    """They were a raw error of NumPy, or metrics of nothing."""
    with pytest.raises(InputError, match=rf"cutoffs=\(10, {cutoff}\): {cutoff} must be an int of at least 1"):
        ranking_metrics(np.array([3, 5]), (10, cutoff))


@pytest.mark.parametrize("filters_seen", [False, True])
def test_ranks_are_those_of_sorted_scores(filters_seen):
    log = tiny_log(seed=3)
    model = tiny_model(log, init_std=1.0).train()
    ranks = rank_cases(model, log.test, filters_seen, batch_size=7)
    assert model.training
    model.eval()
    for case in range(len(log.test)):
        prefix, target = log.test[case]
        scores = model(torch.from_numpy(prefix).long()[None], torch.tensor([len(prefix)]))[0].tolist()
        others = set(range(NUM_ITEMS)) - {target} - (set(prefix.tolist()) if filters_seen else set())
        assert ranks[case] == sum(scores[item] > scores[target] for item in others)


def test_seen_items_are_left_out_even_where_the_model_reads_fewer():
    log = tiny_log(seed=4)
    model = tiny_model(log, max_length=1, init_std=1.0).eval()
    ranks = rank_cases(model, log.test, filters_seen=True)
    scores = model(torch.arange(NUM_ITEMS)[:, None], torch.ones(NUM_ITEMS, dtype=torch.int64)).tolist()
    for case, rank in enumerate(ranks):
        prefix, target = log.test[case]
        own = scores[prefix[-1]]
        others = set(range(NUM_ITEMS)) - {target} - set(prefix.tolist())
        assert rank == sum(own[item] > own[target] for item in others)


def test_zeros_behind_the_end_of_a_session_are_not_seen_items():
    items, lengths = torch.tensor([[3, 0, 5], [7, 0, 0], [0, 0, 0]]), torch.tensor([3, 1, 0])
    seen = seen_items(items, lengths)
    assert seen.tolist() == [[3, 0, 5], [7, -1, -1], [-1, -1, -1]]
    scorer = MatrixScorer(torch.eye(NUM_ITEMS)[:, :1])  # item 0 is the best
    assert top_k(scorer, torch.ones(3, 1), 1, seen)[1].tolist() == [[1], [0], [0]]
    with pytest.raises(InputError, match=r"session 1 has length 4, but must have one in \[0, 3\]"):
        seen_items(items, torch.tensor([3, 4, 0]))


def test_bug_items_that_a_policy_takes_but_no_ranking_has_are_not_seen_items():
    """They were handed to `top_k`, which refused them."""
    items, lengths = torch.tensor([[3, -7, 500]]), torch.tensor([3])
    assert seen_items(items, lengths, NUM_ITEMS).tolist() == [[3, -1, -1]]
    log = tiny_log()
    model = build_session_model(
        "sasrec", build_tables(session_specs("sasrec", log.catalogue, 8), FullConfig(unseen="hash")), log.catalogue
    )
    outsider = Cases(sequences([3, 500, 4]), np.array([0], np.int32), np.array([2], np.int32))
    assert 0 <= rank_cases(model, outsider, filters_seen=True)[0] < NUM_ITEMS


def test_a_model_that_scores_all_alike_is_not_rewarded():
    class Alike(torch.nn.Module):
        max_length = 5

        def queries(self, items, lengths):
            return torch.ones(len(items), 1)

        def scorer(self):
            return MatrixScorer(torch.ones(NUM_ITEMS, 1))

    ranks = rank_cases(Alike(), tiny_log().test)
    assert (ranks == NUM_ITEMS - 1).all()
    best, worst = bound_cases(Alike(), tiny_log().test)
    assert not best.any()
    assert np.array_equal(worst, ranks)
    found = ranking_metrics(worst, best=best)
    assert found["hr@10"] == 0
    assert found["hr@10_random_ties"] == pytest.approx(10 / NUM_ITEMS)


@pytest.mark.parametrize("filters_seen", [False, True])
@pytest.mark.parametrize("used", [0, 1, 2])
def test_the_bounds_of_metadata_are_reached_by_a_model_that_knows_the_right_attributes(used, filters_seen):
    log = tiny_log(sessions=60, filters_seen=filters_seen)
    known = log.catalogue.attributes[:used]
    group = log.catalogue.twin_groups(known)
    targets = log.test.targets.tolist()

    class Knowing(torch.nn.Module):
        num_items, max_length = NUM_ITEMS, 5

        def queries(self, items, lengths):
            return torch.stack([torch.from_numpy(group == group[targets.pop(0)]).float() for _ in items])

        def scorer(self):
            return MatrixScorer(torch.eye(NUM_ITEMS))

    best, worst = bound_cases(Knowing(), log.test, filters_seen)
    assert metadata_bounds(log, known) == ranking_metrics(worst, best=best)
    if used == 2:
        assert metadata_bounds(log) == metadata_bounds(log, known)


def test_bug_slices_by_another_catalogue_are_refused():
    """They were a raw IndexError."""
    cases = tiny_log().test
    with pytest.raises(InputError, match=r"is \d+, but this catalogue has items in \[0, 12\): give the catalogue and"):
        slices_of(tiny_log(num_items=12).catalogue, cases)


@pytest.mark.parametrize(
    ("count", "name"),
    [(0, "unseen"), (1, "seen < 5"), (4, "seen < 5"), (5, "seen < 10"), (9, "seen < 10"), (10, "seen ≥ 10")],
)
def test_items_are_sliced_at_5_and_10_events(count, name):
    catalogue = Catalogue(2, np.array([99, count]), np.arange(2), ())
    slices = slices_of(catalogue, Cases(sequences([0, 1]), np.array([0], np.int32), np.array([1], np.int32)))
    assert [key for key, chosen in slices.items() if "seen" in key and chosen.all()] == [name]


@pytest.mark.parametrize(
    ("length", "name"),
    [
        *((1, "length ≤ 2"), (2, "length ≤ 2"), (3, "length ≤ 5"), (5, "length ≤ 5"), (6, "length ≤ 10")),
        *((10, "length ≤ 10"), (11, "length ≤ 20"), (20, "length ≤ 20"), (21, "length > 20")),
    ],
)
def test_prefixes_are_sliced_at_2_5_10_and_20_items(length, name):
    catalogue = Catalogue(3, np.array([9, 9, 9]), np.arange(3), ())
    cases = Cases(sequences([0] * length + [1]), np.array([0], np.int32), np.array([length], np.int32))
    slices = slices_of(catalogue, cases)
    assert [key for key, chosen in slices.items() if "length" in key and chosen.all()] == [name]


@pytest.mark.parametrize("evaluate", [rank_cases, bound_cases, evaluate_cases])
@pytest.mark.parametrize("items", ["id", "metadata"])
def test_the_catalogue_is_composed_once_for_all_batches(items, evaluate, monkeypatch):
    log, made = tiny_log(), []
    model = tiny_model(log, items=items)
    scorer = model.scorer
    monkeypatch.setattr(model, "scorer", lambda: made.append(torch.is_grad_enabled()) or scorer())
    assert len(log.test) > 2 * 16
    evaluate(model, log.test, batch_size=16)
    assert made == [False]


def test_no_cases():
    log = tiny_log()
    none = Cases(log.test.sequences, log.test.rows[:0], log.test.ends[:0])
    assert rank_cases(tiny_model(log), none).shape == (0,)
    assert [found.shape for found in bound_cases(tiny_model(log), none)] == [(0,), (0,)]


def test_slices_cover_all_cases_and_their_metrics_average_to_the_whole():
    log = tiny_log(sessions=12)
    slices = slices_of(log.catalogue, log.test)
    kinds = [[name for name in slices if "seen" in name], [name for name in slices if "length" in name]]
    ranks = rank_cases(tiny_model(log), log.test)
    whole, found = ranking_metrics(ranks), sliced_metrics(ranks, slices)
    assert len(kinds[0]) == 5
    assert slices["unseen"].any()
    for names in kinds:
        assert np.sum([slices[name] for name in names], axis=0).tolist() == [1] * len(log.test)
        mean = sum(found[n]["cases"] * found[n]["ndcg@10"] for n in names if n in found) / len(log.test)
        assert mean == pytest.approx(whole["ndcg@10"])
    assert evaluate_cases(tiny_model(log), log.test) == whole
    best, worst = bound_cases(tiny_model(log, "m2trec"), log.test)
    at_random = sliced_metrics(worst, slices, best=best)
    assert at_random["unseen"] == {
        "cases": found["unseen"]["cases"],
        **ranking_metrics(worst[slices["unseen"]], best=best[slices["unseen"]]),
    }
    unseen = (log.catalogue.counts[log.test.targets] == 0).tolist()
    repeated = [cases[1] in cases[0] for cases in map(log.test.__getitem__, range(len(log.test)))]
    assert slices["unseen"].tolist() == [flag and not again for flag, again in zip(unseen, repeated, strict=True)]
    assert slices["unseen, repeated"].tolist() == [flag and again for flag, again in zip(unseen, repeated, strict=True)]
    assert slices["length ≤ 2"].tolist() == (log.test.ends <= 2).tolist()
