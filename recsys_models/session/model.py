"""Session models: items to vectors, sessions to queries, queries to scores of the whole catalogue.

Shapes: ``B`` sessions, ``L`` positions, ``D`` dimension, ``N`` targets of a step, ``V`` items.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embcomp import EmbeddingTables
from embcomp.errors import ConfigError
from embcomp.scoring import ItemScorer
from recsys_models.data import NO_TARGET, Attribute, SessionBatch
from recsys_models.session.by_length import encode_by_length
from recsys_models.session.contrastive import Contrastive
from recsys_models.session.encoders import Encoder, Examples, Sessions
from recsys_models.session.items import Items, ItemTable
from recsys_models.session.layers import inside
from recsys_models.session.objectives import Objective
from recsys_models.session.ranker import Ranker, check_sessions, check_targets


class SessionModel(Ranker):
    """A model of the next item, whose embeddings lie in one group of tables, but for a residual that has its own.

    Args:
        tables: of the items; compressed, or plain. Items may have another group beside it, for their residual.
        items: how they become vectors.
        encoder: how sessions become queries.
        objective: what is learned.
        head: a table of vectors that items are scored by; None to score by those of ``items``, which ties the head.
        categories: attributes that are predicted along with the next item -> weights of their losses. Items whose value
            is not known, or which no item of training has, count for nothing in them, nor do items that training has
            not, as in the objective.
        contrastive: a loss on the items themselves, and its weight.
        windows: what is learned from sessions that are longer than the encoder reads: their ``"last"`` items, or
            ``"all"``, window by window.

    Raises:
        ConfigError: if an attribute to predict has several values per item.
    """

    _categories: Tensor

    def __init__(
        self,
        tables: EmbeddingTables,
        items: Items,
        encoder: Encoder,
        objective: Objective,
        head: ItemTable | None = None,
        categories: Mapping[Attribute, float] | None = None,
        contrastive: tuple[Contrastive, float] | None = None,
        windows: str = "last",
    ) -> None:
        super().__init__()
        self.tables, self.items, self.encoder, self.objective, self.head = tables, items, encoder, objective, head
        self.residual_tables = next((group for group in items.groups if group is not tables), None)
        self.num_items, self.max_length, self.windows = items.num_items, encoder.max_length, windows
        self.contrastive = None if contrastive is None else contrastive[0]
        self.contrastive_weight = 0.0 if contrastive is None else contrastive[1]
        predicted = categories or {}
        for attribute in predicted:
            if attribute.is_bag:
                raise ConfigError(f"attribute {attribute.name!r} has several values per item and can't be predicted")
        self.category_weights = tuple(predicted.values())
        self.category_heads = nn.ModuleList(nn.Linear(encoder.dim, a.num_values) for a in predicted)
        known = [np.where(a.values == a.unknown_id, NO_TARGET, a.values) for a in predicted]
        values = np.array(known, np.int64).reshape(len(known), items.num_items)
        values[:, objective.num_seen :] = NO_TARGET
        self.register_buffer("_categories", torch.from_numpy(values), persistent=False)

    # ---- scores -----------------------------------------------------------------------------------------------------

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Scores of all items as the next one.

        Args:
            items: int64 ``(B, L)``, the first ones of each row being the session, oldest first.
            lengths: int64 ``(B,)``. An empty session is taken for one of an item whose vector is zero. Of sessions
                longer than the encoder's ``max_length``, the last items count.

        Returns:
            float32 ``(B, V)``.

        Raises:
            InputError: if shapes do not go together, dtypes are not integers, or a length is not in ``[0, L]``.
            UnseenIdError: if an item is outside its table, and the tables' policy is to say so.
        """
        return self.scorer().every_score(self.queries(items, lengths))

    def queries(self, items: Tensor, lengths: Tensor) -> Tensor:
        """What sessions are encoded to, float32 ``(B, D)``: scores are inner products with it. Arguments as above."""
        items, lengths = self._latest(items, lengths)
        sessions = self.embed(Examples(items, lengths, lengths))
        vectors = encode_by_length(lambda some, _: self.encoder(some), sessions, lengths)
        return self._to_queries(vectors)

    def scorer(self) -> ItemScorer:
        """What scores queries; without gradients, a catalogue of metadata is composed once, as weights are now."""
        return (self.head or self.items).scorer()

    @property
    def composing_bytes(self) -> int:
        """Those of its items; see `Items.composing_bytes`."""
        return self.items.composing_bytes

    # ---- training ---------------------------------------------------------------------------------------------------

    def prepare(self, batch: SessionBatch) -> Examples:
        """What to learn from a batch.

        Raises:
            InputError: if its sessions are none, see `forward`, or a target is neither an item nor `NO_TARGET`.
        """
        check_sessions(batch.items, batch.lengths)
        check_targets(batch.targets, self.num_items)
        return self.encoder.prepare(batch)

    def learn(self, examples: Examples) -> Tensor:
        """Vectors of the sessions of all targets, float32 ``(N, D)``, which `loss` takes."""
        return encode_by_length(self.encoder.learn, self.embed(examples), examples.targets)

    def loss(self, examples: Examples, vectors: Tensor) -> Tensor:
        """The mean loss over targets, of the next item and of its categories, and that of the items: a scalar.

        Categories are predicted from the vectors of sessions, before these become queries.

        Args:
            examples: that are learned from.
            vectors: what `learn` gave for them.
        """
        targets = examples.targets[examples.targets != NO_TARGET]
        if self.head is not None:
            self.head.note_(targets[targets < self.objective.num_seen])  # a free head is never read, so not counted
        loss = self.objective(self.head or self.items, self._to_queries(vectors), targets, examples)
        for weight, head, values in zip(self.category_weights, self.category_heads, self._categories, strict=True):
            loss = loss + weight * _category_loss(head(vectors), values[targets])
        if self.contrastive is not None:
            loss = loss + self.contrastive_weight * self.contrastive(self.items)
        return loss

    def embed(self, examples: Examples) -> Sessions:
        """Vectors of items, zeros behind the ends, where nothing is looked up, and where a session is empty."""
        items, lengths, hidden = examples.items, examples.lengths, examples.hidden
        places = inside(lengths, items.shape[1]).nonzero(as_tuple=True)
        found = self.items(items[places])
        vectors = found.new_zeros(*items.shape, self.items.dim).index_put(places, found)
        if hidden is not None:
            vectors = self.encoder.hide(vectors, hidden)
        return Sessions(vectors, items, lengths.clamp_min(1))

    def penalty(self) -> Tensor:
        """The tables' own loss term, a float32 scalar to add to the training loss."""
        own = self.tables.penalty()
        return own if self.residual_tables is None else own + self.residual_tables.penalty()

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _to_queries(self, vectors: Tensor) -> Tensor:
        return self.objective.scaled(self.encoder.to_queries(vectors))

    def _latest(self, items: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The last items of each session, as many as the encoder takes."""
        check_sessions(items, lengths)
        if items.shape[1] > self.max_length:
            start = (lengths - self.max_length).clamp_min(0)
            place = start[:, None] + torch.arange(self.max_length, device=items.device)
            items, lengths = items.gather(1, place), lengths.clamp_max(self.max_length)
        return items, lengths


def _category_loss(scores: Tensor, values: Tensor) -> Tensor:
    """The mean cross-entropy over values int64 ``(N,)`` that are known; 0 where none is."""
    total = F.cross_entropy(scores, values, ignore_index=NO_TARGET, reduction="sum")
    return total / (values != NO_TARGET).sum().clamp_min(1)
