"""What session models learn: the softmax over the whole catalogue or a sample of it, or one negative per target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embcomp.config import check_at_least, check_choice, check_field_types
from embcomp.errors import ConfigError
from embcomp.scoring import (
    FirstItemsScorer,
    ItemScorer,
    Negatives,
    NegativeSampler,
    cross_entropy,
    sampled_cross_entropy,
)
from embcomp.scoring.sampled import KINDS
from recsys_models.data import NO_TARGET
from recsys_models.session.encoders import Examples
from recsys_models.session.items import Items
from recsys_models.session.layers import inside

LOSSES = ("auto", "softmax", "sampled", "binary")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned.

    Attributes:
        loss: ``"softmax"``: cross-entropy over all items of training; ``"sampled"``: over the target, other targets of
            the step and items that are drawn, corrected for how often each is expected among them, which for targets is
            how often training asks for an item; ``"binary"``: the target against one other item that the session does
            not have, as SASRec was published; ``"auto"``: the softmax up to ``most_items``, the sampled one beyond.
        num_negatives: items that are drawn for a step; of its targets, as many at most are negatives of each other.
        sampling: how: ``"uniform"``, ``"log_uniform"`` or by ``"counts"``, see `NegativeSampler`.
        most_items: see ``loss``.
        temperature: that scores are divided by.
    """

    loss: str = "auto"
    num_negatives: int = 4096
    sampling: str = "uniform"
    most_items: int = 100_000
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_field_types(self)
        check_choice(self, "loss", LOSSES)
        check_choice(self, "sampling", KINDS)
        check_at_least(self, "num_negatives", 1)
        check_at_least(self, "most_items", 1)
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"ObjectiveConfig(temperature={self.temperature!r}): must be above 0, and finite")


class Objective(nn.Module):
    """The loss of queries and the items that they should find, among those that occur in training.

    Items behind the last one that occurs are known from tests alone. To have them found wrong at every step would teach
    never to recommend them, so no loss scores them; targets among them, as of cases that validate, count for nothing.

    Args:
        config: which.
        counts: int64 ``(V,)``, how often items occur in training.

    Raises:
        ConfigError: if ``loss="binary"`` and only one item occurs.
    """

    _log_chances: Tensor

    def __init__(self, config: ObjectiveConfig, counts: Tensor) -> None:
        super().__init__()
        self.config = config
        occurring = counts.nonzero()
        self.num_seen = int(occurring[-1]) + 1 if len(occurring) else len(counts)
        counts = counts[: self.num_seen]
        small = self.num_seen <= config.most_items
        self.loss = ("softmax" if small else "sampled") if config.loss == "auto" else config.loss
        if self.loss == "binary" and self.num_seen < 2:
            raise ConfigError("loss='binary' needs a second item, and training has one: use loss='softmax'")
        self.register_buffer("_log_chances", torch.empty(0), persistent=False)
        self.count_targets_(counts)
        self._drawn = NegativeSampler(config.sampling, counts=counts, seed=None)

    def count_targets_(self, counts: Tensor) -> None:
        """Say how often items are targets in training, which is what makes them negatives of other targets.

        Until then it is taken for how often they occur, though the first items of sessions are no targets.

        Args:
            counts: ``(V,)``, or more of it than training has; may be averages.
        """
        counts = counts[: self.num_seen].double()
        counts = counts if counts.any() else torch.ones_like(counts)
        self._log_chances = (counts / counts.sum()).log().float().to(self._log_chances.device)

    def scaled(self, queries: Tensor) -> Tensor:
        """Queries whose inner products are scores."""
        return queries if self.config.temperature == 1 else queries / self.config.temperature

    def forward(self, items: Items, queries: Tensor, targets: Tensor, examples: Examples) -> Tensor:
        """The mean loss, a scalar; 0 where no target counts.

        Args:
            items: what is scored.
            queries: float32 ``(N, D)``.
            targets: int64 ``(N,)``.
            examples: that they are of.
        """
        scorer, session = items.scorer(), _session_of(examples)
        if self.num_seen < scorer.num_items:
            scorer, counts = FirstItemsScorer(scorer, self.num_seen), targets < self.num_seen
            queries, targets, session = queries[counts], targets[counts], session[counts]
        if not len(targets):
            return queries.sum()
        if self.loss == "softmax":
            return cross_entropy(scorer, queries, targets)
        if self.loss == "binary":
            return self._binary(scorer, queries, targets, examples, session)
        return sampled_cross_entropy(scorer, queries, targets, self._negatives(targets))

    def _negatives(self, targets: Tensor) -> Negatives:
        """Targets of the step, or some of them where they are many, and items that are drawn for it, together."""
        number, taken = self.config.num_negatives, targets
        if len(targets) > number:
            taken = targets[torch.randperm(len(targets), device=targets.device)[:number]]
        ids = torch.cat([taken, self._drawn.draw(number, targets.device).ids])
        others = len(taken) * (len(targets) - 1) / len(targets)  # a query's own target is no draw, if it is taken
        of_batch = self._log_chances[ids] + (math.log(others) if others else -math.inf)
        return Negatives(ids, torch.logaddexp(of_batch, self._drawn.log_probabilities(ids) + math.log(number)))

    def _binary(
        self, scorer: ItemScorer, queries: Tensor, targets: Tensor, examples: Examples, session: Tensor
    ) -> Tensor:
        """Binary cross-entropy of targets against items drawn uniformly; those that the session has do not count.

        It has its inputs and all its targets of the step, the last one of them too; not known are the items before a
        window, and, where one prefix is learned from, those behind its target.
        """
        drawn = torch.randint(self.num_seen, targets.shape, device=targets.device)
        read = examples.items.where(inside(examples.lengths, examples.items.shape[1]), NO_TARGET)
        own = torch.cat([read, examples.targets.reshape(len(read), -1)], dim=1)
        sessions, places = ((own >= 0) & (own < self.num_seen)).nonzero(as_tuple=True)
        known = sessions * self.num_seen + own[sessions, places]
        counts = ~torch.isin(session * self.num_seen + drawn, known)
        right = (queries * scorer.vectors(targets)).sum(-1)
        wrong = (queries * scorer.vectors(drawn)).sum(-1)
        return F.softplus(-right).mean() + (F.softplus(wrong) * counts).sum() / counts.sum().clamp_min(1)


def _session_of(examples: Examples) -> Tensor:
    """The session that each target is of: int64 ``(N,)``."""
    if examples.targets.dim() == 1:
        return torch.arange(len(examples.targets), device=examples.targets.device)
    return (examples.targets >= 0).nonzero()[:, 0]
