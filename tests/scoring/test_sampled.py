"""Sampled softmax: what the correction makes unbiased, and what the samplers draw."""

import math

import pytest
import torch
import torch.nn.functional as F

from embcomp import InputError
from embcomp.scoring import MatrixScorer, Negatives, NegativeSampler, cross_entropy, sampled, sampled_cross_entropy
from embcomp.testing.training import LargestTensor
from tests.scoring.catalogues import OPTIONS, matrix_scorer, scorer_of

COUNTS = torch.tensor([500, 0, 40, 7, 7, 1, 0, 120, 3, 22] * 5)


def sampler_of(kind, **options):
    return NegativeSampler(kind, 50, COUNTS if kind == "counts" else None, **options)


def slow_loss(scores, targets, drawn, log_counts, remove_hits=True):
    losses = []
    for row, target, ids, logs in zip(
        scores.tolist(), targets.tolist(), drawn.tolist(), log_counts.tolist(), strict=True
    ):
        total = math.exp(row[target])
        for item, log_count in zip(ids, logs, strict=True):
            if item != target or not remove_hits:
                total += math.exp(row[item]) / math.exp(log_count)
        losses.append(math.log(total) - row[target])
    return torch.tensor(losses)


@pytest.mark.parametrize("remove_hits", [True, False])
@pytest.mark.parametrize("by_query", [True, False])
def test_against_a_slow_loop(by_query, remove_hits):
    scorer, queries, targets = matrix_scorer(bias=True), torch.randn(6, 4), torch.randint(50, (6,))
    drawn = torch.randint(50, (6, 9) if by_query else (9,))
    drawn[..., 3] = targets if by_query else targets[0]
    negatives = Negatives(drawn, torch.randn(drawn.shape))
    got = sampled_cross_entropy(scorer, queries, targets, negatives, remove_hits, reduction="none")
    every = [t.expand(6, 9) for t in (negatives.ids, negatives.log_counts)]
    torch.testing.assert_close(got, slow_loss(scorer.scores(queries), targets, *every, remove_hits))


@pytest.mark.parametrize("name", OPTIONS)
def test_all_items_make_the_full_softmax(name):
    """As many draws as items, of each one: corrected by counts of one, or by probabilities of uniform draws."""
    scorer = scorer_of(name, torch.randn(130, requires_grad=True))
    queries, targets = torch.randn(7, 6, requires_grad=True), torch.randint(130, (7,))
    targets[:2] = torch.tensor([3, -100])
    every = torch.arange(130)
    uniform = NegativeSampler("uniform", 130).log_probabilities(every) + math.log(130)
    wanted = cross_entropy(scorer, queries, targets)
    inputs = [queries, scorer.bias]
    for negatives in (every, Negatives(every, torch.zeros(130)), Negatives(every, uniform), every.expand(7, 130)):
        loss = sampled_cross_entropy(scorer, queries, targets, negatives)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
        for one, other in zip(
            torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, inputs, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def as_if_uniform(negatives, num_items=50):
    """The same draws, corrected for their number alone."""
    return Negatives(negatives.ids, torch.full(negatives.ids.shape, math.log(len(negatives.ids) / num_items)))


@pytest.mark.parametrize("kind", ["uniform", "log_uniform", "counts"])
def test_the_corrected_sum_is_unbiased_and_the_uncorrected_one_is_not(kind):
    """Estimates of Σ exp(score) from 400 batches of 64 draws: within four standard errors, or not within ten."""
    scorer, queries, targets = matrix_scorer(bias=True), torch.randn(3, 4), torch.tensor([0, 7, 49])
    scores = scorer.scores(queries)
    own = scores.gather(1, targets[:, None]).squeeze(1)
    sampler, found = sampler_of(kind, seed=5), {True: [], False: []}
    for _ in range(400):
        drawn = sampler.draw(64)
        for is_corrected, negatives in ((True, drawn), (False, as_if_uniform(drawn))):
            loss = sampled_cross_entropy(scorer, queries, targets, negatives, reduction="none")
            found[is_corrected].append((loss + own).exp())
    sums = {is_corrected: torch.stack(own) for is_corrected, own in found.items()}
    off = {key: (own.mean(0) - scores.exp().sum(1)) / (own.std(0) / 20) for key, own in sums.items()}
    assert (off[True].abs() < 4).all(), off
    assert kind == "uniform" or (off[False].abs() > 10).all(), off


def test_the_logarithm_converges_and_the_uncorrected_one_does_not():
    scorer, queries, targets = matrix_scorer(), torch.randn(40, 4), torch.randint(50, (40,))
    wanted, sampler = cross_entropy(scorer, queries, targets, reduction="none"), sampler_of("log_uniform")
    off = []
    for number in (30, 3000, 300_000):
        drawn = sampler.draw(number)
        losses = [
            sampled_cross_entropy(scorer, queries, targets, negatives, reduction="none")
            for negatives in (drawn, as_if_uniform(drawn))
        ]
        off.append([float((loss - wanted).abs().mean()) for loss in losses])
    corrected, uncorrected = zip(*off, strict=True)
    assert corrected[0] > 5 * corrected[1] > 25 * corrected[2]
    assert corrected[2] < 0.01
    assert min(uncorrected) > 0.1


class TestChunks:
    """Many queries are gone through chunk by chunk, and again in the backward pass."""

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("remove_hits", [True, False])
    @pytest.mark.parametrize("name", ["full", "hash", "low_rank"])
    def test_give_what_one_chunk_gives(self, name, remove_hits, reduction, monkeypatch):
        scorer = scorer_of(name, torch.randn(130, requires_grad=True))
        queries, targets = torch.randn(23, 6, requires_grad=True), torch.randint(130, (23,))
        targets[[2, 7]] = torch.tensor([-100, 3])
        negatives = Negatives(torch.randint(130, (40,)), torch.randn(40))
        negatives.ids[:2] = targets[4]
        inputs = [queries, scorer.bias, *(p for p in scorer.tables.parameters() if p.requires_grad)]

        def found():
            loss = sampled_cross_entropy(scorer, queries, targets, negatives, remove_hits, reduction=reduction)
            return loss, *torch.autograd.grad(loss.sum(), inputs, materialize_grads=True)

        whole = found()
        monkeypatch.setattr(sampled, "ids_at_once", lambda others: 5)
        for one, other in zip(found(), whole, strict=True):
            torch.testing.assert_close(one, other)

    def test_never_hold_all_scores_and_look_up_once(self):
        scorer, queries = matrix_scorer(5000), torch.randn(20_000, 4, requires_grad=True)
        targets, negatives = torch.randint(5000, (20_000,)), NegativeSampler("uniform", 5000).draw(1000)
        calls, vectors = [], scorer.vectors
        scorer.vectors = lambda ids: calls.append(len(ids)) or vectors(ids)
        with (largest := LargestTensor()):
            sampled_cross_entropy(scorer, queries, targets, negatives).backward()
        assert largest.size <= 8 << 20, largest.by  # all scores are 80 MB
        assert calls == [21_000]


class TestSampler:
    @pytest.mark.parametrize("kind", ["uniform", "log_uniform", "counts"])
    def test_draws_follow_the_probabilities_that_it_tells(self, kind):
        sampler = sampler_of(kind, seed=1)
        chances = sampler.log_probabilities(torch.arange(50)).exp()
        torch.testing.assert_close(chances.sum(), torch.tensor(1.0))
        drawn = sampler.draw(100_000)
        counts = torch.bincount(drawn.ids, minlength=50)
        assert ((counts - 1e5 * chances).abs() < 5 * (1e5 * chances).sqrt() + 1).all()
        torch.testing.assert_close(drawn.log_counts, (1e5 * chances[drawn.ids]).log())

    def test_known_probabilities(self):
        log_uniform = NegativeSampler("log_uniform", 3).log_probabilities(torch.arange(3)).exp()
        wanted = [math.log(2), math.log(3 / 2), math.log(4 / 3)]
        torch.testing.assert_close(log_uniform, torch.tensor(wanted) / math.log(4))
        counted = NegativeSampler("counts", counts=[4, 0, 9], power=0.5).log_probabilities(torch.arange(3)).exp()
        torch.testing.assert_close(counted, torch.tensor([2.0, 1.0, 3.0]) / 6)

    def test_a_large_catalogue(self):
        sampler = NegativeSampler("log_uniform", 30_000_000)
        drawn = sampler.draw(10_000).ids
        assert int(drawn.min()) >= 0
        assert 1_000_000 < int(drawn.max()) < 30_000_000

    def test_seeds(self):
        one, same, other = (sampler_of("counts", seed=seed) for seed in (1, 1, 2))
        first = one.draw(50)
        assert torch.equal(first.ids, same.draw(50).ids)
        assert not torch.equal(first.ids, other.draw(50).ids)
        assert not torch.equal(first.ids, one.draw(50).ids)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"kind": "unifrom", "num_items": 3}, r"kind='unifrom'.*did you mean 'uniform'"),
            ({"kind": "counts", "num_items": 3}, "needs counts="),
            ({"kind": "uniform"}, r"num_items=0\)"),
            ({"kind": "uniform", "num_items": 0}, r"num_items=0\)"),
            ({"kind": "counts", "num_items": 3, "counts": [1, 2]}, r"num_items=3, but 2 counts"),
            ({"kind": "counts", "counts": [1, -2]}, "at least 0"),
            ({"kind": "counts", "counts": [[1, 2]]}, r"must be \(V,\)"),
            ({"kind": "counts", "counts": [1, 2], "power": math.nan}, "power=nan"),
            ({"kind": "uniform", "num_items": 2.5}, r"num_items=2.5\) must be an int"),
            ({"kind": "uniform", "num_items": "3"}, r"num_items='3'\) must be an int"),
        ],
    )
    def test_wrong_arguments(self, arguments, message):
        with pytest.raises(InputError, match=message):
            NegativeSampler(**arguments)

    @pytest.mark.parametrize("number", [0, -1, 2.0, True])
    def test_wrong_numbers(self, number):
        with pytest.raises(InputError, match=rf"draw\({number!r}\)"):
            sampler_of("uniform").draw(number)


@pytest.mark.parametrize("shape", [(5,), (0, 5)])
def test_no_queries(shape):
    drawn = torch.zeros(shape, dtype=torch.long)
    queries, targets = torch.randn(0, 4), torch.zeros(0, dtype=torch.long)
    loss = sampled_cross_entropy(MatrixScorer(torch.randn(20, 4)), queries, targets, drawn, reduction="sum")
    assert loss == 0


def test_counts_beyond_float32_are_counts():
    found = NegativeSampler("counts", counts=[1e200, 2.0, 3.0]).log_probabilities(torch.arange(3))
    assert found.tolist() == pytest.approx([0.0, math.log(2) - 200 * math.log(10), math.log(3) - 200 * math.log(10)])


def test_nothing_but_the_target():
    """All draws are hits: there is nothing to tell the target from, and nothing to learn."""
    scorer, queries = matrix_scorer(), torch.randn(2, 4, requires_grad=True)
    loss = sampled_cross_entropy(scorer, queries, torch.tensor([5, 5]), torch.tensor([5, 5, 5]))
    loss.backward()
    assert loss == 0
    assert (queries.grad == 0).all()


def test_gradients_by_finite_differences():
    matrix, queries = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (9, 4))
    targets, negatives = torch.tensor([0, 8, -100, 2]), NegativeSampler("log_uniform", 9).draw(6)

    def loss(queries, matrix):
        return sampled_cross_entropy(MatrixScorer(matrix), queries, targets, negatives)

    assert torch.autograd.gradcheck(loss, (queries, matrix))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction):
    scorer, queries, targets = matrix_scorer(), torch.randn(4, 4), torch.tensor([1, -100, 2, 3])
    every = torch.arange(50)
    got = sampled_cross_entropy(scorer, queries, targets, every, reduction=reduction)
    torch.testing.assert_close(got, F.cross_entropy(scorer.scores(queries), targets, reduction=reduction))


def test_autocast():
    scorer, queries, targets = scorer_of("hash"), torch.randn(8, 6), torch.randint(130, (8,))
    negatives = NegativeSampler("uniform", 130).draw(20)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sampled_cross_entropy(scorer, queries, targets, negatives)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, sampled_cross_entropy(scorer, queries, targets, negatives), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("negatives", "message"),
    [
        (torch.tensor([1, 50]), r"negatives: 50 at position \[1\]"),
        (torch.zeros(3, 2, dtype=torch.long), r"negatives of shape \(3, 2\): these queries need \(2, n\)"),
        (torch.zeros(3), "negatives must be an int64 tensor"),
        (Negatives(torch.tensor([1, 2]), torch.zeros(3)), r"log_counts of torch.float32 \(3,\)"),
        (Negatives(torch.tensor([1, 2]), torch.tensor([1, 2])), "log_counts of torch.int64"),
        ([1, 2], "not list"),
        (torch.zeros(0, dtype=torch.long), "draw at least one"),
        (torch.zeros(2, 0, dtype=torch.long), "draw at least one"),
        (Negatives(torch.tensor([1, 2]), torch.tensor([0.0, torch.nan])), "log_counts of negatives have NaN"),
    ],
)
def test_wrong_negatives(negatives, message):
    with pytest.raises(InputError, match=message):
        sampled_cross_entropy(matrix_scorer(), torch.zeros(2, 4), torch.tensor([1, 2]), negatives)


@pytest.mark.parametrize("kind", ["uniform", "log_uniform", "counts"])
def test_without_a_seed_draws_follow_the_global_generator(kind):
    samplers = [NegativeSampler(kind, counts=[4, 0, 9, 2, 5], seed=None) for _ in range(2)]
    torch.manual_seed(3)
    first, later = samplers[0].draw(50).ids, samplers[0].draw(50).ids
    torch.manual_seed(3)
    assert samplers[1].draw(50).ids.equal(first)
    assert not first.equal(later)
