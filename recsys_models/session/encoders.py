"""The interface of session encoders, and those that read from left to right: SASRec and GRU4Rec.

Shapes: ``B`` sessions, ``L`` positions, ``D`` dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recsys_models.data import NO_TARGET, SessionBatch
from recsys_models.layers import check_dropout, check_sizes
from recsys_models.session.layers import Transformer, last_of


class Examples(NamedTuple):
    """What a model learns from in a step.

    Attributes:
        items: int64 ``(B, L)``; 0 behind the ends.
        lengths: int64 ``(B,)``.
        targets: int64 ``(B, L)``, `NO_TARGET` where there is none; or ``(B,)``, one per session.
        hidden: bool ``(B, L)``, items that the encoder may not see; None for none.
    """

    items: Tensor
    lengths: Tensor
    targets: Tensor
    hidden: Tensor | None = None


class Sessions(NamedTuple):
    """What an encoder reads.

    Attributes:
        vectors: of the items, float32 ``(B, L, D)``; zeros behind the ends.
        items: int64 ``(B, L)``; 0 behind the ends.
        lengths: int64 ``(B,)``, at least 1.
    """

    vectors: Tensor
    items: Tensor
    lengths: Tensor


class Encoder(nn.Module, ABC):
    """Base of all encoders: sessions to vectors, and these to queries, whose products with items' vectors are scores.

    Args:
        dim: D.
        max_length: L, at most.
    """

    targets: str = "prefixes"
    """What it learns from: ``"positions"``, of which each predicts the next item, or whole ``"prefixes"``."""
    init_std: float = 0.02
    """Standard deviation of items' initial vectors where nothing else is said."""

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__()
        self.dim, self.max_length = dim, max_length

    @property
    def has_choice(self) -> bool:
        """Whether it can learn from either: each position then has the query of the prefix that ends there."""
        return False

    @abstractmethod
    def forward(self, sessions: Sessions) -> Tensor:
        """Vectors of sessions: float32 ``(B, D)``."""

    def to_queries(self, vectors: Tensor) -> Tensor:
        """Map vectors of sessions float32 ``(..., D)`` to where items are; they are there unless a model says else."""
        return vectors

    def prepare(self, batch: SessionBatch) -> Examples:
        """What to learn from a batch, drawn anew at every call where there is something to draw."""
        return Examples(batch.items, batch.lengths, batch.targets)

    def expected_targets(self, batch: SessionBatch) -> tuple[Tensor, Tensor]:
        """Items that `prepare` makes targets, int64 ``(n,)``, and how often on average, float64 ``(n,)``."""
        targets = batch.targets[batch.targets != NO_TARGET]
        return targets, torch.ones_like(targets, dtype=torch.float64)

    def hide(self, vectors: Tensor, hidden: Tensor) -> Tensor:
        """Put what stands for hidden items in their place, where the encoder hides any."""
        return vectors

    def learn(self, sessions: Sessions, targets: Tensor) -> Tensor:
        """Vectors of the sessions of all targets, in their order: float32 ``(N, D)``."""
        out: Tensor = self(sessions)
        return out


class CausalEncoder(Encoder):
    """Base of encoders whose positions know only what is before them, so that all of them are trained at once."""

    targets = "positions"

    @property
    def has_choice(self) -> bool:
        """It can."""
        return True

    @abstractmethod
    def hidden(self, sessions: Sessions) -> Tensor:
        """Queries of all positions: float32 ``(B, L, D)``."""

    def forward(self, sessions: Sessions) -> Tensor:
        """Queries of the last positions: float32 ``(B, D)``."""
        return last_of(self.hidden(sessions), sessions.lengths)

    def learn(self, sessions: Sessions, targets: Tensor) -> Tensor:
        """Queries of the positions that have a target, or of the last ones: float32 ``(N, D)``."""
        return self(sessions) if targets.dim() == 1 else self.hidden(sessions)[targets != NO_TARGET]


class SASRec(CausalEncoder):
    """Causal self-attention.

    "Self-Attentive Sequential Recommendation" (arXiv 1808.09781). We differ in small things: positions are counted from
    the first item, and blocks normalize keys and values as well as queries.

    Args:
        dim: D.
        max_length: positions.
        blocks: their number.
        heads: of attention.
        feedforward: width of the hidden layers; None for D, as in the paper.
        dropout: of vectors, attention and hidden layers.
        activation: of the hidden layers.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        blocks: int = 2,
        heads: int = 1,
        feedforward: int | None = None,
        dropout: float = 0.2,
        activation: str = "relu",
    ) -> None:
        super().__init__(dim, max_length)
        width = dim if feedforward is None else feedforward
        self.transformer = Transformer(dim, max_length, blocks, heads, width, dropout, activation)

    def hidden(self, sessions: Sessions) -> Tensor:
        """Queries of all positions: float32 ``(B, L, D)``."""
        out: Tensor = self.transformer(self._scaled(sessions))
        return out

    def forward(self, sessions: Sessions) -> Tensor:
        """Queries of the last positions, of which alone the last block is worked out: float32 ``(B, D)``."""
        return self.transformer.last(self._scaled(sessions), sessions.lengths)

    def _scaled(self, sessions: Sessions) -> Tensor:
        return sessions.vectors * self.dim**0.5


class GRU4Rec(CausalEncoder):
    """A recurrent network.

    "Session-based Recommendations with Recurrent Neural Networks" (arXiv 1511.06939). It is trained with the losses of
    the other models, where the paper samples from the mini-batch.

    Args:
        dim: D.
        max_length: positions.
        hidden: width of the state; projected to D where it differs.
        layers: of the network.
        dropout: of the input.
    """

    init_std = 0.1  # what is read is not normalized: from smaller vectors the first epochs learn little

    def __init__(self, dim: int, max_length: int, hidden: int = 128, layers: int = 1, dropout: float = 0.2) -> None:
        super().__init__(dim, max_length)
        check_sizes(hidden=hidden, layers=layers)
        self.dropout = nn.Dropout(check_dropout(dropout))
        self.recurrent = nn.GRU(dim, hidden, layers, batch_first=True)
        self.out = nn.Identity() if hidden == dim else nn.Linear(hidden, dim)

    def hidden(self, sessions: Sessions) -> Tensor:
        """Queries of all positions: float32 ``(B, L, D)``."""
        states, _ = self.recurrent(self.dropout(sessions.vectors))
        out: Tensor = self.out(states)
        return out
