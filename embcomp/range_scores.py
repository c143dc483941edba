"""Scores of a catalogue's ids for some queries, range by range, in memory for a chunk.

Shapes: ``N`` queries, ``V`` ids of the catalogue, ``n`` ids that are asked for, ``D`` dimension, ``R`` stored rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from embcomp.errors import InputError
from embcomp.hooks import Repeat
from embcomp.storage import Ids
from embcomp.stretches import RowTerm, Stretch, products, rows_come_first

_CHUNK_SCORES, _CHUNK_SCORES_ON_CPU = 1 << 24, 1 << 20
_SMALLEST_CHUNK, _LARGEST_CHUNK = 1024, 1 << 16

Result = TypeVar("Result")


class RangeScores:
    """Scores of any ids of a catalogue for some queries; what ids have in common is worked out once, when it is made.

    Args:
        stretches: of the catalogue, in order, without a gap.
        zero_id: the id whose vector is zero, whatever the stretches say; None where there is none.
        bias: float ``(V,)``, or None.
        least: ids that are best taken at once where there are gradients; see `assemble`.
        chunk: rows that are scored at once; None for `ids_at_once`.
        rows_first: score stretches with terms by stored rows, or not; None to let `rows_come_first` say so.
        repeatable: see `Repeatable`.
    """

    def __init__(
        self,
        stretches: Sequence[Stretch],
        zero_id: int | None = None,
        bias: Tensor | None = None,
        least: int = 0,
        chunk: int | None = None,
        rows_first: bool | None = None,
        repeatable: Callable[[], Repeat | None] | None = None,
    ) -> None:
        self.stretches, self.zero_id, self.bias = stretches, zero_id, bias
        self._row_scores: list[list[Tensor] | None] = []
        for stretch in stretches:
            is_first = rows_come_first(stretch, torch.is_grad_enabled()) if rows_first is None else rows_first
            has_rows = is_first and stretch.terms
            self._row_scores.append(_score_rows(stretch.terms, chunk, least, repeatable) if has_rows else None)

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
            return products(stretch.queries, stretch.vectors(ids), out)
        rows = torch.arange(ids.start, ids.stop, device=stretch.queries.device) if isinstance(ids, range) else ids
        parts = [term.gather(own, rows) for term, own in zip(stretch.terms, row_scores, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total.add_(part)
        return total if out is None else out.copy_(total)


def _score_rows(
    terms: Sequence[RowTerm], chunk: int | None, least: int, repeatable: Callable[[], Repeat | None] | None
) -> list[Tensor]:
    """Scores of the stored rows of each term, ``(N, R)``."""
    return [assemble(term.score_rows, term.queries, term.num_rows, chunk, least, repeatable) for term in terms]


class Repeatable(Generic[Result]):
    """A call that can be made again in the backward pass, and gives what it gave before.

    Args:
        function: what is called.
        repeatable: `EmbeddingTables.repeatable` of the tables that it looks up in, asked right away; None for lookups
            that nothing changes within a step.
    """

    def __init__(self, function: Callable[..., Result], repeatable: Callable[[], Repeat | None] | None) -> None:
        self._function, self._repeat = function, None if repeatable is None else repeatable()
        self._is_first = True

    def __call__(self, *arguments: Any) -> Result:
        """Call the function, as if for the first time."""
        is_first, self._is_first = self._is_first, False
        with contextlib.nullcontext() if is_first or self._repeat is None else self._repeat():
            return self._function(*arguments)


def assemble(
    scores: Callable[[range, Tensor | None], Tensor],
    queries: Tensor,
    number: int,
    chunk: int | None = None,
    least: int = 0,
    repeatable: Callable[[], Repeat | None] | None = None,
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
        repeatable: see `Repeatable`.

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
            part = checkpoint(Repeatable(scores, repeatable), ids, None, use_reentrant=False)
            out = _Write.apply(out, part, ids.start)
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
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int | np.integer) or chunk < 1):
        raise InputError(f"chunk={chunk!r}: give the number of ids that are scored at once, at least 1, or None")
    return None if chunk is None else int(chunk)


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
