"""Widths of fields under a budget: brought within it, and up to it."""

from __future__ import annotations

import numpy as np

from embcomp.strategies._row_budget import RowBudget
from embcomp.training.search import Candidate

CONSTRAINTS = ("prune", "shrink", "reject")


class WidthRepair:
    """Brings candidates of a search to widths that use the budget up.

    Args:
        budget: of the group, with a limit.
        constraint: of widths at which the rows that the supernet keeps take too much: ``"prune"`` leaves them, as rows
            will go; ``"shrink"`` narrows randomly chosen fields until they fit; ``"reject"`` says None of them, but
            for the narrowest.
    """

    def __init__(self, budget: RowBudget, constraint: str) -> None:
        self.budget, self.constraint = budget, constraint
        self._every_row = budget.sizes.tolist()

    def __call__(self, candidate: Candidate, random: np.random.Generator) -> Candidate | None:
        widths = list(candidate)
        while self.constraint != "prune" and max(widths) > 1 and not self._fits(widths, self.budget.num_wanted):
            if self.constraint == "reject":
                return None
            wide = [field for field, width in enumerate(widths) if width > 1]
            field = wide[int(random.integers(len(wide)))]
            widths[field] = int(random.integers(1, widths[field]))
        return self._widened(np.array(widths), random)

    def _widened(self, widths: np.ndarray, random: np.random.Generator) -> Candidate:
        """Widths with values given to randomly chosen fields, while all rows fit; with ``"prune"`` one value more."""
        dim = self.budget.specs[0].embedding_dim
        fields = random.permutation(np.repeat(np.arange(len(widths)), dim - widths))

        def with_first(number: int) -> list[int]:
            found: list[int] = (widths + np.bincount(fields[:number], minlength=len(widths))).tolist()
            return found

        low, high = 0, len(fields)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._fits(with_first(middle), self._every_row) else (low, middle - 1)
        has_room = low > 0 or self._fits(with_first(0), self._every_row)
        return tuple(with_first(low + int(has_room and self.constraint == "prune")))

    def _fits(self, widths: list[int], rows: list[int]) -> bool:
        limit: int = self.budget.config.limit_bytes
        return self.budget.bytes_of(tuple(widths), rows) <= limit
