"""Cross-entropy over the whole catalogue, against torch's over all scores."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from embcomp import InputError, TableSpec, build_tables, make_config
from embcomp.scoring import FirstItemsScorer, MatrixScorer, TableScorer, cross_entropy, softmax
from embcomp.testing.training import LargestTensor
from tests.scoring.catalogues import OPTIONS, build, matrix_scorer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of a few ids, so that small tables have several."""
    monkeypatch.setattr(softmax, "_PIECE", 20)
    monkeypatch.setattr("embcomp.tables.EmbeddingTables.gradient_rows", 0)


def gradients(loss, inputs):
    found = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return [g.to_dense() for g in found]


@pytest.mark.parametrize("chunk", [None, 33])
@pytest.mark.parametrize("name", OPTIONS)
def test_tables(name, chunk):
    tables, bias = build(name), torch.randn(130, requires_grad=True)
    require_plain(tables, TableScorer(tables, "item", bias), chunk)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("nested", "optembed", "magnitude")])
def test_tables_in_pieces(name, small_pieces):
    """Where what is trained is smaller than the catalogue, vectors are composed again in the backward pass."""
    tables = build(name)
    require_plain(tables, TableScorer(tables, "item"), 7)


def require_plain(tables, scorer, chunk):
    queries, targets = torch.randn(9, 6, requires_grad=True), torch.randint(130, (9,))
    targets[:3] = torch.tensor([3, 129, -100])
    loss = cross_entropy(scorer, queries, targets, chunk)
    logits = queries @ tables.materialize("item").T
    wanted = F.cross_entropy(logits if scorer.bias is None else logits + scorer.bias, targets)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    learned = {name: p for name, p in tables.named_parameters() if p.requires_grad}
    inputs = [queries, *learned.values(), *([] if scorer.bias is None else [scorer.bias])]
    names = ["queries", *learned, "bias"]
    for where, one, other in zip(names, gradients(loss, inputs), gradients(wanted, inputs), strict=False):
        if where.endswith("span"):  # LSQ's factor is that of the ids that are looked up together
            assert (one != 0).any() == (other != 0).any(), where
        else:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=partial("{}: {}".format, where))
    finalized = TableScorer(tables.finalize(), "item", scorer.bias)
    torch.testing.assert_close(
        cross_entropy(finalized, queries, targets, chunk),
        cross_entropy(TableScorer(tables.eval(), "item", scorer.bias), queries, targets, chunk),
        rtol=1e-4,
        atol=1e-4,
    )


def in_phase(name):
    """Tables that show what the backward pass would not show again by itself."""
    tables = build(name).train()
    tables.enter_phase_(tables.phases()[0])
    torch.manual_seed(3)
    tables.set_pass_("random")
    return tables


def by_pieces(scorer, queries, targets):
    return cross_entropy(scorer, queries, targets, 7)


def by_chunks(scorer, queries, targets):
    return F.cross_entropy(scorer.tables.scores("item", queries, 20), targets)


@pytest.mark.parametrize("score", [by_pieces, by_chunks])
@pytest.mark.parametrize("name", ["nested", "optembed"])
def test_pieces_are_composed_again_as_they_were_shown(name, score, small_pieces):
    tables, queries, targets = in_phase(name), torch.randn(9, 6, requires_grad=True), torch.randint(130, (9,))
    learned = [queries, *(p for p in tables.parameters() if p.requires_grad)]
    torch.manual_seed(4)
    rows = torch.cat([tables(ids, "item") for ids in torch.arange(130).split(20)])
    wanted = gradients(F.cross_entropy(queries @ rows.T, targets), learned)
    torch.manual_seed(4)
    loss = score(TableScorer(tables, "item"), queries, targets)
    tables.set_pass_("narrow")
    state, shown = torch.get_rng_state(), tables(torch.arange(130), "item").detach()
    torch.set_rng_state(state)
    for one, other in zip(gradients(loss, learned), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tables(torch.arange(130), "item"), shown)


@pytest.mark.parametrize("chunk", [None, 33])
@pytest.mark.parametrize("name", ["full", "hash", "compact", "compact, shared", "frequency_cut"])
def test_the_first_items_of_a_table(name, chunk):
    tables, queries, targets = build(name), torch.randn(9, 6), torch.randint(77, (9,))
    loss = cross_entropy(FirstItemsScorer(TableScorer(tables, "item"), 77), queries, targets, chunk)
    wanted = F.cross_entropy(queries @ tables.materialize("item").T[:, :77], targets)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    learned = [p for p in tables.parameters() if p.requires_grad]
    for one, other in zip(gradients(loss, learned), gradients(wanted, learned), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [1, 7, 50, None])
@pytest.mark.parametrize("ignore", [-100, 0, 7])
def test_reductions_and_ignored_targets_are_those_of_torch(reduction, chunk, ignore):
    scorer, queries, targets = matrix_scorer(bias=True), torch.randn(8, 4), torch.randint(50, (8,))
    targets[[1, 4]] = ignore
    got = cross_entropy(scorer, queries, targets, chunk, ignore, reduction)
    wanted = F.cross_entropy(scorer.scores(queries), targets, ignore_index=ignore, reduction=reduction)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("chunk", [3, None])
def test_all_targets_ignored(chunk):
    scorer, queries = matrix_scorer(), torch.randn(3, 4, requires_grad=True)
    targets = torch.full((3,), -100)
    assert cross_entropy(scorer, queries, targets, chunk).isnan()
    assert cross_entropy(scorer, queries, targets, chunk, reduction="sum") == 0
    assert cross_entropy(scorer, queries, targets, chunk, reduction="none").tolist() == [0, 0, 0]


@pytest.mark.parametrize("number", [50, 70_000])
@pytest.mark.parametrize("chunk", [3000, 20, None])
def test_bug_gradients_were_nan_where_all_targets_are_ignored(chunk, number):
    """Torch's are zeros, though its loss is NaN too."""
    vectors = torch.randn(number, 4, requires_grad=True)
    queries = torch.randn(3, 4, requires_grad=True)
    cross_entropy(MatrixScorer(vectors), queries, torch.full((3,), -100), chunk).backward()
    assert not vectors.grad.any()
    assert not queries.grad.any()


@pytest.mark.parametrize("chunk", [4, 11])
def test_gradients_by_finite_differences(chunk):
    generator = torch.Generator().manual_seed(0)
    queries, matrix, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 3), (11, 3), (11,))
    )
    targets = torch.tensor([0, 10, 4, -100, 4])

    def loss(queries, matrix, bias):
        return cross_entropy(MatrixScorer(matrix, bias), queries, targets, chunk, reduction="none")

    assert torch.autograd.gradcheck(loss, (queries, matrix, bias))


def test_gradients_of_part_of_the_inputs():
    matrix, queries, targets = torch.randn(30, 4), torch.randn(6, 4), torch.randint(30, (6,))
    for learned in (matrix, queries):
        learned.requires_grad_()
        cross_entropy(MatrixScorer(matrix), queries, targets, 7).backward()
        wanted = torch.autograd.grad(F.cross_entropy(queries @ matrix.T, targets), learned)[0]
        torch.testing.assert_close(learned.grad, wanted)
        learned.requires_grad_(False)


def test_items_without_a_chance():
    """A bias of -inf leaves items out, even whole blocks of them."""
    scorer, queries = matrix_scorer(40), torch.randn(5, 4, requires_grad=True)
    scorer.bias, targets = torch.zeros(40), torch.tensor([20, 21, 39, 30, 25])
    scorer.bias[:16] = -torch.inf
    kept = MatrixScorer(scorer.matrix[16:])
    for chunk in (8, None):
        loss, wanted = cross_entropy(scorer, queries, targets, chunk), cross_entropy(kept, queries, targets - 16)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(gradients(loss, [queries]), gradients(wanted, [queries]))


def test_large_logits():
    scorer, queries = matrix_scorer(60), 1e4 * torch.randn(5, 4)
    targets = torch.randint(60, (5,))
    wanted = F.cross_entropy(scorer.scores(queries), targets)
    torch.testing.assert_close(cross_entropy(scorer, queries, targets, 7), wanted)


def test_sparse_gradients_stay_sparse(small_pieces):
    tables = build("hash, sparse")
    cross_entropy(TableScorer(tables, "item"), torch.randn(4, 6), torch.randint(130, (4,)), 7).backward()
    assert tables.rows.weight.grad.is_sparse


@pytest.mark.parametrize("chunk", [None, 40])
@pytest.mark.parametrize("name", ["full", "low_rank", "hash"])
def test_autocast(name, chunk):
    tables = build(name)
    scorer, queries, targets = TableScorer(tables, "item"), torch.randn(64, 6), torch.randint(130, (64,))
    queries.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(scorer, queries, targets, chunk)
    assert loss.dtype == torch.float32
    wanted = cross_entropy(scorer, queries, targets)
    torch.testing.assert_close(loss, wanted, rtol=0.01, atol=0.01)
    for one, other in zip(gradients(loss, [queries]), gradients(wanted, [queries]), strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=1e-3)


def test_compiled():
    """Small catalogues in one graph, large ones with a break in it."""
    scorer, queries, targets = TableScorer(build("hash"), "item"), torch.randn(5, 6), torch.randint(130, (5,))
    torch.compiler.reset()
    for chunk in (None, 50):
        compiled = torch.compile(lambda q, chunk=chunk: cross_entropy(scorer, q, targets, chunk), backend="eager")
        torch.testing.assert_close(compiled(queries), cross_entropy(scorer, queries, targets, chunk))
    torch.compiler.reset()


def test_training_learns_the_targets():
    tables = build_tables([TableSpec("item", 500, 16)], make_config("hash", num_hashes=2), "30%")
    encode, scorer = torch.nn.Embedding(50, 16), TableScorer(tables)
    optimizer = torch.optim.Adam([*tables.parameters(), *encode.parameters()], lr=0.05)
    targets = torch.randint(500, (50,), generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        loss = cross_entropy(scorer, encode.weight, targets, chunk=100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


class TestMemory:
    def test_no_tensor_of_all_scores_nor_of_all_vectors(self):
        tables = build_tables([TableSpec("item", 300_000, 16)], "compositional", "1%")
        queries, targets = torch.randn(64, 16, requires_grad=True), torch.randint(300_000, (64,))
        with (largest := LargestTensor()):
            cross_entropy(TableScorer(tables), queries, targets, chunk=4096).backward()
        assert largest.size <= 4 * 65536 * 16, largest.by

    def test_vectors_are_composed_in_three_passes_where_they_are_cut(self, small_pieces):
        tables, composed = build("hash"), []
        original = tables.lookup
        tables.lookup = lambda ids, table: composed.append(ids.tolist()) or original(ids, table)
        loss = cross_entropy(TableScorer(tables, "item"), torch.randn(4, 6), torch.randint(130, (4,)), 7)
        assert composed == [[*range(start, min(start + 20, 130))] for start in range(0, 130, 20)]
        loss.backward()
        assert len(composed) == 3 * 7

    @pytest.mark.slow
    @pytest.mark.parametrize(("strategy", "budget", "limit"), [("full", None, 2048), ("hash", "10%", 900)])
    def test_a_million_items_and_2048_queries(self, strategy, budget, limit):
        """In MiB at the most, parameters, gradients and Adam's state of the table among them."""
        code = f"""
import torch
from benchmarks.measure import peak_memory_bytes
torch.set_num_threads(1)
from embcomp import TableSpec, build_tables
from embcomp.scoring import TableScorer, cross_entropy
tables = build_tables([TableSpec("item", 1_000_000, 64)], {strategy!r}, {budget!r})
optimizer = torch.optim.Adam(tables.parameters())
queries = torch.randn(2048, 64, requires_grad=True)
cross_entropy(TableScorer(tables), queries, torch.randint(1_000_000, (2048,))).backward()
optimizer.step()
print(peak_memory_bytes() / 2**20)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert float(done.stdout) < limit


class TestWrongInput:
    scorer, queries = matrix_scorer(), torch.zeros(3, 4)

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (torch.tensor([0, 1]), r"targets of shape \(2,\)"),
            (
                torch.tensor([0, 1, 50]),
                r"targets: 50 at position \[2\] is no item.*\(or -100, which counts for nothing",
            ),
            (torch.tensor([0, -1, 5]), "targets: -1"),
            (torch.rand(3, 50), "must be an int64 tensor, not torch.float32"),
        ],
    )
    def test_targets(self, targets, message):
        with pytest.raises(InputError, match=message):
            cross_entropy(self.scorer, self.queries, targets)

    def test_the_rest(self):
        targets = torch.tensor([1, 2, 3])
        with pytest.raises(InputError, match=r"reduction='avg'; .*mean, none, sum"):
            cross_entropy(self.scorer, self.queries, targets, reduction="avg")
        with pytest.raises(InputError, match=r"queries of shape \(1, 3, 4\)"):
            cross_entropy(self.scorer, self.queries[None], targets)
        with pytest.raises(InputError, match="chunk=0"):
            cross_entropy(self.scorer, self.queries, targets, 0)
