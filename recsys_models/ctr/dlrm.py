"""DLRM (Naumov et al., Deep Learning Recommendation Model for Personalization…, arXiv 1906.00091)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embcomp import EmbeddingTables
from embcomp.errors import ConfigError, did_you_mean
from recsys_models.ctr.base import CTRModel
from recsys_models.ctr.layers import MLP, PairwiseDots
from recsys_models.layers import activation_of

INTERACTIONS = ("dot", "cat")


class DLRM(CTRModel):
    """A bottom MLP turns the dense features into one more vector; the vectors interact; a top MLP follows.

    Args:
        tables: of width D.
        num_dense: P; where it is 0 there is no bottom MLP.
        interaction: ``"dot"``: inner products of all pairs of vectors, beside the bottom MLP's output; ``"cat"``: the
            vectors themselves.
        bottom_units: widths of the bottom MLP's hidden layers; a last layer of width D follows, activated too.
        hidden_units: widths of the top MLP's hidden layers.
        activation: of all hidden layers.
        dropout: of the top MLP's hidden layers.
        bottom_dropout: of the bottom MLP's hidden layers.
        batch_norm: whether the hidden layers of both are batch-normalized.

    Raises:
        ConfigError: if an option is out of range, or there is no pair to multiply.
    """

    def __init__(
        self,
        tables: EmbeddingTables,
        num_dense: int = 0,
        interaction: str = "dot",
        bottom_units: Sequence[int] = (512, 256),
        hidden_units: Sequence[int] = (512, 256),
        activation: str = "relu",
        dropout: float = 0.0,
        bottom_dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__(tables, num_dense)
        if interaction not in INTERACTIONS:
            raise ConfigError(f"DLRM(interaction={interaction!r}): {did_you_mean(interaction, INTERACTIONS)}")
        self.interaction = interaction
        num_vectors, dim = self.num_fields + (num_dense > 0), self.embedding_dim
        if interaction == "dot" and num_vectors < 2:
            raise ConfigError(
                "DLRM(interaction='dot') needs two vectors to multiply: give two fields, or dense features"
            )
        self.bottom, self.last_activation = None, activation_of(activation)
        if num_dense:
            self.bottom = MLP(num_dense, bottom_units, dim, activation, bottom_dropout, batch_norm)
        self.dots = PairwiseDots(num_vectors) if interaction == "dot" else None
        width = num_vectors * dim if self.dots is None else self.dots.out_features + (dim if num_dense else 0)
        self.top = MLP(width, hidden_units, 1, activation, dropout, batch_norm)

    def _logits(self, vectors: Tensor, dense: Tensor | None) -> Tensor:
        beside = None
        if self.bottom is not None and dense is not None:
            beside = self.last_activation(self.bottom(dense))
            vectors = torch.cat([beside.unsqueeze(1), vectors], dim=1)
        if self.dots is None:
            return self.top(vectors.flatten(1)).squeeze(-1)
        dots = self.dots(vectors)
        return self.top(dots if beside is None else torch.cat([beside, dots], dim=1)).squeeze(-1)
