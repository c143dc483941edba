"""IPNN (Qu et al., Product-based Neural Networks for User Response Prediction, arXiv 1611.00144)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embcomp import EmbeddingTables
from embcomp.errors import ConfigError
from recsys_models.ctr.base import CTRModel
from recsys_models.ctr.layers import MLP, PairwiseDots


class IPNN(CTRModel):
    """An MLP over embeddings and their inner products: ``MLP([v_1, ..., v_F, dense, <v_1, v_2>, <v_1, v_3>, ...])``.

    All F (F - 1) / 2 products go into the first layer, each with a weight per hidden unit, as in BARS and OptEmbed's
    code. The paper has all F x F products, squares too, and a rank-one matrix ``(F, F)`` of weights per hidden unit.
    Dense features are not fields here, as they are in BARS: they have no products.

    Args:
        tables: two or more, of width D.
        num_dense: P; dense features stand beside the flat embeddings.
        hidden_units: widths of the MLP's hidden layers.
        activation: of the hidden layers.
        dropout: of the hidden layers.
        batch_norm: whether the hidden layers are batch-normalized.

    Raises:
        ConfigError: if an option is out of range, or there is no pair to multiply.
    """

    def __init__(
        self,
        tables: EmbeddingTables,
        num_dense: int = 0,
        hidden_units: Sequence[int] = (400, 400, 400),
        activation: str = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__(tables, num_dense)
        if self.num_fields < 2:
            raise ConfigError("IPNN needs two fields to multiply: give two, or use FNN, which has no products")
        self.dots = PairwiseDots(self.num_fields)
        width = self.num_fields * self.embedding_dim + num_dense + self.dots.out_features
        self.mlp = MLP(width, hidden_units, 1, activation, dropout, batch_norm)

    def _logits(self, vectors: Tensor, dense: Tensor | None) -> Tensor:
        features = [vectors.flatten(1), self.dots(vectors)]
        if dense is not None:
            features.insert(1, dense)
        return self.mlp(torch.cat(features, dim=1)).squeeze(-1)
