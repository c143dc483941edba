"""Fast, resumable mini-batches of torch tensors."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from recsys_models.data.epochs import Epochs
from recsys_models.data.errors import DataError


class Batch(NamedTuple):
    """One mini-batch of ``B`` rows, ``F`` fields and ``P`` dense features."""

    ids: torch.Tensor
    """int64 ``(B, F)``."""
    dense: torch.Tensor
    """float32 ``(B, P)``; ``P`` may be 0."""
    labels: torch.Tensor
    """float32 ``(B,)``, 0 or 1."""


class Batches(Epochs[Batch]):
    """Mini-batches over arrays held in memory.

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
        super().__init__(len(labels), batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
        if not len(ids) == len(dense) == len(labels):
            raise DataError(f"ids, dense and labels have {len(ids)}, {len(dense)} and {len(labels)} rows, must agree")
        self._ids = torch.from_numpy(np.array(ids, np.int32)).to(device)
        self._dense = torch.from_numpy(np.array(dense, np.float32)).to(device)
        self._labels = torch.from_numpy(np.array(labels, np.float32)).to(device)

    def batches_of(self, epoch: int, start: int) -> Iterator[Batch]:
        """Iterate over the batches of ``epoch`` from number ``start``."""
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
