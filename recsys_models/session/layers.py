"""Building blocks of session models. Shapes: ``B`` sessions, ``L`` positions, ``D`` dimension, ``H`` heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embcomp.errors import ConfigError
from recsys_models.layers import activation_of, check_dropout, check_sizes


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        dim: D, a multiple of ``heads``.
        heads: H.
        dropout: of the attention weights.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        check_sizes(heads=heads)
        if dim % heads:
            raise ConfigError(f"heads={heads}: must divide the dimension, {dim}")
        self.heads, self.dropout = heads, dropout
        self.project = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, vectors: Tensor, mask: Tensor | None) -> Tensor:
        """Attend to earlier positions, or, with a mask bool ``(B, L)``, to all where it is True: ``(B, L, D)``."""
        parts = self._heads(self.project(vectors))
        return self._mixed(parts[0], parts[1], parts[2], mask)

    def of_some(self, asking: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
        """Let ``(B, Q, D)`` attend to ``(B, L, D)`` where a mask bool ``(B, L)`` is True: ``(B, Q, D)``."""
        dim, weight, bias = vectors.shape[-1], self.project.weight, self.project.bias
        queries = self._heads(F.linear(asking, weight[:dim], bias[:dim]))
        known = self._heads(F.linear(vectors, weight[dim:], bias[dim:]))
        return self._mixed(queries[0], known[0], known[1], mask)

    def _heads(self, projected: Tensor) -> Tensor:
        """``(B, L, n D)`` to ``(n, B, H, L, D / H)``."""
        dim = self.out.in_features
        return projected.unflatten(-1, (-1, self.heads, dim // self.heads)).permute(2, 0, 3, 1, 4)

    def _mixed(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        seen = None if mask is None else mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=seen, dropout_p=dropout, is_causal=mask is None
        )
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """A Transformer block: attention and a feed-forward network, each normalized before and added after.

    Args:
        dim: D.
        heads: H.
        feedforward: width of the hidden layer.
        dropout: of attention weights, hidden units and what is added.
        activation: of the hidden layer.
    """

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float, activation: str) -> None:
        super().__init__()
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, dropout)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, feedforward),
            activation_of(activation),
            nn.Dropout(dropout),
            nn.Linear(feedforward, dim),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, vectors: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, L, D)`` to ``(B, L, D)``; the mask is that of `Attention`."""
        return self._added(vectors, self.attention(self.attention_norm(vectors), mask))

    def last(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """The vectors of the last positions alone, each of which sees all before it: ``(B, L, D)`` to ``(B, D)``."""
        normed, places = self.attention_norm(vectors), inside(lengths, vectors.shape[1])
        attended = self.attention.of_some(last_of(normed, lengths)[:, None], normed, places)
        return self._added(last_of(vectors, lengths), attended[:, 0])

    def _added(self, vectors: Tensor, attended: Tensor) -> Tensor:
        vectors = vectors + self.dropout(attended)
        out: Tensor = vectors + self.dropout(self.feedforward(self.feedforward_norm(vectors)))
        return out


class Transformer(nn.Module):
    """Learned positions, dropout, blocks, and a last normalization.

    Items' vectors may be small, as rows of a table are at first, or large, as what is composed of metadata. Positions
    must be told from one another beside them: so ``normalized`` brings both to the same length before they are added,
    where a model without a causal mask knows the order from nothing else.

    Args:
        dim: D.
        max_length: positions, counted from the first.
        blocks: their number.
        heads: H.
        feedforward: width of the hidden layers; None for 4 D.
        dropout: see `Block`; also of the input.
        activation: of the hidden layers.
        normalized: whether vectors are normalized first, and positions as long as they.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        blocks: int,
        heads: int,
        feedforward: int | None,
        dropout: float,
        activation: str,
        normalized: bool = False,
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        check_sizes(blocks=blocks, feedforward=feedforward)
        self.positions = nn.Parameter(torch.empty(max_length, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, heads, 4 * dim if feedforward is None else feedforward, dropout, activation)
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(dim)
        self.input_norm = nn.LayerNorm(dim) if normalized else nn.Identity()
        nn.init.normal_(self.positions, std=1.0 if normalized else 0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, vectors: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, L, D)`` to ``(B, L, D)``; without a mask, positions see only what is before them."""
        hidden = self._placed(vectors)
        for block in self.blocks:
            hidden = block(hidden, mask)
        out: Tensor = self.norm(hidden)
        return out

    def last(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """What `forward` without a mask has at the last positions: ``(B, L, D)`` and ``(B,)`` to ``(B, D)``."""
        hidden = self._placed(vectors)
        *others, final = self.blocks
        for block in others:
            hidden = block(hidden)
        assert isinstance(final, Block)
        out: Tensor = self.norm(final.last(hidden, lengths))
        return out

    def _placed(self, vectors: Tensor) -> Tensor:
        placed: Tensor = self.dropout(self.input_norm(vectors) + self.positions[: vectors.shape[1]])
        return placed


def last_of(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The vectors of each session's last position: ``(B, L, D)`` and lengths ``(B,)`` to ``(B, D)``."""
    return hidden[torch.arange(len(hidden), device=hidden.device), (lengths - 1).clamp_min(0)]


def inside(lengths: Tensor, length: int) -> Tensor:
    """Which positions are of the session, and not behind its end: bool ``(B, L)``."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]
