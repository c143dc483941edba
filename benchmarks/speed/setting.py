"""What is measured: sizes, and ids that are drawn as ids of recommenders are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embcomp import TableSpec

EXPONENT = 1.05
ORDERS = ("frequency", "shuffled")


@dataclass(frozen=True)
class Setting:
    """Sizes of a run.

    Attributes:
        tables: T.
        rows: V, ids of each table.
        batch: B, one id per table each.
        dims: every D that is measured.
        orders: where frequent ids lie: ``"frequency"``, id 0 is the most frequent of its table, so that hot rows are
            neighbours; or ``"shuffled"``, anywhere.
        rounds: repeats of a lookup; steps are repeated a third as often.
        batches: different batches that rounds take turns with, so that no batch's rows are cached from its last turn.
    """

    tables: int = 26
    rows: int = 100_000
    batch: int = 4096
    dims: tuple[int, ...] = (16, 64)
    orders: tuple[str, ...] = ORDERS
    rounds: int = 60
    batches: int = 8

    @property
    def ids_per_batch(self) -> int:
        """Ids that one lookup or step takes."""
        return self.batch * self.tables

    def specs(self, dim: int) -> list[TableSpec]:
        """Describe the tables."""
        return [TableSpec(f"table_{number:02d}", self.rows, dim) for number in range(self.tables)]

    def draw(self, order: str, seed: int = 0) -> list[Tensor]:
        """Draw the batches: int64 ``(B, T)`` each."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [zipf_ids((self.batch, self.tables), self.rows, generator) for _ in range(self.batches)]
        if order == "frequency":
            return drawn
        names = torch.stack([torch.randperm(self.rows, generator=generator) for _ in range(self.tables)], dim=1)
        return [names.gather(0, ids) for ids in drawn]

    def stacked(self, ids: Tensor) -> Tensor:
        """Rows of ids in one table made of all tables: int64 ``(B, T)``."""
        return ids + torch.arange(self.tables) * self.rows


QUICK = Setting(tables=3, rows=300, batch=32, dims=(8,), orders=("frequency",), rounds=3, batches=2)
"""Small enough for a test of the benchmark itself; its figures mean nothing."""


def zipf_ids(shape: tuple[int, ...], size: int, generator: torch.Generator, exponent: float = EXPONENT) -> Tensor:
    """Draw ids by Zipf's law, P(id) ~ (id + 1) ** -exponent, from the inverse of its distribution function.

    Args:
        shape: of the result.
        size: ids are in ``[0, size)``.
        generator: to draw from.
        exponent: of the law; slopes of 0.9 to 1.2 are measured on real click logs.
    """
    law = torch.arange(1, size + 1, dtype=torch.float64).pow_(-exponent).cumsum(0)
    drawn = torch.rand(shape, dtype=torch.float64, generator=generator) * law[-1]
    return torch.searchsorted(law, drawn, right=True).clamp_(max=size - 1)
