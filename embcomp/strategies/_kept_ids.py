"""Which ids of each table have a stored row, and which row it is: a part of the strategies that leave rows out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embcomp.storage.bitmap import bitmap_words, build_bitmap, look_up_bitmap


class KeptIds(nn.Module):
    """The kept ids of a group of tables.

    A table whose kept ids are ``0, 1, …, num_kept − 1`` costs nothing. For the others a bit per id, and the number of
    kept ids before every 64 of them, say which row is whose: 1.5 bits per id, less than an int32 per id costs from 3
    ids on. Until `keep_` is called, a remapped table keeps nothing.

    Args:
        num_ids: ids of each table.
        num_kept: kept ids of each table.
        remapped: whether each table needs bits.
    """

    bits: Tensor
    ranks: Tensor
    _kept: Tensor
    _remapped: Tensor
    _words: Tensor
    _last_words: Tensor

    def __init__(self, num_ids: Sequence[int], num_kept: Sequence[int], remapped: Sequence[bool]) -> None:
        super().__init__()
        self.num_ids, self.remapped = tuple(num_ids), tuple(remapped)
        self.is_remapped = any(remapped)
        self.starts, total = word_starts(num_ids, remapped)
        last = [bitmap_words(ids) - 1 if flag else 0 for ids, flag in zip(num_ids, remapped, strict=True)]
        constants = {"_kept": num_kept, "_remapped": remapped, "_words": self.starts, "_last_words": last}
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(list(values), device="cpu"), persistent=False)
        if self.is_remapped:
            self.register_buffer("bits", torch.zeros(total, dtype=torch.int64))
            self.register_buffer("ranks", torch.zeros(total, dtype=torch.int32))

    def forward(self, ids: Tensor, table: Tensor | int | None) -> tuple[Tensor, Tensor]:
        """Look ids up.

        Args:
            ids: int64 ``(...)`` in ``[0, num_ids[t])``.
            table: as in `EmbeddingTables.lookup`.

        Returns:
            bool ``(...)``, whether an id is kept, and int64 ``(...)``, its row inside its table if it is.
        """
        kept, rows = ids < self._pick(self._kept, table), ids
        flags = self.remapped if table is None or isinstance(table, Tensor) else (self.remapped[table],)
        if any(flags):
            # Ids of tables without a remap look up some word of it too, and then ignore it.
            words = (ids >> 6).minimum(self._pick(self._last_words, table)) + self._pick(self._words, table)
            found, ranks = look_up_bitmap(self.bits, self.ranks, ids, words)
            remapped = self._pick(self._remapped, table)
            # No `torch.where` of bools: ONNX Runtime has none.
            kept, rows = (found & remapped) | (kept & ~remapped), torch.where(remapped, ranks, rows)
        return kept, rows

    @torch.no_grad()
    def keep_(self, table: int, kept: Tensor) -> None:
        """Say which ids a remapped table keeps: int64 ``(num_kept,)``, in any order."""
        bits, ranks = build_bitmap(kept, self.num_ids[table])
        start = self.starts[table]
        self.bits[start : start + len(bits)] = bits.to(self.bits.device)
        self.ranks[start : start + len(ranks)] = ranks.to(self.ranks.device)

    @staticmethod
    def _pick(constants: Tensor, table: Tensor | int | None) -> Tensor:
        return constants if table is None else constants[table]


def word_starts(num_ids: Sequence[int], remapped: Sequence[bool]) -> tuple[list[int], int]:
    """First word of each table among the words of all that have a remap (0 for the others), and their number."""
    starts, total = [], 0
    for size, flag in zip(num_ids, remapped, strict=True):
        starts.append(total if flag else 0)
        total += bitmap_words(size) if flag else 0
    return starts, total
