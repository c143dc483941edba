"""Fast, resumable mini-batches of sessions."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from recsys_models.data.epochs import Epochs
from recsys_models.data.sessions.samples import Samples

NO_TARGET = -100
"""Stands where there is no target; the ``ignore_index`` of torch's cross entropy."""


class SessionBatch(NamedTuple):
    """One mini-batch of ``B`` samples of up to ``L`` items."""

    items: torch.Tensor
    """int64 ``(B, L)``, inputs in order from the left, zeros behind the end."""
    lengths: torch.Tensor
    """int64 ``(B,)``, number of inputs, at least 1."""
    targets: torch.Tensor
    """int64: ``(B,)``, the item after the inputs; or, if every position is asked, ``(B, L)``, the item after each input
    and -100 behind the end."""


class SessionBatches(Epochs[SessionBatch]):
    """Mini-batches that are gathered from flat sequences held in memory.

    Args:
        items: integer ``(n,)``, the sequences one behind another; kept as int32 and widened per batch.
        samples: the pieces to take.
        batch_size: samples per batch; the last batch may be smaller.
        length: the most inputs of a sample, ``L``.
        positions: whether the targets are the items after every input, not only after the last.
        shuffle: whether each epoch visits the samples in its own random order.
        seed: of the orders.
        drop_last: whether to leave out a smaller last batch.
        device: where the arrays are held and the batches come out.
        trim: whether a batch is as wide as its longest sample; else every batch has ``L`` columns.
    """

    def __init__(
        self,
        items: np.ndarray,
        samples: Samples,
        batch_size: int,
        length: int,
        *,
        positions: bool,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        device: str | torch.device = "cpu",
        trim: bool = True,
    ) -> None:
        super().__init__(len(samples.stops), batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self.length = length
        self.positions = positions
        self.trim = trim
        self._items = torch.from_numpy(np.array(items, np.int32)).to(device)
        self._stops = torch.from_numpy(samples.stops).to(device)
        self._lengths = torch.from_numpy(samples.lengths).to(device)
        self._host_lengths = samples.lengths

    def batches_of(self, epoch: int, start: int) -> Iterator[SessionBatch]:
        """Iterate over the batches of ``epoch`` from number ``start``."""
        order = self.order(epoch)
        widths = self._widths(order)
        order = order.to(self._items.device)
        for step in range(start, len(self)):
            yield self._take(order[step * self.batch_size : (step + 1) * self.batch_size], widths[step])

    def _widths(self, order: torch.Tensor) -> list[int]:
        """Return the number of columns of each batch, found at once so that no batch waits for the device."""
        if not self.trim or not len(self):
            return [self.length] * len(self)
        firsts = np.arange(len(self)) * self.batch_size
        used = order.numpy()[: len(self) * self.batch_size]
        widths: list[int] = np.maximum.reduceat(self._host_lengths[used], firsts).tolist()
        return widths

    def _take(self, index: torch.Tensor, width: int) -> SessionBatch:
        stops = self._stops.index_select(0, index).long()
        lengths = self._lengths.index_select(0, index).long()
        column = torch.arange(width, device=index.device)
        behind = column >= lengths[:, None]
        where = ((stops - lengths)[:, None] + column).masked_fill_(behind, 0)
        items = self._items[where].long().masked_fill_(behind, 0)
        if self.positions:
            return SessionBatch(items, lengths, self._items[where + 1].long().masked_fill_(behind, NO_TARGET))
        return SessionBatch(items, lengths, self._items[stops].long())
