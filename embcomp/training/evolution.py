"""Evolutionary search, as OptEmbed searches the dimensions of fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from embcomp.training.search import Candidate, Search, candidate_of, number_of

Repair = Callable[[Candidate, np.random.Generator], Candidate | None]
"""Brings a candidate within what is allowed, or says by None that it is to be drawn anew."""

_TRIES = 50


class Evolution(Search):
    """Evolutionary search as in OptEmbed (arXiv 2208.04482): mutation and crossover of the best candidates.

    A round's candidates are mutations of a parent (every gene redrawn with a small probability) and crossovers of two
    (one cut between two genes), of parents drawn from the best ``num_parents`` of all that were evaluated. Candidates
    are values, not places: nothing that is recorded changes afterwards. None is evaluated twice; where no new one is
    found in `_TRIES` draws, the round is smaller, and an empty round ends the search.

    Args:
        low: smallest value of each gene.
        high: largest value of each gene.
        generations: rounds, the first random one included.
        num_mutations: mutations per round.
        num_crossovers: crossovers per round; both together make the first, random round.
        num_parents: candidates that parents are drawn from.
        mutation_probability: of each gene.
        patience: rounds without a better candidate after which the search ends; None for never.
        repair: brings candidates within a budget; where no draw is allowed, the search begins with ``low``.
        seeds: candidates of the first round; random ones fill it up to the size of the others.
        power: random values v are drawn in proportion to ``v ** -power``: 0 for uniform, 1 for log-uniform draws.
        seed: of all draws.
    """

    def __init__(
        self,
        low: Sequence[int],
        high: Sequence[int],
        generations: int = 30,
        num_mutations: int = 10,
        num_crossovers: int = 10,
        num_parents: int = 15,
        mutation_probability: float = 0.1,
        patience: int | None = None,
        repair: Repair | None = None,
        seeds: Sequence[Candidate] = (),
        power: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.low, self.high = tuple(low), tuple(high)
        self.generations, self.num_mutations, self.num_crossovers = generations, num_mutations, num_crossovers
        self.num_parents, self.mutation_probability, self.patience = num_parents, mutation_probability, patience
        self.repair, self.seeds = repair, tuple(seeds)
        values = [np.arange(lowest, highest + 1) for lowest, highest in zip(self.low, self.high, strict=True)]
        shares = [np.maximum(value, 1.0) ** -power for value in values]
        self._draws = [(value, share / share.sum()) for value, share in zip(values, shares, strict=True)]
        self.generation, self.stale = 0, 0
        self._pending: list[Candidate] | None = None
        self._random = np.random.default_rng(seed)

    def ask(self) -> list[Candidate]:
        if self._pending is None:
            over = self.generation >= self.generations or (self.patience is not None and self.stale >= self.patience)
            self._pending = [] if over else self._next_round()
        return list(self._pending)

    def tell(self, values: Sequence[float]) -> None:
        told = dict(zip(self.ask(), map(float, values), strict=True))
        before = max(self.known.values(), default=-np.inf)
        self.known |= told
        self.stale = 0 if max(self.known.values()) > before else self.stale + 1
        self.generation += 1
        self._pending = None

    def state(self) -> dict[str, Any]:
        return {
            "low": list(self.low),
            "high": list(self.high),
            "generation": self.generation,
            "stale": self.stale,
            "known": [[list(candidate), value] for candidate, value in self.known.items()],
            "pending": None if self._pending is None else [list(candidate) for candidate in self._pending],
            "random": self._random.bit_generator.state,
        }

    def load(self, state: dict[str, Any]) -> None:
        ranges = tuple(state["low"]), tuple(state["high"])
        if ranges != (self.low, self.high):
            raise ValueError(f"a search of values from {ranges[0]} to {ranges[1]}, not from {self.low} to {self.high}")
        values = [range(lowest, highest + 1) for lowest, highest in zip(self.low, self.high, strict=True)]
        known = {candidate_of(genes, values): number_of(value) for genes, value in state["known"]}
        pending = None if state["pending"] is None else [candidate_of(genes, values) for genes in state["pending"]]
        generation, stale = state["generation"], state["stale"]
        if any(type(number) is not int or number < 0 for number in (generation, stale)):
            raise ValueError(f"{generation!r} rounds, of which {stale!r} without a better candidate")
        if not known and (generation or pending == []):
            raise ValueError("rounds without a candidate")
        self._random.bit_generator.state = state["random"]  # the last that may raise, so that nothing is half done
        self.known, self._pending, self.generation, self.stale = known, pending, generation, stale

    @property
    def progress(self) -> tuple[int, int]:
        return self.generation, self.generations

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _next_round(self) -> list[Candidate]:
        size, found = self.num_mutations + self.num_crossovers, list[Candidate]()
        if not self.known:
            for seed in self.seeds:
                self._add(found, partial(tuple, seed), tries=1)
            while len(found) < size and self._add(found, self._draw):
                pass
            return found or [self.low]
        parents = self.best(self.num_parents)
        for number in range(size):
            crossing = number >= self.num_mutations and len(parents) > 1 and len(self.low) > 1
            self._add(found, partial(self._cross if crossing else self._mutate, parents))
        return found

    def _add(self, found: list[Candidate], draw: Callable[[], Candidate], tries: int = _TRIES) -> bool:
        """Add a candidate that is new and allowed; say whether there was one."""
        for _ in range(tries):
            candidate = draw()
            repaired = candidate if self.repair is None else self.repair(candidate, self._random)
            if repaired is not None and repaired not in self.known and repaired not in found:
                found.append(repaired)
                return True
        return False

    def _draw(self) -> Candidate:
        return tuple(int(self._random.choice(values, p=shares)) for values, shares in self._draws)

    def _mutate(self, parents: Sequence[Candidate]) -> Candidate:
        parent = parents[int(self._random.integers(len(parents)))]
        redrawn = self._random.random(len(parent)) < self.mutation_probability
        redrawn[int(self._random.integers(len(parent)))] |= not redrawn.any()
        return tuple(new if flag else old for old, new, flag in zip(parent, self._draw(), redrawn, strict=True))

    def _cross(self, parents: Sequence[Candidate]) -> Candidate:
        first, second = self._random.choice(len(parents), 2, replace=False)
        cut = int(self._random.integers(1, len(self.low)))
        return parents[first][:cut] + parents[second][cut:]
