"""What ranks items: session models, and the floors that they should beat."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from embcomp.scoring import ItemScorer


class Ranker(nn.Module, ABC):
    """A module that encodes sessions to queries and scores the catalogue by them.

    Attributes:
        num_items: V.
        max_length: items of a session that are read, the last ones.
    """

    num_items: int
    max_length: int

    @abstractmethod
    def queries(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Encode sessions, int64 ``(B, L)``, of int64 ``(B,)`` lengths, to float32 ``(B, D)``."""

    @property
    def composing_bytes(self) -> int:
        """Bytes that serving needs beside tables to make vectors of items; none where they are looked up."""
        return 0

    @abstractmethod
    def scorer(self) -> ItemScorer:
        """What scores queries."""
