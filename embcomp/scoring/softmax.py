"""Softmax cross-entropy over a whole catalogue, in memory for a chunk of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from embcomp.range_scores import Repeatable, check_chunk, dtype_of_products, ids_at_once
from embcomp.scoring._checks import check_examples, exact
from embcomp.scoring.scorers import ItemScorer
from embcomp.stretches import Stretch

_PIECE = 1 << 16
_LEAST_QUERIES = 64
_BLOCK_SCORES = 1 << 19
"""Scores of some queries for all items that are computed at once on a CPU: 2 MiB, which stay in the cache of a core."""


def cross_entropy(
    scorer: ItemScorer,
    queries: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the softmax over all items: ``F.cross_entropy(scorer.scores(queries), targets)``.

    Where all scores fit into a chunk, they are computed at once. Otherwise memory is taken for a chunk of scores, and
    for as many vectors as a dense gradient of the tables has values, not for ``(N, V)``. Catalogues whose vectors can
    be there at once are gone through by queries, some at a time against all items, and gradients are worked out along
    with the loss: three matrix products, as ever. Larger ones are gone through by items, chunk by chunk and again in
    the backward pass, which makes four. There are no second derivatives then.

    Args:
        scorer: the catalogue of V items.
        queries: float ``(N, D)``.
        targets: int64 ``(N,)``, items, or ``ignore_index``.
        chunk: items that are scored at once; None for as many as are fast.
        ignore_index: the target of queries that don't count.
        reduction: ``"mean"`` over the queries that count (NaN where there is none), ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(N,)`` with zeros for queries that don't count; float32, or float64 where scores are.

    Raises:
        InputError: if an argument has the wrong dtype, shape, device or value.
    """
    queries, targets = check_examples(scorer, queries, targets, ignore_index, reduction)
    if scorer.num_items <= (check_chunk(chunk) or ids_at_once(queries)):
        logits = scorer.scoring(queries)(range(scorer.num_items))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(dtype), targets, ignore_index=ignore_index, reduction=reduction)
    return _in_chunks(scorer, queries, targets, chunk, ignore_index, reduction)


@torch.compiler.disable
def _in_chunks(
    scorer: ItemScorer, queries: Tensor, targets: Tensor, chunk: int | None, ignore_index: int, reduction: str
) -> Tensor:
    counts = targets != ignore_index
    kept = counts.nonzero().squeeze(1)
    block = check_chunk(chunk) or ids_at_once(queries[kept])
    stretches = scorer.stretches(queries[kept])
    most = max(block, scorer.gradient_rows, _PIECE)
    if reduction != "none" and len(stretches) == 1 and scorer.num_items <= _PIECE:
        total = _sum_by_queries(scorer, stretches[0], targets[kept], block * len(kept))
        if reduction == "mean":
            return total / len(kept) if len(kept) else total + torch.nan  # not 0 / 0, whose gradients are NaN too
        return total
    loss = _losses(scorer, stretches, targets[kept], block, most)
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss.new_zeros(len(queries)).index_put((kept,), loss)


def _sum_by_queries(scorer: ItemScorer, stretch: Stretch, targets: Tensor, scores: int) -> Tensor:
    """The sum of the losses of queries that all count, a scalar, of a catalogue whose vectors are composed at once."""
    vectors = _compose(stretch.vectors, range(scorer.num_items), scorer.zero_id)
    dtype = dtype_of_products(stretch.queries)
    queries = stretch.queries.to(dtype)
    if queries.device.type == "cpu":
        scores = min(scores, max(_BLOCK_SCORES, _LEAST_QUERIES * scorer.num_items))
    rows = max(scores // scorer.num_items, 1)
    with exact(queries.device):
        total: Tensor = _SoftmaxByQueries.apply(queries, vectors.to(dtype), scorer.bias, targets, rows)
    return total


def _losses(scorer: ItemScorer, stretches: Sequence[Stretch], targets: Tensor, block: int, most: int) -> Tensor:
    """Losses of queries that all count: ``(N,)``."""
    found = [
        _score_piece(scorer, stretch, ids, targets, block, again=is_cut)
        for stretch in stretches
        for ids, is_cut in _pieces(stretch, most)
    ]
    totals, picked = zip(*found, strict=True)
    return torch.stack(totals).logsumexp(0) - torch.stack(picked).sum(0)


def _pieces(stretch: Stretch, size: int) -> Iterator[tuple[range, bool]]:
    """Numbers of a stretch's ids in pieces, and whether there are several."""
    for start in range(0, len(stretch.ids), size):
        yield range(start, min(start + size, len(stretch.ids))), len(stretch.ids) > size


def _score_piece(
    scorer: ItemScorer, stretch: Stretch, ids: range, targets: Tensor, block: int, again: bool
) -> tuple[Tensor, Tensor]:
    """For each query the log of the sum over a piece of exp(score), and the target's score, or 0 if it is elsewhere."""
    first = stretch.ids.start + ids.start
    zero = None if scorer.zero_id is None else scorer.zero_id - first
    compose = Repeatable(partial(_compose, stretch.vectors, ids, zero), scorer.repeatable)
    # Of many pieces only one is there at a time: what it is composed of, and the vectors, are composed again.
    vectors = checkpoint(compose, use_reentrant=False) if again and torch.is_grad_enabled() else compose()
    queries, bias = stretch.queries, None if scorer.bias is None else scorer.bias[first : first + len(ids)]
    dtype = dtype_of_products(queries)
    with exact(queries.device):
        totals, picked = _SoftmaxPiece.apply(
            queries.to(dtype), vectors.to(dtype), bias, targets - first, block, (compose, dtype) if again else None
        )
    return totals, picked


def _compose(vectors: Callable[[range], Tensor], ids: range, zero: int | None) -> Tensor:
    found = vectors(ids)
    if zero is None or not 0 <= zero < len(ids):
        return found
    return found.index_fill(0, torch.tensor([zero], device=found.device), 0.0)


class _SoftmaxByQueries(torch.autograd.Function):
    """The sum of cross-entropies, some queries at a time, so that their logits stay in the caches.

    As the result is a single number, gradients are known up to a factor, and are worked out while logits are there.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, vectors: Tensor, bias: Tensor | None, targets: Tensor, rows: int) -> Tensor:
        """Score queries ``(N, d)`` against vectors ``(V, d)``, so many rows at once."""
        dtype = torch.promote_types(queries.dtype, torch.float32)
        of_queries, of_vectors, of_bias = ctx.needs_input_grad[:3]
        grad_queries = torch.empty_like(queries) if of_queries else None
        grad_vectors = torch.zeros(vectors.shape, dtype=dtype, device=vectors.device) if of_vectors else None
        grad_bias = torch.zeros_like(bias) if bias is not None and of_bias else None
        total = torch.zeros((), dtype=dtype, device=queries.device)
        for start in range(0, len(queries), rows):
            some, column = queries[start : start + rows], targets[start : start + rows, None]
            logits = (some @ vectors.transpose(0, 1)).to(dtype)
            if bias is not None:
                logits += bias
            picked, top = logits.gather(1, column), logits.amax(1, keepdim=True)
            sums = logits.sub_(top).exp_().sum(1, keepdim=True)
            total += (sums.log() + top - picked).sum()
            if grad_queries is None and grad_vectors is None and grad_bias is None:
                continue
            logits.div_(sums).scatter_add_(1, column, torch.full_like(picked, -1.0))
            if grad_bias is not None:
                grad_bias += logits.sum(0)
            grad_logits = logits.to(queries.dtype)
            if grad_queries is not None:
                torch.mm(grad_logits, vectors, out=grad_queries[start : start + rows])
            if grad_vectors is not None:
                grad_vectors += grad_logits.transpose(0, 1) @ some
        ctx.save_for_backward(grad_queries, grad_vectors, grad_bias)
        ctx.dtype = vectors.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, vectors and bias."""
        found = [None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors]
        return found[0], None if found[1] is None else found[1].to(ctx.dtype), found[2], None, None


class _SoftmaxPiece(torch.autograd.Function):
    """Logits of some items, block by block: ``log Σ exp`` over the items, and the logit of the target.

    Logits are never kept: each block is computed twice, in the forward and in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        vectors: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        block: int,
        again: tuple[Callable[[], Tensor], torch.dtype] | None,
    ) -> tuple[Tensor, Tensor]:
        """Score queries ``(N, d)`` and vectors ``(n, d)``; targets outside ``[0, n)`` have no logit here, hence 0."""
        ctx.block, ctx.again, ctx.num_items = block, again, len(vectors)
        dtype = torch.promote_types(queries.dtype, torch.float32)
        total = torch.full((len(queries),), -torch.inf, dtype=dtype, device=queries.device)
        picked = torch.zeros_like(total)
        for start, some, logits in _logits(queries, vectors, bias, block):
            inside, column = _columns(targets, start, len(some))
            picked += torch.where(inside, logits.gather(1, column).squeeze(1), 0.0)
            total = torch.logaddexp(total, logits.logsumexp(1))
        ctx.save_for_backward(queries, None if again else vectors, bias, targets, total)
        return total, picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_picked: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, vectors and bias."""
        with exact(grad_total.device):
            return _SoftmaxPiece._gradients(ctx, grad_total, grad_picked)

    @staticmethod
    def _gradients(ctx: Any, grad_total: Tensor, grad_picked: Tensor) -> tuple[Tensor | None, ...]:
        queries, vectors, bias, targets, total = ctx.saved_tensors
        if ctx.again is not None:
            compose, dtype = ctx.again
            with torch.no_grad():
                vectors = compose().to(dtype)
        grad_queries = torch.zeros(queries.shape, dtype=total.dtype, device=total.device)
        grad_vectors, grad_bias = torch.empty_like(vectors), None if bias is None else torch.empty_like(bias)
        total = total.clamp_min(torch.finfo(total.dtype).min)  # where all logits are -inf
        for start, some, logits in _logits(queries, vectors, bias, ctx.block):
            inside, column = _columns(targets, start, len(some))
            logits.sub_(total[:, None]).exp_().mul_(grad_total[:, None])
            logits.scatter_add_(1, column, torch.where(inside, grad_picked, 0.0)[:, None])
            if grad_bias is not None:
                grad_bias[start : start + len(some)] = logits.sum(0)
            grad_logits = logits.to(queries.dtype)
            grad_queries += grad_logits @ some
            torch.mm(grad_logits.transpose(0, 1), queries, out=grad_vectors[start : start + len(some)])
        return grad_queries.to(queries.dtype), grad_vectors, grad_bias, None, None, None


def _logits(queries: Tensor, vectors: Tensor, bias: Tensor | None, block: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Blocks of items: the first one's number, vectors, and logits ``(N, n)`` in float32 or float64."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    for start in range(0, len(vectors), block):
        some = vectors[start : start + block]
        logits = (queries @ some.transpose(0, 1)).to(dtype)
        if bias is not None:
            logits += bias[start : start + block]
        yield start, some, logits


def _columns(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in a block ``(N,)``, and their columns ``(N, 1)``, or any column for the others."""
    column = targets - start
    return (column >= 0) & (column < size), column.clamp(0, size - 1).unsqueeze(1)
