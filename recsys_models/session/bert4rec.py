"""BERT4Rec: gaps in a session are filled from both sides. Shapes: ``B`` sessions, ``L`` positions, ``D`` dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embcomp.errors import ConfigError
from recsys_models.data import NO_TARGET, SessionBatch
from recsys_models.session.encoders import Encoder, Examples, Sessions
from recsys_models.session.layers import Transformer, inside, last_of


class BERT4Rec(Encoder):
    """A Transformer that fills gaps.

    "BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from Transformer" (arXiv
    1904.06690). The next item is a gap behind the last one. Blocks normalize before, and the head is a linear map with
    an activation and a normalization, as in the paper.

    Args:
        dim: D.
        max_length: positions, the gap not counted.
        blocks: their number.
        heads: of attention.
        feedforward: width of the hidden layers; None for 4 D.
        dropout: of vectors, attention and hidden layers.
        activation: of the hidden layers.
        mask_share: of a session's items that are hidden in training; at least one is.
        last_share: of the sessions in which the last item is hidden and no other, as when the next one is asked for.
    """

    targets = "positions"

    def __init__(
        self,
        dim: int,
        max_length: int,
        blocks: int = 2,
        heads: int = 2,
        feedforward: int | None = None,
        dropout: float = 0.1,
        activation: str = "gelu",
        mask_share: float = 0.2,
        last_share: float = 0.1,
    ) -> None:
        super().__init__(dim, max_length)
        if not 0 < mask_share < 1 or not 0 <= last_share <= 1:
            raise ConfigError(f"mask_share={mask_share} must be in (0, 1), last_share={last_share} in [0, 1]")
        self.mask_share, self.last_share = mask_share, last_share
        self.transformer = Transformer(dim, max_length + 1, blocks, heads, feedforward, dropout, activation, True)
        self.gap = nn.Parameter(torch.empty(dim))
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim))
        nn.init.normal_(self.gap, std=0.02)

    def forward(self, sessions: Sessions) -> Tensor:
        """Queries of a gap behind the last item: float32 ``(B, D)``."""
        vectors = torch.cat([sessions.vectors, sessions.vectors.new_zeros(len(sessions.items), 1, self.dim)], dim=1)
        place = torch.arange(vectors.shape[1], device=vectors.device)
        behind = (place == sessions.lengths[:, None])[..., None]
        hidden = self._hidden(torch.where(behind, self.gap, vectors), sessions.lengths + 1)
        return last_of(hidden, sessions.lengths + 1)

    def prepare(self, batch: SessionBatch) -> Examples:
        """Join inputs and targets to whole sessions again, and hide some items; of prefixes, the next item alone."""
        of_prefixes = batch.targets.dim() == 1
        items, lengths = _whole(batch)
        mask = inside(lengths, items.shape[1])
        last = torch.arange(items.shape[1], device=items.device) == (lengths - 1)[:, None]
        hidden = last if of_prefixes else self._drawn(mask, last)
        return Examples(items, lengths, items.masked_fill(~hidden, NO_TARGET), hidden)

    def expected_targets(self, batch: SessionBatch) -> tuple[Tensor, Tensor]:
        """All items of sessions, by their chances to be hidden; see `Encoder.expected_targets`."""
        if batch.targets.dim() == 1:
            return super().expected_targets(batch)
        items, lengths = _whole(batch)
        mask, number = inside(lengths, items.shape[1]), lengths[:, None].double()
        last = torch.arange(items.shape[1], device=items.device) == (lengths - 1)[:, None]
        drawn = self.mask_share + (1 - self.mask_share) ** number / number  # the latter where else none would be
        return items[mask], ((1 - self.last_share) * drawn + self.last_share * last)[mask]

    def hide(self, vectors: Tensor, hidden: Tensor) -> Tensor:
        """Put gaps in the place of hidden items."""
        return torch.where(hidden[..., None], self.gap.to(vectors.dtype), vectors)

    def learn(self, sessions: Sessions, targets: Tensor) -> Tensor:
        """Queries of the gaps: float32 ``(N, D)``."""
        return self._hidden(sessions.vectors, sessions.lengths)[targets != NO_TARGET]

    def _drawn(self, mask: Tensor, last: Tensor) -> Tensor:
        """Which items to hide, of sessions whose items and last items bool ``(B, L)`` say: bool ``(B, L)``."""
        draw = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, 2.0)
        hidden = draw < self.mask_share
        hidden |= (draw == draw.amin(1, keepdim=True)) & ~hidden.any(1, keepdim=True)
        only_last = torch.rand(len(mask), 1, device=mask.device) < self.last_share
        return torch.where(only_last, last, hidden)

    def _hidden(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        out: Tensor = self.head(self.transformer(vectors, inside(lengths, vectors.shape[1])))
        return out


def _whole(batch: SessionBatch) -> tuple[Tensor, Tensor]:
    """Sessions with what follows their last input, int64 ``(B, L + 1)`` and their lengths ``(B,)``."""
    if batch.targets.dim() == 1:
        items = F.pad(batch.items, (0, 1)).scatter(1, batch.lengths[:, None], batch.targets[:, None])
        return items, batch.lengths + 1
    items = torch.cat([batch.items[:, :1], batch.targets.clamp_min(0)], dim=1)
    return items, batch.lengths + (batch.targets[:, 0] != NO_TARGET)  # a session of one item has no target
