"""Rows under a budget of bytes: given the widths of fields, which rows are worth theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embcomp.specs import TableSpec
from embcomp.strategies._remap import remap_bytes
from embcomp.training.search import Candidate

FormBytes = Callable[[Sequence[TableSpec], Any], tuple[list[int], int]]
_LOWEST, _HIGHEST = -(2**63), 2**63 - 1


class RowBudget:
    """Chooses rows by score per value, over all tables, until a budget is used up.

    A score above 0 is what a row is worth; a row that should be gone has ``−1/score``, so that it comes after all of
    those. At width w a positive score counts ``s / w``, a negative one ``s · w``: wider rows must be worth more.

    Args:
        specs: the tables.
        config: a complete `PrunedConfig`, whose ``limit_bytes`` is the budget; None keeps rows of positive score.
        score: float32 ``(R,)``, the rows of the tables one after another, each with its shared row if there are some.
        has_shared: whether every table has a shared row behind its ids.
        form_bytes: specs and complete config -> bytes of each table's rows, and of the remap.
    """

    def __init__(
        self, specs: Sequence[TableSpec], config: Any, score: Tensor, has_shared: bool, form_bytes: FormBytes
    ) -> None:
        self.specs, self.config, self.score, self.form_bytes = specs, config, score, form_bytes
        self.segments = [spec.num_embeddings + has_shared for spec in specs]
        rows = [
            part[: spec.num_embeddings].cpu().double().numpy()
            for part, spec in zip(score.split(self.segments), specs, strict=True)
        ]
        self._is_ordered = [bool((row[1:] <= row[:-1]).all()) for row in rows]
        self._sorted = [np.sort(row) for row in rows]
        self._costs: dict[int, float] = {}

    # ---- what candidates keep ---------------------------------------------------------------------------------------

    def cuts(self, widths: Candidate) -> list[float]:
        """Scores above which rows are kept, one for each table, so that the form fits the budget."""
        if self.config.limit_bytes is None:
            return [0.0] * len(widths)
        low, high = _LOWEST, _HIGHEST  # the highest density keeps nothing that can be left out
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(widths, middle) else (middle, high)
        number = self._numbers(widths, high)
        return [
            -math.inf if kept == len(rows) else _cut(_density_of(high), width)
            for kept, rows, width in zip(number, self._sorted, widths, strict=True)
        ]

    def kept(self, widths: Candidate) -> Tensor:
        """The rows that are kept, bool ``(R,)``: those of `cuts`, and the next ones that still fit."""
        scores = self.score.split(self.segments)
        cuts = self.cuts(widths)
        kept = [own.double() > cut for own, cut in zip(scores, cuts, strict=True)]
        if self.config.limit_bytes is not None:
            self._fill(kept, widths)
        return torch.cat(kept)

    def bytes_of(self, widths: Candidate, number: Sequence[int], is_first: Sequence[bool]) -> int:
        """Serve bytes of a form, by the numbers of kept rows and whether they are the first ones."""
        names = [spec.name for spec in self.specs]
        partly = [0 < n < spec.num_embeddings for n, spec in zip(number, self.specs, strict=True)]
        remapped = [some and not first for some, first in zip(partly, is_first, strict=True)]
        config = replace(
            self.config,
            num_kept=dict(zip(names, map(int, number), strict=True)),
            dims=dict(zip(names, widths, strict=True)),
            remapped=dict(zip(names, remapped, strict=True)),
        )
        rows, remap = self.form_bytes(self.specs, config)
        return sum(rows) + remap

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _fits(self, widths: Candidate, level: int) -> bool:
        return self.bytes_of(widths, self._numbers(widths, level), self._is_ordered) <= self.config.limit_bytes

    def _numbers(self, widths: Candidate, level: int) -> list[int]:
        """Rows of each table whose density is above a level; all of them where the rest costs less than the remap."""
        density, numbers = _density_of(level), []
        for rows, width, ordered, spec in zip(self._sorted, widths, self._is_ordered, self.specs, strict=True):
            number = len(rows) - int(np.searchsorted(rows, _cut(density, width), side="right"))
            fee = 0 if ordered else remap_bytes(spec.num_embeddings)
            rest = self._row_bytes(width) * (len(rows) - number)
            numbers.append(len(rows) if number > 0 and rest <= fee else number)
        return numbers

    def _row_bytes(self, width: int) -> float:
        """Bytes of one more row, from the difference that a thousand make."""
        if width not in self._costs:
            spec = replace(self.specs[0], num_embeddings=10**6)
            sizes = []
            for number in (1000, 2000):
                config = replace(
                    self.config, num_kept={spec.name: number}, dims={spec.name: width}, remapped={spec.name: False}
                )
                sizes.append(sum(self.form_bytes([spec], config)[0]))
            self._costs[width] = (sizes[1] - sizes[0]) / 1000
        return self._costs[width]

    def _fill(self, kept: list[Tensor], widths: Candidate) -> None:
        """Add the best rows that are left, as many as fit; then whole tables, where that saves their remap."""
        scores, owners, places = [], [], []
        for table, (flags, width) in enumerate(zip(kept, widths, strict=True)):
            left = (~flags).nonzero().squeeze(1).cpu().numpy()
            own = self.score.split(self.segments)[table].cpu().double().numpy()[left]
            scores.append(np.where(own > 0, own / width, own * width))
            owners.append(np.full(len(left), table))
            places.append(left)
        if not sum(map(len, scores)):
            return
        order = np.argsort(-np.concatenate(scores), kind="stable")
        owner, place = np.concatenate(owners)[order], np.concatenate(places)[order]
        number = np.array([int(flags[: s.num_embeddings].sum()) for flags, s in zip(kept, self.specs, strict=True)])
        low, high = 0, len(owner)
        while low < high:
            middle = (low + high + 1) // 2
            more = (number + np.bincount(owner[:middle], minlength=len(kept))).tolist()
            fits = self.bytes_of(widths, more, self._is_ordered) <= self.config.limit_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        for table, flags in enumerate(kept):
            flags[torch.from_numpy(place[:low][owner[:low] == table]).to(flags.device)] = True
        self._complete(kept, widths)

    def _complete(self, kept: list[Tensor], widths: Candidate) -> None:
        for table in sorted(range(len(kept)), key=lambda t: self.segments[t]):
            number = [int(flags[: s.num_embeddings].sum()) for flags, s in zip(kept, self.specs, strict=True)]
            number[table] = self.specs[table].num_embeddings
            if self.bytes_of(widths, number, self._is_ordered) <= self.config.limit_bytes:
                kept[table][:] = True


class Shrinker:
    """Brings widths within a budget at which the rows that should stay can all stay.

    Args:
        budget: of the group.
        reject: say None of candidates that don't fit, instead of narrowing fields until they do.
    """

    def __init__(self, budget: RowBudget, reject: bool = False) -> None:
        self.budget, self.reject = budget, reject
        self._wanted = [int((rows > 0).sum()) for rows in budget._sorted]

    def __call__(self, candidate: Candidate, random: np.random.Generator) -> Candidate | None:
        widths = list(candidate)
        while max(widths) > 1 and not self._fits(tuple(widths)):
            if self.reject:
                return None
            wide = [field for field, width in enumerate(widths) if width > 1]
            field = wide[int(random.integers(len(wide)))]
            widths[field] = int(random.integers(1, widths[field]))
        return tuple(widths)

    def _fits(self, widths: Candidate) -> bool:
        size = self.budget.bytes_of(widths, self._wanted, self.budget._is_ordered)
        return size <= self.budget.config.limit_bytes


def _density_of(level: int) -> float:
    """The float64 at a place in the order of all of them; the ends stand for infinities."""
    size = float(np.int64(level if level >= 0 else -level - 1).view(np.float64))
    size = math.inf if math.isnan(size) else size
    return size if level >= 0 else -size


def _cut(density: float, width: int) -> float:
    """The score that has a density at a width."""
    return density * width if density > 0 else density / width
