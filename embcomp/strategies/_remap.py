"""Remaps: which ids of a table are kept, and the rank of each among the kept ones, in 1.5 bits per id."""

from __future__ import annotations

from collections.abc import Sequence

from embcomp.storage.bitmap import bitmap_bytes as remap_bytes
from embcomp.storage.bitmap import bitmap_words as remap_words
from embcomp.storage.bitmap import build_bitmap as build_remap
from embcomp.storage.bitmap import look_up_bitmap as look_up_remap
from embcomp.storage.bitmap import popcount

__all__ = ["build_remap", "look_up_remap", "popcount", "remap_bytes", "remap_words", "word_starts"]


def word_starts(num_ids: Sequence[int], remapped: Sequence[bool]) -> tuple[list[int], int]:
    """First word of each table among the words of all that have a remap (0 for the others), and their number."""
    starts, total = [], 0
    for size, flag in zip(num_ids, remapped, strict=True):
        starts.append(total if flag else 0)
        total += remap_words(size) if flag else 0
    return starts, total
