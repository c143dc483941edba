"""Ids without a slot that were looked up lately: the candidates of ``dynamic``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from embcomp.errors import IncompatibleStateError
from embcomp.strategies._dynamic_map import sort_pairs


class Lookups(NamedTuple):
    """Ids, and what is known of their lookups: int64 ``(n,)`` each.

    Attributes:
        table: index of the table.
        ids: as they were looked up.
        counts: how often.
        last: the step of the last one.
    """

    table: Tensor
    ids: Tensor
    counts: Tensor
    last: Tensor

    def of(self, which: Tensor) -> Lookups:
        """Some of them: a mask or indices."""
        return Lookups(*(values[which] for values in self))

    def merged(self) -> Lookups:
        """One entry per id, sorted by table, then by id: counts add up, and the last lookup counts."""
        table, ids, counts, last = self.of(sort_pairs(self.table, self.ids))
        if not len(ids):
            return self
        is_new = torch.ones_like(ids, dtype=torch.bool)
        is_new[1:] = (ids[1:] != ids[:-1]) | (table[1:] != table[:-1])
        group = is_new.cumsum(0) - 1
        total = torch.zeros_like(ids[is_new])
        latest = total.scatter_reduce(0, group, last, "amax", include_self=False)
        return Lookups(table[is_new], ids[is_new], total.index_add(0, group, counts), latest)


def rank_within(table: Tensor, order: Tensor, num_tables: int) -> Tensor:
    """The place of each entry among those of its table, by an order of all: int64 ``(n,)`` from 0.

    Args:
        table: int64 ``(n,)``.
        order: int64 ``(n,)``, entries from the best to the worst.
        num_tables: T.
    """
    order = order[table[order].argsort(stable=True)]
    numbers = torch.bincount(table, minlength=num_tables)
    first = (numbers.cumsum(0) - numbers)[table[order]]
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device) - first
    return ranks


class History(nn.Module):
    """A log of lookups of ids without a slot, of limited size.

    Steps append to it. When it is full, entries of one id are merged, and of each table those of the highest scores
    stay, as many as there is room for; so a step takes time in proportion to its batch.

    Args:
        room: for how many ids there is room, per table.

    Attributes:
        entries: int64 ``(4, 2 · sum(room))``, the rows of `Lookups`.
        filled: int64 ``()``, entries that are in use.
    """

    entries: Tensor
    filled: Tensor
    _room: Tensor

    def __init__(self, room: Sequence[int]) -> None:
        super().__init__()
        self.num_tables, self.size = len(room), 2 * sum(room)
        self.register_buffer("_room", torch.tensor(list(room), device="cpu"), persistent=False)
        self.register_buffer("entries", torch.zeros(4, self.size, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def add_(self, new: Lookups, order: Callable[[Lookups], Tensor]) -> int:
        """Append lookups.

        Args:
            new: of ids without a slot.
            order: int64 ``(n,)``, from the ids that stay where there is no room for all to those that go first.

        Returns:
            How many ids were forgotten.
        """
        filled, forgotten = int(self.filled), 0
        if filled + len(new.ids) > self.size:
            every = Lookups(*torch.cat([self.entries[:, :filled], torch.stack(new)], dim=1)).merged()
            new = every.of(rank_within(every.table, order(every), self.num_tables) < self._room[every.table])
            filled, forgotten = 0, len(every.ids) - len(new.ids)
        self.entries[:, filled : filled + len(new.ids)] = torch.stack(new)
        self.filled.fill_(filled + len(new.ids))
        return forgotten

    def copied(self) -> Lookups:
        """All ids, merged."""
        return Lookups(*self.entries[:, : int(self.filled)].clone()).merged()

    def take_(self) -> Lookups:
        """All ids, merged; the log is empty afterwards."""
        found = self.copied()
        self.filled.zero_()
        return found

    def check_state(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        """Check that a state is one that a history can have.

        Raises:
            IncompatibleStateError: if it is not.
        """
        entries, filled = state.get(f"{prefix}entries"), state.get(f"{prefix}filled")
        if (
            entries is None
            or filled is None
            or entries.is_meta
            or entries.shape != (4, self.size)
            or filled.numel() != 1
        ):
            return  # load_state_dict says so
        number = int(filled)
        used = entries[:, : max(number, 0)]
        tables_exist = bool(((used[0] >= 0) & (used[0] < self.num_tables)).all())
        if not 0 <= number <= self.size or not tables_exist or bool((used[2] < 1).any()):
            raise IncompatibleStateError(
                f"{prefix}entries: {number} of {self.size} are said to be in use, of {self.num_tables} tables, with "
                "counts of at least 1, and they are not: the checkpoint contradicts itself"
            )
