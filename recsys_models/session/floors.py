"""What any session model should beat: popularity, and items often found in the same sessions. Nothing is trained.

Shapes: ``B`` sessions, ``L`` positions, ``V`` items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from embcomp.errors import ConfigError, InputError
from embcomp.range_scores import check_queries
from embcomp.scoring import ItemScorer
from embcomp.storage import Ids
from embcomp.stretches import Stretch
from recsys_models.data import Sequences
from recsys_models.metrics import device_of
from recsys_models.session.ranker import Ranker, check_sessions

_SESSIONS = 65536


class Popularity(Ranker):
    """Items by how often they occur in training.

    Args:
        counts: int64 ``(V,)``.

    Raises:
        InputError: if they are something else, or one is below 0.
    """

    max_length = 1
    counts: Tensor

    def __init__(self, counts: np.ndarray) -> None:
        super().__init__()
        if counts.ndim != 1 or not len(counts) or not np.isfinite(counts).all() or counts.min() < 0:
            raise InputError(f"counts of {counts.dtype} {counts.shape} must be (V,), finite and at least 0")
        self.num_items = len(counts)
        self.register_buffer("counts", torch.tensor(counts, dtype=torch.float32))

    def queries(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Scores of all items, float32 ``(B, V)``; they depend on nothing.

        Raises:
            InputError: if these are not sessions and their lengths; see `SessionModel.forward`.
        """
        check_sessions(items, lengths)
        return self.counts.expand(len(items), -1)

    def scorer(self) -> Scored:
        """What hands the scores out."""
        return Scored(self.num_items, device_of(self))


class ItemKNN(Ranker):
    """Items by how often they share a session with the last one.

    The baseline of "Session-based Recommendations with Recurrent Neural Networks" (arXiv 1511.06939): the cosine of
    the items' sessions, with a constant added to their numbers, so that rare items are not near by chance.

    Args:
        train: sessions.
        num_items: V.
        neighbours: most similar items that are kept of each.
        regularization: that constant.

    Raises:
        ConfigError: if ``neighbours`` or ``regularization`` is out of range.
        InputError: if sessions have an item outside ``[0, V)``.
    """

    max_length = 1
    near: Tensor
    similarity: Tensor

    def __init__(self, train: Sequences, num_items: int, neighbours: int = 100, regularization: float = 20.0) -> None:
        super().__init__()
        if not isinstance(neighbours, int | np.integer) or neighbours < 1 or not 0 <= regularization < math.inf:
            raise ConfigError(
                f"ItemKNN(neighbours={neighbours}, regularization={regularization}): an int of at least 1, and a "
                "finite number of at least 0"
            )
        _check_items(train.items, num_items, "sessions to learn from")
        self.num_items = num_items
        kept = min(neighbours, num_items)
        near, similarity = np.zeros((num_items, kept), np.int64), np.zeros((num_items, kept), np.float32)
        together = _together(train, num_items)
        scale = 1 / np.sqrt(together.diagonal() + regularization).clip(1e-12)
        together.setdiag(0)
        together.eliminate_zeros()
        cosine = sparse.diags(scale) @ together @ sparse.diags(scale)
        for item, values, others in _rows(cosine.tocsr()):
            best = np.lexsort((others, -values))[:kept]
            near[item, : len(best)], similarity[item, : len(best)] = others[best], values[best]
        self.register_buffer("near", torch.from_numpy(near))
        self.register_buffer("similarity", torch.from_numpy(similarity))

    def queries(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Scores of all items, float32 ``(B, V)``; zeros where a session is empty.

        Raises:
            InputError: if these are not sessions and their lengths, see `SessionModel.forward`, or the last item of one
                is outside ``[0, V)``.
        """
        check_sessions(items, lengths)
        items, lengths = items.long(), lengths.long()
        last = items.gather(1, (lengths - 1).clamp_min(0)[:, None]).squeeze(1).masked_fill(lengths == 0, 0)
        _check_items(last, self.num_items, "sessions")
        values = self.similarity[last] * (lengths > 0)[:, None]
        scores = torch.zeros(len(items), self.num_items, device=items.device)
        return scores.scatter_add_(1, self.near[last], values)  # places that are left over add zeros to item 0

    def scorer(self) -> Scored:
        """What hands the scores out."""
        return Scored(self.num_items, device_of(self))


class Scored(ItemScorer):
    """Scores that are there already: queries are rows of them.

    Args:
        num_items: V.
        device: of the scores.
    """

    bias = None

    def __init__(self, num_items: int, device: torch.device) -> None:
        self.num_items, self.dim, self.device = num_items, num_items, device

    def vectors(self, ids: Tensor) -> Tensor:
        """Rows of the unit matrix, float32 ``(..., V)``."""
        return F.one_hot(ids, self.num_items).float()

    def stretches(self, queries: Tensor) -> list[Stretch]:
        """One for all items, by rows of the unit matrix."""
        return [Stretch(range(self.num_items), queries, self._rows)]

    def check_queries(self, queries: Tensor) -> Tensor:
        """Return the scores."""
        return check_queries(queries, self.dim, self.device, "a floor")

    def scoring(self, queries: Tensor, chunk: int | None = None) -> Callable[[Ids], Tensor]:  # type: ignore[override]
        """Hand the scores out, a copy of them."""

        def scores(ids: Ids, out: Tensor | None = None) -> Tensor:
            found = queries[:, ids.start : ids.stop].clone() if isinstance(ids, range) else queries[:, ids]
            return found if out is None else out.copy_(found)

        return scores

    def score_pairs(self, queries: Tensor, ids: Tensor) -> Tensor:
        """Scores of some items for each query: float32 ``(N, n)``."""
        return queries.gather(1, ids)

    def rounding(self, queries: Tensor, ids: Tensor) -> Tensor:
        """Zeros ``(N,)``: nothing is worked out, so scores tie where they are equal."""
        return queries.new_zeros(len(ids))

    def _rows(self, ids: Ids) -> Tensor:
        return self.vectors(torch.arange(ids.start, ids.stop, device=self.device) if isinstance(ids, range) else ids)


def _check_items(items: Tensor | np.ndarray, num_items: int, what: str) -> None:
    """Raise `InputError` unless all items are in ``[0, V)``."""
    outside = items[(items < 0) | (items >= num_items)]
    if len(outside):
        raise InputError(
            f"ItemKNN: {what} have item {int(outside[0])}, but there are items in [0, {num_items}): give num_items and "
            "sessions of one catalogue"
        )


def _together(train: Sequences, num_items: int) -> sparse.csr_matrix:
    """In how many sessions two items occur together, and each occurs: float64 ``(V, V)``."""
    total = sparse.csr_matrix((num_items, num_items))
    for first in range(0, len(train), _SESSIONS):
        offsets = train.offsets[first : first + _SESSIONS + 1]
        items = np.array(train.items[offsets[0] : offsets[-1]])  # a copy: duplicates are summed in place
        occurs = sparse.csr_matrix(
            (np.ones(len(items)), items, offsets - offsets[0]), shape=(len(offsets) - 1, num_items)
        )
        occurs.sum_duplicates()
        occurs.data[:] = 1
        total = total + occurs.T @ occurs
    return total.tocsr()


def _rows(matrix: sparse.csr_matrix) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Row number, values and columns of every row."""
    for row, (start, stop) in enumerate(zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)):
        yield row, matrix.data[start:stop], matrix.indices[start:stop]
