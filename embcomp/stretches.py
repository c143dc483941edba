"""Scores of a table's ids for some queries, range by range: composed in chunks, or gathered from scores of stored rows.

Shapes: ``N`` queries, ``V`` ids of a table, ``n`` ids that are asked for, ``D`` output dimension, ``d`` values that a
stretch is scored by, ``R`` stored rows, ``H`` stored rows per id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from embcomp.errors import InputError
from embcomp.storage import Ids, RowStore, Segment

FLOPS_PER_BYTE = 16
"""Floating-point operations that take as long as moving a byte: 12 to 20 on CPU cores with wide vectors and on GPUs."""
MOST_ROW_SCORES = 1 << 24
"""Scores of stored rows that may be kept while ids are scored."""
_CHUNK_SCORES, _CHUNK_SCORES_ON_CPU = 1 << 24, 1 << 20
_SMALLEST_CHUNK, _LARGEST_CHUNK = 1024, 1 << 16


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
        return _products(self.queries, self.store.rows_from(self.first, places, self.segment), out)

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


class RangeScores:
    """Scores of any ids of a catalogue for some queries; what ids have in common is worked out once, when it is made.

    Args:
        stretches: of the catalogue, in order, without a gap.
        zero_id: the id whose vector is zero, whatever the stretches say; None where there is none.
        bias: float ``(V,)``, or None.
        least: ids that are best taken at once where there are gradients; see `assemble`.
        chunk: rows that are scored at once; None for `ids_at_once`.
        rows_first: score stretches with terms by stored rows, or not; None to let `rows_come_first` say so.
    """

    def __init__(
        self,
        stretches: Sequence[Stretch],
        zero_id: int | None = None,
        bias: Tensor | None = None,
        least: int = 0,
        chunk: int | None = None,
        rows_first: bool | None = None,
    ) -> None:
        self.stretches, self.zero_id, self.bias = stretches, zero_id, bias
        self._row_scores: list[list[Tensor] | None] = []
        for stretch in stretches:
            is_first = rows_come_first(stretch, torch.is_grad_enabled()) if rows_first is None else rows_first
            self._row_scores.append(_score_rows(stretch.terms, chunk, least) if is_first and stretch.terms else None)

    def __call__(self, ids: Ids, out: Tensor | None = None) -> Tensor:
        """Score ids: int64 ``(n,)`` or a range, in ``[0, V)``, to float ``(N, n)``, the caller's own to write to.

        Scores of a range can be written to ``out``, where there are no gradients.
        """
        found = self._of_ranges(ids, out) if isinstance(ids, range) else self._of_any(ids)
        if self.zero_id is not None:
            if isinstance(ids, Tensor):
                found = found.masked_fill(ids == self.zero_id, 0.0)
            elif self.zero_id in ids:
                found[:, ids.index(self.zero_id)] = 0.0
        if self.bias is not None:
            bias = self.bias[ids.start : ids.stop] if isinstance(ids, range) else self.bias[ids]
            found = found + bias if out is None else found.add_(bias)
        return found

    def _of_ranges(self, ids: range, out: Tensor | None) -> Tensor:
        own = [(number, stretch.own(ids)) for number, stretch in enumerate(self.stretches)]
        own = [(number, part) for number, part in own if len(part)]
        if len(own) == 1:
            return self._of_stretch(*own[0], out)
        if out is None:
            return torch.cat([self._of_stretch(number, part) for number, part in own], dim=1)
        columns = out.split([len(part) for _, part in own], dim=1)
        for (number, part), place in zip(own, columns, strict=True):
            self._of_stretch(number, part, place)
        return out

    def _of_any(self, ids: Tensor) -> Tensor:
        if len(self.stretches) == 1:
            return self._of_stretch(0, ids)
        parts, places = [], []
        for number, stretch in enumerate(self.stretches):
            parts.append(self._of_stretch(number, stretch.own(ids)))
            places.append(((ids >= stretch.ids.start) & (ids < stretch.ids.stop)).nonzero().squeeze(1))
        return torch.cat(parts, dim=1).index_select(1, torch.cat(places).argsort())

    def _of_stretch(self, number: int, ids: Ids, out: Tensor | None = None) -> Tensor:
        stretch, row_scores = self.stretches[number], self._row_scores[number]
        if row_scores is None:
            return _products(stretch.queries, stretch.vectors(ids), out)
        rows = torch.arange(ids.start, ids.stop, device=stretch.queries.device) if isinstance(ids, range) else ids
        parts = [term.gather(own, rows) for term, own in zip(stretch.terms, row_scores, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total.add_(part)
        return total if out is None else out.copy_(total)


def _products(queries: Tensor, vectors: Tensor, out: Tensor | None) -> Tensor:
    found = vectors.transpose(0, 1)
    return queries @ found if out is None else torch.mm(queries, found, out=out)


def _score_rows(terms: Sequence[RowTerm], chunk: int | None, least: int) -> list[Tensor]:
    """Scores of the stored rows of each term, ``(N, R)``."""
    return [assemble(term.score_rows, term.queries, term.num_rows, chunk, least) for term in terms]


def assemble(
    scores: Callable[[range, Tensor | None], Tensor],
    queries: Tensor,
    number: int,
    chunk: int | None = None,
    least: int = 0,
) -> Tensor:
    """Put scores of ids together, chunk by chunk, in no more memory than the result and a chunk.

    With gradients, what a chunk is composed of is composed again in the backward pass. The dense gradient of a chunk is
    as large as all that is trained, however few its ids, so chunks are then of ``least`` ids at least.

    Args:
        scores: ids to ``(N, n)``, written to a tensor that is given, where there are no gradients.
        queries: ``(N, D)``.
        number: V, how many ids there are, from 0 on.
        chunk: ids at once; None for `ids_at_once`.
        least: see above.

    Returns:
        float ``(N, V)``.

    Raises:
        InputError: if the chunk is not an int of at least 1.
    """
    size = check_chunk(chunk) or ids_at_once(queries)
    with_gradient = torch.is_grad_enabled()
    size = max(size, least) if with_gradient else size
    ranges = [range(start, min(start + size, number)) for start in range(0, number, size)]
    if len(ranges) == 1:
        return scores(ranges[0], None)
    if torch.compiler.is_compiling():
        return torch.cat([scores(ids, None) for ids in ranges], dim=1)
    out = queries.new_empty(len(queries), number, dtype=dtype_of_products(queries))
    for ids in ranges:
        if with_gradient:
            out = _Write.apply(out, checkpoint(scores, ids, None, use_reentrant=False), ids.start)
        elif out.dtype == queries.dtype:
            scores(ids, out[:, ids.start : ids.stop])
        else:  # autocast, which writes to no given tensor
            out[:, ids.start : ids.stop] = scores(ids, None)
    return out


def dtype_of_products(queries: Tensor) -> torch.dtype:
    """The dtype that queries are multiplied in: autocast's, where it is on, else their own."""
    device = queries.device.type
    is_lower = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_lower else queries.dtype


def ids_at_once(queries: Tensor) -> int:
    """How many ids to score at once: on CPU as many as leave their scores in its caches, a few megabytes.

    In a compiled or exported graph it is a constant, so that the number of queries is free.
    """
    if torch.compiler.is_compiling():
        return _LARGEST_CHUNK
    scores = _CHUNK_SCORES_ON_CPU if queries.device.type == "cpu" else _CHUNK_SCORES
    return min(max(scores // max(len(queries), 1), _SMALLEST_CHUNK), _LARGEST_CHUNK)


def check_chunk(chunk: int | None) -> int | None:
    """Return the chunk.

    Raises:
        InputError: if it is neither None nor an int of at least 1.
    """
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise InputError(f"chunk={chunk!r}: give the number of ids that are scored at once, at least 1, or None")
    return chunk


def check_queries(
    queries: Tensor, dim: int, device: torch.device, what: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return queries ``(..., D)`` in the dtype that they are scored in; 16 bits count as float32.

    Raises:
        InputError: if they have the wrong dtype, device or last dimension; the message names ``what`` they are for.
    """
    if not isinstance(queries, Tensor) or queries.dtype not in (dtype, torch.float16, torch.bfloat16):
        got = queries.dtype if isinstance(queries, Tensor) else type(queries).__name__
        raise InputError(f"queries for {what} must be a {dtype} tensor, not {got}")
    if queries.dim() == 0 or queries.shape[-1] != dim:
        raise InputError(
            f"queries of shape {tuple(queries.shape)} for {what} of dimension {dim}: they must be (..., {dim})"
        )
    if queries.device != device:
        raise InputError(f"queries are on {queries.device}, {what} on {device}: move one of them")
    return queries.to(dtype)


class _Write(torch.autograd.Function):
    """Write columns that nobody wrote before; unlike a slice's, its gradient copies nothing."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, part: Tensor, start: int) -> Tensor:
        ctx.columns = slice(start, start + part.shape[1])
        ctx.mark_dirty(out)
        out[:, ctx.columns] = part
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, gradient[:, ctx.columns], None
