"""Compressed models under TorchRec's ``DistributedModelParallel``, and saving them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardedTensor, ShardingEnv
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from embcomp._checkpoint import read_checkpoint
from embcomp._optimizer_state import OptimizerState, check_fit, listed, load_states_, read_states, states_of
from embcomp.errors import ConfigError, EmbcompError, IncompatibleStateError, did_you_mean
from embcomp.integrations.sharding.plans import (
    REPLICATED,
    local_processes,
    make_planner,
    replicated_tables,
    skeleton,
    wanted_shardings,
)
from embcomp.integrations.sharding.row_states import ROWS, fitted_row_states, gather_row_states, told_by_all
from embcomp.integrations.sharding.rows import ShardableRows, shardable_, stores_of
from embcomp.io import check_loaded, write_pretrained

logger = logging.getLogger(__name__)

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": torch.optim.Adam,
}
"""Name -> optimizer of the rows; TorchRec runs it fused with the backward pass. Adam is for GPUs alone."""
OPTIONS: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "adagrad": ("eps",),
    "rowwise_adagrad": ("eps",),
    "adam": ("eps",),
}
"""Options of the optimizers that TorchRec's kernels obey, everywhere; others would be ignored, or fail within them."""
_Error: TypeAlias = tuple[type[EmbcompError], str] | None
_OTHER_ROWS = "rows have another optimizer than the one that was saved, or were sharded otherwise"


def distribute(
    model: nn.Module,
    optimizer: str = "rowwise_adagrad",
    learning_rate: float = 0.01,
    sharding: str | Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> DistributedModelParallel:
    """Shard the compressed tables of a model over the processes of a group; called in each of them.

    All processes must begin with the same rows: build the model from one seed, or load it from one folder. What else is
    in it, TorchRec's collections that were left as they are among it, has a copy in every process, whose gradients are
    averaged; for models that are sharded together with such collections, see `shardable_`.

    Args:
        model: with compressed tables.
        optimizer: of their rows, one of `OPTIMIZERS`. With ``"rowwise_adagrad"``, parts of a table that is cut by
            column have accumulators of their own, which TorchRec does not add up: losses are a little other then.
        learning_rate: of it.
        sharding: see `plan_sharding`.
        device: of this process.
        group: of processes 0 to n - 1; None for the default one.
        options: of the optimizer, those of `OPTIONS`.

    Returns:
        the model to train, whose `dense_parameters` need an optimizer of their own. Rows of which every process has a
        copy are among them: ``optimizer`` does not train those, which is told in a warning.

    Raises:
        ConfigError: as `plan_sharding`, for an unknown optimizer or option, Adam on the CPU, where there is no process
            group, for tables on ``meta``, for copies of rows with row-sparse gradients, where ``device`` is another GPU
            than the current, for a group of other processes, or where processes hold other rows.
    """
    _check_optimizer(optimizer, options, torch.device(device))
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError(
            "there is no process group: start the script by torchrun, and call torch.distributed.init_process_group "
            "('gloo', or 'nccl' on GPUs) first"
        )
    device = torch.device(device)
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise ConfigError(
            f"device={str(device)!r}, but the current one is cuda:{torch.cuda.current_device()}, where processes would "
            "meet: call torch.cuda.set_device first, before the process group is made"
        )
    group = _group(group)
    if (ranks := dist.get_process_group_ranks(group)) != list(range(len(ranks))):
        raise ConfigError(
            f"the group is of processes {ranks}: TorchRec places rows by rank, so take a group of processes 0 to "
            f"{len(ranks) - 1}, in this order"
        )
    wanted = wanted_shardings(model, sharding, group.size())
    replicated = replicated_tables(wanted)
    _check_replicated(model, replicated)
    _check_alike(model, group)
    if replicated and dist.get_rank(group) == 0:
        logger.warning(
            "tables %s have a copy in each process, which optimizer=%r does not train: give dense_parameters(model), "
            "which they are among, an optimizer that suits rows too",
            ", ".join(sorted(replicated)[:3]),
            optimizer,
        )
    shardable_(model, replicated)
    for _, store, _ in stores_of(model):
        store.processes, rows = group.size(), store.elsewhere
        if isinstance(rows, ShardableRows):
            rate = learning_rate
            if optimizer == "rowwise_adagrad":  # whose mean of squares is over the columns that fill rows up too
                rate *= (rows.dim / rows.width) ** 0.5
            _apply_optimizer_in_backward(OPTIMIZERS[optimizer], rows.parameters(), {"lr": rate, **options})
    planner = make_planner(wanted, group.size(), local_processes(group.size()), device.type)
    sharders: list[Any] = [EmbeddingCollectionSharder()]
    plan = planner.collective_plan(skeleton(model, replicated), sharders, group)
    return DistributedModelParallel(
        model, env=ShardingEnv.from_process_group(group), device=device, plan=plan, sharders=sharders
    )


def dense_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that need an optimizer: all but the rows that are sharded, which the backward pass updates.

    Rows that are replicated are among them.
    """
    for parameter in model.parameters():
        if not hasattr(parameter, "_in_backward_optimizers") and parameter.requires_grad:
            yield parameter


def save_sharded(
    model: DistributedModelParallel,
    folder: str | Path,
    group: dist.ProcessGroup | None = None,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
) -> None:
    """Save a distributed model as `save_pretrained` would save it undistributed; called in every process.

    The first process gathers the rows and writes; the others wait. Loading needs no process group, and any number of
    processes can go on with it: ``load_pretrained_(fresh_model, folder)``, then `distribute`, then, with optimizers,
    `load_optimizers_`.

    Args:
        model: what `distribute` returned.
        folder: one that the first process can write to.
        group: that the model is distributed over; None for the default one.
        optimizers: of `dense_parameters`, whose state is saved along, and with it that of the optimizer of rows; an
            empty list where there are no such parameters, None for no state at all.

    Raises:
        ConfigError: if one of the optimizers is none of torch, or wraps others, two train one parameter, or rows are
            trained by Adam.
        IncompatibleStateError: in every process, if the first could not write, or an optimizer trains what is not the
            model's, or processes do not agree on whether there are optimizers.
    """
    group = _group(group)
    states: list[OptimizerState] | None = None
    found: _Error = None
    try:
        states = None if optimizers is None else states_of(dict(model.named_parameters()), listed(optimizers))
    except EmbcompError as error:
        found = type(error), str(error)
    told = told_by_all((found, states is None), group)
    _raise_first([theirs for theirs, _ in told])
    if len({is_none for _, is_none in told}) > 1:
        raise IncompatibleStateError("some processes have optimizers=None and some have not: give the same in all")
    if states is not None:
        states.append(gather_row_states(model, group, _device(group)))
    state = _gathered(model, group)
    if dist.get_rank(group) == 0:
        try:
            write_pretrained(model.module, folder, state, states)
        except Exception as error:  # the others wait: all are to hear of it
            found = IncompatibleStateError, f"{folder} was not saved: {type(error).__name__}: {error}"
    _raise_first(told_by_all(found, group))


def load_optimizers_(
    model: DistributedModelParallel,
    folder: str | Path,
    optimizers: Sequence[torch.optim.Optimizer],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Give optimizers, and that of the rows, the state that `save_sharded` saved; called in every process.

    The processes may be more or fewer than they were, and rows cut in other ways, except that rows of which every
    process had a copy must be copies again. Row-wise Adagrad has an accumulator per part of a row that is cut by
    column: where rows are cut otherwise now, all parts begin with the mean. Learning rates and other options become
    those that were saved, but for the optimizer of rows.

    Args:
        model: what `distribute` returned, of a model that `load_pretrained_` has loaded.
        folder: where `save_sharded` saved, with ``optimizers=``; every process reads it.
        optimizers: of `dense_parameters`, as those that were saved.
        group: that the model is distributed over; None for the default one.

    Raises:
        ConfigError, IncompatibleStateError: in every process, if one of them finds that an optimizer is none of torch,
            the checkpoint has no state of optimizers, it does not fit, or it is not the one that the model was loaded
            from; nothing is changed then.
    """
    group = _group(group)
    parameters = dict(model.named_parameters())
    copies: list[tuple[Tensor, Tensor]] = []
    saved: list[OptimizerState] = []
    rows, wanted = set[str](), set[str]()
    found: _Error = None
    try:
        optimizers = listed(optimizers)
        checkpoint = read_checkpoint(Path(folder))
        saved = read_states(checkpoint)
        check_loaded(model, checkpoint)
        if not saved or saved[-1].kind != ROWS:
            raise IncompatibleStateError(f"{folder} has no state of sharded rows: save_pretrained has written it")
        [of_rows] = saved.pop().groups
        check_fit(states_of(parameters, optimizers), saved, checkpoint)
        wanted = set(of_rows.parameters)
        copies, wrong, rows = fitted_row_states(model, of_rows.parameters)
        if wrong:
            raise IncompatibleStateError(f"{folder}: {_OTHER_ROWS}: {wrong}")
    except EmbcompError as error:  # the others wait: all are to hear of it
        found = type(error), str(error)
    told = told_by_all((found, rows), group)
    _raise_first([theirs for theirs, _ in told])
    if strange := sorted(wanted.difference(*(theirs for _, theirs in told))):
        raise IncompatibleStateError(f"{folder}: {_OTHER_ROWS}: it keeps none for rows {strange[0]}")
    load_states_(parameters, optimizers, saved)
    for target, part in copies:
        target.copy_(part)


# ---- inside ---------------------------------------------------------------------------------------------------------


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    group = group or dist.group.WORLD
    assert group is not None
    return group


def _raise_first(errors: list[_Error]) -> None:
    """Raise the first error of all processes in each of them, so that none waits for another."""
    for error in errors:
        if error is not None:
            raise error[0](error[1])


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the backend sends from and gathers to."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _check_optimizer(optimizer: str, options: Mapping[str, Any], device: torch.device) -> None:
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer={optimizer!r}; {did_you_mean(optimizer, OPTIMIZERS)}")
    if optimizer == "adam" and device.type == "cpu":
        raise ConfigError(
            "optimizer='adam': TorchRec has no Adam for rows on the CPU; use 'sgd', 'adagrad' or 'rowwise_adagrad'"
        )
    for option in options:
        if option not in OPTIONS[optimizer]:
            allowed = ", ".join(["learning_rate", *OPTIONS[optimizer]])
            raise ConfigError(
                f"optimizer={optimizer!r} has no option {option!r} that TorchRec's kernels obey; allowed: {allowed}"
            )


def _check_alike(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Compare rows of the processes' models, of which each will hold some; the rest is copied from the first one."""
    told = {", ".join(names[:3]): _sums(store.get_parameter("weight")) for _, store, names in stores_of(model)}
    every = told_by_all(told, group)
    for rank, other in enumerate(every):
        for rows in {**every[0], **other}:
            one, own = every[0].get(rows), other.get(rows)
            if one is None or own is None or one[0] != own[0] or abs(one[1] - own[1]) > 1e-6 * (one[2] + own[2]):
                raise ConfigError(
                    f"rows {rows} differ between process 0 and process {rank}: all must begin with the same. Seed the "
                    "processes alike before the model is built (torch.manual_seed), or load it in each from one folder"
                )


def _sums(rows: Tensor) -> tuple[tuple[int, ...], float, float]:
    """Shape, sum and sum of absolute values, which other machines may round a little differently."""
    if rows.is_meta:
        return tuple(rows.shape), 0.0, 0.0
    with torch.no_grad():
        size = torch.linalg.vector_norm(rows, 1, dtype=torch.float64)
        return tuple(rows.shape), float(rows.sum(dtype=torch.float64)), float(size)


def _check_replicated(model: nn.Module, replicated: Collection[str]) -> None:
    """Refuse row-sparse gradients of rows that ``DistributedDataParallel`` averages, which it can't."""
    for _, store, names in stores_of(model):
        if store.sparse and set(names) <= set(replicated):
            raise ConfigError(
                f"rows {', '.join(names[:3])} have row-sparse gradients (sparse=True), and copies of them can't be "
                f"averaged: set sparse=False, or another sharding than {REPLICATED!r}"
            )


def _gathered(model: DistributedModelParallel, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """The model's state as if it were in one process; in the first process, and nothing in the others."""
    first = dist.get_rank(group) == 0
    state = {name: _whole(value, first, _device(group)) for name, value in model.state_dict().items()}
    for path, rows in model.module.named_modules():
        if isinstance(rows, ShardableRows):
            prefix = f"{path}.collection.embeddings."
            parts = [state.pop(f"{prefix}{name}.weight") for name in rows.names]
            if first:
                state[f"{path.rpartition('.')[0]}.weight"] = torch.cat([part[:, : rows.dim] for part in parts])
    return state if first else {}


def _whole(value: Any, first: bool, device: torch.device) -> Tensor:
    if not isinstance(value, ShardedTensor):
        return value
    whole = torch.empty(value.size(), device=device) if first else None
    value.gather(0, whole)
    return torch.empty(0) if whole is None else whole.cpu()
