"""Vectors times the matrices of their tables: a part of the strategies that have a matrix per table."""

from __future__ import annotations

import torch
from torch import Tensor

from embcomp.mixed import is_eager


def multiply_by_table(vectors: Tensor, matrices: Tensor, table: Tensor | int | None) -> Tensor:
    """Multiply each vector by the matrix of its table, in memory of the vectors: never a matrix per id.

    Args:
        vectors: float ``(..., d)``.
        matrices: float ``(T, d, D)``, of any dtype.
        table: as in `EmbeddingTables.lookup`; None for vectors ``(..., T, d)``.

    Returns:
        ``(..., D)`` of the vectors' dtype.
    """
    if isinstance(table, int):
        return vectors @ matrices[table].to(vectors.dtype)
    matrices = matrices.to(vectors.dtype)
    if table is None and torch.compiler.is_exporting():  # where einsum asks whether the batch is of one
        columns = [column @ matrix for column, matrix in zip(vectors.unbind(-2), matrices.unbind(), strict=True)]
        return torch.stack(columns, dim=-2)
    if table is None:
        return torch.einsum("...d,...dk->...k", vectors, matrices)
    return (multiply_ordered if is_eager(table) else multiply_masked)(vectors, matrices, table)


def multiply_ordered(vectors: Tensor, matrices: Tensor, table: Tensor) -> Tensor:
    """`multiply_by_table` for tables that may be looked at: vectors in the order of their tables, one product each."""
    flat, owner = vectors.reshape(-1, vectors.shape[-1]), table.expand(vectors.shape[:-1]).reshape(-1)
    order = owner.argsort(stable=True)
    pieces = flat.index_select(0, order).split(owner.bincount(minlength=len(matrices)).tolist())
    found = torch.cat([piece @ matrix for piece, matrix in zip(pieces, matrices, strict=True)])
    return torch.empty_like(found).index_copy(0, order, found).view(*vectors.shape[:-1], found.shape[-1])


def multiply_masked(vectors: Tensor, matrices: Tensor, table: Tensor) -> Tensor:
    """The same in shapes that don't depend on tables: all vectors times every matrix, each taken where it is theirs."""
    out, table = vectors @ matrices[0], table.unsqueeze(-1)
    for index, matrix in enumerate(matrices[1:], 1):
        out = torch.where(table == index, vectors @ matrix, out)
    return out
