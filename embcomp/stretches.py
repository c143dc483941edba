"""Stretches: how the ids of a table are scored by queries, by vectors or by stored rows, and which of the two is less.

Shapes: ``N`` queries, ``V`` ids of a table, ``n`` ids that are asked for, ``D`` output dimension, ``d`` values that a
stretch is scored by, ``R`` stored rows, ``H`` stored rows per id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embcomp.storage import Ids, RowStore, Segment

FLOPS_PER_BYTE = 16
"""Float32 operations that take as long as moving a byte: some 20 as measured on a CPU core, 12 by GPUs' data sheets."""
MOST_ROW_SCORES = 1 << 24
"""Scores of stored rows that may be kept while the ids of a stretch are scored."""


@dataclass(frozen=True)
class RowTerm:
    """A share of the scores of ids that is a sum of scores of stored rows: ``Σ_h w_h(id) ⟨query, row_h(id)⟩``.

    Attributes:
        queries: float ``(N, d)``.
        store: whose rows they are.
        first: the first of them.
        num_rows: R, how many they are.
        segment: their segment.
        places: int64 ids ``(n,)`` to their H rows, int64 ``(n,)`` each, in ``[0, R)``.
        num_places: H.
        weights: int64 ids ``(n,)`` to float ``(n, H)``; None where all are one.
    """

    queries: Tensor
    store: RowStore
    first: int
    num_rows: int
    segment: Segment
    places: Callable[[Tensor], Sequence[Tensor]]
    num_places: int = 1
    weights: Callable[[Tensor], Tensor] | None = None

    def score_rows(self, places: Ids, out: Tensor | None = None) -> Tensor:
        """Scores of stored rows by their place: float ``(N, n)``, written to ``out`` where it is given."""
        return products(self.queries, self.store.rows_from(self.first, places, self.segment), out)

    def gather(self, row_scores: Tensor, ids: Tensor) -> Tensor:
        """Scores of ids, ``(N, n)``, from those of the rows, ``(N, R)``."""
        weights = None if self.weights is None else self.weights(ids).to(row_scores.dtype)
        total: Tensor | None = None
        for number, place in enumerate(self.places(ids)):
            part = row_scores.index_select(1, place)
            part = part if weights is None else part * weights[:, number]
            total = part if total is None else total.add_(part)
        assert total is not None
        return total


@dataclass(frozen=True)
class Stretch:
    """Consecutive ids of a table that are scored alike: ``queries @ vectors(ids).T``, or by ``terms``.

    Attributes:
        ids: which; the first one is number 0 for ``vectors`` and ``terms``.
        queries: float ``(N, d)``; d is D, unless less will do.
        vectors: ids to what they are scored by, float ``(n, d)``; the result is not written to.
        terms: the same scores by stored rows; none where there is no such way.
    """

    ids: range
    queries: Tensor
    vectors: Callable[[Ids], Tensor]
    terms: Sequence[RowTerm] = ()

    def moved(self, start: int, stop: int) -> Stretch:
        """The same stretch for ids from ``start`` on, of which those before ``stop`` count."""
        return replace(self, ids=range(self.ids.start + start, min(self.ids.stop + start, stop)))

    def own(self, ids: Ids) -> Ids:
        """Numbers within the stretch of those ids that lie in it."""
        first, stop = self.ids.start, self.ids.stop
        if isinstance(ids, range):
            start = max(ids.start, first) - first
            return range(start, max(start, min(ids.stop, stop) - first))
        return ids[(ids >= first) & (ids < stop)] - first


def rows_come_first(stretch: Stretch, with_gradients: bool = False) -> bool:
    """Whether to score stored rows, and gather their scores, rather than to compose vectors and score those.

    The way is taken that moves fewer bytes, `FLOPS_PER_BYTE` operations counting as one:

    - composing: for each id, H rows of d values are read, its own d values written and read again, twice where there
      are gradients, as vectors are then composed again; and they are scored by N·d multiplications and additions;
    - stored rows first: each is read and scored, by N·d multiplications and additions, and its N scores written; for
      each id and each of its H rows, N scores are read, each by an index of eight bytes, and with weights they are
      read and written once more.

    What both do, writing N scores for each id, is left out. So few queries, many ids per row and few rows per id speak
    for stored rows, whose scores must also be no more than `MOST_ROW_SCORES`, as they are kept. Stretches without terms
    are composed, and so are all in a compiled or exported graph, which must not depend on the number of queries.
    """
    if not stretch.terms or torch.compiler.is_compiling():
        return False
    num_queries, dim = stretch.queries.shape
    num_ids, terms = len(stretch.ids), stretch.terms
    row_scores = num_queries * sum(term.num_rows for term in terms)
    row_values = sum(term.num_rows * term.store.dim for term in terms)
    read_per_id = sum(term.num_places * term.store.dim for term in terms)
    composing = 4 * num_ids * (read_per_id + 2 * dim) * (2 if with_gradients else 1)
    composing += 2 * num_queries * num_ids * dim // FLOPS_PER_BYTE
    gathering = 4 * (row_values + row_scores) + 2 * num_queries * row_values // FLOPS_PER_BYTE
    gathering += num_queries * num_ids * sum(term.num_places * (20 if term.weights else 12) for term in terms)
    return row_scores <= MOST_ROW_SCORES and gathering < composing


def products(queries: Tensor, vectors: Tensor, out: Tensor | None = None) -> Tensor:
    """Inner products of queries ``(N, d)`` and vectors ``(n, d)``: ``(N, n)``, written to ``out`` where it is given."""
    found = vectors.transpose(0, 1)
    return queries @ found if out is None else torch.mm(queries, found, out=out)
