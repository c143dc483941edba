"""Fast, resumable mini-batches of torch tensors."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from recsys_models.data.errors import DataError


class Batch(NamedTuple):
    """One mini-batch of ``B`` rows, ``F`` fields and ``P`` dense features."""

    ids: torch.Tensor
    """int64 ``(B, F)``."""
    dense: torch.Tensor
    """float32 ``(B, P)``; ``P`` may be 0."""
    labels: torch.Tensor
    """float32 ``(B,)``, 0 or 1."""


class Batches:
    """Mini-batches over arrays held in memory.

    The order of rows depends on ``seed`` and the number of the epoch alone, never on what was drawn before, so a run
    stopped in epoch 3 after 120 batches goes on with ``batches.epoch(3, start=120)``.

    Args:
        ids: integer ``(N, F)``; kept as int32 and widened per batch.
        dense: float32 ``(N, P)``.
        labels: float32 ``(N,)``.
        batch_size: rows per batch; the last batch may be smaller.
        shuffle: whether each epoch visits the rows in its own random order.
        seed: of the orders.
        drop_last: whether to leave out a smaller last batch.
        device: where the arrays are held and the batches come out.
    """

    def __init__(
        self,
        ids: np.ndarray,
        dense: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}, must be at least 1")
        if not len(ids) == len(dense) == len(labels):
            raise DataError(f"ids, dense and labels have {len(ids)}, {len(dense)} and {len(labels)} rows, must agree")
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self._ids = torch.from_numpy(np.array(ids, np.int32)).to(device)
        self._dense = torch.from_numpy(np.array(dense, np.float32)).to(device)
        self._labels = torch.from_numpy(np.array(labels, np.float32)).to(device)

    def __len__(self) -> int:
        """Return the number of batches of one epoch."""
        rows = len(self._labels)
        return rows // self.batch_size if self.drop_last else math.ceil(rows / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over epoch 0."""
        return self.epoch(0)

    def order(self, epoch: int) -> torch.Tensor:
        """Return the order of rows in ``epoch``, int64 ``(N,)``, on the CPU."""
        rows = len(self._labels)
        if not self.shuffle:
            return torch.arange(rows)
        return torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(rows))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of one epoch.

        Args:
            epoch: number of the epoch, from 0.
            start: how many batches to skip, to resume within an epoch.

        Yields:
            :class:`Batch`.

        Raises:
            DataError: if ``epoch`` is negative or ``start`` is outside ``[0, len(self)]``.
        """
        if epoch < 0 or not 0 <= start <= len(self):
            raise DataError(f"epoch {epoch}, start {start}: epoch must be >= 0 and start in [0, {len(self)}]")
        return self._run(epoch, start)

    def _run(self, epoch: int, start: int) -> Iterator[Batch]:
        order = self.order(epoch).to(self._ids.device)
        for step in range(start, len(self)):
            rows = slice(step * self.batch_size, (step + 1) * self.batch_size)
            yield self._take(order[rows]) if self.shuffle else self._cut(rows)

    def _take(self, index: torch.Tensor) -> Batch:
        return Batch(
            self._ids.index_select(0, index).long(),
            self._dense.index_select(0, index),
            self._labels.index_select(0, index),
        )

    def _cut(self, rows: slice) -> Batch:
        return Batch(self._ids[rows].long(), self._dense[rows].clone(), self._labels[rows].clone())
