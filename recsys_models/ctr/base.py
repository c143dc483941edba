"""The interface of click models: logits from ids and dense features, all embeddings from one group of tables.

Shapes: ``B`` batch, ``F`` categorical fields, ``P`` dense features, ``D`` embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from embcomp import EmbeddingTables, TableSpec
from embcomp.errors import ConfigError, InputError
from recsys_models.ctr.layers import DenseFactors
from recsys_models.data import Field


class CTRModel(nn.Module):
    """Base of all click models.

    Everything that grows with the vocabularies lies in ``tables``, so it is compressed and counted. Models with
    first-order weights keep them in column 0 of the tables, which are then ``D + 1`` wide; `table_dim` says so.

    Args:
        tables: one table per field, in the order of the columns of ``ids``.
        num_dense: P, may be 0.

    Raises:
        ConfigError: if ``num_dense`` is negative, or the tables are too narrow for the model.
    """

    has_first_order: ClassVar[bool] = False
    """Whether column 0 of the tables is a first-order weight."""
    init_std: ClassVar[float] = 1e-4
    """Standard deviation of initial embeddings where nothing else is said, that of BARS."""

    def __init__(self, tables: EmbeddingTables, num_dense: int = 0) -> None:
        super().__init__()
        if num_dense < 0:
            raise ConfigError(f"num_dense={num_dense!r} must be at least 0")
        if self.has_first_order and tables.embedding_dim < 2:
            raise ConfigError(
                f"{type(self).__name__} needs tables of width {type(self).__name__}.table_dim(D), at least 2; "
                f"these have {tables.embedding_dim}"
            )
        self.tables = tables
        self.num_fields = tables.num_tables
        self.num_dense = num_dense
        self.embedding_dim = tables.embedding_dim - int(self.has_first_order)

    @classmethod
    def table_dim(cls, embedding_dim: int) -> int:
        """Width of the tables for embeddings of dimension D."""
        return embedding_dim + int(cls.has_first_order)

    @classmethod
    def table_specs(cls, fields: Sequence[Field], embedding_dim: int, init_std: float | None = None) -> list[TableSpec]:
        """Describe the tables that the model needs for a data set's fields.

        Args:
            fields: of the data set.
            embedding_dim: D.
            init_std: standard deviation of the initial embeddings; None for the model's own.
        """
        dim, init_std = cls.table_dim(embedding_dim), cls.init_std if init_std is None else init_std
        return [TableSpec(field.name, field.num_ids, dim, init_std=init_std) for field in fields]

    def forward(self, ids: Tensor, dense: Tensor | None = None) -> Tensor:
        """Predict clicks.

        Args:
            ids: int64 ``(B, F)``.
            dense: float32 ``(B, P)``; may be None where P is 0.

        Returns:
            Logits, float32 ``(B,)``.

        Raises:
            InputError: if a shape or dtype is wrong.
            UnseenIdError: if the tables have ``unseen="error"`` and an id is outside its table.
        """
        return self._logits(self.tables(ids), self._checked(dense))

    def _logits(self, vectors: Tensor, dense: Tensor | None) -> Tensor:
        """The model's mathematics: vectors ``(B, F, table_dim(D))`` and dense ``(B, P)``, None where P is 0."""
        raise NotImplementedError

    def penalty(self) -> Tensor:
        """The tables' own loss term, a float32 scalar to add to the training loss."""
        return self.tables.penalty()

    def _checked(self, dense: Tensor | None) -> Tensor | None:
        given = 0 if dense is None else dense.shape[-1]
        if given != self.num_dense:
            raise InputError(
                f"dense has {given} features per row, but this {type(self).__name__} was built for {self.num_dense}: "
                f"give float32 (B, {self.num_dense}), or build it with num_dense={given}"
            )
        return dense if self.num_dense else None


class FactorModel(CTRModel):
    """Base of models with a first-order weight and a factor per field, where dense features are fields too.

    The weight of dense feature p is ``x_p w_p`` and its factor ``x_p v_p``, as in the factorization machine's paper.
    """

    has_first_order = True

    def __init__(self, tables: EmbeddingTables, num_dense: int = 0) -> None:
        super().__init__(tables, num_dense)
        self.num_factors = self.num_fields + num_dense
        self.dense_factors = DenseFactors(num_dense, tables.embedding_dim) if num_dense else None

    def _weights_and_factors(self, vectors: Tensor, dense: Tensor | None) -> tuple[Tensor, Tensor]:
        """First-order weights float32 ``(B, F + P)`` and factors float32 ``(B, F + P, D)``."""
        if self.dense_factors is not None and dense is not None:
            vectors = torch.cat([vectors, self.dense_factors(dense)], dim=1)
        return split_first_order(vectors)


def split_first_order(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Take ``(B, F, D + 1)`` apart into weights ``(B, F)`` and factors ``(B, F, D)``.

    Two slices would have gradients as wide as ``vectors`` each, mostly zeros; a split has one.
    """
    weights, factors = vectors.split([1, vectors.shape[-1] - 1], dim=-1)
    return weights.squeeze(-1), factors
