"""Clicks whose ids come and go: a synthetic stream of raw 64-bit ids with drift."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embcomp.errors import ConfigError


class Chunk(NamedTuple):
    """Rows in the order of time.

    Attributes:
        ids: int64 ``(N, F)``, raw ids.
        numbers: int64 ``(N, F)``, the same ids numbered as they came up, which no real system could know beforehand.
        labels: float32 ``(N,)``, 0 or 1.
    """

    ids: Tensor
    numbers: Tensor
    labels: Tensor


class DriftingClicks:
    """A stream of chunks; between chunks some of the live ids of each field are replaced by new ones.

    A place of a field has a popularity for good, Zipf's law over places, and an id lives in one place: so popular ids
    go too, and new ones are popular at once. Each id has a hidden effect and a hidden vector, standard normal but for a
    factor; the logit of a click adds up the effects, and inner products of vectors of every two fields.

    Args:
        live: field -> ids that are live at a time.
        num_rows: rows of a chunk.
        new_share: share of live ids that is new in each chunk but the first, in [0, 1].
        seed: of everything.
        zipf: exponent of the popularity.

    Raises:
        ConfigError: if a number is out of range.
    """

    def __init__(
        self, live: Mapping[str, int], num_rows: int, new_share: float = 0.01, seed: int = 0, zipf: float = 1.0
    ) -> None:
        if not live or min(live.values()) < 1 or num_rows < 1:
            raise ConfigError(f"DriftingClicks: live={dict(live)!r} and num_rows={num_rows} must be at least 1")
        if not 0 <= new_share <= 1 or not 0 <= zipf < np.inf:
            raise ConfigError(
                f"DriftingClicks: new_share={new_share} must be in [0, 1], zipf={zipf} finite, at least 0"
            )
        self.live, self.num_rows, self.new_share, self.seed, self.zipf = dict(live), num_rows, new_share, seed, zipf

    def num_ids(self, num_chunks: int) -> dict[str, int]:
        """Field -> ids that ever come up in so many chunks."""
        return {name: size + (num_chunks - 1) * self._new(size) for name, size in self.live.items()}

    def chunks(self, num_chunks: int) -> Iterator[Chunk]:
        """The first chunks, the same at every call."""
        rng = np.random.default_rng(self.seed)
        fields = [_Field(size, self._new(size), self.zipf, rng) for size in self.live.values()]
        for number in range(num_chunks):
            if number:
                for field in fields:
                    field.replace(rng)
            places = [rng.choice(len(field.numbers), self.num_rows, p=field.popularity) for field in fields]
            drawn = list(zip(fields, places, strict=True))
            score = -1.0 + sum(field.effects[place] for field, place in drawn)
            vectors = np.stack([field.vectors[place] for field, place in drawn])
            total = vectors.sum(0)
            score += 0.5 * ((total**2).sum(-1) - (vectors**2).sum((0, 2)))
            labels = score + rng.logistic(size=self.num_rows) > 0
            yield Chunk(
                torch.from_numpy(np.stack([field.ids[place] for field, place in drawn], axis=1)),
                torch.from_numpy(np.stack([field.numbers[place] for field, place in drawn], axis=1)),
                torch.from_numpy(labels.astype(np.float32)),
            )

    def _new(self, size: int) -> int:
        return round(self.new_share * size)


class _Field:
    """The live ids of a field, by place."""

    def __init__(self, size: int, num_new: int, zipf: float, rng: np.random.Generator) -> None:
        self.num_new, self.next_number = num_new, 0
        weights = 1 / np.arange(1, size + 1) ** zipf
        self.popularity = weights / weights.sum()
        self.ids, self.numbers = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.effects, self.vectors = np.zeros(size), np.zeros((size, 4))
        self._put(np.arange(size), rng)

    def replace(self, rng: np.random.Generator) -> None:
        """Put new ids into some places."""
        self._put(rng.choice(len(self.ids), self.num_new, replace=False), rng)

    def _put(self, places: np.ndarray, rng: np.random.Generator) -> None:
        number = len(places)
        self.ids[places] = rng.integers(-(2**63), 2**63 - 1, number)
        self.numbers[places] = self.next_number + np.arange(number)
        self.effects[places] = rng.normal(0, 1.0, number)
        self.vectors[places] = rng.normal(0, 0.5, (number, 4))
        self.next_number += number
