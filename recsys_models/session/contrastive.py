"""Items that are told from others by one half of their attributes and by the other: a loss on the catalogue alone.

"Self-supervised Learning for Large-scale Item Recommendations" (arXiv 2007.12865): two views of an item hide
complementary halves of its attributes, and lose some values of those with several; each view should find the other
among the views of all items drawn. Items are drawn uniformly from the whole catalogue, those that training never saw
among them, so that rare ones learn as much as others.

Shapes: ``n`` items drawn, ``A`` attributes, ``D`` dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import mutual_info_score
from torch import Tensor, nn

from embcomp.errors import ConfigError
from recsys_models.data import Attribute
from recsys_models.layers import check_dropout
from recsys_models.session.items import Items, MetadataItems

MASKINGS = ("random", "correlated")
_MOST_ITEMS = 100_000


class Contrastive(nn.Module):
    """The loss of two views of items.

    Args:
        items: with at least two attributes.
        attributes: of the items, in the same order.
        masking: which attributes the first view hides: a ``"random"`` half, or one at random and those that tell most
            about it, ``"correlated"``, so that no view is guessed from one hint.
        number: n; fewer where the catalogue has fewer.
        temperature: that cosines are divided by.
        dropout: of the values of attributes with several.

    Raises:
        ConfigError: if items have no attributes, or one, or an option is out of range.
    """

    similar: Tensor

    def __init__(
        self,
        items: Items,
        attributes: Sequence[Attribute],
        masking: str = "correlated",
        number: int = 512,
        temperature: float = 0.1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not isinstance(items, MetadataItems) or len(attributes) < 2:
            way = "name another in attributes" if attributes else "set items='metadata' or 'hybrid'"
            raise ConfigError(
                f"ssl_weight above 0 needs items of at least two attributes; these have {len(attributes)}: {way}, or "
                "set ssl_weight=0"
            )
        if masking not in MASKINGS or not 0 < temperature < math.inf or number < 2:
            raise ConfigError(
                f"ssl_masking={masking!r} must be one of {', '.join(map(repr, MASKINGS))}, "
                f"ssl_temperature={temperature} above 0 and finite, ssl_items={number} at least 2"
            )
        self.number, self.temperature, self.dropout = number, temperature, check_dropout(dropout)
        similar = mutual_information(attributes) if masking == "correlated" else np.zeros((len(attributes),) * 2)
        self.register_buffer("similar", torch.from_numpy(similar), persistent=False)

    def forward(self, items: MetadataItems) -> Tensor:
        """The mean loss over both views of items drawn anew, a scalar."""
        device = self.similar.device
        drawn = draw_distinct(items.num_items, self.number, device)
        hidden = self._hidden(len(drawn))
        first, second = (F.normalize(items.view(drawn, kept, self.dropout), dim=-1) for kept in (~hidden, hidden))
        scores = first @ second.T / self.temperature
        right = torch.arange(len(drawn), device=device)
        return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2

    def _hidden(self, number: int) -> Tensor:
        """Which attributes the first view hides: bool ``(n, A)``, half of them, at least one and never all."""
        width = len(self.similar)
        seed = torch.randint(width, (number, 1), device=self.similar.device)
        order = self.similar[seed.squeeze(1)] + 1e-9 * torch.rand(number, width, device=self.similar.device)
        order.scatter_(1, seed, torch.inf)
        place = order.argsort(1, descending=True).argsort(1)
        return place < max(width // 2, 1)


def draw_distinct(num_items: int, number: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw different items uniformly: int64 ``(number,)``, or all where there are no more; in time for the number."""
    if num_items <= 4 * number:
        return torch.randperm(num_items, device=device)[:number]
    drawn = torch.empty(0, dtype=torch.int64, device=device)
    while len(drawn) < number:
        drawn = torch.cat([drawn, torch.randint(num_items, (2 * number,), device=device)]).unique()
    return drawn[torch.randperm(len(drawn), device=device)[:number]]


def mutual_information(attributes: Sequence[Attribute]) -> np.ndarray:
    """Mutual information of all pairs of attributes over the catalogue, in nats: float64 ``(A, A)``.

    Of attributes with several values, an item's most frequent one counts; large catalogues are thinned out.
    """
    step = -(-len(attributes[0].offsets) // _MOST_ITEMS)
    firsts = [attribute.firsts[::step] for attribute in attributes]
    return np.array([[mutual_info_score(one, other) for other in firsts] for one in firsts])
