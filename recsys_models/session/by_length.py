"""Sessions of like length are encoded together: batches are as wide as their longest, and most are far shorter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recsys_models.data import NO_TARGET
from recsys_models.session.encoders import Sessions


def encode_by_length(encode: Callable[[Sessions, Tensor], Tensor], sessions: Sessions, targets: Tensor) -> Tensor:
    """Encode sessions in groups, the longest of each less than twice as long as the shortest.

    On other devices than the CPU all are encoded at once: what lies behind ends costs less there than to wait for what
    lengths are.

    Args:
        encode: of ``B`` sessions and their targets it makes float32 ``(N, D)``, what is behind ends left aside.
        sessions: of a batch.
        targets: int64 ``(B, L)``, `NO_TARGET` where there is none, or ``(B,)``.

    Returns:
        float32 ``(N, D)``, what ``encode`` makes of all at once.
    """
    lengths = sessions.lengths
    groups = _groups(lengths) if lengths.device.type == "cpu" else []
    if len(groups) <= 1:
        return encode(sessions, targets)
    asked = torch.ones_like(targets, dtype=torch.bool) if targets.dim() == 1 else targets != NO_TARGET
    numbers = (asked.flatten().cumsum(0) - 1).view_as(targets)
    found, order = [], []
    for group in groups:
        longest = int(lengths[group].max())
        own = Sessions(sessions.vectors[:, :longest][group], sessions.items[group, :longest], lengths[group])
        found.append(encode(own, targets[group] if targets.dim() == 1 else targets[group, :longest]))
        order.append(numbers[group][asked[group]])
    return torch.cat(found)[torch.cat(order).argsort()]


def _groups(lengths: Tensor) -> list[Tensor]:
    """Numbers of the sessions that are longer than half of the longest, of those longer than a quarter, and so on."""
    if not len(lengths):
        return []
    halvings = (lengths.max().double() / lengths).log2().floor()
    return [(halvings == number).nonzero()[:, 0] for number in halvings.unique()]
