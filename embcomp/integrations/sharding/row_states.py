"""State of the optimizer that TorchRec runs on sharded rows: gathered from all processes, and given out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardedTensor

from embcomp._optimizer_state import GroupState, OptimizerState, ParameterState
from embcomp.errors import ConfigError

ROWS = "TorchRec, fused"
"""The kind of an `OptimizerState` of sharded rows."""
WIDTHS = "widths"
"""Beside accumulators of rows that are cut by column, one after the other: int64, how wide each part is."""


def told_by_all(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """What each process tells the others, by rank."""
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, value, group)
    return told


def gather_row_states(
    model: DistributedModelParallel, group: dist.ProcessGroup, device: torch.device
) -> OptimizerState:
    """The state of all rows as if they were in one process; called in every process.

    Args:
        model: what `distribute` returned.
        group: that it is distributed over.
        device: that the group's backend sends from.

    Returns:
        by the name of the rows' parameter, in the first process; of no rows in the others.

    Raises:
        ConfigError: for Adam.
    """
    rank, own = dist.get_rank(group), _sharded(model)
    shards = {name: (value.size(), value.dtype, _places(value)) for name, value in own.items()}
    told = told_by_all(shards, group)
    if any(key == "momentum2" for theirs in told for _, key in theirs):
        raise ConfigError("TorchRec does not tell which step Adam is at for sharded rows: save without optimizers")
    whole: dict[tuple[str, str], Tensor] = {}
    for sender, theirs in enumerate(told):
        for name, (size, dtype, places) in theirs.items():
            for index, (offsets, sizes) in enumerate(places):
                part = own[name].local_shards()[index].tensor if sender == rank else None
                if rank == 0:
                    if part is None:
                        part = torch.empty(sizes, dtype=dtype, device=device)
                        dist.recv(part, sender, group)
                    whole.setdefault(name, torch.zeros(size, dtype=dtype))[_slices(offsets, sizes)] = part.cpu()
                elif part is not None:
                    dist.send(part.to(device).contiguous(), 0, group)
    found: dict[str, ParameterState] = {}
    weights = model.state_dict()
    for (path, key), value in whole.items():
        state = found.setdefault(path, ParameterState(tuple(weights[path].size())))
        state.tensors[key] = value
        if value.dim() == 1 and len(widths := _widths(weights[path])) > 1:
            state.tensors[WIDTHS] = widths
    return OptimizerState(ROWS, [GroupState({}, found)])


def fitted_row_states(
    model: DistributedModelParallel, saved: Mapping[str, ParameterState]
) -> tuple[list[tuple[Tensor, Tensor]], str, set[str]]:
    """Where this process has to put which part of what `gather_row_states` gathered.

    Rows may be cut in other ways than they were. Row-wise accumulators of rows that are cut by column in other ways
    become the means over columns.

    Returns:
        Pairs of a tensor of this process and what goes there; what is wrong, or ""; and the rows that it has parts of.
    """
    own, weights = _sharded(model), model.state_dict()
    rows = {path for path, _ in own}
    copies: list[tuple[Tensor, Tensor]] = []
    for (path, key), value in own.items():
        whole = _fitted(saved[path], key, weights[path]) if path in saved and key in saved[path].tensors else None
        if whole is None or whole.shape != value.size():
            has = "none" if whole is None else f"one of shape {tuple(whole.shape)}"
            return [], f"it keeps a {key} of shape {tuple(value.size())} for rows {path}, and there is {has}", rows
        for shard, (offsets, sizes) in zip(value.local_shards(), _places(value), strict=True):
            copies.append((shard.tensor, whole[_slices(offsets, sizes)]))
    return copies, "", rows


# ---- inside ---------------------------------------------------------------------------------------------------------


def _sharded(model: DistributedModelParallel) -> dict[tuple[str, str], ShardedTensor]:
    """State of which this process has parts, by the name of the rows' parameter and the optimizer's name for it."""
    found = {}
    for path, values in model.fused_optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if not isinstance(value, ShardedTensor):
                raise ConfigError(
                    f"state {name} of rows {path} is a {type(value).__name__}: only that of rows which distribute has "
                    "sharded can be saved"
                )
            found[path, name.rpartition(".")[2]] = value
    return found


def _places(value: ShardedTensor) -> list[tuple[list[int], list[int]]]:
    """Offsets and sizes of the parts that are in this process."""
    metadata = [shard.metadata for shard in value.local_shards()]
    return [(list(one.shard_offsets), list(one.shard_sizes)) for one in metadata]


def _slices(offsets: list[int], sizes: list[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))


def _widths(weight: ShardedTensor) -> Tensor:
    """How wide the parts are that rows are cut into by column, int64, ``(1,)`` where they are whole."""
    shards = weight.metadata().shards_metadata
    return torch.tensor([shard.shard_sizes[1] for shard in shards if shard.shard_offsets[0] == 0])


def _fitted(state: ParameterState, key: str, weight: ShardedTensor) -> Tensor:
    """The state for rows as they are cut now, if it is one of them at all."""
    whole, now = state.tensors[key], _widths(weight)
    then = state.tensors.get(WIDTHS, now.sum().view(1))
    if whole.dim() != 1 or whole.numel() != len(then) * weight.size(0) or torch.equal(then, now):
        return whole
    means = (then / then.sum()) @ whole.view(len(then), -1)
    return means.repeat(len(now))
