"""Ranking of the whole catalogue, and its metrics: hit rate, NDCG and MRR, also by how often the target was seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from embcomp.errors import InputError
from embcomp.scoring import ranks
from recsys_models.data import Cases, Catalogue
from recsys_models.metrics import device_of
from recsys_models.session.ranker import Ranker

CUTOFFS = (10, 20)
RARE = (5, 10)
"""Numbers of training events below which items are told apart."""
LENGTHS = (2, 5, 10, 20)
"""Lengths of sessions up to which cases are told apart."""
EVAL_BATCH_SIZE = 512


def ranking_metrics(ranks: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Compute hit rate, NDCG and MRR of cases with one right item each.

    Args:
        ranks: int64 ``(C,)``, numbers of items that were scored higher than the right one; C at least 1.
        cutoffs: k: ranks from k on count as misses.

    Returns:
        ``"hr@k"``, ``"ndcg@k"`` and ``"mrr@k"`` for each k, means over cases.

    Raises:
        InputError: if there are no cases, or a rank is negative.
    """
    if ranks.ndim != 1 or not len(ranks) or ranks.min() < 0:
        raise InputError(f"ranks {ranks.shape} must be at least 0, (C,), C at least 1")
    found = {}
    for cutoff in cutoffs:
        hit = ranks < cutoff
        found[f"hr@{cutoff}"] = float(hit.mean())
        found[f"ndcg@{cutoff}"] = float((hit / np.log2(ranks + 2.0)).mean())
        found[f"mrr@{cutoff}"] = float((hit / (ranks + 1.0)).mean())
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
    longest = int(cases.ends.max(initial=1)) if filters_seen else model.max_length
    batches = cases.batches(batch_size, longest, device=device_of(model))
    found: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            scorer = model.scorer()
            for batch in batches:
                seen = None
                if filters_seen:
                    place = torch.arange(batch.items.shape[1], device=batch.items.device)
                    seen = batch.items.masked_fill(place >= batch.lengths[:, None], -1)
                found.append(ranks(scorer, model.queries(batch.items, batch.lengths), batch.targets, seen))
    finally:
        model.train(was_training)
    return torch.cat(found).cpu().numpy() if found else np.empty(0, np.int64)


def evaluate_cases(
    model: Ranker,
    cases: Cases,
    filters_seen: bool = False,
    cutoffs: Sequence[int] = CUTOFFS,
    batch_size: int = EVAL_BATCH_SIZE,
) -> dict[str, float]:
    """`rank_cases`, then `ranking_metrics`."""
    return ranking_metrics(rank_cases(model, cases, filters_seen, batch_size), cutoffs)


def slices_of(catalogue: Catalogue, cases: Cases) -> dict[str, np.ndarray]:
    """Tell cases apart by how often their right item was seen in training, and by the length of their prefix.

    Returns:
        name -> bool ``(C,)``; the slices of each kind cover all cases, and some may be empty.
    """
    seen = catalogue.counts[cases.targets]
    found = {"unseen": seen == 0}
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
    ranks: np.ndarray, slices: Mapping[str, np.ndarray], cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, dict[str, float]]:
    """`ranking_metrics` of every slice that has cases, with their number as ``"cases"``."""
    return {
        name: {"cases": float(chosen.sum()), **ranking_metrics(ranks[chosen], cutoffs)}
        for name, chosen in slices.items()
        if chosen.any()
    }
