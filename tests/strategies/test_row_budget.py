"""Rows under a budget against a list of all rows, best per value first, that is kept as far as it fits."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.isotonic import isotonic_regression

from embcomp import TableSpec
from embcomp.strategies._pruned import PrunedConfig, form_bytes
from embcomp.strategies._row_budget import RowBudget, _falling_means
from embcomp.strategies._width_repair import CONSTRAINTS, WidthRepair

DIM = 16
ROW_BYTES = {"float32": lambda w: 4 * w, "int8": lambda w: w, "int4:row": lambda w: w / 2 + 4}
KINDS = ("distinct", "tied", "infinite", "ordered")


def draw_scores(size, kind, gone, random):
    """Scores of one table, float32; a share of its rows should be gone."""
    worth = np.exp(random.uniform(-9, 9, size)).astype(np.float32)
    if kind == "tied":
        worth = random.integers(1, 4, size).astype(np.float32)
    elif kind == "infinite":
        worth[random.random(size) < 0.3] = np.inf
    score = np.where(random.random(size) < gone, -1 / worth, worth)
    return np.sort(score)[::-1].tolist() if kind == "ordered" else score.tolist()


class Case:
    """Tables, scores and a limit, and the slow way to say what fits."""

    def __init__(self, scores, widths, rows="float32", pruned="oov", unseen="error", share=None, projection="none"):
        self.scores, self.widths, self.sizes = scores, tuple(widths), [len(part) for part in scores]
        self.specs = [TableSpec(f"t{table}", size, DIM) for table, size in enumerate(self.sizes)]
        self.has_shared = pruned == "oov" or unseen == "oov_row"
        self.spares_shared = pruned == "oov" and unseen != "oov_row"  # tables that are whole need no shared row
        self.prices = [ROW_BYTES[rows](width) for width in widths]
        is_rising = [any(a < b for a, b in itertools.pairwise(part)) for part in scores]
        self.fees = [12 * -(-size // 64) if flag else 0 for size, flag in zip(self.sizes, is_rising, strict=True)]
        self.config = self.without_limit = PrunedConfig(rows=rows, pruned=pruned, unseen=unseen, projection=projection)
        self.least, self.most = self.bytes_of(self.parts_of([])), self.bytes_of([[True] * n for n in self.sizes])
        if share is not None:
            self.config = replace(self.config, limit_bytes=self.least + math.floor(share * (self.most - self.least)))
        flat = [value for part in scores for value in [*part, *([math.inf] if self.has_shared else [])]]
        self.budget = RowBudget(self.specs, self.config, torch.tensor(flat), self.has_shared, form_bytes)

    def bytes_of(self, flags, widths=None):
        """Exact bytes of a form; a table whose kept ids are its first ones needs no remap."""
        names = [spec.name for spec in self.specs]
        numbers = [sum(part) for part in flags]
        config = replace(
            self.without_limit,
            num_kept=dict(zip(names, numbers, strict=True)),
            dims=dict(zip(names, widths or self.widths, strict=True)),
            remapped={name: not all(part[:n]) for name, part, n in zip(names, flags, numbers, strict=True)},
        )
        rows, matrices, remap = form_bytes(self.specs, config)
        return sum(rows) + remap + sum(matrices)

    def density(self, table, row):
        score, width = min(self.scores[table][row], 2.0**128), self.widths[table]
        return score / width if score > 0 else score * width

    def ranked(self):
        """All rows as (table, id), best per value first, of equals the first."""
        rows = [(table, row) for table, size in enumerate(self.sizes) for row in range(size)]
        return sorted(rows, key=lambda place: -self.density(*place))

    def parts_of(self, rows):
        """Flags of some rows, and of whole tables where the rest costs less than saying which rows they are."""
        flags = [[False] * size for size in self.sizes]
        for table, row in rows:
            flags[table][row] = True
        return [[True] * len(part) if self.is_completed(table, sum(part)) else part for table, part in enumerate(flags)]

    def is_completed(self, table, number):
        left = self.sizes[table] - number - self.spares_shared
        return number > 0 and left * self.prices[table] <= self.fees[table]

    def ids_of(self, flags):
        """Flags of the ids of each table, out of those of all rows."""
        return [part[:size].tolist() for part, size in zip(flags.split(self.budget.segments), self.sizes, strict=True)]

    def __repr__(self):
        scores = [part[:20] for part in self.scores]
        return (
            f"Case({scores}, {self.widths}, {self.sizes} rows, {self.config}, {self.budget.numbers(self.widths)} kept)"
        )


@st.composite
def cases(draw, most_ids, kinds=KINDS, projections=("none",)):
    tables = draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gone = draw(st.sampled_from([0.0, 0.3, 1.0]))
    return Case(
        [
            draw_scores(draw(st.integers(1, most_ids)), draw(st.sampled_from(kinds)), gone, random)
            for _ in range(tables)
        ],
        [draw(st.integers(1, DIM)) for _ in range(tables)],
        draw(st.sampled_from(list(ROW_BYTES))),
        draw(st.sampled_from(["oov", "zero"])),
        draw(st.sampled_from(["error", "oov_row"])),
        draw(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-3, 0.999, 1.0]))),
        draw(st.sampled_from(projections)),
    )


@settings(deadline=None, max_examples=200)
@given(case=cases(12, projections=("none", "linear")))
def test_of_tiny_tables_the_longest_list_that_fits_is_kept(case):
    limit, ranked, budget = case.config.limit_bytes, case.ranked(), case.budget
    parts = [case.parts_of(ranked[:first]) for first in range(len(ranked) + 1)]
    fitting = [flags for flags in parts if budget.bytes_of(case.widths, [sum(part) for part in flags]) <= limit]
    assert case.ids_of(budget.kept(case.widths)) == fitting[-1]


@settings(deadline=None, max_examples=200)
@given(case=cases(2000))
def test_rows_are_kept_in_order_until_the_limit_is_used_up(case):
    flags, ranked = case.ids_of(case.budget.kept(case.widths)), case.ranked()
    used = case.bytes_of(flags)
    assert used <= case.config.limit_bytes
    left_out = [place for place, (table, row) in enumerate(ranked) if not flags[table][row]]
    if not left_out:
        return
    assert case.config.limit_bytes < case.most
    first = left_out[0]
    assert case.parts_of(ranked[:first]) == flags
    table, _ = ranked[first]
    assert case.config.limit_bytes - used < case.prices[table] + case.fees[table] + 4 * DIM


@settings(deadline=None, max_examples=30)
@given(case=cases(50))
def test_without_a_limit_rows_of_positive_score_are_kept(case):
    free = Case(case.scores, case.widths, case.config.rows, case.config.pruned, case.config.unseen)
    assert free.ids_of(free.budget.kept(free.widths)) == [[score > 0 for score in part] for part in free.scores]


@settings(deadline=None, max_examples=100)
@given(case=cases(300, projections=("none", "linear")), seed=st.integers(0, 2**32 - 1))
def test_shrunk_widths_fit_with_all_wanted_rows_or_are_all_ones(case, seed):
    wanted, limit = [[score > 0 for score in part] for part in case.scores], case.config.limit_bytes
    fits = case.budget.bytes_of(case.widths, [sum(part) for part in wanted]) <= limit
    ones = (1,) * len(case.widths)
    found = WidthRepair(case.budget, "shrink")(case.widths, np.random.default_rng(seed))
    takes = min(case.bytes_of(wanted, found), case.bytes_of([[True] * size for size in case.sizes], found))
    assert found == ones or takes <= limit
    assert not fits or all(before <= width <= DIM for width, before in zip(found, case.widths, strict=True))
    rejected = WidthRepair(case.budget, "reject")(case.widths, np.random.default_rng(seed))
    assert rejected == (found if fits or case.widths == ones else None)


@settings(deadline=None, max_examples=100)
@example(case=Case([[1.0, 1.0]], [1], share=0.97, projection="linear"), seed=0, constraint="prune")
@given(
    case=cases(300, projections=("none", "linear")),
    seed=st.integers(0, 2**32 - 1),
    constraint=st.sampled_from(CONSTRAINTS),
)
def test_widths_that_leave_some_of_the_budget_get_wider_until_it_is_used_up(case, seed, constraint):
    found = WidthRepair(case.budget, constraint)(case.widths, np.random.default_rng(seed))
    whole, limit = [[True] * size for size in case.sizes], case.config.limit_bytes
    had_room = case.bytes_of(whole) <= limit
    if found is None or not had_room:
        # Narrow rows of few ids may take more than whole ones, as they need a matrix.
        assert constraint != "prune" or found == case.widths or case.bytes_of(whole, found) <= limit
        return
    assert all(before <= width <= DIM for width, before in zip(found, case.widths, strict=True))
    takes = case.bytes_of(whole, found)
    if constraint == "prune":  # rows go then, as many as it takes
        assert takes > limit or found == (DIM,) * len(found)
    else:
        assert takes <= limit
        wider = [(*found[:f], w + 1, *found[f + 1 :]) for f, w in enumerate(found) if w < DIM]
        assert not wider or any(case.bytes_of(whole, more) > limit for more in wider)


def test_equal_rows_go_in_the_order_of_tables_and_ids():
    case = Case([[1.0, 1.0, 1.0], [1.0, 1.0]], [4, 4], pruned="zero", share=0.8)
    assert case.ids_of(case.budget.kept(case.widths)) == [[True, True, True], [True, False]]
    assert case.ids_of(case.budget.kept((8, 4)))[1] == [True, True]  # a narrow row costs less


@pytest.mark.parametrize(
    ("limit", "numbers"),
    [
        (64, [0, 0, 1]),
        (71, [0, 0, 1]),
        (72, [0, 1, 1]),
        (88, [1, 1, 1]),
        (104, [2, 1, 1]),
        (108, [2, 1, 2]),
        (116, [2] * 3),
    ],
)
def test_rows_are_worth_their_score_per_value_and_those_that_should_be_gone_least(limit, numbers):
    """Bytes are 16, 8 and 4 a row, and 60 for reading 16 values from the last one on."""
    case = Case([[8.0, 2.0], [5.0, -1.0], [3.0, -1.5]], [4, 2, 1], pruned="zero")
    case.budget.config = replace(case.config, limit_bytes=limit)
    assert [sum(part) for part in case.ids_of(case.budget.kept(case.widths))] == numbers


@pytest.mark.parametrize("width", [1, 32, 60, 63, 64])
def test_the_price_of_a_row_is_that_of_one_in_a_large_table(width):
    specs = [TableSpec("t", 3, 64)]
    for projection in ("none", "linear"):
        budget = RowBudget(specs, PrunedConfig(projection=projection), torch.ones(4), True, form_bytes)
        assert budget._row_bytes(width) == 4 * width


# ---- small budgets -------------------------------------------------------------------------------------------------


def falling(size, random, budget_of_falling, share, width=16):
    """A table whose ids are numbered by falling frequency, with scores that follow it only roughly."""
    worth = (size / (1 + np.arange(size)) * np.exp(random.uniform(-1, 1, size))).astype(np.float32)
    specs = [TableSpec("t", size, DIM)]
    limit = math.floor(share * specs[0].full_bytes)
    config = PrunedConfig(projection="none", limit_bytes=limit)
    score = torch.tensor([*worth.tolist(), math.inf])
    return worth, RowBudget(specs, config, score, True, form_bytes, budget_of_falling), limit


@pytest.mark.parametrize("share", [0.001, 0.002, 0.005, 0.01])
@pytest.mark.parametrize("width", [16, 4, 1])
def test_where_bits_would_eat_the_budget_ids_that_are_numbered_by_frequency_are_kept_from_the_first_on(share, width):
    worth, budget, limit = falling(20_000, np.random.default_rng(3), [True], share)
    (number,), kept = budget.numbers((width,)), budget.kept((width,))[:-1]
    assert budget.bytes_of((width,), [number]) <= limit < budget.bytes_of((width,), [number + 1])
    assert bool(kept[:number].all())
    assert not bool(kept[number:].any())
    assert limit - 4 * number * width < 4 * width + 8 * 16
    _, by_score, _ = falling(20_000, np.random.default_rng(3), [False], share)
    assert worth[by_score.kept((width,))[:-1].numpy()].sum() < worth[:number].sum()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_values_by_id_fall_as_the_nearest_falling_ones(worth):
    wanted = isotonic_regression(worth, increasing=False)
    assert _falling_means(np.array(worth)) == pytest.approx(wanted, rel=1e-9, abs=1e-6)


def test_of_large_tables_neighbours_are_taken_together():
    worth = np.random.default_rng(0).random(10_000)
    found = _falling_means(worth)
    assert len(found) == len(worth)
    assert bool((np.diff(found) <= 1e-12).all())
    assert found.sum() == pytest.approx(worth.sum())


def test_where_bits_are_cheap_rows_are_kept_by_score():
    worth, budget, _ = falling(20_000, np.random.default_rng(3), [True], 0.1)
    number = int(budget.numbers((16,))[0])
    kept = budget.kept((16,))[:-1].numpy()
    assert set(np.flatnonzero(kept)) == set(np.argsort(-worth)[:number])


def test_where_frequency_says_little_bits_are_worth_their_bytes():
    size, random = 20_000, np.random.default_rng(4)
    worth = np.where(np.arange(size) % 50 == 49, 1000.0, random.random(size)).astype(np.float32)
    specs = [TableSpec("t", size, DIM)]
    config = PrunedConfig(projection="none", limit_bytes=math.floor(0.02 * specs[0].full_bytes))
    budget = RowBudget(specs, config, torch.tensor([*worth.tolist(), math.inf]), True, form_bytes, [True])
    kept = budget.kept((16,))[:-1].numpy()
    assert set(np.flatnonzero(kept) % 50) == {49}
