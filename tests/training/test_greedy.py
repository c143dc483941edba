"""`GreedyCut` against plain greedy cutting, and its state."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embcomp.training.greedy import GreedyCut

PRICES = (7, 3, 1)
LADDER = (8, 4, 2, 1, 0)


def cost(candidate):
    return sum(price * value for price, value in zip(PRICES, candidate, strict=True))


def additive(seed):
    """Values that are sums over genes, so that what a step costs does not depend on the others."""
    gains = np.random.default_rng(seed).random((len(PRICES), len(LADDER)))
    gains = -np.sort(-gains, axis=1)
    return lambda candidate: float(sum(gains[g, LADDER.index(v)] for g, v in enumerate(candidate)))


def run(search, value, rounds=None):
    while (candidates := search.ask()) and rounds != 0:
        assert search.ask() == candidates
        search.tell([value(candidate) for candidate in candidates])
        rounds = None if rounds is None else rounds - 1
    return search


def plainly(value):
    """The same walk, every step evaluated anew every time."""
    path = [tuple(LADDER[0] for _ in PRICES)]
    while any(path[-1]):
        here = path[-1]
        steps = [
            (*here[:g], lower, *here[g + 1 :])
            for g in range(len(here))
            for lower in LADDER[LADDER.index(here[g]) + 1 :]
        ]
        path.append(min(steps, key=lambda step: (value(here) - value(step)) / (cost(here) - cost(step))))
    return path


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_lazy_and_plain_walks_agree_where_genes_do_not_interact(seed):
    value = additive(seed)
    search = run(GreedyCut([LADDER] * 3, cost, at_once=2), value)
    assert search.path == plainly(value)
    assert search.progress == (12, 12)


def test_the_front_goes_from_all_to_nothing_and_its_bytes_fall():
    front = run(GreedyCut([LADDER] * 3, cost), additive(0)).front()
    assert front[0].candidate == (8, 8, 8)
    assert front[-1].candidate == (0, 0, 0)
    sizes = [point.bytes for point in front]
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(point.bytes == cost(point.candidate) for point in front)


@pytest.mark.parametrize("limit", [0, 1, 20, 50, 88])
def test_the_chosen_form_is_the_first_within_the_limit(limit):
    search = run(GreedyCut([LADDER] * 3, cost, limit), additive(1))
    chosen = search.finalists(5)
    assert chosen == [next(form for form in search.path if cost(form) <= limit)]


def test_without_a_limit_nothing_is_cut():
    assert run(GreedyCut([LADDER] * 3, cost), additive(1)).finalists(1) == [(8, 8, 8)]


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_it_goes_on_from_its_state_by_way_of_json(rounds):
    value = additive(2)
    half = run(GreedyCut([LADDER] * 3, cost, at_once=1), value, rounds)
    resumed = GreedyCut([LADDER] * 3, cost, at_once=1)
    resumed.load(json.loads(json.dumps(half.state())))
    whole = run(GreedyCut([LADDER] * 3, cost, at_once=1), value)
    assert run(resumed, value).front() == whole.front()


def test_ladders_of_one_value_leave_nothing_to_cut():
    search = run(GreedyCut([(1,), (1,)], sum), sum)
    assert search.path == [(1, 1)]
    assert search.ask() == []
