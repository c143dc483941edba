"""Scores of whole tables: by composed vectors and by stored rows, in chunks, and which of the two is chosen."""

from functools import partial

import pytest
import torch

import embcomp
from embcomp import HashConfig, InputError, TableSpec, build_tables, make_config, range_scores
from embcomp.range_scores import RangeScores, assemble
from embcomp.storage import make_row_store
from embcomp.strategies.full import FullTables
from embcomp.stretches import MOST_ROW_SCORES, RowTerm, Stretch, rows_come_first
from embcomp.testing._cases import build
from embcomp.testing.training import LargestTensor

SPECS = (TableSpec("user", 60, 8, init_std=1.0), TableSpec("item", 211, 8, padding_idx=4, init_std=0.5))

STRUCTURED = {
    "hash": make_config("hash"),
    "hash, sum of 2": make_config("hash", num_hashes=2),
    "hash, mean of 3": make_config("hash", num_hashes=3, combine="mean"),
    "hash, concat": make_config("hash", num_hashes=2, combine="concat"),
    "hash, weighted": make_config("hash", num_hashes=2, combine="weighted"),
    "hash, any id": make_config("hash", num_hashes=2, unseen="hash"),
    "sum": make_config("compositional", combine="sum"),
    "sum of 3, shuffled": make_config("compositional", combine="sum", num_parts=3, shuffle=True),
    "concat": make_config("compositional", combine="concat", unseen="oov_row"),
    "concat, shuffled": make_config("compositional", combine="concat", shuffle=True),
    "unified": make_config("unified", lookups=2, chunk_dim=4),
    "unified, few lookups": make_config("unified", lookups={"item": 1, "user": 2}, chunk_dim=2),
    "unified, sub-tables": make_config("unified", lookups=2, chunk_dim=4, sub_tables=2),
    "unified, signs": make_config("unified", lookups=2, chunk_dim=4, reader="sign"),
    "unified, diagonal": make_config("unified", lookups=2, chunk_dim=4, reader="diagonal"),
    "shared and projected": make_config(
        "compact", projection="linear", layout={"user": "60<3x32/4", "item": "211<2x32/3"}
    ),
    "shared, in tiers": make_config("compact", layout={"user": "60<8x32", "item": "50<8x32 120<3x32 211<2x32/3"}),
}


def built(name, budget="40%"):
    config = STRUCTURED[name]
    tables = build_tables(SPECS, config, None if getattr(config, "layout", None) else budget)
    with torch.no_grad():
        for parameter in tables.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return tables


def both_ways(monkeypatch, rows_first):
    monkeypatch.setattr(
        range_scores, "rows_come_first", lambda stretch, gradients=False: rows_first and bool(stretch.terms)
    )


@pytest.mark.parametrize("rows_first", [True, False])
@pytest.mark.parametrize("name", STRUCTURED)
def test_stored_rows_and_composed_vectors_score_alike(monkeypatch, name, rows_first):
    both_ways(monkeypatch, rows_first)
    tables = built(name)
    queries = torch.randn(2, 3, 8, requires_grad=True)
    for form, chunk in ((tables, None), (tables, 50), (tables.finalize(), 7)):
        for table, spec in enumerate(SPECS):
            wanted = queries @ form.materialize(table).T
            got = form.scores(spec.name, queries, chunk)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            if spec.padding_idx is not None:
                assert (got[..., spec.padding_idx] == 0).all()
            inputs = [queries, *(p for p in form.parameters() if p.requires_grad)]
            pull = torch.randn(got.shape)
            grads = [torch.autograd.grad((s * pull).sum(), inputs, materialize_grads=True) for s in (got, wanted)]
            for one, other in zip(*grads, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_cases_above_are_by_stored_rows():
    for name in STRUCTURED:
        assert any(stretch.terms for stretch in built(name).stretches(1, torch.zeros(1, 8))), name


@pytest.mark.parametrize("rows_first", [True, False])
@pytest.mark.parametrize("name", ["hash, weighted", "shared, in tiers", "concat, shuffled"])
def test_any_ids_have_the_scores_that_they_have_in_their_ranges(monkeypatch, name, rows_first):
    both_ways(monkeypatch, rows_first)
    tables, queries, bias = built(name), torch.randn(5, 8), torch.randn(211)
    scores = RangeScores(tables.stretches(1, queries), zero_id=4, bias=bias)
    wanted = queries @ tables.materialize(1).T + bias
    ids = torch.tensor([210, 4, 0, 49, 50, 50, 119, 120, 3])
    torch.testing.assert_close(scores(ids), wanted[:, ids], rtol=1e-4, atol=1e-5)
    for start, stop in ((0, 211), (3, 5), (49, 121), (120, 121), (4, 4 + 1)):
        torch.testing.assert_close(scores(range(start, stop)), wanted[:, start:stop], rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            out = torch.full((5, 300), torch.nan)
            scores(range(start, stop), out[:, 7 : 7 + stop - start])
        torch.testing.assert_close(out[:, 7 : 7 + stop - start], wanted[:, start:stop], rtol=1e-4, atol=1e-5)
        assert out.isnan().sum() == 5 * (300 - stop + start)


@pytest.mark.parametrize("rows", ["float16", "float16:pure", "int8:row", "int4:column", "int2:group64", "float32"])
@pytest.mark.parametrize("sparse", [False, True])
def test_consecutive_rows_are_those_of_lookups(rows, sparse):
    store = make_row_store(rows, [30, 50], 6, sparse)
    store.reset_parameters([1.0, 2.0], torch.Generator().manual_seed(0))
    for form in (store, store.finalize()):
        wanted = form(torch.arange(40, 70), 1)
        assert torch.equal(form.consecutive(40, 70, 1), wanted)
        assert torch.equal(form.rows_from(30, range(10, 40), 1), wanted)
        assert torch.equal(form.rows_from(30, torch.arange(10, 40), 1), wanted)
    store.consecutive(40, 70, 1).sum().backward()
    assert store.weight.grad.is_sparse == sparse


def stretch_of(num_queries, num_ids, num_rows, places=1, dim=64, weights=None):
    store = make_row_store("float32", [num_rows], dim)
    term = RowTerm(torch.zeros(num_queries, dim), store, 0, num_rows, 0, lambda ids: [ids], places, weights)
    return Stretch(range(num_ids), torch.zeros(num_queries, dim), lambda ids: torch.zeros(0, dim), [term])


class TestTheRule:
    @pytest.mark.parametrize(
        ("case", "rows_first"),
        [
            ({"num_queries": 1, "num_rows": 50_000}, True),
            ({"num_queries": 64, "num_rows": 10_000}, True),
            ({"num_queries": 64, "num_rows": 50_000}, False),
            ({"num_queries": 256, "num_rows": 10_000}, False),
            ({"num_queries": 16, "num_rows": 10_000, "places": 2}, True),
            ({"num_queries": 256, "num_rows": 10_000, "places": 2}, False),
            ({"num_queries": 256, "num_rows": 10_000, "dim": 512}, True),
            ({"num_queries": 1, "num_rows": 300_000}, False),
            ({"num_queries": 64, "num_rows": 10_000, "weights": torch.ones_like}, False),
        ],
    )
    def test_few_queries_few_rows_and_few_places_speak_for_stored_rows(self, case, rows_first):
        """As measured: at 1 to 64 queries stored rows are 1.5 to 10 times as fast, at 256 they are slower."""
        assert rows_come_first(stretch_of(num_ids=100_000, **case)) == rows_first

    def test_gradients_speak_for_stored_rows(self):
        case = stretch_of(64, 100_000, 50_000)
        assert not rows_come_first(case)
        assert rows_come_first(case, with_gradients=True)

    def test_the_scores_of_stored_rows_are_bounded(self):
        dim, num_rows = 4096, 40_000
        assert rows_come_first(stretch_of(MOST_ROW_SCORES // num_rows, 10**6, num_rows, dim=dim))
        assert not rows_come_first(stretch_of(MOST_ROW_SCORES // num_rows + 1, 10**6, num_rows, dim=dim))

    def test_nothing_to_choose(self):
        assert not rows_come_first(Stretch(range(9), torch.zeros(1, 2), torch.zeros))


class TestMemory:
    @pytest.mark.parametrize("name", ["hash", "unified", "low_rank", "full", "compositional", "magnitude", "quantize"])
    def test_no_tensor_is_larger_than_the_scores(self, name):
        tables = build_tables([TableSpec("item", 30_000, 32)], name, None if name == "full" else "40%")
        queries = torch.randn(4, 32)
        for form in (tables.eval(), tables.finalize()):
            with torch.no_grad(), (largest := LargestTensor()):
                form.scores("item", queries, chunk=1000)
            assert largest.size <= 4 * 4 * 30_000, largest.by

    def test_several_chunks_are_composed_again_in_the_backward_pass(self):
        tables = build_tables([TableSpec("item", 40_000, 32)], "compositional", "2%")
        queries, composed = torch.randn(4, 32, requires_grad=True), []
        original = tables.lookup
        tables.lookup = lambda ids, table: composed.append(len(ids)) or original(ids, table)
        scores = tables.scores("item", queries, chunk=5000)
        assert composed == [5000] * 8
        kept = [t for t in saved(scores) if t.numel() >= 5000 * 32]
        assert not kept
        scores.sum().backward()
        assert composed == [5000] * 16

    def test_the_gradients_of_writing_are_views(self):
        parts, base = [torch.ones(2, 3, requires_grad=True) for _ in range(3)], torch.empty(2, 9)
        for number, part in enumerate(parts):
            base = range_scores._Write.apply(base, part, 3 * number)
        pull = torch.arange(18.0).view(2, 9)
        base.backward(pull)
        assert all(torch.equal(part.grad, pull[:, 3 * n : 3 * n + 3]) for n, part in enumerate(parts))


def saved(result):
    """Tensors that a graph keeps."""
    found, nodes = [], [result.grad_fn]
    while nodes:
        node = nodes.pop()
        found += [t for t in getattr(node, "saved_tensors", ()) if t is not None]
        nodes += [following for following, _ in node.next_functions if following is not None]
    return found


class Doubled(FullTables):
    """Somebody's strategy, derived from one that says how it is scored."""

    def lookup(self, ids, table):
        return 2 * super().lookup(ids, table)


def test_who_looks_up_anew_is_scored_by_that():
    tables = Doubled(SPECS, make_config("full"))
    queries = torch.randn(3, 8)
    torch.testing.assert_close(tables.scores("item", queries), queries @ tables.materialize("item").T)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (torch.zeros(3, 8, dtype=torch.float64), "float32 tensor, not torch.float64"),
        (torch.zeros(3, 8, dtype=torch.long), "not torch.int64"),
        ([1.0] * 8, "not list"),
        (torch.zeros(8, 3), r"\(8, 3\).*'user', 'item' of dimension 8"),
        (torch.tensor(1.0), r"must be \(\.\.\., 8\)"),
        (torch.zeros(3, 8, device="meta"), "queries are on meta.*on cpu"),
    ],
)
def test_wrong_queries(queries, message):
    with pytest.raises(InputError, match=message):
        build_tables(SPECS, "full").scores("user", queries)


@pytest.mark.parametrize("chunk", [0, -1, 2.0, True, "9"])
def test_wrong_chunks(chunk):
    with pytest.raises(InputError, match=rf"chunk={chunk!r}"):
        build_tables(SPECS, "full").scores("user", torch.zeros(1, 8), chunk)


def test_queries_of_16_bits_count_as_float32():
    tables, queries = build_tables(SPECS, "full"), torch.randn(3, 8).bfloat16()
    scores = tables.scores("user", queries)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, tables.scores("user", queries.float()))


@pytest.mark.parametrize("name", ["hash, sum of 2", "shared and projected", "concat"])
def test_autocast(name):
    tables, queries = built(name), torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        scores = tables.scores("item", queries, chunk=50)
    assert scores.dtype == torch.bfloat16
    torch.testing.assert_close(scores.float(), queries @ tables.materialize("item").T, rtol=0.05, atol=0.05)
    scores.float().sum().backward()
    assert queries.grad.isfinite().all()


@pytest.mark.parametrize("name", embcomp.list_strategies())
def test_compiled_and_meta(name):
    tables, queries = build(name), torch.randn(3, 6)
    torch.compiler.reset()
    for table, chunk in (("user", 100), ("item", None)):
        compiled = torch.compile(partial(tables.scores, table, chunk=chunk), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(queries), tables.scores(table, queries))
        torch.compiler.reset()
    assert tables.to("meta").scores("user", queries.to("meta"), 7).shape == (3, 300)


class Scores(torch.nn.Module):
    def __init__(self, tables):
        super().__init__()
        self.tables = tables

    def forward(self, queries):
        return self.tables.scores("user", queries)


@pytest.mark.parametrize("name", embcomp.list_strategies())
def test_exported_for_any_number_of_queries(name):
    served = Scores(build(name).finalize())
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        program = torch.export.export(served, (torch.randn(5, 6),), dynamic_shapes={"queries": {0: batch}}).module()
    for number in (2, 300):
        queries = torch.randn(number, 6)
        torch.testing.assert_close(program(queries), served(queries), rtol=1e-4, atol=1e-5)


def test_nothing_is_scored():
    tables = build_tables(SPECS, HashConfig(num_rows={"user": 3, "item": 5}))
    assert tables.scores("item", torch.zeros(0, 8)).shape == (0, 211)
    assert tables.scores("item", torch.zeros(2, 0, 8), chunk=3).shape == (2, 0, 211)
    assert tables.scores("item", torch.zeros(8)).shape == (211,)
    assert assemble(lambda ids, out: torch.ones(1, len(ids)), torch.zeros(1, 8), 10, 3).tolist() == [[1.0] * 10]
