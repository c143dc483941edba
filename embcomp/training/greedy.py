"""Greedy cutting: one gene after another goes down, where that costs the least quality per byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from embcomp.training.search import Candidate, FrontPoint, Search, candidate_of, number_of


class GreedyCut(Search):
    """From the top of all ladders to their bottoms, each time by the step that loses the least value per byte saved.

    A step takes one gene to any lower rung of its ladder. Steps are compared by what they would cost from where the
    search is; that is evaluated anew only for the ``at_once`` steps that looked cheapest when last evaluated, and the
    cheapest of those is taken (lazy greedy). The steps of a gene that has moved are evaluated anew in any case.

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
        self.path: list[Candidate] = []
        self._slopes: dict[tuple[int, int], float] = {}

    def ask(self) -> list[Candidate]:
        if not self.path:
            return [self._top()]
        steps = self._steps(self.path[-1])
        stale = [step for step in sorted(steps, key=self._looks) if steps[step] not in self.known]
        unseen = [step for step in stale if step not in self._slopes]
        return [steps[step] for step in (unseen or stale[: self.at_once])]

    def tell(self, values: Sequence[float]) -> None:
        asked = self.ask()
        self.known.update(zip(asked, map(float, values), strict=True))
        if not self.path:
            self.path = asked
        while steps := self._steps(self.path[-1]):
            self._slopes |= {step: self._slope(found) for step, found in steps.items() if found in self.known}
            if any(step not in self._slopes for step in steps):
                return
            cheapest = min(steps, key=self._looks)
            if steps[cheapest] not in self.known:
                return
            self.path.append(steps[cheapest])
            self._slopes = {step: slope for step, slope in self._slopes.items() if step[0] != cheapest[0]}

    def state(self) -> dict[str, Any]:
        return {
            "known": [[list(candidate), value] for candidate, value in self.known.items()],
            "path": [list(candidate) for candidate in self.path],
            "slopes": [[*step, slope] for step, slope in self._slopes.items()],
        }

    def load(self, state: dict[str, Any]) -> None:
        known = {candidate_of(genes, self.ladders): number_of(value) for genes, value in state["known"]}
        path = [candidate_of(genes, self.ladders) for genes in state["path"]]
        slopes = {(gene, value): slope for gene, value, slope in state["slopes"]}
        if path[:1] != ([self._top()] if known else []) or not known.keys() >= set(path):
            raise ValueError("its way does not begin with the largest form, or leads to forms without a value")
        moved = ([old > new for old, new in zip(*forms, strict=True) if old != new] for forms in pairwise(path))
        if any(own != [True] for own in moved):  # one gene at a time, and down
            raise ValueError("its way has steps that there are not")
        if not slopes.keys() <= (self._steps(path[-1]).keys() if path else set()):
            raise ValueError("it has what other steps cost than there are")
        if any(type(slope) is not float or slope != slope for slope in slopes.values()):
            raise ValueError("what steps cost is no number")
        self.known, self.path, self._slopes = known, path, slopes

    @property
    def progress(self) -> tuple[int, int]:
        left = (
            [ladder.index(value) for ladder, value in zip(self.ladders, self.path[-1], strict=True)]
            if self.path
            else [0]
        )
        return sum(left), sum(len(ladder) - 1 for ladder in self.ladders)

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

    def _top(self) -> Candidate:
        return tuple(ladder[0] for ladder in self.ladders)

    def _steps(self, here: Candidate) -> dict[tuple[int, int], Candidate]:
        """(Gene, lower value) -> candidate, for all steps from a form."""
        return {
            (gene, lower): (*here[:gene], lower, *here[gene + 1 :])
            for gene, (ladder, value) in enumerate(zip(self.ladders, here, strict=True))
            for lower in ladder[ladder.index(value) + 1 :]
        }

    def _looks(self, step: tuple[int, int]) -> float:
        """What a step cost when it was last evaluated."""
        return self._slopes.get(step, float("-inf"))

    def _slope(self, candidate: Candidate) -> float:
        """Value lost per byte saved; a step that saves nothing is free only if it loses nothing."""
        here = self.path[-1]
        saved = self.cost(here) - self.cost(candidate)
        lost = self.known[here] - self.known[candidate]
        return lost / saved if saved > 0 else (float("inf") if lost > 0 else float("-inf"))
