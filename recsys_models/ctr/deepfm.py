"""DeepFM (Guo et al., DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, arXiv 1703.04247)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from embcomp import EmbeddingTables
from recsys_models.ctr.base import FactorModel
from recsys_models.ctr.layers import MLP, pairwise_sum


class DeepFM(FactorModel):
    """A factorization machine plus an MLP over the same factors, laid side by side.

    Args:
        tables: of width D + 1.
        num_dense: P; dense features are fields of both parts, with weight ``x w`` and factor ``x v``.
        hidden_units: widths of the MLP's hidden layers.
        activation: of the hidden layers.
        dropout: of the hidden layers.
        batch_norm: whether the hidden layers are batch-normalized.
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
        width = self.num_factors * self.embedding_dim
        self.mlp = MLP(width, hidden_units, 1, activation, dropout, batch_norm)

    def _logits(self, vectors: Tensor, dense: Tensor | None) -> Tensor:
        weights, factors = self._weights_and_factors(vectors, dense)
        return weights.sum(-1) + pairwise_sum(factors) + self.mlp(factors.flatten(1)).squeeze(-1)
