"""Both kinds of catalogues behind one interface."""

import pytest
import torch

from embcomp import InputError
from embcomp.scoring import FirstItemsScorer, MatrixScorer, TableScorer
from tests.scoring.catalogues import OPTIONS, build, matrix_scorer


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_table_scores_as_its_dense_rows_do(name, with_bias):
    tables, queries = build(name), torch.randn(2, 3, 6)
    bias = torch.randn(130) if with_bias else None
    for form in (tables, tables.eval(), tables.finalize()):
        table = TableScorer(form, "item", bias)
        matrix = MatrixScorer(form.materialize("item").detach(), bias)
        assert (table.num_items, table.dim, table.device) == (matrix.num_items, matrix.dim, matrix.device)
        for start, stop in ((0, None), (0, 130), (2, 5), (70, 71), (9, 9)):
            got, wanted = (scorer.scores(queries, start, stop) for scorer in (table, matrix))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        ids = torch.tensor([[3, 0], [129, 70]])
        torch.testing.assert_close(table.vectors(ids), matrix.vectors(ids))
        torch.testing.assert_close(table.score_pairs(queries[0, :2], ids), matrix.score_pairs(queries[0, :2], ids))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("number", [2, 77, 130])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_first_items_are_scored_as_in_the_whole_catalogue(name, number, with_bias):
    whole, queries = TableScorer(build(name), "item", torch.randn(130) if with_bias else None), torch.randn(2, 6)
    first = FirstItemsScorer(whole, number)
    assert (first.num_items, first.dim, first.device) == (number, 6, whole.device)
    torch.testing.assert_close(first.scores(queries), whole.scores(queries, 0, number))
    ids = torch.tensor([[1, 0], [0, 1]])
    torch.testing.assert_close(first.score_pairs(queries, ids), whole.score_pairs(queries, ids))


@pytest.mark.parametrize("number", [0, -1, 51])
def test_more_items_than_there_are(number):
    with pytest.raises(InputError, match=f"the first {number} items of a catalogue of 50"):
        FirstItemsScorer(matrix_scorer(), number)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_matrices_of_16_bits_are_scored_in_float32(dtype):
    scorer = matrix_scorer(dtype=dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    queries = torch.randn(2, 4, dtype=wanted)
    assert scorer.scores(queries).dtype == scorer.vectors(torch.tensor([1])).dtype == wanted
    torch.testing.assert_close(scorer.scores(queries), queries @ scorer.matrix.to(wanted).T)


def test_a_scorer_follows_its_tables():
    scorer = TableScorer(build("hash"), "item")
    assert scorer.device.type == "cpu"
    scorer.tables.to("meta")
    assert scorer.device.type == "meta"
    assert scorer.scores(torch.zeros(2, 6, device="meta")).shape == (2, 130)


@pytest.mark.parametrize("matrix", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.long), torch.zeros(0, 2), [[1.0]]])
def test_what_is_no_matrix_of_items(matrix):
    with pytest.raises(InputError, match=r"float tensor \(V, D\)"):
        MatrixScorer(matrix)


@pytest.mark.parametrize("bias", [torch.zeros(49), torch.zeros(50, 1), torch.zeros(50, dtype=torch.long)])
def test_what_is_no_bias(bias):
    with pytest.raises(InputError, match=r"bias of .*50 items need a float tensor \(50,\)"):
        MatrixScorer(torch.zeros(50, 2), bias)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.float64), "must be a torch.float32 tensor, not torch.float64"),
        (torch.zeros(2, 3), r"\(2, 3\).*of dimension 4"),
        (torch.zeros(2, 4, device="meta"), "queries are on meta"),
    ],
)
def test_wrong_queries(queries, message):
    with pytest.raises(InputError, match=message):
        matrix_scorer().scores(queries)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 51)])
def test_wrong_ranges(start, stop):
    with pytest.raises(InputError, match=f"items {start} to {stop}: there are items 0 to 50"):
        matrix_scorer().scores(torch.zeros(1, 4), start, stop)


def test_no_such_table():
    with pytest.raises(InputError, match="no table 'items'"):
        TableScorer(build("full"), "items")
