"""Greedy cutting: one gene after another a step down, where that costs the least quality per byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from embcomp.training.search import Candidate, Search


class FrontPoint(NamedTuple):
    """A form on the way from the largest to the smallest."""

    candidate: Candidate
    bytes: int
    value: float


class GreedyCut(Search):
    """From the top of all ladders to their bottoms, each time by the step that loses the least value per byte saved.

    Steps are compared by what they would cost from where the search is. That is evaluated anew only for the ``at_once``
    steps that looked cheapest when last evaluated, and the cheapest of those is taken (lazy greedy).

    Args:
        ladders: values of each gene, falling.
        cost: candidate -> bytes.
        limit: bytes that the chosen form may take; None chooses the largest.
        at_once: steps that are evaluated in a round.
    """

    def __init__(
        self,
        ladders: Sequence[Sequence[int]],
        cost: Callable[[Candidate], int],
        limit: int | None = None,
        at_once: int = 8,
    ) -> None:
        super().__init__()
        self.limit = limit
        self.ladders, self.cost, self.at_once = [tuple(ladder) for ladder in ladders], cost, at_once
        self._below = [dict(pairwise(ladder)) for ladder in self.ladders]
        self.path: list[Candidate] = []
        self._slopes: dict[int, float] = {}

    def ask(self) -> list[Candidate]:
        if not self.path:
            return [tuple(ladder[0] for ladder in self.ladders)]
        return [candidate for candidate in self._steps().values() if candidate not in self.known]

    def tell(self, values: Sequence[float]) -> None:
        asked = self.ask()
        self.known.update(zip(asked, map(float, values), strict=True))
        if not self.path:
            self.path = asked
        while self.path:  # steps that were all evaluated on an earlier way here need no asking
            steps = self._steps()
            if not steps or any(candidate not in self.known for candidate in steps.values()):
                return
            self._slopes |= {gene: self._slope(candidate) for gene, candidate in steps.items()}
            gene = min(steps, key=lambda gene: self._slopes[gene])
            self.path.append(steps[gene])
            del self._slopes[gene]

    def state(self) -> dict[str, Any]:
        return {
            "known": [[list(candidate), value] for candidate, value in self.known.items()],
            "path": [list(candidate) for candidate in self.path],
            "slopes": [[gene, slope] for gene, slope in self._slopes.items()],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.known = {tuple(candidate): value for candidate, value in state["known"]}
        self.path = [tuple(candidate) for candidate in state["path"]]
        self._slopes = {int(gene): slope for gene, slope in state["slopes"]}

    @property
    def progress(self) -> tuple[int, int]:
        return max(len(self.path) - 1, 0), sum(len(ladder) - 1 for ladder in self.ladders)

    def finalists(self, number: int) -> list[Candidate]:
        return [self.within(self.limit)]

    def within(self, limit: int | None) -> Candidate:
        """The first form on the way that takes at most ``limit`` bytes, or the last one."""
        fitting = (form for form in self.path if limit is None or self.cost(form) <= limit)
        return next(fitting, self.path[-1])

    def front(self) -> list[FrontPoint]:
        """The forms on the way, the largest first."""
        return [FrontPoint(candidate, self.cost(candidate), self.known[candidate]) for candidate in self.path]

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _steps(self) -> dict[int, Candidate]:
        """Gene -> candidate one step down, for the steps that look cheapest; steps never looked at come first."""
        here = self.path[-1]
        open_genes = [gene for gene, value in enumerate(here) if value in self._below[gene]]
        unseen = [gene for gene in open_genes if gene not in self._slopes]
        seen = sorted((gene for gene in open_genes if gene in self._slopes), key=lambda gene: self._slopes[gene])
        chosen = [*unseen, *seen][: max(self.at_once, len(unseen))]
        return {gene: (*here[:gene], self._below[gene][here[gene]], *here[gene + 1 :]) for gene in chosen}

    def _slope(self, candidate: Candidate) -> float:
        """Value lost per byte saved; a step that saves nothing is free only if it loses nothing."""
        here = self.path[-1]
        saved = self.cost(here) - self.cost(candidate)
        lost = self.known[here] - self.known[candidate]
        return lost / saved if saved > 0 else (float("inf") if lost > 0 else float("-inf"))
