"""Logistic regression: one weight per id."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embcomp import EmbeddingTables
from embcomp.errors import ConfigError
from recsys_models.ctr.base import CTRModel
from recsys_models.layers import linear


class LR(CTRModel):
    """Logistic regression: ``bias + sum of the ids' weights + w · dense``.

    Args:
        tables: of width 1, whatever D is.
        num_dense: P; dense features enter linearly.

    Raises:
        ConfigError: if the tables are wider than 1.
    """

    def __init__(self, tables: EmbeddingTables, num_dense: int = 0) -> None:
        super().__init__(tables, num_dense)
        if tables.embedding_dim != 1:
            raise ConfigError(f"LR needs tables of width LR.table_dim(D) = 1; these have {tables.embedding_dim}")
        self.bias = nn.Parameter(torch.zeros(1))
        self.dense_weights = linear(num_dense, 1, bias=False) if num_dense else None

    @classmethod
    def table_dim(cls, embedding_dim: int) -> int:
        """Width 1, whatever D is."""
        return 1

    def _logits(self, vectors: Tensor, dense: Tensor | None) -> Tensor:
        logits = vectors.sum((1, 2)) + self.bias
        if self.dense_weights is not None and dense is not None:
            logits = logits + self.dense_weights(dense).squeeze(-1)
        return logits
