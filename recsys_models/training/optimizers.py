"""Optimizers by name, and gradient clipping that takes row-sparse gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from embcomp.training import RowwiseAdagrad

Groups = list[dict[str, Any]]


def _adam(groups: Groups) -> Optimizer:
    return torch.optim.Adam(groups, fused=True)


OPTIMIZERS: dict[str, Callable[[Groups], Optimizer]] = {
    "adam": _adam,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "rowwise_adagrad": RowwiseAdagrad,
}
"""Name -> what makes the optimizer of parameter groups, each with ``params``, ``lr`` and perhaps ``weight_decay``."""

DENSE_ONLY = ("adam",)
"""Optimizers that take no row-sparse gradients."""


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """Scale all gradients down to a Euclidean norm of at most ``max_norm``; row-sparse ones are coalesced for it."""
    if not any(p.grad is not None and p.grad.is_sparse for p in parameters):
        nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    values: list[Tensor] = []
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()
            values.append(p.grad.values())
        elif p.grad is not None:
            values.append(p.grad)
    scale = (max_norm / (nn.utils.get_total_norm(values) + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(scale)
