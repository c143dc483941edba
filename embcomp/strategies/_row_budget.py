"""Rows under a budget of bytes: given the widths of fields, which rows are worth theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embcomp.specs import TableSpec
from embcomp.storage.bitmap import bitmap_bytes
from embcomp.training.search import Candidate

FormBytes = Callable[[Sequence[TableSpec], Any], tuple[list[int], list[int], int]]
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
        form_bytes: specs and complete config -> bytes of each table's rows and of its matrix, and of the remap.
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
        self.sizes = np.array([len(row) for row in rows])
        self.num_wanted = [int((row > 0).sum()) for row in rows]
        self.is_ordered = [bool((row[1:] <= row[:-1]).all()) for row in rows]
        fees = zip(self.is_ordered, specs, strict=True)
        self._fees = np.array([0 if ordered else bitmap_bytes(spec.num_embeddings) for ordered, spec in fees])
        self._spared = int(has_shared and config.unseen != "oov_row")  # whole tables need no shared row
        # Ranks among all scores, sorted within each table and set apart by table: one search answers for all tables.
        self._all = np.sort(np.concatenate(rows))
        self._apart = np.arange(len(rows)) * (len(self._all) + 1)
        ranks = [np.sort(np.searchsorted(self._all, row, side="right")) for row in rows]
        self._ranks = np.concatenate([own + apart for own, apart in zip(ranks, self._apart, strict=True)])
        self._ends = np.cumsum(self.sizes)
        self._costs: dict[int, float] = {}

    # ---- what candidates keep ---------------------------------------------------------------------------------------

    def cuts(self, widths: Candidate) -> list[float]:
        """Scores above which rows are kept, one for each table, so that the form fits the budget to within a row.

        Where rows are worth the same, all of them are kept or none.
        """
        if self.config.limit_bytes is None:
            return [0.0] * len(widths)
        numbers = self.numbers(widths)
        cuts, partly = np.full(len(widths), -math.inf), numbers < self.sizes
        best_left_out = (self._ends - numbers - 1)[partly]
        cuts[partly] = self._all[self._ranks[best_left_out] - self._apart[partly] - 1]
        found: list[float] = cuts.tolist()
        return found

    def numbers(self, widths: Candidate) -> np.ndarray:
        """How many rows of each table are above its cut: int64 ``(T,)``."""
        if self.config.limit_bytes is None:
            return np.array(self.num_wanted)
        width, prices = np.array(widths), np.array([self._row_bytes(width) for width in widths])

        @cache
        def fits(number: tuple[int, ...]) -> bool:
            return self.bytes_of(widths, number) <= self.config.limit_bytes

        if fits(tuple(self.sizes.tolist())):
            return self.sizes
        # The highest density keeps nothing that can be left out, the lowest everything, which does not fit.
        low, high, most, above = _LOWEST, _HIGHEST, self.sizes.sum(), np.zeros_like(self.sizes)
        while high - low > 1 and most - above.sum() > 1:
            middle = (low + high) // 2
            number = self._above(_cut(_density_of(middle), width))
            if fits(tuple(self._completed(number, prices).tolist())):
                high, above = middle, number
            else:
                low, most = middle, number.sum()
        return self._completed(above, prices)

    def kept(self, widths: Candidate) -> Tensor:
        """The rows that are kept, bool ``(R,)``: the best per value, as many as fit exactly."""
        scores = self.score.split(self.segments)
        if self.config.limit_bytes is None:
            return self.score > 0
        ranked, owners, places = [], [], []
        for table, (part, spec, width) in enumerate(zip(scores, self.specs, widths, strict=True)):
            own = part[: spec.num_embeddings].cpu().double().numpy()
            ranked.append(np.where(own > 0, own / width, own * width))
            owners.append(np.full(len(own), table))
            places.append(np.arange(len(own)))
        order = np.argsort(-np.concatenate(ranked), kind="stable")
        owner, place = np.concatenate(owners)[order], np.concatenate(places)[order]
        prices = np.array([self._row_bytes(width) for width in widths])

        def numbers(first: int) -> list[int]:
            found: list[int] = self._completed(np.bincount(owner[:first], minlength=len(widths)), prices).tolist()
            return found

        low, high = 0, len(owner)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.bytes_of(widths, numbers(middle)) <= self.config.limit_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        kept = [torch.zeros_like(part, dtype=torch.bool) for part in scores]
        for table, (flags, number) in enumerate(zip(kept, numbers(low), strict=True)):
            if number == self.specs[table].num_embeddings:
                flags[:] = True
            else:
                flags[torch.from_numpy(place[:low][owner[:low] == table]).to(flags.device)] = True
        return torch.cat(kept)

    def bytes_of(self, widths: Candidate, number: Sequence[int]) -> int:
        """Serve bytes of a form, by the numbers of kept rows."""
        names = [spec.name for spec in self.specs]
        partly = [0 < n < spec.num_embeddings for n, spec in zip(number, self.specs, strict=True)]
        remapped = [some and not ordered for some, ordered in zip(partly, self.is_ordered, strict=True)]
        form = {
            "num_kept": dict(zip(names, map(int, number), strict=True)),
            "dims": dict(zip(names, widths, strict=True)),
            "remapped": dict(zip(names, remapped, strict=True)),
        }
        config = copy(self.config)
        vars(config).update(form)  # past the checks of a new config: a search asks thousands of times
        rows, matrices, remap = self.form_bytes(self.specs, config)
        return sum(rows) + remap + sum(matrices)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _above(self, cut: np.ndarray) -> np.ndarray:
        """Rows of each table whose scores are above its cut."""
        rank = self._all.searchsorted(cut, side="right")
        found: np.ndarray = self._ends - self._ranks.searchsorted(self._apart + rank, side="right")
        return found

    def _completed(self, numbers: np.ndarray, prices: np.ndarray) -> np.ndarray:
        """Keep tables whole where that costs no more than to leave rows out: to say which, and a row for them all."""
        saved = prices * (self.sizes - numbers - self._spared)
        return np.where((numbers > 0) & (saved <= self._fees), self.sizes, numbers)

    def _row_bytes(self, width: int) -> float:
        """Bytes of one more row of many, from the difference that a thousand make."""
        if width not in self._costs:
            spec = replace(self.specs[0], num_embeddings=10**6)
            sizes = []
            for number in (998_000, 999_000):
                config = replace(
                    self.config, num_kept={spec.name: number}, dims={spec.name: width}, remapped={spec.name: False}
                )
                sizes.append(sum(self.form_bytes([spec], config)[0]))
            self._costs[width] = (sizes[1] - sizes[0]) / 1000
        return self._costs[width]


def _density_of(level: int) -> float:
    """The float64 at a place in the order of all of them; the ends stand for infinities."""
    size = float(np.int64(level if level >= 0 else -level - 1).view(np.float64))
    size = math.inf if math.isnan(size) else size
    return size if level >= 0 else -size


def _cut(density: float, width: np.ndarray) -> np.ndarray:
    """The scores that have a density at some widths."""
    with np.errstate(over="ignore"):  # infinity is meant
        return density * width if density > 0 else density / width
