"""A set of positions as one bit per position: whether one is in it, and how many before it are, without a search."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from embcomp.storage import packing

WORD = 64
"""Positions per word; each word costs 8 bytes of bits and the bytes of its rank."""
_INT32_MAX = 2**31 - 1


def bitmap_words(size: int) -> int:
    """Words that the bits of so many positions take."""
    return -(-size // WORD)


def bitmap_bytes(size: int, members: int = 0) -> int:
    """Bytes of a set of ``members`` out of ``size`` positions: its bits, and ranks in the dtype of `count_dtype`."""
    return (8 + count_dtype(members).itemsize) * bitmap_words(size)


def count_dtype(largest: int) -> torch.dtype:
    """The dtype of ranks and pointers that reach ``largest``: int32 as long as it does."""
    return torch.int32 if largest <= _INT32_MAX else torch.int64


def build_bitmap(members: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Build the set of int64 ``(n,)`` positions in ``[0, size)``, in any order; returns what `bitmap_of` does."""
    flags = torch.zeros(size, dtype=torch.bool)
    flags[members.cpu()] = True
    return bitmap_of(flags)


def bitmap_of(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Build the set of the positions whose flag is set.

    Args:
        flags: bool ``(size,)``.

    Returns:
        bits int64 ``(words,)``, bit i of word w being position ``64 w + i``, and ranks int32 ``(words,)``, the number
        of members before each word.
    """
    bits = pack_flags(flags)
    return bits, ranks_of(bits).to(torch.int32)


def pack_flags(flags: Tensor) -> Tensor:
    """Bits of flags: bool ``(size,)`` to int64 ``(words,)``; unused bits are zero."""
    packed = packing.pack(flags.view(torch.uint8), 1)
    return F.pad(packed, (0, -len(packed) % 8)).view(torch.int64)


def ranks_of(bits: Tensor) -> Tensor:
    """Members before each word: int64 ``(words,)`` to int64 ``(words,)``."""
    members = popcount(bits & 0x7FFFFFFFFFFFFFFF).add_(bits < 0)
    return members.cumsum(0) - members


def look_up_bitmap(bits: Tensor, ranks: Tensor, positions: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Look positions up.

    Args:
        bits: int64 ``(words,)``.
        ranks: int32 or int64 ``(words,)``.
        positions: int64 ``(...)``; only ``position mod 64`` is read.
        words: int64 ``(...)``, the word of each position.

    Returns:
        bool ``(...)``, whether a position is in the set, and int64 ``(...)``, how many members come before it.
    """
    word, place = bits[words], positions & (WORD - 1)
    member = ((word >> place) & 1).bool()
    below = word & ((1 << place) - 1)
    return member, popcount(below).add_(ranks[words])


def popcount(values: Tensor) -> Tensor:
    """Count the set bits of int64 values ``(...)`` that are not negative."""
    pairs = values - ((values >> 1) & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (eights * 0x0101010101010101) >> 56
