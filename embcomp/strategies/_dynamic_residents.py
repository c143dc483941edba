"""Ids that come and go: lookups are counted, and every so many steps slots are given to other ids."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from embcomp.hashing import hash_seed
from embcomp.strategies._dynamic_history import History, Lookups, rank_within
from embcomp.strategies._dynamic_map import EMPTY, IdMap
from embcomp.strategies._dynamic_policy import Policy

if TYPE_CHECKING:
    from embcomp.strategies.dynamic import DynamicConfig

logger = logging.getLogger(__name__)

MOST_PENDING = 256
"""Lookups that are kept until the next step: a loop that never makes one must not fill the memory."""


class NewResidents(NamedTuple):
    """Ids that were given a slot: int64 ``(n,)`` each.

    Attributes:
        table: index of the table.
        ids: the ids.
        slots: their slots within the table.
    """

    table: Tensor
    ids: Tensor
    slots: Tensor


class Residents(nn.Module):
    """Who has the slots of a group of tables, and, while training, who else was looked up lately.

    Lookups wait until the step is made, then residents are counted in the map and other ids in the history. Between
    steps nothing waits, so that the state of the buffers is all there is.

    Args:
        names: of the tables.
        num_slots: of each table; 0 where it needs none.
        room: of each table, ids without a slot that are remembered.
        config: the rules.

    Attributes:
        map: the ids that have a slot.
        history: ids without one; not there when served.
        clock: int64 ``()``, steps so far; not there when served.
    """

    history: History
    clock: Tensor
    _seeds: Tensor

    def __init__(
        self, names: Sequence[str], num_slots: Sequence[int], room: Sequence[int], config: DynamicConfig
    ) -> None:
        super().__init__()
        self.names, self.policy, self.interval = tuple(names), Policy(config), config.interval
        self.map = IdMap(num_slots)
        self.history = History(room)
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))
        seeds = [hash_seed(config.seed, name, "admission") for name in names]
        self.register_buffer("_seeds", torch.tensor(seeds, device="cpu"), persistent=False)
        self._waiting: list[tuple[Tensor, Tensor | int]] = []
        self._told: set[str] = set()

    def note_(self, ids: Tensor, table: Tensor | int) -> None:
        """Note a lookup.

        Args:
            ids: int64 ``(...)``; `EMPTY` is not counted, nor are ids of tables without slots.
            table: broadcastable to ``ids``.
        """
        self._waiting.append((ids, table))
        if len(self._waiting) < MOST_PENDING or torch.compiler.is_compiling():
            return
        self._tell_once(
            f"{MOST_PENDING} lookups without a step, so that no id gets a row of its own: call "
            "handle.step_(optimizer) after optimizer.step()"
        )
        self._count_()

    @torch.no_grad()
    def step_(self) -> NewResidents | None:
        """Count what was looked up, and every so many steps give slots to other ids."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._tell_once(
                "several processes are running, and each counts its own lookups: copies of these tables "
                "(DistributedDataParallel) give their rows to different ids, and are no longer the same. Train them in "
                "one process"
            )
        self.clock += 1
        self._count_()
        return self.compete_() if int(self.clock) % self.interval == 0 else None

    @torch.no_grad()
    def compete_(self) -> NewResidents | None:
        """Let the ids of the history compete with residents; who got a slot, or None if nobody did."""
        candidates = self.history.take_()
        candidates = candidates.of(~self.map.find(candidates.ids, candidates.table)[0])
        candidates = candidates.of(self.policy.admits(candidates, self._seeds, self.clock))
        places, winners = self.policy.compete(self.map, candidates, self.clock)
        if not len(places):
            return None
        slots = self.map.replace_(places, winners.ids, winners.counts, winners.last)
        return NewResidents(winners.table, winners.ids, slots)

    @torch.no_grad()
    def admit_(self, table: int, counts: Tensor) -> None:
        """Give all slots of a table to its most frequent ids, of equally frequent ones to the smaller.

        Args:
            table: index of the table.
            counts: ``(V,)``; ids that never occur get no slot.
        """
        ids = counts.argsort(stable=True, descending=True)[: self.map.num_slots[table]]
        ids = ids[counts[ids] > 0].to(self.map.ids.device)
        start = self.map.starts[table]
        self.map.ids[start : start + self.map.num_slots[table]] = EMPTY
        times = counts.to(ids.device)[ids].round().long().clamp_min(1)
        self.map.replace_(start + torch.arange(len(ids), device=ids.device), ids, times, self.clock.expand_as(ids))

    @torch.no_grad()
    def take_(self, old: Residents) -> NewResidents:
        """Take over residents, history and time of the same tables with other numbers of slots.

        Where there are fewer slots those of the highest scores stay, and of equal ones those looked up more often.

        Returns:
            Who has a slot, and which.
        """
        places, self.clock, self._waiting = old.map, old.clock.clone(), list(old._waiting)
        score = old.policy.resident_score(places.counts, places.last, old.clock)
        score = score.masked_fill(places.ids == EMPTY, -math.inf)
        order = places.counts.argsort(stable=True, descending=True)
        order = order[score[order].argsort(stable=True, descending=True)]
        ranks = rank_within(places.owners(), order, len(self.names))
        stays = (ranks < self.map._sizes[places.owners()]) & (places.ids != EMPTY)
        table, ids = places.owners()[stays], places.ids[stays]
        numbers = rank_within(table, torch.arange(len(ids), device=ids.device), len(self.names))
        new = self.map._starts[table] + numbers
        slots = self.map.replace_(new, ids, places.counts[stays], places.last[stays])
        self.history.add_(old.history.copied(), old._keeping)
        return NewResidents(table, ids, slots)

    def finalize_(self) -> None:
        """Keep what serving needs: the map's ids."""
        self.map.finalize_()
        del self.history, self.clock
        self._waiting = []

    def check_state(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        """Check that a state is one that this can have.

        Raises:
            IncompatibleStateError: if it is not.
        """
        self.map.check_state(state, f"{prefix}map.")
        if not self.map.is_final:
            self.history.check_state(state, f"{prefix}history.")

    def _count_(self) -> None:
        """Work off what waits."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        device = self.clock.device
        ids = torch.cat([ids.reshape(-1) for ids, _ in waiting]).to(device)
        table = torch.cat([torch.as_tensor(t, device=device).expand(i.shape).reshape(-1) for i, t in waiting])
        counted = (ids != EMPTY) & (self.map._sizes[table] > 0)
        ids, table = ids[counted], table[counted]
        lookups = Lookups(table, ids, torch.ones_like(ids), self.clock.expand_as(ids)).merged()
        found, places = self.map.find(lookups.ids, lookups.table)
        self.map.touch_(places[found], lookups.counts[found], self.clock)
        if self.history.add_(lookups.of(~found), self._keeping):
            self._tell_once(
                "more ids without a slot were looked up since the last competition than there is room for; those of "
                "the lowest scores are forgotten, and may never get one: raise history= or min_history=, or lower "
                "interval="
            )

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning("tables %s: %s", ", ".join(self.names[:3]), message)

    def _keeping(self, lookups: Lookups) -> Tensor:
        return self.policy.keeping(lookups, self._seeds, self.clock)
