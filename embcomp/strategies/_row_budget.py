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
_MOST = 2.0**128
"""In place of an infinite score: more than any float32, and still finite after a division and a multiplication."""
_MOST_STEPS = 4096
_CHEAP = 1 / 16
"""Share of the budget that saying which ids are kept may take: for less, no table is cut by its ids' order instead."""


class RowBudget:
    """Chooses rows by score per value, over all tables, until a budget is used up.

    A score above 0 is what a row is worth; a row that should be gone has ``−1/score``, so that it comes after all of
    those. At width w a positive score counts ``s / w``, a negative one ``s · w``: wider rows must be worth more. Of
    rows that are worth the same, those of the first tables and ids come first.

    Bits say which ids of a table are kept, unless they are its first ones. Where budgets are so small that those bits
    take a good part of them, tables whose ids are numbered by falling frequency may be kept from their first id on
    instead, if the rows that then find room are worth more together.

    Args:
        specs: the tables.
        config: a complete `PrunedConfig`, whose ``limit_bytes`` is the budget; None keeps rows of positive score.
        score: float32 ``(R,)``, the rows of the tables one after another, each with its shared row if there are some.
        has_shared: whether every table has a shared row behind its ids.
        form_bytes: specs and complete config -> bytes of each table's rows and of its matrix, and of the remap.
        is_falling: whether the ids of each table are numbered by falling frequency; None where that isn't known.

    Attributes:
        place: int32 ``(R,)``: how many rows of its table come before each; −1 for shared rows, which are always kept.
    """

    def __init__(
        self,
        specs: Sequence[TableSpec],
        config: Any,
        score: Tensor,
        has_shared: bool,
        form_bytes: FormBytes,
        is_falling: Sequence[bool] | None = None,
    ) -> None:
        self.specs, self.config, self.form_bytes = specs, config, form_bytes
        self.segments = [spec.num_embeddings + has_shared for spec in specs]
        self._spared = int(has_shared and config.unseen != "oov_row")  # whole tables need no shared row
        rows = [
            part[: spec.num_embeddings].cpu().double().clamp_max(_MOST).numpy()
            for part, spec in zip(score.split(self.segments), specs, strict=True)
        ]
        self.sizes = np.array([len(row) for row in rows])
        self.num_wanted = [int((row > 0).sum()) for row in rows]
        self._costs: dict[int, float] = {}
        orders = self._rank(rows)
        falling = [
            known and not own for known, own in zip(is_falling or [False] * len(rows), self.is_ordered, strict=True)
        ]
        if config.limit_bytes is not None and self._fees[falling].sum() > _CHEAP * config.limit_bytes:
            orders = self._rank_by_id_if_better(rows, orders, falling)
        places = [np.append(np.argsort(order), [-1] * has_shared) for order in orders]
        self.place = torch.from_numpy(np.concatenate(places)).int().to(score.device)

    def _rank(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Order the rows of each table by score; return their ids in that order."""
        orders = [np.argsort(-row, kind="stable") for row in rows]
        self.is_ordered = [bool((row[1:] <= row[:-1]).all()) for row in rows]
        fees = zip(self.is_ordered, self.specs, strict=True)
        self._fees = np.array([0 if ordered else bitmap_bytes(spec.num_embeddings) for ordered, spec in fees])
        self._sorted = [row[order] for row, order in zip(rows, orders, strict=True)]
        # Ranks among all scores, sorted within each table and set apart by table: one search answers for all tables.
        self._all = np.sort(np.concatenate(rows))
        self._apart = np.arange(len(rows)) * (len(self._all) + 1)
        ranks = [np.searchsorted(self._all, row[::-1], side="right") for row in self._sorted]
        self._ranks = np.concatenate([own + apart for own, apart in zip(ranks, self._apart, strict=True)])
        self._ends = np.cumsum(self.sizes)
        return orders

    def _rank_by_id_if_better(
        self, rows: Sequence[np.ndarray], orders: list[np.ndarray], falling: Sequence[bool]
    ) -> list[np.ndarray]:
        """Order tables by id if, at most widths, the rows that fit are worth more then; return the orders."""
        dim = self.specs[0].embedding_dim
        shown = [(dim >> power or 1,) * len(rows) for power in range(dim.bit_length())]
        worth = [np.maximum(row, 0) for row in rows]

        def values(orders: list[np.ndarray]) -> list[float]:
            kept = [zip(worth, orders, self.numbers(widths).tolist(), strict=True) for widths in shown]
            return [sum(float(own[order[:number]].sum()) for own, order, number in tables) for tables in kept]

        by_score = values(orders)
        by_id = self._rank(
            [_falling_means(own) if falls else row for row, own, falls in zip(rows, worth, falling, strict=True)]
        )
        wins = sum(mine > other for mine, other in zip(values(by_id), by_score, strict=True))
        return by_id if 2 * wins > len(shown) else self._rank(rows)

    # ---- what candidates keep ---------------------------------------------------------------------------------------

    def numbers(self, widths: Candidate) -> np.ndarray:
        """How many rows of each table are kept, int64 ``(T,)``: the best per value, as many as fit."""
        if self.config.limit_bytes is None:
            return np.array(self.num_wanted)
        width, prices = np.array(widths), np.array([self._row_bytes(width) for width in widths])

        @cache
        def fits(number: tuple[int, ...]) -> bool:
            return self.bytes_of(widths, self._completed(np.array(number), prices).tolist()) <= self.config.limit_bytes

        if fits(tuple(self.sizes.tolist())):
            return self.sizes
        # The highest density keeps nothing that can be left out, the lowest everything, which does not fit.
        low, high, most, least = _LOWEST, _HIGHEST, self.sizes.sum(), 0
        while high - low > 1 and most - least > 1:
            middle = (low + high) // 2
            number = self._above(_cut(_density_of(middle), width))
            if fits(tuple(number.tolist())):
                high, least = middle, number.sum()
            else:
                low, most = middle, number.sum()
        rounding = 4 + 2 * int(width.max())  # levels that a division and a multiplication may be off, near zero too
        above = self._at(high + rounding, width)
        owner = self._between(above, self._at(low - rounding, width), width)
        first, last = 0, len(owner)
        while first < last:
            middle = (first + last + 1) // 2
            number = above + np.bincount(owner[:middle], minlength=len(widths))
            first, last = (middle, last) if fits(tuple(number.tolist())) else (first, middle - 1)
        return self._completed(above + np.bincount(owner[:first], minlength=len(widths)), prices)

    def kept(self, widths: Candidate) -> Tensor:
        """The rows that are kept, bool ``(R,)``."""
        numbers = torch.from_numpy(self.numbers(widths)).to(self.place.device)
        return self.place < numbers.repeat_interleave(torch.tensor(self.segments, device=numbers.device))

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

    def _at(self, level: int, width: np.ndarray) -> np.ndarray:
        """Rows of each table above a density, none and all beyond the ends."""
        if level >= _HIGHEST:
            return np.zeros_like(self.sizes)
        return self.sizes if level <= _LOWEST else self._above(_cut(_density_of(level), width))

    def _above(self, cut: np.ndarray) -> np.ndarray:
        """Rows of each table whose scores are above its cut."""
        rank = self._all.searchsorted(cut, side="right")
        found: np.ndarray = self._ends - self._ranks.searchsorted(self._apart + rank, side="right")
        return found

    def _between(self, least: np.ndarray, most: np.ndarray, width: np.ndarray) -> np.ndarray:
        """Tables of the rows that are among the most of their tables, but not the least, best per value first."""
        parts = [own[low:high] for own, low, high in zip(self._sorted, least, most, strict=True)]
        density = [np.where(own > 0, own / w, own * w) for own, w in zip(parts, width, strict=True)]
        owner = np.repeat(np.arange(len(parts)), [len(own) for own in parts])
        return owner[np.argsort(-np.concatenate(density), kind="stable")]

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


def _falling_means(worth: np.ndarray) -> np.ndarray:
    """The falling steps that are nearest to some values: neighbours that rise are pooled, like ``(V,)``."""
    firsts = np.arange(0, len(worth), -(-len(worth) // _MOST_STEPS))
    steps: list[tuple[float, int]] = []
    for total, number in zip(np.add.reduceat(worth, firsts), np.diff([*firsts, len(worth)]), strict=True):
        pooled, many = float(total), int(number)
        while steps and steps[-1][0] * many < pooled * steps[-1][1]:
            before, others = steps.pop()
            pooled, many = pooled + before, many + others
        steps.append((pooled, many))
    totals, numbers = np.array(steps).T
    means: np.ndarray = np.repeat(totals / numbers, numbers.astype(int))
    return means


def _density_of(level: int) -> float:
    """The float64 at a place in the order of all of them; the ends stand for infinities."""
    size = float(np.int64(level if level >= 0 else -level - 1).view(np.float64))
    size = math.inf if math.isnan(size) else size
    return size if level >= 0 else -size


def _cut(density: float, width: np.ndarray) -> np.ndarray:
    """The scores that have a density at some widths."""
    with np.errstate(over="ignore"):  # infinity is meant
        return density * width if density > 0 else density / width
