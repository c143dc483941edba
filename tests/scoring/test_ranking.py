"""Best items and ranks, against brute force over all scores."""

import operator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcomp import InputError, TableSpec, build_tables
from embcomp.scoring import MatrixScorer, TableScorer, rank_bounds, ranking, ranks, top_k
from embcomp.testing.training import LargestTensor
from tests.scoring.catalogues import OPTIONS, matrix_scorer, scorer_of


def slow_top_k(scores, k, exclude):
    """Sort all items of each query by falling score, then by id, in plain Python."""
    values, ids = [], []
    for row, left_out in zip(scores.tolist(), exclude.tolist(), strict=True):
        order = sorted((-s, i) for i, s in enumerate(row) if i not in left_out and s > -np.inf)[:k]
        order += [(np.inf, -1)] * (k - len(order))
        values.append([-s for s, _ in order])
        ids.append([i for _, i in order])
    return torch.tensor(values), torch.tensor(ids)


def slow_ranks(scores, targets, exclude, beats=operator.ge):
    found = []
    for row, target, left_out in zip(scores.tolist(), targets.tolist(), exclude.tolist(), strict=True):
        rivals = [i for i in range(len(row)) if i != target and i not in left_out]
        found.append(sum(beats(row[i], row[target]) for i in rivals))
    return torch.tensor(found)


@st.composite
def catalogues(draw):
    """Whole numbers, so that scores are exact and there are ties; some items at -inf; some of them excluded."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_items, dim = draw(st.integers(1, 200)), draw(st.integers(1, 3))
    num_queries, spread = draw(st.integers(1, 6)), draw(st.sampled_from([0, 1, 3, 50]))
    matrix = torch.from_numpy(random.integers(-spread, spread + 1, (num_items, dim))).float()
    queries = torch.from_numpy(random.integers(-2, 3, (num_queries, dim))).float()
    bias = torch.from_numpy(random.integers(-1, 2, num_items)).float()
    bias[torch.from_numpy(random.random(num_items) < draw(st.sampled_from([0, 0.3, 1])))] = -torch.inf
    exclude = random.integers(-1, num_items, (num_queries, draw(st.sampled_from([0, 1, 5, num_items, 400]))))
    scorer = MatrixScorer(matrix, draw(st.sampled_from([None, bias])))
    return scorer, queries, torch.from_numpy(exclude), draw(st.one_of(st.none(), st.integers(1, num_items + 1)))


@settings(max_examples=300, deadline=None)
@given(catalogues(), st.data())
def test_against_brute_force(case, data):
    scorer, queries, exclude, chunk = case
    scores, k = scorer.scores(queries), data.draw(st.integers(1, scorer.num_items))
    wanted_values, wanted = slow_top_k(scores, k, exclude)
    values, ids = top_k(scorer, queries, k, exclude, chunk)
    assert torch.equal(ids, wanted)
    assert torch.equal(values, wanted_values)
    targets = torch.tensor([data.draw(st.integers(0, scorer.num_items - 1)) for _ in queries])
    assert torch.equal(ranks(scorer, queries, targets, exclude, chunk), slow_ranks(scores, targets, exclude))
    best, worst = rank_bounds(scorer, queries, targets, exclude, chunk)
    assert torch.equal(best, slow_ranks(scores, targets, exclude, operator.gt))
    assert torch.equal(worst, slow_ranks(scores, targets, exclude))


@pytest.mark.parametrize("name", OPTIONS)
def test_tables(name):
    for bias in (None, torch.randn(130)):
        scorer, queries = scorer_of(name, bias), torch.randn(7, 6)
        exclude = torch.randint(-1, 130, (7, 30))
        scores = scorer.scores(queries).detach()
        for chunk in (None, 17):
            values, ids = top_k(scorer, queries, 10, exclude, chunk)
            # Hashed ids tie, and chunks round in other ways: so values are compared, and that ids have them.
            torch.testing.assert_close(values, slow_top_k(scores, 10, exclude)[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(scores.gather(1, ids), values, rtol=1e-4, atol=1e-5)
            assert not (ids.unsqueeze(2) == exclude.unsqueeze(1)).any()
            assert all(len(set(row)) == 10 for row in ids.tolist())
        targets = torch.randint(130, (7,))
        found = ranks(scorer, queries, targets, exclude)
        least = scores.gather(1, targets[:, None])
        rivals = torch.ones_like(scores, dtype=torch.bool).scatter(1, exclude.clamp_min(0), False)
        rivals[(exclude != 0).all(1), 0] = True
        rivals.scatter_(1, targets[:, None], False)
        assert (found >= ((scores > least + 1e-4) & rivals).sum(1)).all()
        assert (found <= ((scores >= least - 1e-4) & rivals).sum(1)).all()


class TestTies:
    @pytest.mark.parametrize("num_items", [5, 4099, 70_001])
    @pytest.mark.parametrize("num_queries", [1, 2, 5, 16])
    def test_a_model_that_scores_all_items_alike_ranks_every_target_last(self, num_items, num_queries):
        """Not even where products of matrices round their last columns in another way."""
        for dim in (16, 300):
            scorer = MatrixScorer(torch.randn(1, dim).expand(num_items, dim).contiguous())
            targets = torch.cat([torch.tensor([0, num_items - 1]), torch.randint(num_items, (num_queries,))])
            for own in targets[:, None] if num_queries == 1 else [targets[:num_queries]]:
                queries = torch.randn(len(own), dim)
                assert (ranks(scorer, queries, own) == num_items - 1).all()
                best, worst = rank_bounds(scorer, queries, own)
                assert not best.any()
                assert (worst == num_items - 1).all()

    def test_so_does_one_of_hashed_ids(self):
        tables = build_tables([TableSpec("item", 3000, 16)], "hash", "10%")
        with torch.no_grad():
            tables.rows.weight.copy_(tables.rows.weight[:1].expand_as(tables.rows.weight))
        for form in (tables, tables.finalize()):
            assert (ranks(TableScorer(form), torch.randn(3, 16), torch.tensor([0, 1500, 2999])) == 2999).all()

    def test_equal_scores_are_found_by_rising_id(self):
        scorer = MatrixScorer(torch.ones(5000, 2))
        for chunk in (None, 7, 4999):
            assert top_k(scorer, torch.ones(3, 2), 100, chunk=chunk)[1].tolist() == [[*range(100)]] * 3
        exclude = torch.tensor([[0, 2, 4]])
        assert top_k(scorer, torch.ones(1, 2), 3, exclude)[1].tolist() == [[1, 3, 5]]

    @pytest.mark.parametrize("chunk", [None, 1000])
    def test_equal_vectors_are_found_by_rising_id_where_their_scores_are_exact(self, chunk):
        """Whole numbers are, in any order of additions: of every five items in a row, all have one vector."""
        groups = torch.randint(-9, 10, (800, 64)).float()
        scorer, queries = MatrixScorer(groups.repeat_interleave(5, 0)), torch.randint(-9, 10, (3, 64)).float()
        exclude = torch.randint(4000, (3, 50))
        values, ids = top_k(scorer, queries, 100, exclude, chunk)
        wanted_values, wanted = slow_top_k(scorer.scores(queries), 100, exclude)
        assert torch.equal(ids, wanted)
        assert torch.equal(values, wanted_values)

    @pytest.mark.parametrize("chunk", [None, 1000])
    @pytest.mark.parametrize("num_items", [50, 4099])
    @pytest.mark.parametrize("num_queries", [1, 2, 5])
    def test_equal_vectors_are_found_in_the_order_of_their_rounded_scores(self, num_queries, num_items, chunk):
        """Products of matrices round their last columns in another way, so that 4096 may come before 0."""
        scorer = MatrixScorer(torch.randn(1, 64).expand(num_items, 64).contiguous())
        queries = torch.randn(num_queries, 64)
        values, ids = top_k(scorer, queries, 10, chunk=chunk)
        starts = range(0, num_items, chunk or num_items)
        score = scorer.scoring(queries)
        scores = torch.cat([score(range(i, min(i + (chunk or num_items), num_items))) for i in starts], dim=1)
        wanted_values, wanted = slow_top_k(scores, 10, torch.full((num_queries, 1), -1))
        assert torch.equal(ids, wanted)
        assert torch.equal(values, wanted_values)
        rounding = scorer.rounding(queries, ids[:, 0])
        assert (values[:, 0] - values[:, -1] <= rounding).all()
        best, worst = rank_bounds(scorer, queries, ids[:, 0])
        assert not best.any()
        assert (worst == num_items - 1).all()

    def test_one_item(self):
        scorer = MatrixScorer(torch.ones(1, 2))
        assert ranks(scorer, torch.ones(2, 2), torch.zeros(2, dtype=torch.long)).tolist() == [0, 0]
        assert top_k(scorer, torch.ones(1, 2), 1)[1].tolist() == [[0]]


class TestExcluded:
    def test_the_target_is_never_excluded(self):
        scorer = MatrixScorer(torch.arange(5.0)[:, None])
        exclude = torch.tensor([[4, 2, 2, -1]])
        assert ranks(scorer, torch.ones(1, 1), torch.tensor([2]), exclude).tolist() == [1]
        assert ranks(scorer, torch.ones(1, 1), torch.tensor([2])).tolist() == [2]

    def test_what_is_missing_is_minus_one(self):
        scorer = MatrixScorer(torch.arange(5.0)[:, None])
        values, ids = top_k(scorer, torch.ones(1, 1), 4, torch.tensor([[4, 1, 0]]))
        assert ids.tolist() == [[3, 2, -1, -1]]
        assert values.tolist() == [[3.0, 2.0, -np.inf, -np.inf]]

    @pytest.mark.parametrize("chunk", [None, 100])
    def test_nearly_all(self, chunk):
        scorer, queries = matrix_scorer(3000), torch.randn(4, 4)
        exclude = torch.stack([torch.randperm(3000)[:2995] for _ in range(4)])
        values, ids = top_k(scorer, queries, 10, exclude, chunk)
        wanted_values, wanted = slow_top_k(scorer.scores(queries), 10, exclude)
        assert torch.equal(ids, wanted)
        torch.testing.assert_close(values, wanted_values)


def test_many_queries_are_taken_in_portions(monkeypatch):
    scorer, queries = matrix_scorer(60), torch.randn(11, 4)
    exclude, targets = torch.randint(-1, 60, (11, 5)), torch.randint(60, (11,))
    whole = (*top_k(scorer, queries, 5, exclude), ranks(scorer, queries, targets, exclude))
    monkeypatch.setattr(ranking, "QUERIES", 4)
    cut = (*top_k(scorer, queries, 5, exclude), ranks(scorer, queries, targets, exclude))
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other)


def test_no_queries():
    scorer = matrix_scorer()
    values, ids = top_k(scorer, torch.zeros(0, 4), 3)
    assert values.shape == ids.shape == (0, 3)
    assert ranks(scorer, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_items_far_better_than_all_before_them():
    """Every chunk has more candidates than there is room for."""
    scorer = MatrixScorer(torch.arange(20_000.0)[:, None])
    values, ids = top_k(scorer, torch.tensor([[1.0], [-1.0]]), 70, chunk=1024)
    assert ids.tolist() == [[*range(19_999, 19_929, -1)], [*range(70)]]
    assert values[0].tolist() == [float(i) for i in range(19_999, 19_929, -1)]


def test_full_precision_under_autocast_and_no_gradients():
    scorer, queries = matrix_scorer(), torch.randn(3, 4, requires_grad=True)
    wanted, targets = top_k(scorer, queries, 5), torch.tensor([1, 2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        values, ids = top_k(scorer, queries, 5)
        assert torch.equal(
            ranks(scorer, queries, targets), slow_ranks(scorer.scores(queries), targets, targets[:, None])
        )
    assert torch.equal(values, wanted[0])
    assert torch.equal(ids, wanted[1])
    assert not values.requires_grad


def test_memory_for_a_chunk():
    tables = build_tables([TableSpec("item", 100_000, 16)], "hash", "5%").finalize_()
    scorer, queries = TableScorer(tables), torch.randn(32, 16)
    for call in (
        lambda: top_k(scorer, queries, 10, torch.randint(100_000, (32, 20)), chunk=1000),
        lambda: ranks(scorer, queries, torch.arange(32), chunk=1000),
    ):
        with (largest := LargestTensor()):
            call()
        assert largest.size <= 4 * 5000 * 32, largest.by


class TestWrongInput:
    scorer, queries = matrix_scorer(), torch.zeros(3, 4)

    @pytest.mark.parametrize("k", [0, 51, -1, 2.0, True, None])
    def test_k(self, k):
        with pytest.raises(InputError, match=rf"k={k!r} must be an int in \[1, 50\]"):
            top_k(self.scorer, self.queries, k)

    @pytest.mark.parametrize(
        ("exclude", "message"),
        [
            (torch.zeros(3), "must be an int64 tensor, not torch.float32"),
            (torch.zeros(2, 5, dtype=torch.long), r"\(2, 5\): these queries need \(3, n\)"),
            (torch.zeros(3, dtype=torch.long), r"need \(3, n\)"),
            (torch.tensor([[0], [50], [1]]), r"exclude: 50 at position \[1, 0\] is no item.*\[0, 50\) \(or -1"),
            (torch.tensor([[0], [-2], [1]]), "exclude: -2"),
            (torch.zeros(3, 1, dtype=torch.long, device="meta"), "exclude are on meta"),
        ],
    )
    def test_exclude(self, exclude, message):
        for call in (
            lambda: top_k(self.scorer, self.queries, 2, exclude),
            lambda: ranks(self.scorer, self.queries, torch.tensor([0, 1, 2]), exclude),
        ):
            with pytest.raises(InputError, match=message):
                call()

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (torch.tensor([0, 1]), r"targets of shape \(2,\): these queries need \(3,\)"),
            (torch.tensor([0, -1, 2]), r"targets: -1 at position \[1\] is no item: items are in \[0, 50\)$"),
            (torch.tensor([0, 1, 50]), "targets: 50"),
            ([0, 1, 2], "not list"),
        ],
    )
    def test_targets(self, targets, message):
        with pytest.raises(InputError, match=message):
            ranks(self.scorer, self.queries, targets)

    @pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
    def test_queries(self, shape):
        with pytest.raises(InputError, match=r"must be \(N, 4\)"):
            top_k(self.scorer, torch.zeros(shape), 1)

    @pytest.mark.parametrize("chunk", [0, -3, 1.5, True])
    def test_chunk(self, chunk):
        with pytest.raises(InputError, match=rf"chunk={chunk!r}"):
            top_k(self.scorer, self.queries, 1, chunk=chunk)

    def test_nan(self):
        matrix = torch.randn(5000, 2)
        matrix[4000, 1] = torch.nan
        with pytest.raises(InputError, match=r"one of the 32 items from 4000 on is NaN"):
            top_k(MatrixScorer(matrix), torch.ones(3, 2), 5)
        ranked = ranks(MatrixScorer(matrix[3999:4002]), torch.ones(2, 2), torch.tensor([1, 0]))
        assert ranked[0] == 2
        assert ranked[1] >= 1
        best, worst = rank_bounds(MatrixScorer(matrix[3999:4002]), torch.ones(2, 2), torch.tensor([1, 0]))
        assert best[0] == 2  # NaN is no tie that could be won
        assert best[1] >= 1
        assert torch.equal(worst, ranked)
