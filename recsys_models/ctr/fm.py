"""Factorization machine (Rendle, Factorization Machines, ICDM 2010)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embcomp import EmbeddingTables
from recsys_models.ctr.base import FactorModel
from recsys_models.ctr.layers import pairwise_sum


class FM(FactorModel):
    """Factorization machine: ``bias + sum_i w_i + sum_{i<j} <v_i, v_j>`` over all fields, dense ones included.

    Args:
        tables: of width D + 1.
        num_dense: P; dense features are fields with weight ``x w`` and factor ``x v``.
    """

    def __init__(self, tables: EmbeddingTables, num_dense: int = 0) -> None:
        super().__init__(tables, num_dense)
        self.bias = nn.Parameter(torch.zeros(1))

    def _logits(self, vectors: Tensor, dense: Tensor | None) -> Tensor:
        weights, factors = self._weights_and_factors(vectors, dense)
        return weights.sum(-1) + pairwise_sum(factors) + self.bias
