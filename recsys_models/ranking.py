"""Ranking of the whole catalogue, and its metrics: hit rate, NDCG and MRR, also by how often the target was seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from embcomp.errors import InputError
from embcomp.scoring import rank_bounds, ranks
from recsys_models.data import Attribute, Cases, Catalogue, SessionLog
from recsys_models.metrics import device_of
from recsys_models.session.layers import inside
from recsys_models.session.ranker import Ranker, check_sessions

CUTOFFS = (10, 20)
RARE = (5, 10)
"""Numbers of training events below which items are told apart."""
LENGTHS = (2, 5, 10, 20)
"""Lengths of sessions up to which cases are told apart."""
EVAL_BATCH_SIZE = 512
RANDOM_TIES = "_random_ties"
"""Ends the names of metrics that break ties at random; the others count ties against the model."""


def ranking_metrics(
    ranks: np.ndarray, cutoffs: Sequence[int] = CUTOFFS, best: np.ndarray | None = None
) -> dict[str, float]:
    """Compute hit rate, NDCG and MRR of cases with one right item each.

    Args:
        ranks: int64 ``(C,)``, numbers of items that were scored higher than the right one; C at least 1.
        cutoffs: k, at least 1 each: ranks from k on count as misses.
        best: int64 ``(C,)``, the ranks where ties are won, if ``ranks`` are those where they are lost; None if nobody
            asks.

    Returns:
        ``"hr@k"``, ``"ndcg@k"`` and ``"mrr@k"`` for each k, means over cases. With ``best``, also
        ``"hr@k_random_ties"`` and so on: what is expected, exactly, if every rank between the two is as likely.

    Raises:
        InputError: if there are no cases, a rank is no integer or negative, ``best`` is of other cases or above
            ``ranks``, or a cutoff is no int of at least 1.
    """
    if not isinstance(cutoffs, Sequence):
        raise InputError(f"cutoffs={cutoffs!r} must be a sequence, such as (10, 20)")
    ranks, best = _integers(ranks), None if best is None else _integers(best)
    if best is not None:
        at_random = {f"{name}{RANDOM_TIES}": value for name, value in _expected(best, ranks, cutoffs).items()}
        return _expected(ranks, ranks, cutoffs) | at_random
    return _expected(ranks, ranks, cutoffs)


def _integers(ranks: np.ndarray) -> np.ndarray:
    found = np.asarray(ranks)
    if found.dtype.kind not in "iu":
        raise InputError(f"ranks of {found.dtype} must be integers: how many items scored higher than the right one")
    return found


def _expected(best: np.ndarray, worst: np.ndarray, cutoffs: Sequence[int]) -> dict[str, float]:
    """The mean over cases of the mean of each metric over all ranks from the best to the worst."""
    if worst.ndim != 1 or not len(worst) or best.shape != worst.shape or best.min() < 0 or (best > worst).any():
        raise InputError(
            f"ranks {worst.shape} must be at least 0, (C,), C at least 1, and best ones {best.shape} nowhere above them"
        )
    found = {}
    for cutoff in cutoffs:
        if isinstance(cutoff, bool) or not isinstance(cutoff, int | np.integer) or cutoff < 1:
            raise InputError(
                f"cutoffs={tuple(cutoffs)!r}: {cutoff!r} must be an int of at least 1, such as 10 for hr@10"
            )
        places = np.arange(cutoff)
        gains = {"hr": np.ones(cutoff), "ndcg": 1 / np.log2(places + 2.0), "mrr": 1 / (places + 1.0)}
        first, behind = np.minimum(best, cutoff), np.minimum(worst + 1, cutoff)
        for name, gain in gains.items():
            before = np.append(0.0, gain.cumsum())  # the gain of all places before each
            found[f"{name}@{cutoff}"] = float(((before[behind] - before[first]) / (worst - best + 1)).mean())
    return found


def rank_cases(
    model: Ranker, cases: Cases, filters_seen: bool = False, batch_size: int = EVAL_BATCH_SIZE
) -> np.ndarray:
    """Rank the right item of every case among all items, in evaluation mode; the model's mode is restored.

    Args:
        model: whose catalogue is composed once.
        cases: prefixes of sessions, and the items that follow.
        filters_seen: whether items of the prefix are left out of the ranking.
        batch_size: cases at once.

    Returns:
        int64 ``(C,)``, items scored at least as high as the right one.
    """
    return _ranked(lambda *given: (ranks(*given),), model, cases, filters_seen, batch_size)[0]


def bound_cases(
    model: Ranker, cases: Cases, filters_seen: bool = False, batch_size: int = EVAL_BATCH_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Rank the right item of every case, at best and at worst, by how ties are broken; see `rank_cases`.

    Returns:
        int64 ``(C,)`` each: items scored higher than the right one, and at least as high.
    """
    best, worst = _ranked(rank_bounds, model, cases, filters_seen, batch_size)
    return best, worst


def _ranked(
    rank: Callable[..., tuple[Tensor, ...]], model: Ranker, cases: Cases, filters_seen: bool, batch_size: int
) -> list[np.ndarray]:
    """What ``rank`` finds of scorer, queries, targets and excluded items of all cases."""
    longest = int(cases.ends.max(initial=1)) if filters_seen else model.max_length
    batches = cases.batches(batch_size, longest, device=device_of(model))
    found: list[tuple[Tensor, ...]] = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            scorer = model.scorer()
            for batch in batches:
                seen = None
                if filters_seen:
                    seen = seen_items(batch.items, batch.lengths, model.num_items)
                found.append(rank(scorer, model.queries(batch.items, batch.lengths), batch.targets, seen))
    finally:
        model.train(was_training)
    if not found:
        return [np.empty(0, np.int64)] * 2
    return [torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True)]


def seen_items(items: Tensor, lengths: Tensor, num_items: int | None = None) -> Tensor:
    """The items of sessions, as `top_k` and `ranks` of `embcomp.scoring` take those that are to be left out.

    What fills a batch up behind the ends, most often 0, is an item for them, and would be left out too.

    Args:
        items: int64 ``(B, L)``, the first ones of each row being the session.
        lengths: int64 ``(B,)``.
        num_items: V, where sessions may have items outside ``[0, V)``, which no ranking has; None where they don't.

    Returns:
        int64 ``(B, L)``, -1 behind the ends and in the place of items outside.

    Raises:
        InputError: if shapes do not go together, dtypes are not integers, or a length is not in ``[0, L]``.
    """
    check_sessions(items, lengths)
    outside = ~inside(lengths, items.shape[1])
    if num_items is not None:
        outside |= items >= num_items
    return items.masked_fill(outside | (items < 0), -1)


def evaluate_cases(
    model: Ranker,
    cases: Cases,
    filters_seen: bool = False,
    cutoffs: Sequence[int] = CUTOFFS,
    batch_size: int = EVAL_BATCH_SIZE,
) -> dict[str, float]:
    """`rank_cases`, then `ranking_metrics`."""
    return ranking_metrics(rank_cases(model, cases, filters_seen, batch_size), cutoffs)


def metadata_bounds(
    log: SessionLog, attributes: Sequence[Attribute] | None = None, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, float]:
    """Bound what models can reach on the test cases that know items by their attributes alone.

    Items of equal attributes score alike, whatever the model, so the best that it can do is to have those of the right
    item come first.

    Args:
        log: the data set.
        attributes: those that are known; None for all of the catalogue.
        cutoffs: see `ranking_metrics`.

    Returns:
        `ranking_metrics` of such a model, with ties at random too; items of the prefix are left out where
        ``log.filters_seen``.
    """
    group, cases = log.catalogue.twin_groups(attributes), log.test
    worst = np.bincount(group)[group[cases.targets]] - 1
    if log.filters_seen:
        for case in np.flatnonzero(worst).tolist():
            prefix, target = cases[case]
            worst[case] -= len(set(prefix[group[prefix] == group[target]].tolist()) - {target})
    return ranking_metrics(worst, cutoffs, best=np.zeros_like(worst))


def slices_of(catalogue: Catalogue, cases: Cases) -> dict[str, np.ndarray]:
    """Tell cases apart by how often their right item was seen in training, and by the length of their prefix.

    Every case is in one slice of each kind: ``"seen < 10"`` are those of items seen five to nine times, where ``"seen <
    5"`` is there too. Items that were not seen in training, but are in the prefix, are a slice of their own: of those,
    models of ids know as much as others.

    Returns:
        name -> bool ``(C,)``; the slices of each kind cover all cases, and some may be empty.

    Raises:
        InputError: if the right item of a case is outside the catalogue.
    """
    outside = cases.targets[(cases.targets < 0) | (cases.targets >= catalogue.num_items)]
    if len(outside):
        raise InputError(
            f"slices_of: the right item of a case is {int(outside[0])}, but this catalogue has items in "
            f"[0, {catalogue.num_items}): give the catalogue and the cases of one log"
        )
    seen = catalogue.counts[cases.targets]
    is_repeated = np.zeros(len(cases), dtype=bool)
    for case in np.flatnonzero(seen == 0).tolist():
        prefix, target = cases[case]
        is_repeated[case] = target in prefix
    found = {"unseen": (seen == 0) & ~is_repeated, "unseen, repeated": (seen == 0) & is_repeated}
    for low, high in zip((1, *RARE), (*RARE, None), strict=True):
        name = f"seen ≥ {low}" if high is None else f"seen < {high}"
        found[name] = (seen >= low) & (True if high is None else seen < high)
    low = 0
    for high in (*LENGTHS, None):
        name = f"length > {low}" if high is None else f"length ≤ {high}"
        found[name] = (cases.ends > low) & (True if high is None else cases.ends <= high)
        low = high or low
    return found


def sliced_metrics(
    ranks: np.ndarray,
    slices: Mapping[str, np.ndarray],
    cutoffs: Sequence[int] = CUTOFFS,
    best: np.ndarray | None = None,
) -> dict[str, dict[str, float]]:
    """`ranking_metrics` of every slice that has cases, with their number as ``"cases"``."""
    return {
        name: {
            "cases": float(chosen.sum()),
            **ranking_metrics(ranks[chosen], cutoffs, None if best is None else best[chosen]),
        }
        for name, chosen in slices.items()
        if chosen.any()
    }
