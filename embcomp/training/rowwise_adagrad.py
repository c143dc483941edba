"""Row-wise Adagrad: one accumulator per row instead of one per value, for row-sparse and dense gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embcomp.errors import ConfigError


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad with a single accumulator per row: ``s ← s + mean(g²)``, ``w ← w − lr · g / (√s + eps)``.

    The rule of FBGEMM's ``EXACT_ROWWISE_ADAGRAD``: gradients of a row that occurs several times in a batch are summed
    first. State is 4 bytes per row. A step on row-sparse gradients (``sparse=True`` in a strategy's config) touches only
    the rows of the batch. Parameters of one dimension fall back to plain Adagrad.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        eps: added to the root of the accumulator.
        initial_accumulator_value: where accumulators start.
        weight_decay: coupled L2, on the rows of the batch only where gradients are sparse.

    Raises:
        ConfigError: if a value is negative.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        values = {"lr": lr, "eps": eps, "initial_accumulator_value": initial_accumulator_value}
        values["weight_decay"] = weight_decay
        for name, value in values.items():
            if not value >= 0:
                raise ConfigError(f"RowwiseAdagrad({name}={value!r}): must be at least 0")
        super().__init__(params, values)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure`` re-evaluates the loss, as in every torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            shape = parameter.shape[:1] if parameter.dim() > 1 else parameter.shape
            start = group["initial_accumulator_value"]
            state["sum"] = torch.full(shape, start, dtype=torch.float32, device=parameter.device)
        if parameter.grad.is_sparse:
            _sparse_step(parameter, state["sum"], group)
        else:
            _dense_step(parameter, state["sum"], group)


def _dense_step(parameter: Tensor, total: Tensor, group: dict[str, Any]) -> None:
    gradient = parameter.grad
    assert gradient is not None
    if group["weight_decay"]:
        gradient = gradient.add(parameter, alpha=group["weight_decay"])
    square = gradient.float().square()
    total.add_(square.flatten(1).mean(1) if parameter.dim() > 1 else square)
    scale = total.sqrt().add_(group["eps"]).reciprocal_().mul_(-group["lr"])
    parameter.add_(gradient * scale.view(-1, *(1,) * (parameter.dim() - 1)))


def _sparse_step(parameter: Tensor, total: Tensor, group: dict[str, Any]) -> None:
    gradient = parameter.grad
    assert gradient is not None
    rows, summed = _sum_duplicates(gradient._indices()[0], gradient._values())
    if len(rows) == 0:
        return
    current = F.embedding(rows, parameter)
    if group["weight_decay"]:
        summed = summed.add(current, alpha=group["weight_decay"])
    state = total[rows] + summed.float().square().mean(1)
    total[rows] = state
    scale = state.sqrt_().add_(group["eps"]).reciprocal_().mul_(-group["lr"])
    parameter[rows] = current.addcmul_(summed, scale[:, None].to(current.dtype))


def _sum_duplicates(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the values of equal rows: rows ``(N,)``, values ``(N, d)`` -> unique rows ``(U,)``, sums ``(U, d)``.

    A sort of the row numbers and one bagged gather move far fewer bytes than ``Tensor.coalesce``.
    """
    ordered, order = torch.sort(rows)
    unique, counts = torch.unique_consecutive(ordered, return_counts=True)
    starts = counts.cumsum(0) - counts
    return unique, F.embedding_bag(order, values, starts, mode="sum")
