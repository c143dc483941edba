"""Encoders that read a session as a whole: NARM, SR-GNN and M2TRec. They learn from each prefix, unless told else.

Shapes: ``B`` sessions, ``L`` positions, ``D`` dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embcomp.errors import ConfigError
from recsys_models.data import NO_TARGET
from recsys_models.layers import check_dropout, check_sizes
from recsys_models.session.encoders import CausalEncoder, Encoder, Sessions
from recsys_models.session.layers import Transformer, inside, last_of

POOLINGS = ("mean", "last", "attention")


class NARM(CausalEncoder):
    """A recurrent network with attention.

    "Neural Attentive Session-based Recommendation" (arXiv 1711.04725). The last state stands for the whole session, the
    states that it attends to for its main purpose; a bilinear map takes both to the space of the items. It learns from
    prefixes, as in the paper, or in one pass from all positions, as states know only what is before them.

    Args:
        dim: D.
        max_length: positions.
        hidden: width of the state.
        layers: of the recurrent network.
        dropout: of the items' vectors.
        context_dropout: of the session's vector.
    """

    targets = "prefixes"
    init_std = 0.1  # as GRU4Rec

    def __init__(
        self,
        dim: int,
        max_length: int,
        hidden: int = 128,
        layers: int = 1,
        dropout: float = 0.25,
        context_dropout: float = 0.5,
    ) -> None:
        super().__init__(dim, max_length)
        check_sizes(hidden=hidden, layers=layers)
        self.dropout, self.context_dropout = (
            nn.Dropout(check_dropout(dropout)),
            nn.Dropout(check_dropout(context_dropout)),
        )
        self.recurrent = nn.GRU(dim, hidden, layers, batch_first=True)
        self.of_last, self.of_each = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.weight = nn.Linear(hidden, 1, bias=False)
        self.bilinear = nn.Linear(2 * hidden, dim, bias=False)

    def forward(self, sessions: Sessions) -> Tensor:
        """Queries: float32 ``(B, D)``."""
        states, _ = self.recurrent(self.dropout(sessions.vectors))
        last = last_of(states, sessions.lengths)
        return self._queries(states, last[:, None], inside(sessions.lengths, states.shape[1])[:, None])[:, 0]

    def hidden(self, sessions: Sessions) -> Tensor:
        """Queries of all positions: float32 ``(B, L, D)``; attention takes ``B · L²`` values of the state's width."""
        states, _ = self.recurrent(self.dropout(sessions.vectors))
        places = torch.arange(states.shape[1], device=states.device)
        return self._queries(states, states, (places <= places[:, None])[None])

    def _queries(self, states: Tensor, last: Tensor, seen: Tensor) -> Tensor:
        """Queries ``(B, Q, D)`` of last states ``(B, Q, H)``, of the states that ``seen``, ``(B or 1, Q, L)``, says."""
        weights = self.weight(torch.sigmoid(self.of_last(last)[:, :, None] + self.of_each(states)[:, None])).squeeze(-1)
        purpose = (weights * seen) @ states
        queries: Tensor = self.bilinear(self.context_dropout(torch.cat([last, purpose], dim=-1)))
        return queries


class SRGNN(Encoder):
    """A gated graph network over the items of a session.

    "Session-based Recommendation with Graph Neural Networks" (arXiv 1811.00855). Distinct items are nodes, steps from
    one to the next are edges, once however often they are taken. A node of the first position of an item stands for all
    of them.

    Args:
        dim: D.
        max_length: positions.
        steps: of the graph network.
    """

    init_std = 0.058  # that of uniform values up to 0.1, as their code draws them for D = 100

    def __init__(self, dim: int, max_length: int, steps: int = 1) -> None:
        super().__init__(dim, max_length)
        check_sizes(steps=steps)
        self.steps = steps
        self.incoming, self.outgoing = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.incoming_bias, self.outgoing_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.gates = nn.GRUCell(2 * dim, dim)
        self.of_last, self.of_each = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.weight = nn.Linear(dim, 1, bias=False)
        self.out = nn.Linear(2 * dim, dim)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(dim**-0.5), dim**-0.5)

    def forward(self, sessions: Sessions) -> Tensor:
        """Queries: float32 ``(B, D)``."""
        mask = inside(sessions.lengths, sessions.items.shape[1])
        node = first_places(sessions.items, mask)
        incoming, outgoing = transitions(node, mask)
        states = sessions.vectors  # where a node's first position is; other positions have no edge
        for _ in range(self.steps):
            arrived = incoming @ self.incoming(states) + self.incoming_bias
            left = outgoing @ self.outgoing(states) + self.outgoing_bias
            messages = torch.cat([arrived, left], dim=-1)
            states = self.gates(messages.flatten(0, 1), states.flatten(0, 1)).view_as(states)
        hidden = states.gather(1, node[..., None].expand_as(states))
        last = last_of(hidden, sessions.lengths)
        weights = self.weight(torch.sigmoid(self.of_last(last)[:, None] + self.of_each(hidden))) * mask[..., None]
        queries: Tensor = self.out(torch.cat([(weights * hidden).sum(1), last], dim=-1))
        return queries


def first_places(items: Tensor, mask: Tensor) -> Tensor:
    """For each position the first one of the same item in the session: int64 ``(B, L)``; 0 behind the ends."""
    same = (items[:, :, None] == items[:, None, :]) & mask[:, None, :]
    return same.int().argmax(-1).masked_fill(~mask, 0)


def transitions(node: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Normalized matrices of a session graph.

    Args:
        node: int64 ``(B, L)``, of each position.
        mask: bool ``(B, L)``, False behind the ends.

    Returns:
        Incoming and outgoing edges, float32 ``(B, L, L)``: row u of the first holds shares of the edges that lead to u,
        row u of the second of those that lead away.
    """
    size, length = node.shape
    edges = torch.zeros(size, length, length, device=node.device)
    if length > 1:
        place = node[:, :-1] * length + node[:, 1:]
        taken = mask[:, 1:].float()
        edges.view(size, length * length).scatter_reduce_(1, place, taken, "amax")
    outgoing = edges / edges.sum(2, keepdim=True).clamp_min(1)
    incoming = (edges / edges.sum(1, keepdim=True).clamp_min(1)).transpose(1, 2)
    return incoming, outgoing


class M2TRec(Encoder):
    """A Transformer over the whole session, averaged.

    "M2TRec: Metadata-aware Multi-task Transformer for Large-scale and Cold-start free Session-based Recommendations"
    (arXiv 2209.11824), whose items are composed of their attributes, and which predicts categories along with the item.
    ``causal`` is ours: a session is learned from in one pass, where else each of its prefixes is a pass of its own.

    Args:
        dim: D.
        max_length: positions.
        blocks: their number.
        heads: of attention.
        feedforward: width of the hidden layers; None for 4 D.
        dropout: of vectors, attention and hidden layers.
        activation: of the hidden layers.
        pooling: ``"mean"`` over the positions, as in the paper, the ``"last"`` one, or ``"attention"``.
        causal: whether positions see only what is before them, so that the pooled positions up to each are a query.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        blocks: int = 2,
        heads: int = 4,
        feedforward: int | None = None,
        dropout: float = 0.2,
        activation: str = "gelu",
        pooling: str = "mean",
        causal: bool = False,
    ) -> None:
        super().__init__(dim, max_length)
        if pooling not in POOLINGS:
            raise ConfigError(f"pooling={pooling!r} must be one of {', '.join(map(repr, POOLINGS))}")
        self.transformer = Transformer(dim, max_length, blocks, heads, feedforward, dropout, activation, True)
        self.pooling, self.causal = pooling, causal
        self.targets = "positions" if causal else "prefixes"
        self.weight = nn.Linear(dim, 1) if pooling == "attention" else None
        self.query = nn.Linear(dim, dim)

    @property
    def has_choice(self) -> bool:
        """Where positions see only what is before them."""
        return self.causal

    def forward(self, sessions: Sessions) -> Tensor:
        """Vectors of sessions: float32 ``(B, D)``."""
        mask = inside(sessions.lengths, sessions.items.shape[1])
        hidden = self.transformer(sessions.vectors, None if self.causal else mask)
        if self.pooling == "last":
            return last_of(hidden, sessions.lengths)
        return self._pooled(hidden, mask[:, None])[:, 0]

    def to_queries(self, vectors: Tensor) -> Tensor:
        """Map vectors of sessions ``(..., D)`` to where items are."""
        queries: Tensor = self.query(vectors)
        return queries

    def learn(self, sessions: Sessions, targets: Tensor) -> Tensor:
        """Vectors of the sessions of all targets: float32 ``(N, D)``."""
        if not self.causal or targets.dim() == 1:
            return super().learn(sessions, targets)
        hidden = self.transformer(sessions.vectors)
        if self.pooling != "last":
            places = torch.arange(hidden.shape[1], device=hidden.device)
            hidden = self._pooled(hidden, (places <= places[:, None])[None])
        return hidden[targets != NO_TARGET]

    def _pooled(self, hidden: Tensor, seen: Tensor) -> Tensor:
        """Means of positions, weighted or not, ``(B, Q, D)``, of those that ``seen``, ``(B or 1, Q, L)``, says."""
        weights = hidden.new_zeros(hidden.shape[:2]) if self.weight is None else self.weight(hidden).squeeze(-1)
        return weights[:, None].masked_fill(~seen, float("-inf")).softmax(-1) @ hidden
