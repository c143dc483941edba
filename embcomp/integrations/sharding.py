"""Compressed tables in several processes: their rows lie in TorchRec's collections, which TorchRec shards.

    handle = embcomp.compress_(model, "hash", budget="10%")
    print(plan_sharding(model, world_size=4))              # before anything is started: bytes of each rank
    model = distribute(model, "rowwise_adagrad", 0.02)     # in every process, after init_process_group
    ...                                                    # train; an optimizer of dense_parameters(model) beside it
    save_sharded(model, folder)                            # in every process; load_pretrained_ loads it anywhere

Rows are updated in the backward pass. What else a strategy trains (projections, scales of rows) is small, is in every
process, and is averaged by ``DistributedDataParallel`` as the rest of the model is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward

from embcomp.config import strategy_of
from embcomp.errors import ConfigError, IncompatibleStateError, did_you_mean
from embcomp.integrations.versions import torchrec_error
from embcomp.io import write_pretrained
from embcomp.memory import format_bytes
from embcomp.sites import find_groups
from embcomp.storage.base import MatrixRows, Segment
from embcomp.swap import groups_of
from embcomp.tables import EmbeddingTables

try:
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.distributed.types import ShardedTensor, ShardingEnv, ShardingPlan, ShardingType
    from torchrec.modules.embedding_configs import EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollection
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
except (ImportError, OSError) as error:
    raise torchrec_error(error) from error

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": torch.optim.Adam,
}
"""Name -> optimizer of the rows; TorchRec runs it fused with the backward pass."""

SHARDINGS = tuple(kind.value for kind in ShardingType)
REPLICATED = ShardingType.DATA_PARALLEL.value
_ALIGNMENT = 4
"""Rows have a multiple of so many values in the kernels of FBGEMM."""


class ShardableRows(nn.Module):
    """Rows of a store as tables of an ``EmbeddingCollection``, one per segment; TorchRec shards the collection.

    Args:
        store: what kind of rows they are.
        weight: the rows, float32 ``(R, d)``, which are copied.
        names: of the segments, unique in the model.
    """

    _starts: Tensor

    def __init__(self, store: MatrixRows, weight: Tensor, names: list[str]) -> None:
        super().__init__()
        self.dim, self.segments, self.names = store.dim, store.segments, names
        self.width = -(-store.dim // _ALIGNMENT) * _ALIGNMENT
        configs = [
            EmbeddingConfig(name=name, embedding_dim=self.width, num_embeddings=rows, feature_names=[name])
            for name, rows in zip(names, store.segments, strict=True)
        ]
        self.collection = EmbeddingCollection(configs, device=weight.device)  # on meta, TorchRec would draw them anew
        for name, rows in zip(names, weight.detach().split(list(store.segments)), strict=True):
            padded = nn.functional.pad(rows, (0, self.width - self.dim)) if self.width > self.dim else rows.clone()
            self.collection.embeddings[name].weight = nn.Parameter(padded)
        self.register_buffer("_starts", torch.tensor(store.starts(), device=weight.device), persistent=False)

    def forward(self, rows: Tensor, segment: Segment) -> Tensor:
        """Look rows up: int64 ``(...)``, counted over all segments, to float32 ``(..., d)``."""
        flat, number = rows.reshape(-1), len(self.segments)
        if number == 1:
            order, counts = None, [flat.numel()]
        else:
            owner = torch.bucketize(flat, self._starts[1:], right=True)
            order = owner.argsort(stable=True)
            counts = owner.bincount(minlength=number).tolist()
            flat = flat[order] - self._starts[owner[order]]
        longest = torch.arange(max(1, *counts), device=flat.device)
        lengths = (longest < torch.tensor(counts, device=flat.device)[:, None]).long().flatten()
        found = self.collection(KeyedJaggedTensor(self.names, flat, lengths=lengths))
        vectors = torch.cat([found[name].values() for name in self.names])[:, : self.dim]
        if order is not None:
            vectors = torch.empty_like(vectors).index_copy(0, order, vectors)
        return vectors.view(*rows.shape, self.dim)


def shardable_(model: nn.Module, replicated: Collection[str] = ()) -> nn.Module:
    """Move the rows of all compressed tables into TorchRec's collections, in place: what `distribute` does first.

    Looked up and trained in one process, the tables are what they were. For models that are sharded together with
    collections of their own: call this, then TorchRec's planner and ``DistributedModelParallel`` as usual, with an
    ``EmbeddingCollectionSharder`` among the sharders.

    Args:
        model: with compressed tables.
        replicated: names of stored tables, see `stored_tables`, that stay where they are, for
            ``DistributedDataParallel``.

    Raises:
        NoMatchingTableError: if there are no compressed tables.
        ConfigError: if a strategy's rows can't be sharded, or their format can't; the message names it.
    """
    groups = groups_of(model)
    for tables in groups:
        _check_shardable(tables)
    for _, store, names in _stores(model):
        if store.elsewhere is None and not set(names) <= set(replicated):
            rows = ShardableRows(store, store.weight, names)
            del store.weight
            store.elsewhere = rows
    for tables in groups:
        for module in tables.modules():
            if isinstance(module, EmbeddingTables):
                module.is_sharded = True
    return model


def stored_tables(model: nn.Module) -> list[str]:
    """Names of the tables of stored rows, by which `plan_sharding` and `distribute` are told how to shard which."""
    return [name for _, _, names in _stores(model) for name in names]


@dataclass(frozen=True)
class Shard:
    """A part of a table's rows.

    Attributes:
        table: name of the stored table: group, part of the strategy, and logical table where it has rows of its own.
        sharding: TorchRec's name of how the table is cut.
        rank: that holds the part; every one, one by one, where the table is replicated.
        rows: first row, and the one behind the last.
        columns: first column, and the one behind the last.
        bytes: of the float32 values, without optimizer state.
    """

    table: str
    sharding: str
    rank: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    bytes: int


@dataclass(frozen=True)
class ShardingReport:
    """Where the rows of compressed tables go.

    Attributes:
        plan: TorchRec's.
        world_size: number of processes.
        shards: every part.
        replicated_bytes: of what else is in the tables, such as projections, the same in every process.
    """

    plan: ShardingPlan
    world_size: int
    shards: tuple[Shard, ...]
    replicated_bytes: int

    @property
    def bytes_per_rank(self) -> list[int]:
        """Bytes of rows and of what is replicated, in the order of ranks."""
        own = [sum(shard.bytes for shard in self.shards if shard.rank == rank) for rank in range(self.world_size)]
        return [size + self.replicated_bytes for size in own]

    def __str__(self) -> str:
        lines = [f"{'table':<40} {'sharding':<16} {'rank':>4} {'rows':>22} {'columns':>10} {'bytes':>12}"]
        for shard in self.shards:
            rows, columns = (f"{first}-{stop - 1}" for first, stop in (shard.rows, shard.columns))
            told = format_bytes(shard.bytes)
            lines.append(f"{shard.table:<40} {shard.sharding:<16} {shard.rank:>4} {rows:>22} {columns:>10} {told:>12}")
        for rank, size in enumerate(self.bytes_per_rank):
            lines.append(f"rank {rank}: {format_bytes(size)} of tables, {self.replicated_bytes:,} B of it replicated")
        return "\n".join(lines)


def plan_sharding(
    model: nn.Module,
    world_size: int,
    sharding: str | Mapping[str, str] | None = None,
    device: str = "cpu",
    local_world_size: int | None = None,
) -> ShardingReport:
    """Let TorchRec's planner place the rows of compressed tables; nothing is started, and the model stays as it is.

    Args:
        model: with compressed tables, which may be on ``meta``.
        world_size: number of processes.
        sharding: one of `SHARDINGS` for all tables, or name of `stored_tables` -> one of them; the planner chooses for
            the others, ``"data_parallel"`` aside.
        device: type of the devices, ``"cpu"`` or ``"cuda"``.
        local_world_size: processes on one machine; None for all.

    Raises:
        ConfigError: as `shardable_`, and for an unknown way of sharding or name of a table.
    """
    for tables in groups_of(model):
        _check_shardable(tables)
    wanted = _wanted(model, sharding)
    planner = _planner(wanted, world_size, local_world_size or world_size, device)
    skeleton = _skeleton(model, _replicated(wanted))
    return _reported(model, planner.plan(skeleton, [EmbeddingCollectionSharder()]), world_size, _replicated(wanted))


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

    All processes must hold the same model: build it from one seed, or load it from one folder.

    Args:
        model: with compressed tables.
        optimizer: of their rows, one of `OPTIMIZERS`. With ``"rowwise_adagrad"``, parts of a table that is cut by
            column have accumulators of their own, which TorchRec does not add up: losses are a little other then.
        learning_rate: of it.
        sharding: see `plan_sharding`.
        device: of this process.
        group: None for the default one.
        options: of the optimizer, such as ``eps``.

    Returns:
        the model to train, whose ``dense_parameters`` need an optimizer of their own.

    Raises:
        ConfigError: as `plan_sharding`, for an unknown optimizer, or where there is no process group.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer={optimizer!r}; {did_you_mean(optimizer, OPTIMIZERS)}")
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError(
            "there is no process group: start the script by torchrun, and call torch.distributed.init_process_group "
            "('gloo', or 'nccl' on GPUs) first"
        )
    group = group or dist.group.WORLD
    assert group is not None
    wanted = _wanted(model, sharding)
    shardable_(model, _replicated(wanted))
    for _, store, _ in _stores(model):
        store.processes, rows = group.size(), store.elsewhere
        if isinstance(rows, ShardableRows):
            rate = learning_rate
            if optimizer == "rowwise_adagrad":  # whose mean of squares is over the columns that fill rows up too
                rate *= (rows.dim / rows.width) ** 0.5
            _apply_optimizer_in_backward(OPTIMIZERS[optimizer], rows.parameters(), {"lr": rate, **options})
    device = torch.device(device)
    planner = _planner(wanted, group.size(), _local_world_size(group), device.type)
    sharders: list[Any] = [EmbeddingCollectionSharder()]
    plan = planner.collective_plan(model, sharders, group)
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


def save_sharded(model: DistributedModelParallel, folder: str | Path, group: dist.ProcessGroup | None = None) -> None:
    """Save a distributed model as `save_pretrained` would save it undistributed; called in every process.

    The first process gathers the rows and writes; the others wait. Loading needs no process group, and any number of
    processes can go on with it: ``load_pretrained_(fresh_model, folder)``, then `distribute`.

    Args:
        model: what `distribute` returned.
        folder: one that the first process can write to.
        group: that the model is distributed over; None for the default one.

    Raises:
        IncompatibleStateError: in every process, if the first could not write.
    """
    state = _gathered(model, group)
    problem: list[str | None] = [None]
    if dist.get_rank(group) == 0:
        try:
            write_pretrained(model.module, folder, state)
        except Exception as error:  # the others wait: all are to hear of it
            problem = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(problem, 0, group)
    if problem[0] is not None:
        raise IncompatibleStateError(f"{folder} was not saved: {problem[0]}")


# ---- inside ---------------------------------------------------------------------------------------------------------


def _check_shardable(tables: EmbeddingTables) -> None:
    name, some = strategy_of(tables.config).name, ", ".join(tables.names[:3])
    if not tables.can_be_sharded:
        raise ConfigError(
            f"strategy {name!r} (tables {some}) trains its rows in ways that need all of them in one process: take "
            "another strategy, or leave its tables out of compress_ and shard them plainly"
        )
    if tables.is_final:
        raise IncompatibleStateError(f"tables {some} are finalized: serve them, or load the training form")
    stores = [module for module in tables.modules() if isinstance(module, MatrixRows)]
    here = [store for store in stores if store.elsewhere is None]
    if any(not store.weight.requires_grad for store in here):
        raise ConfigError(f"tables {some} are frozen: leave them out of compress_, or unfreeze them")
    if not stores or any(store.weight.dtype != torch.float32 for store in here):
        raise ConfigError(f"tables {some} train rows={tables.config.rows!r}, not float32: take a format without 'pure'")


def _stores(model: nn.Module) -> list[tuple[str, MatrixRows, list[str]]]:
    """Path of every store of rows, the store, and the names of its segments."""
    found: list[tuple[str, MatrixRows, list[str]]] = []
    known: set[str] = set()
    for index, (prefix, tables) in enumerate(find_groups(model).items()):
        for path, module in tables.named_modules():
            if isinstance(module, MatrixRows):
                names = [_unique(name, known) for name in _names(tables, index, path, len(module.segments))]
                found.append((f"{prefix}{path}", module, names))
    return found


def _unique(name: str, known: set[str]) -> str:
    number, own = 1, name
    while own in known:
        number += 1
        own = f"{name}_{number}"
    known.add(own)
    return own


def _skeleton(model: nn.Module, replicated: Collection[str]) -> nn.Module:
    """The rows that will be sharded, on ``meta``, in their places."""
    skeleton = nn.Module()
    for path, store, names in _stores(model):
        if set(names) <= set(replicated):
            continue
        owner = skeleton
        for name in path.split("."):
            if not hasattr(owner, name):
                owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        weight = torch.empty(store.num_rows, store.dim, device="meta")
        owner.add_module("elsewhere", ShardableRows(store, weight, names))
    return skeleton


def _names(tables: EmbeddingTables, group: int, store: str, segments: int) -> list[str]:
    """Names of stored tables, which TorchRec takes for names of modules."""
    own = tables.names if segments == tables.num_tables else [str(index) for index in range(segments)]
    parts = [f"{store}_{name}" if segments > 1 or segments == tables.num_tables else store for name in own]
    return [f"group{group}_{re.sub(r'[^0-9A-Za-z_]', '_', part)}" for part in parts]


def _wanted(model: nn.Module, sharding: str | Mapping[str, str] | None) -> dict[str, list[str]]:
    """Stored table -> ways of sharding that are allowed."""
    names = stored_tables(model)
    given = dict.fromkeys(names, sharding) if isinstance(sharding, str) else dict(sharding or {})
    for name, kind in given.items():
        if name not in names:
            raise ConfigError(f"sharding: no stored table {name!r}; {did_you_mean(name, names)}")
        if kind not in SHARDINGS:
            raise ConfigError(f"sharding of {name!r}: {kind!r}; {did_you_mean(str(kind), SHARDINGS)}")
    for _, _, own in _stores(model):
        kept = [name for name in own if given.get(name) == REPLICATED]
        if kept and len(kept) < len(own):
            raise ConfigError(
                f"sharding: {', '.join(own)} are one matrix, so {REPLICATED!r} is for all of them or none, and it was "
                f"given for {', '.join(kept)}"
            )
    others = [kind for kind in SHARDINGS if kind != REPLICATED]
    return {name: [given[name]] if name in given else others for name in names}


def _replicated(wanted: Mapping[str, list[str]]) -> list[str]:
    return [name for name, kinds in wanted.items() if kinds == [REPLICATED]]


def _planner(
    wanted: Mapping[str, list[str]], world_size: int, local_world_size: int, device: str
) -> EmbeddingShardingPlanner:
    constraints = {
        name: ParameterConstraints(sharding_types=kinds, min_partition=_ALIGNMENT) for name, kinds in wanted.items()
    }
    topology = Topology(world_size=world_size, local_world_size=local_world_size, compute_device=device)
    reservation = FixedPercentageStorageReservation(percentage=0.15)
    return EmbeddingShardingPlanner(topology, constraints=constraints, storage_reservation=reservation)


def _local_world_size(group: dist.ProcessGroup) -> int:
    return min(group.size(), int(os.environ.get("LOCAL_WORLD_SIZE", group.size())))


def _reported(model: nn.Module, plan: ShardingPlan, world_size: int, replicated: Collection[str]) -> ShardingReport:
    shards = []
    for tables in plan.plan.values():
        for name, parameter in tables.items():
            for rank, rows, columns in map(_place, parameter.sharding_spec.shards):
                size = 4 * (rows[1] - rows[0]) * (columns[1] - columns[0])
                shards.append(Shard(name, parameter.sharding_type, rank, rows, columns, size))
    for _, store, names in _stores(model):
        for name, number in zip(names, store.segments, strict=True):
            if name in replicated:
                whole = (0, number), (0, store.dim), 4 * number * store.dim
                shards += [Shard(name, REPLICATED, rank, *whole) for rank in range(world_size)]
    homes = [store.elsewhere for _, store, _ in _stores(model)]
    stored = {id(p) for home in homes if home is not None for p in home.parameters()}
    stored |= {id(store.weight) for _, store, _ in _stores(model) if store.elsewhere is None}
    rest = [t for g in find_groups(model).values() for t in (*g.parameters(), *g.buffers()) if id(t) not in stored]
    return ShardingReport(plan, world_size, tuple(shards), sum(tensor.nbytes for tensor in rest))


def _place(shard: Any) -> tuple[int, tuple[int, int], tuple[int, int]]:
    (row, column), (rows, columns) = shard.shard_offsets, shard.shard_sizes
    return shard.placement.rank(), (row, row + rows), (column, column + columns)


def _gathered(model: DistributedModelParallel, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """The model's state as if it were in one process; in the first process, and nothing in the others."""
    first = dist.get_rank(group) == 0
    state = {name: _whole(value, first) for name, value in model.state_dict().items()}
    for path, rows in model.module.named_modules():
        if isinstance(rows, ShardableRows):
            prefix = f"{path}.collection.embeddings."
            parts = [state.pop(f"{prefix}{name}.weight") for name in rows.names]
            if first:
                state[f"{path.rpartition('.')[0]}.weight"] = torch.cat([part[:, : rows.dim] for part in parts])
    return state if first else {}


def _whole(value: Any, first: bool) -> Tensor:
    if not isinstance(value, ShardedTensor):
        return value
    whole = torch.empty(value.size()) if first else None
    value.gather(0, whole)
    return torch.empty(0) if whole is None else whole
