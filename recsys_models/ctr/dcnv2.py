"""DCN-V2 (Wang et al., DCN V2: Improved Deep & Cross Network, arXiv 2008.13535)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embcomp import EmbeddingTables
from embcomp.errors import ConfigError, did_you_mean
from recsys_models.ctr.base import CTRModel
from recsys_models.ctr.layers import MLP, CrossNet
from recsys_models.layers import linear

STRUCTURES = ("stacked", "parallel")


class DCNv2(CTRModel):
    """Cross layers and an MLP, one after the other or side by side; of the low-rank mixture, a single expert.

    Args:
        tables: of width D.
        num_dense: P; dense features stand beside the flat embeddings.
        structure: ``"stacked"``: the MLP works on the crossed features; ``"parallel"``: on the input, and the last
            layer sees both.
        num_cross_layers: number of cross layers.
        cross_rank: rank of their matrices; None for full.
        hidden_units: widths of the MLP's hidden layers; none for cross layers alone.
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
        structure: str = "stacked",
        num_cross_layers: int = 3,
        cross_rank: int | None = None,
        hidden_units: Sequence[int] = (400, 400, 400),
        activation: str = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__(tables, num_dense)
        if structure not in STRUCTURES:
            raise ConfigError(f"DCNv2(structure={structure!r}): {did_you_mean(structure, STRUCTURES)}")
        width = self.num_fields * self.embedding_dim + num_dense
        self.is_parallel = structure == "parallel" and len(hidden_units) > 0
        self.cross = CrossNet(width, num_cross_layers, cross_rank)
        self.mlp = MLP(width, hidden_units, None, activation, dropout, batch_norm)
        self.last = linear(self.mlp.out_features + (width if self.is_parallel else 0), 1)

    def _logits(self, vectors: Tensor, dense: Tensor | None) -> Tensor:
        features = vectors.flatten(1)
        if dense is not None:
            features = torch.cat([features, dense], dim=1)
        crossed = self.cross(features)
        if self.is_parallel:
            return self.last(torch.cat([crossed, self.mlp(features)], dim=1)).squeeze(-1)
        return self.last(self.mlp(crossed)).squeeze(-1)
