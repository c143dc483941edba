"""Where the rows go: what TorchRec's planner says, and what that costs in bytes, before anything is started."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan, ShardingType

from embcomp.errors import ConfigError, did_you_mean
from embcomp.integrations.sharding.rows import ALIGNMENT, ShardableRows, check_shardable, stored_tables, stores_of
from embcomp.memory import format_bytes
from embcomp.sites import find_groups
from embcomp.specs import as_int
from embcomp.swap import groups_of

SHARDINGS = tuple(EmbeddingCollectionSharder().sharding_types("cpu"))
"""Ways of cutting a table that TorchRec has for collections of rows."""
REPLICATED, ROW_WISE = ShardingType.DATA_PARALLEL.value, ShardingType.ROW_WISE.value
_CHOSEN = (ShardingType.TABLE_WISE.value, ROW_WISE)
"""Ways that the planner chooses among: with them losses are those of one process, whatever the optimizer."""
_DEVICES = ("cpu", "cuda")


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
        sharding: one of `SHARDINGS` for all tables, or name of `stored_tables` -> one of them; for the others the
            planner chooses between ``"table_wise"`` and ``"row_wise"``. Tables of too few rows to give each process
            some are placed whole where ``"row_wise"`` is asked for.
        device: type of the devices, ``"cpu"`` or ``"cuda"``.
        local_world_size: processes on one machine; None for what torchrun says where it started this process, as
            `distribute` takes it, or all.

    Raises:
        ConfigError: as `shardable_`, for an unknown way of sharding or name of a table, for numbers of processes that
            do not go together, and if the planner finds no place for a table.
    """
    if as_int(world_size) is None:
        raise ConfigError(f"world_size={world_size!r}: give the number of processes, an int of at least one")
    if device not in _DEVICES:
        raise ConfigError(f"device={device!r}; {did_you_mean(device, _DEVICES)}")
    local_world_size = local_processes(world_size) if local_world_size is None else local_world_size
    _check_processes(world_size, local_world_size)
    for tables in groups_of(model):
        check_shardable(tables)
    wanted = wanted_shardings(model, sharding, world_size)
    planner = make_planner(wanted, world_size, local_world_size, device)
    replicated = replicated_tables(wanted)
    try:
        plan = planner.plan(skeleton(model, replicated), [EmbeddingCollectionSharder()])
    except PlannerError as error:
        raise ConfigError(
            f"TorchRec's planner finds no place for the rows in {world_size} processes: {error}"
        ) from error
    return _reported(model, plan, world_size, replicated)


def wanted_shardings(
    model: nn.Module, sharding: str | Mapping[str, str] | None, world_size: int
) -> dict[str, list[str]]:
    """Stored table -> ways of sharding that are allowed.

    Tables of so few rows that some process would have none of them are not cut by row but placed whole: FBGEMM's
    kernels for the CPU fail on a process that has no rows at all.
    """
    names = stored_tables(model)
    given = dict.fromkeys(names, sharding) if isinstance(sharding, str) else dict(sharding or {})
    for name, kind in given.items():
        if name not in names:
            raise ConfigError(f"sharding: no stored table {name!r}; {did_you_mean(name, names)}")
        if kind not in SHARDINGS:
            raise ConfigError(f"sharding of {name!r}: {kind!r}; {did_you_mean(str(kind), SHARDINGS)}")
    for _, _, own in stores_of(model):
        kept = [name for name in own if given.get(name) == REPLICATED]
        if kept and len(kept) < len(own):
            raise ConfigError(
                f"sharding: {', '.join(own)} are one matrix, so {REPLICATED!r} is for all of them or none, and it was "
                f"given for {', '.join(kept)}"
            )
    wanted = {name: [given[name]] if name in given else list(_CHOSEN) for name in names}
    for _, store, own in stores_of(model):
        for name, rows in zip(own, store.segments, strict=True):
            if (world_size - 1) * -(-rows // world_size) >= rows:
                wanted[name] = [kind for kind in wanted[name] if kind != ROW_WISE] or [ShardingType.TABLE_WISE.value]
    return wanted


def replicated_tables(wanted: Mapping[str, list[str]]) -> list[str]:
    """The tables of which every process has a copy."""
    return [name for name, kinds in wanted.items() if kinds == [REPLICATED]]


def local_processes(world_size: int) -> int:
    """Processes of a group on one machine: torchrun's number, or what of it divides a smaller group's."""
    told = os.environ.get("LOCAL_WORLD_SIZE")
    if told is not None and not told.isdecimal():
        raise ConfigError(f"LOCAL_WORLD_SIZE is {told!r}: set it to the processes on each machine, as torchrun does")
    local = world_size if told is None else min(world_size, int(told))
    return local if local < 1 or world_size % local == 0 else math.gcd(world_size, local)


def make_planner(
    wanted: Mapping[str, list[str]], world_size: int, local_world_size: int, device: str
) -> EmbeddingShardingPlanner:
    """TorchRec's planner, told what is allowed; arguments are those of `plan_sharding`."""
    constraints = {
        name: ParameterConstraints(sharding_types=kinds, min_partition=ALIGNMENT) for name, kinds in wanted.items()
    }
    topology = TopologyFactory.create_topology(
        TrainerConfig(world_size=world_size, local_world_size=local_world_size),
        kernel_config=KernelConfig(compute_device=device),
    )
    reservation = FixedPercentageStorageReservation(percentage=0.15)
    return EmbeddingShardingPlanner(topology, constraints=constraints, storage_reservation=reservation)


def skeleton(model: nn.Module, replicated: Collection[str]) -> nn.Module:
    """The compressed rows that are sharded, and nothing else of a model: on ``meta``, in their places."""
    bare = nn.Module()
    for path, store, names in stores_of(model):
        if set(names) <= set(replicated):
            continue
        owner = bare
        for name in path.split("."):
            if not hasattr(owner, name):
                owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        weight = torch.empty(store.num_rows, store.dim, device="meta")
        owner.add_module("elsewhere", ShardableRows(store, weight, names))
    return bare


# ---- inside ---------------------------------------------------------------------------------------------------------


def _check_processes(world_size: int, local_world_size: int) -> None:
    if world_size < 1 or not 1 <= local_world_size <= world_size or world_size % local_world_size:
        raise ConfigError(
            f"world_size={world_size} and local_world_size={local_world_size}: give the number of processes, at least "
            "one, and how many of them are on each machine, which must divide it"
        )


def _reported(model: nn.Module, plan: ShardingPlan, world_size: int, replicated: Collection[str]) -> ShardingReport:
    shards = []
    for tables in plan.plan.values():
        for name, parameter in tables.items():
            for rank, rows, columns in map(_place, parameter.sharding_spec.shards):
                size = 4 * (rows[1] - rows[0]) * (columns[1] - columns[0])
                shards.append(Shard(name, parameter.sharding_type, rank, rows, columns, size))
    for _, store, names in stores_of(model):
        for name, number in zip(names, store.segments, strict=True):
            if name in replicated:
                whole = (0, number), (0, store.dim), 4 * number * store.dim
                shards += [Shard(name, REPLICATED, rank, *whole) for rank in range(world_size)]
    homes = [store.elsewhere for _, store, _ in stores_of(model)]
    stored = {id(p) for home in homes if home is not None for p in home.parameters()}
    stored |= {id(store.weight) for _, store, _ in stores_of(model) if store.elsewhere is None}
    rest = [t for g in find_groups(model).values() for t in (*g.parameters(), *g.buffers()) if id(t) not in stored]
    return ShardingReport(plan, world_size, tuple(shards), sum(tensor.nbytes for tensor in rest))


def _place(shard: Any) -> tuple[int, tuple[int, int], tuple[int, int]]:
    (row, column), (rows, columns) = shard.shard_offsets, shard.shard_sizes
    return shard.placement.rank(), (row, row + rows), (column, column + columns)
