"""Vectors times the matrices of their tables: against a loop over ids, and in memory of the vectors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcomp.strategies._table_matrices import multiply_by_table, multiply_masked, multiply_ordered
from embcomp.testing.training import LargestTensor

# Shapes of vectors without d, and of tables, which broadcast to them.
SHAPES = [((), ()), ((0,), (0,)), ((7,), (7,)), ((7,), (1,)), ((3, 4), (4,)), ((3, 4), (3, 1)), ((2, 3, 4), (3, 4))]


def _one_by_one(vectors, matrices, table):
    owners = table.expand(vectors.shape[:-1]).reshape(-1).tolist()
    rows = [row @ matrices[owner] for row, owner in zip(vectors.reshape(-1, vectors.shape[-1]), owners, strict=True)]
    return torch.stack(rows).view(*vectors.shape[:-1], -1) if rows else vectors.new_empty(0, matrices.shape[-1])


def _gradients(multiply, vectors, matrices, table):
    vectors, matrices = vectors.clone().requires_grad_(), matrices.clone().requires_grad_()
    found = multiply(vectors, matrices, table)
    pull = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape)
    # Zero where there are no ids at all: the loop then has no graph.
    loss = (found * pull).sum() + 0 * (vectors.sum() + matrices.sum())
    return found, *torch.autograd.grad(loss, (vectors, matrices))


@pytest.mark.parametrize("multiply", [multiply_by_table, multiply_ordered, multiply_masked])
@settings(max_examples=50, deadline=None)
@given(shapes=st.sampled_from(SHAPES), tables=st.integers(1, 5), narrow=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_values_and_gradients_are_those_of_a_loop_over_ids(multiply, shapes, tables, narrow, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(*shapes[0], narrow, generator=generator, dtype=torch.float64)
    matrices = torch.randn(tables, narrow, 3, generator=generator, dtype=torch.float64)
    table = torch.randint(tables, shapes[1], generator=generator)
    for got, wanted in zip(
        _gradients(multiply, vectors, matrices, table), _gradients(_one_by_one, vectors, matrices, table), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("multiply", [multiply_ordered, multiply_masked])
def test_no_tensor_is_larger_than_the_vectors(multiply):
    vectors, matrices = torch.randn(5000, 16, requires_grad=True), torch.randn(3, 16, 16, requires_grad=True)
    with (largest := LargestTensor()):
        multiply(vectors, matrices, torch.arange(5000) % 3).sum().backward()
    assert largest.size <= vectors.nbytes


@pytest.mark.parametrize("multiply", [multiply_ordered, multiply_masked])
def test_a_table_that_is_not_finite_harms_no_other(multiply):
    matrices = torch.stack([torch.eye(2), torch.full((2, 2), torch.nan)])
    found = multiply(torch.ones(4, 2), matrices, torch.tensor([0, 1, 0, 1]))
    assert found.isnan().any(1).tolist() == [False, True, False, True]


def test_tables_by_number_and_by_column():
    vectors, matrices = torch.randn(5, 3, 4), torch.randn(3, 4, 2)
    every = torch.stack([multiply_by_table(vectors[:, table], matrices, table) for table in range(3)], dim=1)
    torch.testing.assert_close(multiply_by_table(vectors, matrices, None), every)
    torch.testing.assert_close(multiply_by_table(vectors, matrices, torch.arange(3)), every)


def test_a_compiled_form_has_any_number_of_ids_per_table():
    vectors, matrices = torch.randn(6, 4), torch.randn(3, 4, 4)
    compiled = torch.compile(multiply_by_table, fullgraph=True, backend="aot_eager", dynamic=True)
    for table in (torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([2, 2, 2, 2, 2, 0])):
        torch.testing.assert_close(compiled(vectors, matrices, table), _one_by_one(vectors, matrices, table))
    torch.compiler.reset()
    assert multiply_by_table(vectors.to("meta"), matrices.to("meta"), table.to("meta")).shape == (6, 4)
