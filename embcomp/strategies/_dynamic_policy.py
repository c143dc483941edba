"""Who gets a slot: admission, scores, and the competition of candidates with residents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embcomp.hashing import hash_ids
from embcomp.strategies._dynamic_history import Lookups, rank_within
from embcomp.strategies._dynamic_map import EMPTY, IdMap

if TYPE_CHECKING:
    from embcomp.strategies.dynamic import DynamicConfig

POLICIES = ("lfu", "lru", "distance_lfu", "ttl")
ADMISSIONS = ("always", "count", "probability")


@dataclass(frozen=True)
class Policy:
    """The rules of a config, as functions of counts and steps.

    Attributes:
        config: which names them.
    """

    config: DynamicConfig

    def score(self, counts: Tensor, last: Tensor, now: Tensor) -> Tensor:
        """What slots go by: float64 ``(n,)``, the higher the better; without a difference between old and new ids.

        Args:
            counts: int64 ``(n,)``, lookups.
            last: int64 ``(n,)``, the step of the last one.
            now: int64 ``()``, the step.
        """
        if self.config.policy == "lru":
            return last.double()
        if self.config.policy == "distance_lfu":
            return counts.double() / (now - last + 1).double().pow(self.config.decay)
        return counts.double()

    def resident_score(self, counts: Tensor, last: Tensor, now: Tensor) -> Tensor:
        """`score` of residents; with ``"ttl"`` nobody gets in front of those that live, and anybody of the others."""
        if self.config.policy == "ttl":
            age = (now - last).double()
            return torch.where(age > self.config.ttl, -age, math.inf)
        return self.score(counts, last, now)

    def keeping(self, lookups: Lookups, seeds: Tensor, now: Tensor) -> Tensor:
        """In which order ids stay in a history that is full, the best first: int64 ``(n,)``.

        Of equal scores those come first that were looked up more often, and of those chance decides, anew in every
        interval: were it their ids, some would never be remembered.

        Args:
            lookups: each id once.
            seeds: int64 ``(T,)``, of the tables.
            now: int64 ``()``, the step.
        """
        chance = hash_ids(hash_ids(lookups.ids, seeds[lookups.table]), ~(now // self.config.interval)) & 0xFFFFFFFF
        order = ((lookups.counts.clamp_max(2**31 - 1) << 32) | chance).argsort(descending=True)
        return order[self.score(lookups.counts, lookups.last, now)[order].argsort(stable=True, descending=True)]

    def admits(self, candidates: Lookups, seeds: Tensor, now: Tensor) -> Tensor:
        """Which candidates may compete: bool ``(n,)``.

        Chance is a hash of seed, id and step, so that it is the same on every device and after every resumption.

        Args:
            candidates: each id once.
            seeds: int64 ``(T,)``, of the tables.
            now: int64 ``()``, the step.
        """
        if self.config.admission == "always":
            return torch.ones_like(candidates.ids, dtype=torch.bool)
        if self.config.admission == "count":
            return candidates.counts >= self.config.min_count
        bits = hash_ids(hash_ids(candidates.ids, seeds[candidates.table]), now)
        chance = ((bits >> 11) & (2**53 - 1)).double() / 2**53
        return chance >= (1 - self.config.admit_probability) ** candidates.counts.double()

    def compete(self, residents: IdMap, candidates: Lookups, now: Tensor) -> tuple[Tensor, Lookups]:
        """Let admitted candidates compete with residents for the slots of their tables.

        Where scores are equal residents stay; among residents smaller ids do, and among candidates those come first
        that were looked up more often, then smaller ids.

        Args:
            residents: of all tables.
            candidates: admitted ones, sorted by table, then by id.
            now: int64 ``()``, the step.

        Returns:
            Places whose slots change hands, int64 ``(n,)``, and the ids that get them, in the same order.
        """
        candidates = candidates.of(candidates.counts.argsort(stable=True, descending=True))
        old = self.resident_score(residents.counts, residents.last, now)
        old = old.masked_fill(residents.ids == EMPTY, -math.inf)
        score = torch.cat([old, self.score(candidates.counts, candidates.last, now)])
        table = torch.cat([residents.owners(), candidates.table])
        slots = torch.tensor(residents.num_slots, device=table.device)
        wins = rank_within(table, score.argsort(stable=True, descending=True), len(slots)) < slots[table]
        # As many lose their slot as get one, table by table, so that the n-th of the ones gets that of the n-th of the
        # others once both are in the order of tables.
        winners = candidates.of(wins[residents.total :])
        return (~wins[: residents.total]).nonzero().squeeze(1), winners.of(winners.table.argsort(stable=True))
