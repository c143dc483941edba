"""Wide & Deep (Cheng et al., Wide & Deep Learning for Recommender Systems, arXiv 1606.07792)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embcomp import EmbeddingTables
from recsys_models.ctr.base import CTRModel, split_first_order
from recsys_models.ctr.layers import MLP
from recsys_models.layers import linear


class WideDeep(CTRModel):
    """A linear model plus an MLP. The wide part has one weight per id, without hand-made feature crosses, as in BARS.

    Args:
        tables: of width D + 1.
        num_dense: P; dense features enter the wide part linearly, and the MLP beside the flat embeddings.
        hidden_units: widths of the MLP's hidden layers.
        activation: of the hidden layers.
        dropout: of the hidden layers.
        batch_norm: whether the hidden layers are batch-normalized.
    """

    has_first_order = True

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
        width = self.num_fields * self.embedding_dim + num_dense
        self.mlp = MLP(width, hidden_units, 1, activation, dropout, batch_norm)
        self.dense_weights = linear(num_dense, 1, bias=False) if num_dense else None

    def _logits(self, vectors: Tensor, dense: Tensor | None) -> Tensor:
        weights, factors = split_first_order(vectors)
        wide, deep = weights.sum(-1), factors.flatten(1)
        if self.dense_weights is not None and dense is not None:
            wide = wide + self.dense_weights(dense).squeeze(-1)
            deep = torch.cat([deep, dense], dim=1)
        return wide + self.mlp(deep).squeeze(-1)
