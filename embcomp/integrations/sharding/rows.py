"""Rows of compressed tables in TorchRec's collections, which TorchRec shards."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.config import strategy_of
from embcomp.errors import ConfigError, IncompatibleStateError
from embcomp.sites import find_groups
from embcomp.storage.base import MatrixRows, Segment
from embcomp.swap import groups_of
from embcomp.tables import EmbeddingTables

ALIGNMENT = 4
"""Rows have a multiple of so many values in the kernels of FBGEMM."""


class ShardableRows(nn.Module):
    """Rows of a store as tables of an ``EmbeddingCollection``, which TorchRec shards: one per segment that has any.

    Args:
        store: what kind of rows they are.
        weight: the rows, float32 ``(R, d)``, which are copied.
        names: of the segments, unique in the model.
    """

    _starts: Tensor

    def __init__(self, store: MatrixRows, weight: Tensor, names: list[str]) -> None:
        super().__init__()
        kept = [number for number, rows in enumerate(store.segments) if rows]  # TorchRec has no tables without rows
        self.dim, self.segments = store.dim, [store.segments[number] for number in kept]
        self.names = [names[number] for number in kept]
        self.width = -(-store.dim // ALIGNMENT) * ALIGNMENT
        configs = [
            EmbeddingConfig(name=name, embedding_dim=self.width, num_embeddings=rows, feature_names=[name])
            for name, rows in zip(self.names, self.segments, strict=True)
        ]
        self.collection = EmbeddingCollection(configs, device=weight.device)  # on meta, TorchRec would draw them anew
        for name, rows in zip(self.names, weight.detach().split(self.segments), strict=True):
            padded = nn.functional.pad(rows, (0, self.width - self.dim)) if self.width > self.dim else rows.clone()
            self.collection.embeddings[name].weight = nn.Parameter(padded)
        starts = torch.tensor([store.starts()[number] for number in kept], device=weight.device)
        self.register_buffer("_starts", starts, persistent=False)

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
        ConfigError: if a strategy's rows can't be sharded, their format can't, or tables are on ``meta``; the message
            names them.
    """
    groups = groups_of(model)
    for tables in groups:
        check_shardable(tables)
        _check_values(tables)
    for _, store, names in stores_of(model):
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
    return [name for _, _, names in stores_of(model) for name in names]


def stores_of(model: nn.Module) -> list[tuple[str, MatrixRows, list[str]]]:
    """Path of every store of rows, the store, and the names of its segments."""
    found: list[tuple[str, MatrixRows, list[str]]] = []
    known: set[str] = set()
    for index, (prefix, tables) in enumerate(find_groups(model).items()):
        for path, module in tables.named_modules():
            if isinstance(module, MatrixRows):
                names = [_unique(name, known) for name in _names(tables, index, path, len(module.segments))]
                found.append((f"{prefix}{path}", module, names))
    return found


def check_shardable(tables: EmbeddingTables) -> None:
    """Refuse tables whose rows other processes can't hold.

    Raises:
        ConfigError: if the strategy or the format of the rows is not made for it, or the tables are frozen.
        IncompatibleStateError: if they are finalized.
    """
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


# ---- inside ---------------------------------------------------------------------------------------------------------


def _check_values(tables: EmbeddingTables) -> None:
    """Refuse tables on ``meta``, whose constants TorchRec would fill with zeros."""
    if any(tensor.is_meta for tensor in (*tables.parameters(), *tables.buffers())):
        raise ConfigError(
            f"tables {', '.join(tables.names[:3])} are on 'meta', without values: build them on the CPU, the same in "
            "every process (plan_sharding takes them from 'meta')"
        )


def _names(tables: EmbeddingTables, group: int, store: str, segments: int) -> list[str]:
    """Names of stored tables, which TorchRec takes for names of modules."""
    own = tables.names if segments == tables.num_tables else [str(index) for index in range(segments)]
    parts = [f"{store}_{name}" if segments > 1 or segments == tables.num_tables else store for name in own]
    return [f"group{group}_{re.sub(r'[^0-9A-Za-z_]', '_', part)}" for part in parts]


def _unique(name: str, known: set[str]) -> str:
    number, own = 1, name
    while own in known:
        number += 1
        own = f"{name}_{number}"
    known.add(own)
    return own
