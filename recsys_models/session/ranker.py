"""What ranks items: session models, and the floors that they should beat."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from embcomp.errors import InputError
from embcomp.scoring import ItemScorer
from recsys_models.data import NO_TARGET


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


def check_targets(targets: Tensor, num_items: int) -> None:
    """Raise `InputError` unless targets, int64 of any shape, are items in ``[0, V)``, or `NO_TARGET`."""
    if targets.dtype != torch.int64:
        raise InputError(f"targets {targets.dtype} must be int64: call .long()")
    wrong = ((targets < 0) | (targets >= num_items)) & (targets != NO_TARGET)
    if wrong.any():
        place = wrong.nonzero()[0]
        raise InputError(
            f"target {int(targets[tuple(place)])} at {place.tolist()} is no item: there are items in [0, {num_items}), "
            f"and {NO_TARGET} stands where there is no target"
        )


def check_sessions(items: Tensor, lengths: Tensor) -> None:
    """Raise `InputError` unless these are sessions ``(B, L)`` and their lengths ``(B,)``, each in ``[0, L]``."""
    integers = (torch.int64, torch.int32)
    if items.dim() != 2 or lengths.shape != items.shape[:1] or items.shape[1] < 1:
        raise InputError(
            f"items {tuple(items.shape)} and lengths {tuple(lengths.shape)} must be int64 (B, L) and (B,), L >= 1"
        )
    if items.dtype not in integers or lengths.dtype not in integers:
        raise InputError(f"items {items.dtype} and lengths {lengths.dtype} must be int64: call .long()")
    wrong = (lengths < 0) | (lengths > items.shape[1])
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise InputError(
            f"session {row} has length {int(lengths[row])}, but must have one in [0, {items.shape[1]}], as many as "
            "items has columns"
        )
