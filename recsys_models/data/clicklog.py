"""The data model: a log of impressions with categorical fields, dense features and click labels."""

from dataclasses import dataclass

import numpy as np
import torch

from recsys_models.data.batches import Batches
from recsys_models.data.malformed import MalformedLine


@dataclass(frozen=True, eq=False)
class Field:
    """A categorical field.

    Ids are ordered by their frequency in training: id 0 is the most frequent, ties go to the smaller raw value. The
    last id stands for all values that training did not see, or saw fewer than ``min_count`` times.

    Args:
        name: of the field.
        num_ids: number of ids, with the last one.
        counts: int64 ``(num_ids,)``, how often each id occurs in the training split.
        values: ``(num_ids - 1,)``, the raw value behind each id but the last, int64 or text; None if unknown. A
            missing value has the smallest int64, hexadecimal values are given as integers.
    """

    name: str
    num_ids: int
    counts: np.ndarray
    values: np.ndarray | None = None

    @property
    def unknown_id(self) -> int:
        """The id of values outside the vocabulary, the last one."""
        return self.num_ids - 1


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of one split, in their order in the source.

    Args:
        ids: int32 ``(N, F)``, memory-mapped and read-only when it comes from a cache.
        dense: float32 ``(N, P)``; ``P`` may be 0.
        labels: float32 ``(N,)``, 0 or 1.
    """

    ids: np.ndarray
    dense: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.labels)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        device: str | torch.device = "cpu",
    ) -> Batches:
        """Load the rows into memory and return them as mini-batches; the arguments are those of :class:`Batches`."""
        return Batches(
            self.ids,
            self.dense,
            self.labels,
            batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            device=device,
        )


@dataclass(frozen=True, eq=False)
class ClickLog:
    """A data set, encoded and split.

    Args:
        name: of the data set.
        fields: the ``F`` categorical fields, in the order of the columns of :attr:`Split.ids`.
        dense_names: names of the ``P`` dense features.
        train: the split that vocabularies and counts come from.
        validation: the split to choose by.
        test: the split to report on.
        content_hash: of the source files, the options and the version of the reader: equal hashes mean equal data.
        malformed: the first lines that were left out.
        num_malformed: how many lines were left out.
    """

    name: str
    fields: tuple[Field, ...]
    dense_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    content_hash: str
    malformed: tuple[MalformedLine, ...] = ()
    num_malformed: int = 0
