"""Epochs of mini-batches whose order depends on a seed and a number alone, so that a stopped run can go on."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np
import torch

from recsys_models.data.errors import DataError

B = TypeVar("B")


class Epochs(ABC, Generic[B]):
    """What all mini-batches share.

    The order of rows depends on ``seed`` and the number of the epoch alone, never on what was drawn before, so a run
    stopped in epoch 3 after 120 batches goes on with ``batches.epoch(3, start=120)``.

    Args:
        rows: number of rows.
        batch_size: rows per batch; the last batch may be smaller.
        shuffle: whether each epoch visits the rows in its own random order.
        seed: of the orders.
        drop_last: whether to leave out a smaller last batch.
    """

    def __init__(self, rows: int, batch_size: int, *, shuffle: bool, seed: int, drop_last: bool) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}, must be at least 1")
        self.rows = rows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last

    def __len__(self) -> int:
        """Return the number of batches of one epoch."""
        return self.rows // self.batch_size if self.drop_last else math.ceil(self.rows / self.batch_size)

    def __iter__(self) -> Iterator[B]:
        """Iterate over epoch 0."""
        return self.epoch(0)

    def order(self, epoch: int) -> torch.Tensor:
        """Return the order of rows in ``epoch``, int64 ``(N,)``, on the CPU."""
        if not self.shuffle:
            return torch.arange(self.rows)
        return torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(self.rows))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[B]:
        """Iterate over the batches of one epoch.

        Args:
            epoch: number of the epoch, from 0.
            start: how many batches to skip, to resume within an epoch.

        Yields:
            Batches.

        Raises:
            DataError: if ``epoch`` is negative or ``start`` is outside ``[0, len(self)]``.
        """
        if epoch < 0 or not 0 <= start <= len(self):
            raise DataError(f"epoch {epoch}, start {start}: epoch must be >= 0 and start in [0, {len(self)}]")
        return self.batches_of(epoch, start)

    @abstractmethod
    def batches_of(self, epoch: int, start: int) -> Iterator[B]:
        """Iterate over the batches of ``epoch`` from number ``start``, which is in range."""
