"""Sampled softmax: cross-entropy against a few items drawn from the catalogue, corrected for how they were drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from embcomp.errors import InputError, did_you_mean
from embcomp.range_scores import ids_at_once
from embcomp.scoring._checks import check_examples, check_items
from embcomp.scoring.scorers import ItemScorer

KINDS = ("counts", "log_uniform", "uniform")


@dataclass(frozen=True)
class Negatives:
    """Items that were drawn.

    Attributes:
        ids: int64 ``(S,)`` for all queries alike, or ``(N, S)``.
        log_counts: float, the same shape: the log of how often each item is drawn on average.
    """

    ids: Tensor
    log_counts: Tensor


class NegativeSampler:
    """Draws items, with replacement, and knows how likely each is.

    Args:
        kind: ``"uniform"``; ``"log_uniform"``, P(id) ~ log((id + 2) / (id + 1)), about 1 / (id + 1.5), for items that
            are numbered by falling frequency; or ``"counts"``, P(id) ~ count ** power.
        num_items: V; None to take it from the counts.
        counts: ``(V,)``, how often items occur; those that never do count as occurring once, since what is never drawn
            can't be corrected for. Needed for ``"counts"``.
        power: 1 for items as they occur, less to draw frequent ones less often.
        seed: of the generator, on CPU, which the draws follow one another from; None for torch's global generator,
            whose state checkpoints of a training loop usually hold.

    Raises:
        InputError: if the kind is unknown, or counts and the number of items are missing, wrong or don't agree.
    """

    def __init__(
        self,
        kind: str,
        num_items: int | None = None,
        counts: Any = None,
        power: float = 1.0,
        seed: int | None = 0,
    ) -> None:
        if kind not in KINDS:
            raise InputError(f"NegativeSampler(kind={kind!r}); {did_you_mean(kind, KINDS)}")
        known = None if counts is None else _checked_counts(counts)
        if known is None and kind == "counts":
            raise InputError("NegativeSampler(kind='counts') needs counts=")
        if not math.isfinite(power):
            raise InputError(f"NegativeSampler(power={power!r}) must be finite, such as 0.75")
        if num_items is None:
            num_items = 0 if known is None else len(known)
        if isinstance(num_items, bool) or not isinstance(num_items, int | np.integer):
            raise InputError(f"NegativeSampler(num_items={num_items!r}) must be an int, the number of items")
        if num_items < 1 or (known is not None and len(known) != num_items):
            found = "" if known is None else f", but {len(known)} counts"
            raise InputError(f"NegativeSampler(num_items={num_items}{found}): give the number of items, at least 1")
        self.kind, self.num_items = kind, int(num_items)
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._log_probabilities: Tensor | None = None
        if kind == "counts" and known is not None:
            weights = known.clamp_min(1) ** power
            self._sums = weights.cumsum(0)
            self._log_probabilities = (weights.log() - self._sums[-1].log()).float()

    def draw(self, number: int, device: torch.device | str = "cpu") -> Negatives:
        """Draw items for all queries of a batch.

        Args:
            number: S, how many.
            device: of the result.

        Returns:
            Items ``(S,)``, the same one perhaps more than once, each drawn ``S · P(id)`` times on average.

        Raises:
            InputError: if the number is not an int of at least 1.
        """
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
            raise InputError(f"draw({number!r}): give the number of items to draw, an int of at least 1")
        number = int(number)
        if self.kind == "uniform":
            ids = torch.randint(self.num_items, (number,), generator=self.generator)
        else:
            chance = torch.rand(number, dtype=torch.float64, generator=self.generator)
            if self.kind == "counts":
                ids = torch.searchsorted(self._sums, chance * self._sums[-1], right=True)
            else:
                ids = (chance * math.log(self.num_items + 1)).exp().long() - 1
            ids = ids.clamp_(max=self.num_items - 1)
        found = Negatives(ids, self.log_probabilities(ids) + math.log(number))
        return Negatives(found.ids.to(device), found.log_counts.to(device))

    def log_probabilities(self, ids: Tensor) -> Tensor:
        """Log of the chance of each item in one draw: int64 ``(...)`` to float32 ``(...)``."""
        if self.kind == "uniform":
            return torch.full(ids.shape, -math.log(self.num_items), device=ids.device)
        if self._log_probabilities is not None:
            return self._log_probabilities[ids.to(self._log_probabilities.device)].to(ids.device)
        return ((1 / (ids.double() + 1)).log1p() / math.log(self.num_items + 1)).log().float()


def sampled_cross_entropy(
    scorer: ItemScorer,
    queries: Tensor,
    targets: Tensor,
    negatives: Negatives | Tensor,
    remove_hits: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the softmax over a target and sampled items: an estimate of `cross_entropy`.

    The sum over the catalogue, ``exp(s_target) + Σ_{j ≠ target} exp(s_j)``, is estimated by
    ``exp(s_target) + Σ_{sampled j ≠ target} exp(s_j) / c_j``, c_j being how often item j is drawn on average. The
    estimate of the sum is unbiased; that of its logarithm, and so of the loss, is too small on average, the less so the
    more items are drawn. To subtract ``log c_j`` from scores is called the logQ correction (for negatives in the batch:
    "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", Yi et al., RecSys 2019). The target
    is there in any case, so its own score is left as it is; the bias of correcting that too is the subject of
    "Correcting the LogQ Correction: Revisiting Sampled Softmax for Large-Scale Retrieval" (arXiv 2507.09331).

    All vectors are looked up once and together. Where all queries share the negatives, memory is taken for N + S
    vectors and the scores of a chunk of queries, which are computed again in the backward pass where there are several
    chunks, not for ``(N, S)``. Negatives of each query's own take N · S vectors.

    Args:
        scorer: the catalogue of V items.
        queries: float ``(N, D)``.
        targets: int64 ``(N,)``, items, or ``ignore_index``.
        negatives: what `NegativeSampler` has drawn, ``(S,)`` or ``(N, S)``; or int64 items alone, uncorrected.
        remove_hits: leave out negatives that are the query's own target, as the estimate above does.
        ignore_index: the target of queries that don't count.
        reduction: ``"mean"`` over the queries that count (NaN where there is none), ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(N,)`` with zeros for queries that don't count; float32, or float64 where scores are.

    Raises:
        InputError: if an argument has the wrong dtype, shape, device or value.
    """
    queries, targets = check_examples(scorer, queries, targets, ignore_index, reduction)
    drawn, log_counts = _checked_negatives(scorer, queries, negatives)
    counts = targets != ignore_index
    own = targets.where(counts, 0)
    vectors = scorer.vectors(torch.cat([own, drawn.reshape(-1)]))
    scores, others = (queries * vectors[: len(own)]).sum(1), vectors[len(own) :].view(*drawn.shape, vectors.shape[-1])
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    scores = (scores if scorer.bias is None else scores + scorer.bias[own]).to(dtype)
    shared = others, _offsets(scorer, drawn, log_counts, dtype), drawn if remove_hits else None
    size = ids_at_once(others) if drawn.dim() == 1 else len(queries)
    if len(queries) <= size:
        losses = _losses(queries, scores, own, *shared)
    else:
        chunks = zip(queries.split(size), scores.split(size), own.split(size), strict=True)
        losses = torch.cat([checkpoint(_losses, *chunk, *shared, use_reentrant=False) for chunk in chunks])
    losses = losses.masked_fill(~counts, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()


def _offsets(scorer: ItemScorer, drawn: Tensor, log_counts: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to scores of drawn items, the shape of these; None for nothing."""
    if scorer.bias is None:
        return None if log_counts is None else -log_counts.to(dtype)
    bias = scorer.bias[drawn].to(dtype)
    # Not -inf: a sum over nothing else would have no gradient.
    return (bias if log_counts is None else bias - log_counts.to(dtype)).clamp_min(torch.finfo(dtype).min)


def _losses(
    queries: Tensor, scores: Tensor, targets: Tensor, others: Tensor, offsets: Tensor | None, hits: Tensor | None
) -> Tensor:
    """Losses of queries ``(n, D)`` whose targets ``(n,)`` have these scores, against drawn items: ``(n,)``.

    Args:
        queries: float ``(n, D)``.
        scores: of the targets, ``(n,)``.
        targets: int64 ``(n,)``.
        others: vectors of the drawn items, ``(S, D)`` or ``(n, S, D)``.
        offsets: to add to their scores, ``(S,)`` or ``(n, S)``.
        hits: int64, the drawn items, where they are left out for a query whose target they are.
    """
    logits = queries @ others.transpose(0, 1) if others.dim() == 2 else (others @ queries.unsqueeze(-1)).squeeze(-1)
    logits = logits.to(scores.dtype)
    if offsets is not None:
        logits = logits.add_(offsets)
    if hits is not None:
        logits = logits.masked_fill_(hits == targets.unsqueeze(1), torch.finfo(logits.dtype).min)
    return F.softplus(logits.logsumexp(1) - scores)


def _checked_negatives(
    scorer: ItemScorer, queries: Tensor, negatives: Negatives | Tensor
) -> tuple[Tensor, Tensor | None]:
    drawn, log_counts = (negatives.ids, negatives.log_counts) if isinstance(negatives, Negatives) else (negatives, None)
    by_query = isinstance(drawn, Tensor) and drawn.dim() == 2
    drawn = check_items(scorer, "negatives", drawn, (len(queries), None) if by_query else (None,))
    if not drawn.shape[-1]:
        raise InputError(f"negatives of shape {tuple(drawn.shape)}: draw at least one")
    if log_counts is None:
        return drawn, None
    if not log_counts.is_floating_point() or log_counts.shape != drawn.shape or log_counts.device != drawn.device:
        raise InputError(
            f"log_counts of {log_counts.dtype} {tuple(log_counts.shape)} on {log_counts.device}: negatives "
            f"{tuple(drawn.shape)} on {drawn.device} need a float for each"
        )
    if bool(log_counts.isnan().any()):
        raise InputError("log_counts of negatives have NaN: give the logarithm of how often each is drawn on average")
    return drawn, log_counts


def _checked_counts(counts: Any) -> Tensor:
    found = torch.as_tensor(counts, dtype=torch.float64).cpu()
    if found.dim() != 1 or not bool((found.isfinite() & (found >= 0)).all()):
        raise InputError(f"counts of shape {tuple(found.shape)} must be (V,), finite and at least 0")
    return found
