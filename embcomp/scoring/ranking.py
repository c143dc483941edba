"""The best items for queries, and the ranks of given items, exactly, in memory for a chunk of the catalogue.

Both are computed in the dtype of the items, whatever autocast says, and without gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embcomp.errors import InputError
from embcomp.range_scores import check_chunk, ids_at_once
from embcomp.scoring._checks import check_items, check_matrix, exact
from embcomp.scoring.scorers import ItemScorer

QUERIES = 1024
"""Queries that are taken at once."""
_BLOCK = 32
_WHOLE_NUMBERS = 1 << 24


@torch.no_grad()
def top_k(
    scorer: ItemScorer, queries: Tensor, k: int, exclude: Tensor | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k items of the largest scores for each query, exactly; of equal scores the smaller id comes first.

    Scores are compared as they are computed. Products of matrices may round the scores of equal vectors differently, by
    where in a chunk their items are; such items come in the order of their rounded scores. `rank_bounds` counts them as
    ties.

    Args:
        scorer: the catalogue of V items.
        queries: float ``(B, D)``.
        k: how many, 1 to V.
        exclude: int64 ``(B, n)``, items that are not to be found, such as those of the user's past; filled up with -1
            where there are fewer, not with 0, which is an item.
        chunk: items that are scored at once; None for as many as are fast.

    Returns:
        float ``(B, k)`` scores, falling, and int64 ``(B, k)`` items. Where fewer than k items are left, or have scores
        above ``-inf``, the others have score ``-inf`` and id -1.

    Raises:
        InputError: if an argument has the wrong dtype, shape, device or value, or a score is NaN.
    """
    queries = check_matrix(scorer, queries)
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= scorer.num_items:
        raise InputError(f"top_k: k={k!r} must be an int in [1, {scorer.num_items}], the number of items")
    k = int(k)
    excluded = _check_excluded(scorer, queries, exclude)
    with exact(queries.device):
        found = [
            _best_of(scorer, some, k, None if excluded is None else excluded[rows], chunk)
            for rows, some in _portions(queries)
        ]
    values, ids = zip(*found, strict=True)
    return torch.cat(values), torch.cat(ids)


@torch.no_grad()
def ranks(
    scorer: ItemScorer, queries: Tensor, targets: Tensor, exclude: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """Count for each query the items that score at least as high as its target: 0 says that the target comes first.

    Ties count against the target, so that a model which scores all items alike gets the rank V - 1 throughout. Scores
    that differ by rounding alone are ties. NaN, too, counts against the target.

    Args:
        scorer: the catalogue of V items.
        queries: float ``(B, D)``.
        targets: int64 ``(B,)``.
        exclude: int64 ``(B, n)``, items that don't count, filled up with -1; the target counts in any case.
        chunk: items that are scored at once; None for as many as are fast.

    Returns:
        int64 ``(B,)``, 0 to V - 1.

    Raises:
        InputError: if an argument has the wrong dtype, shape, device or value.
    """
    return _counted(scorer, queries, targets, exclude, chunk, with_best=False)[0]


@torch.no_grad()
def rank_bounds(
    scorer: ItemScorer, queries: Tensor, targets: Tensor, exclude: Tensor | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Count for each query the items that score higher than its target, and those that score at least as high.

    The target may stand at any place between the two, as ties are broken; the second count is that of `ranks`, whose
    arguments and errors these are. NaN counts against the target in both.

    Returns:
        int64 ``(B,)`` each, 0 to V - 1, the first nowhere above the second.
    """
    worst, best = _counted(scorer, queries, targets, exclude, chunk, with_best=True)
    return best, worst


def _counted(
    scorer: ItemScorer, queries: Tensor, targets: Tensor, exclude: Tensor | None, chunk: int | None, with_best: bool
) -> list[Tensor]:
    """Ranks where ties are lost, and where they are won if those are asked for: int64 ``(B,)`` each."""
    queries = check_matrix(scorer, queries)
    targets = check_items(scorer, "targets", targets, (len(queries),))
    excluded = _check_excluded(scorer, queries, exclude)
    # The target is no rival of its own: it is left out like those that are excluded.
    left_out = targets[:, None] if excluded is None else torch.cat([targets[:, None], excluded], dim=1)
    with exact(queries.device):
        found = [
            _ranks_of(scorer, some, targets[rows], left_out[rows], chunk, with_best)
            for rows, some in _portions(queries)
        ]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _portions(queries: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """At most `QUERIES` queries at a time, and at least once."""
    for start in range(0, max(len(queries), 1), QUERIES):
        rows = slice(start, start + QUERIES)
        yield rows, queries[rows]


def _ranges(scorer: ItemScorer, queries: Tensor, chunk: int | None) -> Iterator[range]:
    size = check_chunk(chunk) or ids_at_once(queries)
    for start in range(0, scorer.num_items, size):
        yield range(start, min(start + size, scorer.num_items))


def _check_excluded(scorer: ItemScorer, queries: Tensor, exclude: Tensor | None) -> Tensor | None:
    return None if exclude is None else check_items(scorer, "exclude", exclude, (len(queries), None), allowed=-1)


class _Places:
    """Items of each query, found by ranges: int64 ``(B, n)``, -1 for none."""

    def __init__(self, ids: Tensor) -> None:
        rows = torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(ids)
        self.ids, order = ids.flatten().sort()
        self.rows = rows.flatten()[order]

    def fill_(self, scores: Tensor, ids: range, value: float) -> None:
        """Write a value where scores ``(B, n)`` of a range of items belong to them."""
        bounds = torch.tensor([ids.start, ids.stop], device=self.ids.device)
        start, stop = torch.searchsorted(self.ids, bounds).tolist()
        if start < stop:
            scores[self.rows[start:stop], self.ids[start:stop] - ids.start] = value


def _best_of(
    scorer: ItemScorer, queries: Tensor, k: int, excluded: Tensor | None, chunk: int | None
) -> tuple[Tensor, Tensor]:
    scores, places = scorer.scoring(queries, chunk), None if excluded is None else _Places(excluded)
    values = queries.new_full((len(queries), k), -torch.inf)
    ids = torch.full((len(queries), k), -1, device=queries.device)
    for some in _ranges(scorer, queries, chunk):
        found = scores(some)
        if places is not None:
            places.fill_(found, some, -torch.inf)
        _merge_(values, ids, *_candidates(found, values[:, -1:], k, some.start))
    return values, ids


def _candidates(scores: Tensor, above: Tensor, k: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of a chunk that may be among the k best: their queries, items and values, ``(n,)`` each, in that order.

    Most chunks have little that is good enough. So scores are looked at in blocks: only those whose maximum is above
    the k-th best score so far are read a second time. At the beginning, the k-th largest maximum is such a bound too.

    Args:
        scores: ``(B, n)``.
        above: ``(B, 1)``, the k-th best score so far.
        k: how many are looked for.
        first: the first item of the chunk.
    """
    missing = -scores.shape[1] % _BLOCK
    padded = F.pad(scores, (0, missing), value=-torch.inf) if missing else scores
    blocks = padded.view(len(scores), padded.shape[1] // _BLOCK, _BLOCK)
    maxima = blocks.amax(-1)
    if len(scores) and bool(maxima.amax().isnan()):
        start = first + int(maxima.isnan().nonzero()[0, 1]) * _BLOCK
        raise InputError(
            f"top_k: a score of one of the {_BLOCK} items from {start} on is NaN: are all queries and items finite?"
        )
    least = torch.full_like(above, -torch.inf)
    if maxima.shape[1] >= 2 * k and bool((above == -torch.inf).any()):
        least = maxima.topk(k).values[:, -1:]
    row, block = ((maxima > above) & (maxima >= least)).nonzero(as_tuple=True)
    some = blocks[row, block]
    number, place = ((some > above[row]) & (some >= least[row])).nonzero(as_tuple=True)
    found, row, column = some[number, place], row[number], block[number] * _BLOCK + place
    if len(found) > 4 * k * len(scores) and scores.shape[1] > k:
        kept = (found >= scores.topk(k).values[row, -1]).nonzero().squeeze(1)
        found, row, column = found[kept], row[kept], column[kept]
    return row, column + first, found


def _merge_(values: Tensor, ids: Tensor, row: Tensor, item: Tensor, found: Tensor) -> None:
    """Take candidates into the best so far, scores and items ``(B, k)``; their items are larger than all of those."""
    if not len(row):
        return
    k = values.shape[1]
    rows, line, counts = row.unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[line] + k
    shape = (len(rows), k + int(counts.max()))
    all_values = torch.full(shape, -torch.inf, dtype=values.dtype, device=row.device)
    all_ids = torch.full(shape, -1, device=row.device)
    all_values[:, :k], all_ids[:, :k] = values[rows], ids[rows]
    all_values[line, place], all_ids[line, place] = found, item
    best, order = torch.sort(all_values, dim=1, descending=True, stable=True)
    values[rows], ids[rows] = best[:, :k], all_ids.gather(1, order[:, :k])


def _ranks_of(
    scorer: ItemScorer, queries: Tensor, targets: Tensor, left_out: Tensor, chunk: int | None, with_best: bool
) -> list[Tensor]:
    scores, places = scorer.scoring(queries, chunk), _Places(left_out)
    own, rounding = scores(targets).diagonal(), scorer.rounding(queries, targets)
    least, most = (own - rounding).unsqueeze(1), (own + rounding).unsqueeze(1)
    worst = torch.full_like(targets, scorer.num_items)
    best = worst.clone()
    for ids in _ranges(scorer, queries, chunk):
        found = scores(ids)
        if with_best:
            best -= _ones(torch.le(found, most, out=torch.empty_like(found)), places, ids)
        worst -= _ones(found.lt_(least), places, ids)
    return [worst, best] if with_best else [worst]


def _ones(beaten: Tensor, places: _Places, ids: range) -> Tensor:
    """Count the ones of each row ``(B, n)`` of a range of items, those that are left out among them: int64 ``(B,)``."""
    places.fill_(beaten, ids, 1.0)
    # Ones are added up exactly in float32 as long as they are no more than its whole numbers.
    return beaten.sum(1, dtype=beaten.dtype if len(ids) <= _WHOLE_NUMBERS else torch.float64).long()
