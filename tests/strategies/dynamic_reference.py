"""`dynamic`'s rules once more, for one table, in dicts and loops: slow and obvious."""

import math

import torch

from embcomp.hashing import hash_ids, hash_seed


class Reference:
    """One table: who is resident in which slot, and who was looked up since the last competition."""

    def __init__(self, name, slots, config):
        self.name, self.config, self.now = name, config, 0
        self.residents = {}  # id -> [slot, lookups, step of the last lookup]
        self.free = list(range(slots))
        self.candidates = {}  # id -> [lookups, step of the last lookup]

    def step(self, ids):
        """One training step that looks these ids up."""
        self.now += 1
        for value in ids:
            if value == 2**63 - 1:
                continue
            if value in self.residents:
                self.residents[value][1] += 1
                self.residents[value][2] = self.now
            else:
                times, _ = self.candidates.get(value, (0, 0))
                self.candidates[value] = [times + 1, self.now]
        if self.now % self.config.interval == 0:
            self.compete()

    def compete(self):
        ranking = [(-self.resident_score(i), 0, 0, i) for i in self.residents]
        ranking += [(-self.score(*self.candidates[i]), 1, -self.candidates[i][0], i) for i in self.admitted()]
        ranking.sort()
        winners = ranking[: len(self.residents) + len(self.free)]
        new = sorted(place[2:] for place in winners if place[1] == 1)
        kept = {place[3] for place in winners if place[1] == 0}
        losers = sorted(i for i in self.residents if i not in kept)
        missing = len(new) - len(losers)
        slots = [self.residents.pop(i)[0] for i in losers] + self.free[len(self.free) - missing :]
        self.free = self.free[: len(self.free) - missing]
        for slot, (_, value) in zip(slots, new, strict=True):
            self.residents[value] = [slot, *self.candidates[value]]
        self.candidates = {}

    def admitted(self):
        return [value for value, (times, _) in self.candidates.items() if self.admits(value, times)]

    def admits(self, value, times):
        if self.config.admission == "always":
            return True
        if self.config.admission == "count":
            return times >= self.config.min_count
        seed = hash_seed(self.config.seed, self.name, "admission")
        bits = int(hash_ids(hash_ids(torch.tensor(value), seed), self.now)) % 2**64
        return (bits >> 11) / 2**53 >= (1 - self.config.admit_probability) ** times

    def score(self, times, last):
        if self.config.policy == "lru":
            return last
        if self.config.policy == "distance_lfu":
            return times / (self.now - last + 1) ** self.config.decay
        return times

    def resident_score(self, value):
        _, times, last = self.residents[value]
        if self.config.policy != "ttl":
            return self.score(times, last)
        return math.inf if self.now - last <= self.config.ttl else last - self.now
