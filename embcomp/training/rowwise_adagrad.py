"""Row-wise Adagrad: one accumulator per row instead of one per value, for row-sparse and dense gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embcomp.errors import ConfigError, InputError
from embcomp.storage.gather import read_rows

_PIECE_BYTES = 1 << 20
_MAX_INT32 = 2**31 - 1


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad with a single accumulator per row: ``s ← s + mean(g²)``, ``w ← w − lr · g / (√s + eps)``.

    The rule of FBGEMM's ``EXACT_ROWWISE_ADAGRAD``: gradients of a row that occurs several times in a batch are summed
    first. State is 4 bytes per row, float32 whatever the parameter's dtype. A step on row-sparse gradients
    (``sparse=True`` in a strategy's config) touches only the rows of the batch. A parameter of one dimension has rows
    of one value, which is plain Adagrad.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        eps: added to the root of the accumulator.
        initial_accumulator_value: where accumulators start.
        weight_decay: coupled L2, on the rows of the batch only where gradients are sparse.

    Raises:
        ConfigError: if a value is negative.
        InputError: in `step`, if a gradient is sparse in more than its rows.
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state; accumulators stay float32, which torch would round to the parameters' dtype."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, own, strict=True):
            if index in state_dict["state"]:
                total = state_dict["state"][index]["sum"]
                self.state[parameter]["sum"] = total.to(parameter.device, torch.float32, copy=True)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            shape = parameter.shape[:1] if parameter.dim() > 1 else parameter.shape
            start = group["initial_accumulator_value"]
            state["sum"] = torch.full(shape, start, dtype=torch.float32, device=parameter.device)
        if gradient.is_sparse:
            _sparse_step(parameter, gradient, state["sum"], group)
        else:
            _dense_step(parameter, gradient, state["sum"], group)


def _dense_step(parameter: Tensor, gradient: Tensor, total: Tensor, group: dict[str, Any]) -> None:
    if parameter.numel() == 0:
        return
    if group["weight_decay"]:
        gradient = gradient.add(parameter, alpha=group["weight_decay"])
    square = gradient.float().square()
    total.add_(square.flatten(1).mean(1) if parameter.dim() > 1 else square)
    scale = _scale(total.sqrt(), group).view(-1, *(1,) * (parameter.dim() - 1))
    parameter.add_(gradient * scale)


def _sparse_step(parameter: Tensor, gradient: Tensor, total: Tensor, group: dict[str, Any]) -> None:
    if gradient._nnz() == 0 or parameter.numel() == 0:
        return
    weight = parameter.view(len(parameter), -1)
    for rows, summed in _sums_by_row(gradient):
        current = read_rows(weight, rows)
        if group["weight_decay"]:
            summed = summed.add(current, alpha=group["weight_decay"])
        wide = summed.float()
        state = total.index_select(0, rows).add_(torch.linalg.vecdot(wide, wide), alpha=1 / wide.shape[1])
        total.index_copy_(0, rows, state)
        scale = _scale(state.sqrt_(), group).unsqueeze(1)
        weight.index_copy_(0, rows, current.addcmul_(summed, scale.to(current.dtype)))


def _scale(root: Tensor, group: dict[str, Any]) -> Tensor:
    """What gradients are multiplied by, in place of the accumulators' roots."""
    return root.add_(group["eps"]).reciprocal_().mul_(-group["lr"])


def _sums_by_row(gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Sum a row-sparse gradient's values of equal rows: a sort and bagged gathers move fewer bytes than ``coalesce``.

    Yields:
        Different rows, int64 ``(U,)``, and their sums ``(U, d)``: on CPU in pieces that stay in the cache while they
        are worked on, elsewhere at once.
    """
    if gradient.sparse_dim() != 1:
        raise InputError(f"RowwiseAdagrad: a gradient is sparse in {gradient.sparse_dim()} dimensions, not in its rows")
    rows = gradient._indices()[0]
    values = gradient._values().view(len(rows), -1)
    size = max(1, _PIECE_BYTES // (values.element_size() * values.shape[1])) if values.is_cpu else len(rows)
    if gradient.is_coalesced():
        yield from zip(rows.split(size), values.split(size), strict=True)
        return
    ordered, order = torch.sort(rows.int() if len(gradient) <= _MAX_INT32 else rows)
    unique, counts = torch.unique_consecutive(ordered, return_counts=True)
    starts = counts.cumsum(0) - counts
    borders = [*starts[::size].tolist(), len(rows)]
    pieces = zip(unique.long().split(size), starts.split(size), pairwise(borders), strict=True)
    for piece, bags, (first, last) in pieces:
        yield piece, F.embedding_bag(order[first:last], values, bags - first, mode="sum")
