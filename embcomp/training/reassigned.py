"""Optimizer state of rows that went to other ids: it begins anew, as the rows did."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embcomp._optimizer_state import wrapped_by

if TYPE_CHECKING:
    from embcomp.tables import EmbeddingTables


def step_tables_(groups: Iterable[EmbeddingTables], *optimizers: torch.optim.Optimizer) -> None:
    """What tables do after a step of the optimizers, which then remember nothing of rows that went to other ids."""
    groups = list(groups)
    for tables in groups:
        tables.step_()
    if optimizers:  # else somebody asks for those rows later
        reset_rows_(groups, *optimizers)


def reset_rows_(groups: Iterable[EmbeddingTables], *optimizers: torch.optim.Optimizer) -> None:
    """Clear what optimizers remember of rows that went to other ids since this was called last.

    Of a parameter with R rows, every state tensor whose first dimension is R is one of rows: moments, accumulators,
    row-wise or not. Those rows become zero, or the ``initial_accumulator_value`` of the parameter's group, or its
    learning rate where they are Rprop's steps. Numbers of steps stay, since other rows share them. `Compression.step_`
    and `Phases.step_` call this for their optimizers.

    Args:
        groups: tables, after their ``step_``.
        optimizers: all that train them, or what wraps those; of other parameters nothing is touched.
    """
    for tables in groups:
        for parameter, rows in tables.reassigned_():
            _reset_rows_(parameter, rows, optimizers)


@contextlib.contextmanager
def resetting_rows(groups: Sequence[EmbeddingTables], *optimizers: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, an earlier state of the model is loaded; rows that go to other ids by it are cleared as by `reset_rows_`.

    A loop that rewinds and keeps its optimizers needs it, one that loads their state along with the model does not.
    """
    before = [tables.row_owners() for tables in groups]
    yield
    for tables, found in zip(groups, before, strict=True):
        now = tables.row_owners()
        if found is not None and now is not None:
            _reset_rows_(now[0], (now[1] != found[1]).nonzero().squeeze(1), optimizers)


@torch.no_grad()
def _reset_rows_(parameter: Tensor, rows: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    for optimizer in _with_inner(optimizers):
        state = optimizer.state.get(parameter, {})
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or tensor.shape[:1] != parameter.shape[:1]:
                continue
            if tensor.is_sparse:  # momenta of row-sparse gradients
                state[name] = _without_rows(tensor, rows)
            else:
                tensor[rows.to(tensor.device)] = _first_value(optimizer, parameter, name)


def _with_inner(optimizers: Iterable[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """Optimizers, and those that they wrap, which may be where the state is; each once."""
    found: dict[int, torch.optim.Optimizer] = {}
    waiting = list(optimizers)
    while waiting:
        optimizer = waiting.pop()
        if id(optimizer) not in found:
            found[id(optimizer)] = optimizer
            waiting += [inner for _, inner in wrapped_by(optimizer)]
    return list(found.values())


def _without_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """A sparse tensor without the entries of some rows, which are zero then."""
    tensor = tensor.coalesce()
    stay = ~torch.isin(tensor.indices()[0], rows.to(tensor.device))
    left = tensor.indices()[:, stay], tensor.values()[stay]
    return torch.sparse_coo_tensor(*left, tensor.shape, is_coalesced=True, check_invariants=False)


def _first_value(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str) -> float:
    """Where a state tensor starts: sums of Adagrad, row-wise or not, and steps of Rprop have a value of their own."""
    group: dict[str, Any] = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    starts = {"sum": group.get("initial_accumulator_value", 0.0), "step_size": group["lr"]}
    return float(starts.get(name, 0.0))
