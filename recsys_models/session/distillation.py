"""A trained table of items, brought over to items that are composed of metadata: no other part is trained again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from embcomp.errors import ConfigError, InputError
from recsys_models.layers import check_sizes
from recsys_models.session.items import CHUNK, Items


def distill_(
    items: Items,
    vectors: Tensor,
    counts: Tensor | np.ndarray | Sequence[int],
    steps: int = 1000,
    batch_size: int = 1024,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> float:
    """Fit items to trained vectors: the squared error, weighted by how often items occur, is what falls.

    Args:
        items: to fit, in place; their tables are trained too.
        vectors: float32 ``(V, D)``, rows of a trained table, such as `EmbeddingTables.materialize` gives; not all the
            same. The table is not trained.
        counts: int64 ``(V,)``, such as those of the catalogue; items are drawn by them, so those without any are left
            to what they share with others.
        steps: of Adam, whose rate falls to zero along a cosine.
        batch_size: items per step.
        learning_rate: at first.
        seed: of the items drawn.

    Returns:
        The share of the vectors' variance around their mean, weighted by counts, that is left unexplained.

    Raises:
        ConfigError: if ``steps``, ``batch_size`` or ``learning_rate`` is out of range.
        InputError: if shapes do not go together, vectors are not finite or do not vary over the items that occur,
            counts are negative or all zero, or nothing of the items can be trained.
    """
    check_sizes(steps=steps or None, batch_size=batch_size)  # to make none is allowed
    if not 0 < learning_rate < math.inf:
        raise ConfigError(f"learning_rate={learning_rate} must be above 0, and finite")
    counts = counts if isinstance(counts, Tensor) else torch.tensor(counts)  # a copy: arrays may be read-only
    _check_targets(items, vectors, counts)
    vectors, generator = vectors.detach(), torch.Generator().manual_seed(seed)
    weights = counts.double().cpu()
    trained = (items, *items.groups)
    parameters = [p for module in trained for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("nothing of these items can be trained, as of finalized tables: distill first, then finalize")
    optimizer = torch.optim.Adam(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        drawn = torch.multinomial(weights, batch_size, replacement=True, generator=generator).to(vectors.device)
        error = (items(drawn) - vectors[drawn]).square().sum(-1).mean()
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()
        schedule.step()
    return _unexplained(items, vectors, weights.to(vectors.device))


def _check_targets(items: Items, vectors: Tensor, counts: Tensor) -> None:
    is_float = isinstance(vectors, Tensor) and vectors.dtype == torch.float32
    if not is_float or vectors.shape != (items.num_items, items.dim) or counts.shape != vectors.shape[:1]:
        found = f"{vectors.dtype} {tuple(vectors.shape)}" if isinstance(vectors, Tensor) else type(vectors).__name__
        raise InputError(
            f"vectors {found} and counts {tuple(counts.shape)} must be float32 tensors ({items.num_items}, "
            f"{items.dim}) and int64 ({items.num_items},)"
        )
    if not bool((counts >= 0).all() & (counts > 0).any()):
        raise InputError("counts must be at least 0, and one of them above 0: items are drawn by them")
    if not vectors.isfinite().all():
        raise InputError(f"vectors of {int((~vectors.isfinite()).any(1).sum())} items are not finite")
    occurring = vectors[counts.to(vectors.device) > 0]
    if (occurring == occurring[0]).all():
        raise InputError(
            f"the vectors of all {len(occurring)} items that occur are the same, so there is nothing to explain: give "
            "rows of a trained table, of at least two items"
        )


@torch.no_grad()
def _unexplained(items: Items, vectors: Tensor, weights: Tensor) -> float:
    share = (weights / weights.sum()).float()[:, None]
    left = vectors.new_zeros(())
    for ids in torch.arange(items.num_items, device=vectors.device).split(CHUNK):
        left += (share[ids] * (items(ids) - vectors[ids]).square()).sum()
    return float(left / (share * (vectors - (share * vectors).sum(0)).square()).sum())
