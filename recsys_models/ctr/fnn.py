"""FNN (Zhang, Du and Wang, Deep Learning over Multi-field Categorical Data, arXiv 1601.02376)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embcomp import EmbeddingTables
from recsys_models.ctr.base import CTRModel
from recsys_models.ctr.layers import MLP


class FNN(CTRModel):
    """An MLP over the embeddings, laid end to end: ``MLP([v_1, ..., v_F, dense])``. BARS calls it DNN.

    The paper trains a factorization machine first and starts the embeddings from it; here, as in later work, everything
    is trained from the start. The paper's first layer also sees the machine's bias and first-order weights ``w_i``:
    trained end to end, they are no more than the layer's bias and embeddings one wider, so there is no column for them.
    The paper's activation is tanh.

    Args:
        tables: of width D.
        num_dense: P; dense features stand beside the flat embeddings.
        hidden_units: widths of the MLP's hidden layers.
        activation: of the hidden layers.
        dropout: of the hidden layers.
        batch_norm: whether the hidden layers are batch-normalized.

    Raises:
        ConfigError: if an option is out of range.
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
        width = self.num_fields * self.embedding_dim + num_dense
        self.mlp = MLP(width, hidden_units, 1, activation, dropout, batch_norm)

    def _logits(self, vectors: Tensor, dense: Tensor | None) -> Tensor:
        features = vectors.flatten(1)
        if dense is not None:
            features = torch.cat([features, dense], dim=1)
        return self.mlp(features).squeeze(-1)
