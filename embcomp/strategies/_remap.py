"""A set of kept ids as one bit per id: whether an id is kept, and its rank among the kept ones, in 1.5 bits per id."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

WORD = 64
"""Ids per word; each word costs 8 bytes of bits and 4 bytes of rank."""


def remap_words(num_ids: int) -> int:
    """Words that the bits of V ids take."""
    return -(-num_ids // WORD)


def remap_bytes(num_ids: int) -> int:
    """Bytes of the remap of V ids."""
    return 12 * remap_words(num_ids)


def build_remap(kept: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
    """Build the remap of one table.

    Args:
        kept: int64 ``(n,)``, the ids that are kept.
        num_ids: V.

    Returns:
        bits int64 ``(words,)``, bit i of word w being id ``64 w + i``, and ranks int32 ``(words,)``, the number of kept
        ids before each word.
    """
    flags = np.zeros(remap_words(num_ids) * WORD, dtype=bool)
    flags[kept.cpu().numpy()] = True
    bits = np.packbits(flags, bitorder="little").view(np.dtype("<i8")).astype(np.int64)
    in_words = flags.reshape(-1, WORD).sum(axis=1)
    ranks = (np.cumsum(in_words) - in_words).astype(np.int32)
    return torch.from_numpy(bits), torch.from_numpy(ranks)


def look_up_remap(bits: Tensor, ranks: Tensor, ids: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Look ids up.

    Args:
        bits: int64 ``(words,)``.
        ranks: int32 ``(words,)``.
        ids: int64 ``(...)``; only ``id mod 64`` is read.
        words: int64 ``(...)``, the word of each id.

    Returns:
        bool ``(...)``, whether an id is kept, and int64 ``(...)``, how many kept ids of its table come before it.
    """
    word, place = bits[words], ids & (WORD - 1)
    kept = ((word >> place) & 1).bool()
    below = word & ((1 << place) - 1)
    return kept, popcount(below).add_(ranks[words])


def popcount(values: Tensor) -> Tensor:
    """Count the set bits of int64 values ``(...)`` that are not negative."""
    pairs = values - ((values >> 1) & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (eights * 0x0101010101010101) >> 56


def word_starts(num_ids: Sequence[int], remapped: Sequence[bool]) -> tuple[list[int], int]:
    """First word of each table among the words of all that have a remap (0 for the others), and their number."""
    starts, total = [], 0
    for size, flag in zip(num_ids, remapped, strict=True):
        starts.append(total if flag else 0)
        total += remap_words(size) if flag else 0
    return starts, total
