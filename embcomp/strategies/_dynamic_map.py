"""Which ids have a slot, and which: the map of ``dynamic``, exact for every 64-bit id, without a loop over ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from embcomp.errors import IncompatibleStateError

EMPTY = 2**63 - 1
"""What stands for no id in the map; the id of that value can't have a slot."""


class IdMap(nn.Module):
    """The resident ids of a group of tables: those that have a slot, a row of their own.

    Each table has a range of places, where its residents lie sorted and empty slots behind them; an id is found by
    bisection within the places of its table, so ids of different tables never meet. While training, a place also says
    which slot its id has, how often the id was looked up since it is resident, and when last. In the serving form a
    resident's slot is the number of its place, so that 8 bytes per slot are all there is.

    Args:
        num_slots: of each table; 0 where it needs none.

    Attributes:
        ids: int64 ``(S,)``, S slots of all tables together.
        is_final: whether it is the serving form, which has nothing but ``ids``.
        slots: int64 ``(S,)``, slot within the table of the id at each place.
        counts: int64 ``(S,)``, lookups.
        last: int64 ``(S,)``, the step of the last lookup.
    """

    ids: Tensor
    slots: Tensor
    counts: Tensor
    last: Tensor
    _starts: Tensor
    _sizes: Tensor

    def __init__(self, num_slots: Sequence[int]) -> None:
        super().__init__()
        self.is_final = False
        self.num_slots, self.total = tuple(num_slots), sum(num_slots)
        self.starts = [sum(num_slots[:table]) for table in range(len(num_slots))]
        for name, values in (("_starts", self.starts), ("_sizes", num_slots)):
            self.register_buffer(name, torch.tensor(list(values), device="cpu"), persistent=False)
        longest = max(num_slots)
        self._strides = [1 << bit for bit in reversed(range(longest.bit_length()))]
        self.register_buffer("ids", torch.full((self.total,), EMPTY, dtype=torch.int64))
        self.register_buffer("slots", torch.cat([torch.arange(0), *(torch.arange(size) for size in num_slots)]))
        self.register_buffer("counts", torch.zeros(self.total, dtype=torch.int64))
        self.register_buffer("last", torch.zeros(self.total, dtype=torch.int64))

    def forward(self, ids: Tensor, table: Tensor | int | None) -> tuple[Tensor, Tensor]:
        """Look ids up.

        Args:
            ids: int64 ``(...)``, any value.
            table: as in `EmbeddingTables.lookup`.

        Returns:
            bool ``(...)``, whether an id has a slot, and int64 ``(...)``, which slot of its table if it has.
        """
        found, smaller = self._search(ids, table)
        if self.is_final:
            return found, smaller
        return found, self.slots[self._place(smaller, table)]

    def find(self, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Whether ids have a slot, bool ``(...)``, and their places in ``[0, S)`` if they have, int64 ``(...)``."""
        found, smaller = self._search(ids, table)
        return found, self._place(smaller, table)

    def _search(self, ids: Tensor, table: Tensor | int | None) -> tuple[Tensor, Tensor]:
        """Whether ids are resident, and how many residents of their table are smaller."""
        if isinstance(table, int) and not torch.compiler.is_exporting():  # ONNX has no such search
            own = self.ids[self.starts[table] : self.starts[table] + self.num_slots[table]]
            smaller = torch.searchsorted(own, ids.contiguous())
        else:
            starts, sizes = self._pick(self._starts, table), self._pick(self._sizes, table)
            smaller = torch.zeros_like(ids)
            for stride in self._strides:
                further = smaller + stride
                below = self.ids[(starts + further - 1).clamp_max(self.total - 1)] < ids
                smaller = torch.where(below & (further <= sizes), further, smaller)
        inside = smaller < self._pick(self._sizes, table)
        return (self.ids[self._place(smaller, table)] == ids) & inside & (ids != EMPTY), smaller

    def _place(self, smaller: Tensor, table: Tensor | int | None) -> Tensor:
        return (self._pick(self._starts, table) + smaller).clamp_max(self.total - 1)

    # ---- changes ----------------------------------------------------------------------------------------------------

    def owners(self) -> Tensor:
        """The table of each place: int64 ``(S,)``."""
        return torch.repeat_interleave(self._sizes)

    def within(self) -> Tensor:
        """The number of each place among those of its table: int64 ``(S,)``."""
        return torch.arange(self.total, device=self.ids.device) - self._starts[self.owners()]

    def of(self, table: int) -> Tensor:
        """The ids of a table that have a slot, sorted: int64 ``(n,)``."""
        own = self.ids[self.starts[table] : self.starts[table] + self.num_slots[table]]
        return own[own != EMPTY].clone()

    def touch_(self, places: Tensor, counts: Tensor, step: Tensor) -> None:
        """Note lookups of residents: different places, int64 ``(n,)``, and how often each was looked up."""
        self.counts[places] += counts
        self.last[places] = step

    def replace_(self, places: Tensor, ids: Tensor, counts: Tensor, last: Tensor) -> Tensor:
        """Give the slots at some places to other ids; returns those slots, int64 ``(n,)``, each within its table."""
        given = self.slots[places]
        self.ids[places], self.counts[places], self.last[places] = ids, counts, last
        order = sort_pairs(self.owners(), self.ids)
        for name in ("ids", "slots", "counts", "last"):
            values = getattr(self, name)
            values.copy_(values[order])
        return given

    def finalize_(self) -> None:
        """Turn into the serving form; whoever keeps the rows has put them into the order of places."""
        self.is_final = True
        del self.slots, self.counts, self.last

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def check_state(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        """Check that a state is one that a map can have.

        Raises:
            IncompatibleStateError: if ids are not sorted or have two slots, or two ids have one.
        """
        ids, slots = state.get(f"{prefix}ids"), state.get(f"{prefix}slots")
        if ids is None or ids.is_meta or ids.shape != (self.total,):
            return  # load_state_dict says so
        for start, size in zip(self.starts, self.num_slots, strict=True):
            own = ids[start : start + size]
            if not bool(((own[1:] > own[:-1]) | (own[1:] == EMPTY)).all()):
                raise IncompatibleStateError(f"{prefix}ids: ids of a table are not sorted, or one is there twice")
            taken = None if slots is None or slots.shape != ids.shape else slots[start : start + size].cpu()
            if taken is not None and not torch.equal(taken.sort().values, torch.arange(size)):
                raise IncompatibleStateError(f"{prefix}slots: {size} slots of a table are not there once each")

    @staticmethod
    def _pick(constants: Tensor, table: Tensor | int | None) -> Tensor:
        return constants if table is None else constants[table]


def sort_pairs(table: Tensor, ids: Tensor) -> Tensor:
    """The order of ``(table, id)`` pairs, int64 ``(n,)``; equal pairs stay in theirs."""
    order = ids.argsort(stable=True)
    return order[table[order].argsort(stable=True)]
