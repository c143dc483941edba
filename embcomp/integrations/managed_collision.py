"""TorchRec's managed collision modules in the place of ``dynamic``'s map, and back to tables that embcomp serves.

    tables = ManagedCollisionTables(specs, DynamicConfig(num_slots=…, num_fallback=…, unseen="hash"))
    ...                                  # train: tables(ids), then tables.step_() and reset_rows_([tables], optimizer)
    served = tables.to_tables().finalize_()

TorchRec decides which ids have a slot, and remaps them; the rows lie in its ``EmbeddingCollection``. On the same stream
the residents are those of ``dynamic`` after every step, for the policies that both have; `ManagedCollisionTables` says
where they differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embcomp.errors import ConfigError, IncompatibleStateError, InputError, SpecError
from embcomp.hashing import hash_seed
from embcomp.integrations.versions import torchrec_error, warn_of_versions
from embcomp.specs import TableSpec
from embcomp.strategies.dynamic import DynamicConfig, DynamicTables

try:
    from torchrec.modules.embedding_configs import EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollection
    from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
    from torchrec.modules.mc_modules import (
        DistanceLFU_EvictionPolicy,
        LFU_EvictionPolicy,
        LRU_EvictionPolicy,
        ManagedCollisionCollection,
        MCHEvictionPolicy,
        MCHManagedCollisionModule,
    )
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
except (ImportError, OSError) as error:
    raise torchrec_error(error) from error
warn_of_versions()

_NO_ID = 2**63 - 1


class RememberingCollisionModule(MCHManagedCollisionModule):
    """TorchRec's module, which also remembers the slots that it gave to other ids, and may begin with an empty batch.

    TorchRec 1.8 reports slots to its collection, which forgets them: no row is begun anew unless somebody else does. It
    sizes the history by the first batch: had that no ids, no id would ever get a slot.
    """

    _input_history_buffer_size: int

    def _init_history_buffers(self, features: Any) -> None:
        super()._init_history_buffers(features)
        if not self._input_history_buffer_size:
            self._input_history_buffer_size = -1  # as before: the next batch tells

    def evict(self) -> Tensor | None:
        """As TorchRec's; what it returns is remembered until `take_evicted_`."""
        found: Tensor | None = super().evict()
        if found is not None:
            self._remembered = [*getattr(self, "_remembered", []), found.clone()]
        return found

    def take_evicted_(self) -> Tensor:
        """Slots that were given to other ids since this was asked last: int64 ``(n,)``."""
        found, self._remembered = getattr(self, "_remembered", []), []
        return torch.cat([torch.empty(0, dtype=torch.int64, device=self.device), *found]).unique()


def make_collection(
    specs: Sequence[TableSpec], config: DynamicConfig, device: torch.device | str = "cpu"
) -> ManagedCollisionEmbeddingCollection:
    """TorchRec's collection by the rules of a config of ``dynamic``; a feature per table, of the table's name.

    Args:
        specs: the tables; characters of their names that can't be in a module's become ``_``.
        config: with ``num_slots``, a single fallback row per table (which TorchRec has), float32 rows, any ids
            (``unseen="hash"``), admission ``"always"``, start ``"random"``, and a policy that TorchRec has.
        device: of rows and map.

    Raises:
        ConfigError: if TorchRec has no such rules.
        SpecError: if a table has padding, which TorchRec's modules don't know, or two names become one.
    """
    _check(specs, config)
    assert config.num_slots is not None
    names, device = _module_names(specs), torch.device(device)
    configs = [
        EmbeddingConfig(
            name=name,
            embedding_dim=spec.embedding_dim,
            num_embeddings=config.num_slots[spec.name] + 1,
            feature_names=[name],
        )
        for spec, name in zip(specs, names, strict=True)
    ]
    modules = {
        own.name: RememberingCollisionModule(own.num_embeddings, device, _policy(config), config.interval)
        for own in configs
    }
    collisions = ManagedCollisionCollection(modules, configs)
    return ManagedCollisionEmbeddingCollection(EmbeddingCollection(configs, device), collisions)


class ManagedCollisionTables(nn.Module):
    """The lookup of ``dynamic`` with TorchRec's `ManagedCollisionEmbeddingCollection` behind it.

    Rows begin as those of `DynamicTables` with the same config. What differs from ``dynamic``:

    - TorchRec lets ids compete in the lookup, before they are remapped; here it is after the step. Residents are the
      same once the step is made, but in one step of every ``interval`` new residents are looked up in slots that are
      begun anew afterwards.
    - Every training lookup is a step to TorchRec: look all tables up at once, once a step, for the same answers.
      Lookups without gradients count too.
    - Its history has room for 1.25 intervals of the size of the first batch with ids; later ids are dropped.
    - Scores are float32, in ``dynamic`` float64. The id 2⁶³ − 1 finds the first empty slot, if there is one.
    - Its TTL policy is another module (MPZCH), of wall-clock hours and probing, which is not offered here.

    Args:
        specs: see `make_collection`.
        config: see `make_collection`.
        device: of rows and map.

    Attributes:
        collection: TorchRec's, which takes a ``KeyedJaggedTensor`` as well.
    """

    def __init__(self, specs: Sequence[TableSpec], config: DynamicConfig, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.specs, self.config, self.names = tuple(specs), config, tuple(spec.name for spec in specs)
        self.collection = make_collection(specs, config, device)
        self.num_tables, self.embedding_dim = len(self.specs), self.specs[0].embedding_dim
        self._features = _module_names(specs)
        self._reassigned: list[tuple[nn.Parameter, Tensor]] = []
        start = DynamicTables(specs, config)
        with torch.no_grad():
            for index, weight in enumerate(self._weights()):
                weight[:-1] = start.rows.consecutive(*_span(start, index)).to(weight.device)
                weight[-1:] = start.rows.consecutive(*_span(start, len(specs) + index)).to(weight.device)

    def forward(self, ids: Tensor, table: Tensor | int | str | None = None) -> Tensor:
        """Look up vectors.

        Args:
            ids: int64 ``(...)``, any value.
            table: as in `EmbeddingTables.forward`.

        Returns:
            float32 ``(..., D)``.

        Raises:
            InputError: if ids are no int64, or do not go with the tables.
        """
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            raise InputError(f"ids must be an int64 tensor, not {getattr(ids, 'dtype', type(ids).__name__)}")
        owner = self._owner(ids, table).reshape(-1)
        order = owner.argsort(stable=True)
        lengths = torch.bincount(owner, minlength=len(self.names))
        features = KeyedJaggedTensor(self._features, ids.reshape(-1)[order], lengths=lengths)
        found, _ = self.collection(features)
        vectors = torch.cat([found[name].values() for name in self._features])
        return torch.empty_like(vectors).index_copy(0, order, vectors).view(*ids.shape, self.embedding_dim)

    @torch.no_grad()
    def step_(self) -> None:
        """After the optimizer's step: rows of slots that TorchRec gave to other ids begin anew."""
        for spec, module, weight in zip(self.specs, self._modules_of(), self._weights(), strict=True):
            rows = module.take_evicted_()
            if len(rows):
                step = int(module.state_dict()["_current_iter_tensor"])
                generator = torch.Generator().manual_seed(hash_seed(self.config.seed, spec.name, step) & (2**63 - 1))
                drawn = torch.randn(len(rows), spec.embedding_dim, generator=generator) * spec.init_std
                weight[rows] = drawn.to(weight.device)
                self._reassigned.append((weight, rows))

    def reassigned_(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Rows that went to other ids since this was asked last; for `embcomp.training.reset_rows_`."""
        found, self._reassigned = self._reassigned, []
        return found

    def residents_of(self, table: int | str) -> Tensor:
        """The ids that have a slot, sorted: int64 ``(n,)``."""
        index = self.names.index(table) if isinstance(table, str) else table
        ids = self._modules_of()[index].state_dict()["_mch_sorted_raw_ids"]
        return ids[ids != _NO_ID].clone()

    def to_tables(self) -> DynamicTables:
        """The same residents and rows as tables of ``dynamic``, to go on with, or to finalize, save and export."""
        return to_tables(self.collection, self.specs, self.config)

    def _owner(self, ids: Tensor, table: Tensor | int | str | None) -> Tensor:
        """The table of each id: int64, the shape of ``ids``."""
        number = len(self.names)
        if isinstance(table, str) and table in self.names:
            table = self.names.index(table)
        if table is None and number == 1:
            table = 0
        if table is None and ids.dim() and ids.shape[-1] == number:
            table = torch.arange(number, device=ids.device)
        if isinstance(table, Tensor):
            if table.dtype != torch.int64 or bool(((table < 0) | (table >= number)).any()):
                raise InputError(f"table must be int64 in [0, {number}); tables: {', '.join(self.names)}")
            return torch.broadcast_to(table, ids.shape)
        if isinstance(table, int) and 0 <= table < number:
            return torch.full_like(ids, table)
        raise InputError(f"table={table!r} for ids of shape {tuple(ids.shape)}; tables: {', '.join(self.names)}")

    def _modules_of(self) -> list[Any]:
        modules = self.collection._managed_collision_collection._managed_collision_modules
        return [modules[name] for name in self._features]

    def _weights(self) -> list[nn.Parameter]:
        return [self.collection._embedding_module.embeddings[name].weight for name in self._features]


@torch.no_grad()
def to_tables(
    collection: ManagedCollisionEmbeddingCollection, specs: Sequence[TableSpec], config: DynamicConfig
) -> DynamicTables:
    """Tables of ``dynamic`` with the residents and rows of a collection of TorchRec; lookups of its history are left.

    Args:
        collection: as `make_collection` makes them, trained anywhere, in one process.
        specs: its tables.
        config: its rules.

    Raises:
        IncompatibleStateError: if the collection lacks a table, or has another number of slots.
    """
    tables, state = DynamicTables(specs, config), collection.state_dict()
    for index, name in enumerate(_module_names(specs)):
        module = f"_managed_collision_collection._managed_collision_modules.{name}."
        weight, own = state.get(f"_embedding_module.embeddings.{name}.weight"), _of_module(state, module)
        slots = tables.num_slots[index]
        if weight is None or "_mch_sorted_raw_ids" not in own or weight.shape != (slots + 1, tables.embedding_dim):
            shape = None if weight is None else tuple(weight.shape)
            raise IncompatibleStateError(
                f"table {tables.names[index]!r}: the collection has rows {shape}, the config wants {slots} slots and a "
                f"fallback row of {tables.embedding_dim} values"
            )
        _take_module(tables, index, own, weight)
    return tables


def _take_module(tables: DynamicTables, index: int, own: Mapping[str, Tensor], weight: Tensor) -> None:
    """Fill one table of ``dynamic``."""
    there = own["_mch_sorted_raw_ids"] != _NO_ID
    ids, theirs = own["_mch_sorted_raw_ids"][there].cpu(), own["_mch_remapped_ids_mapping"][there].cpu()
    residents, now = tables.residents, own["_current_iter_tensor"].cpu().view(())
    counts = own["_mch_counts"][there].cpu() if "_mch_counts" in own else torch.ones_like(ids)
    last = own["_mch_last_access_iter"][there].cpu() if "_mch_last_access_iter" in own else now.expand_as(ids)
    residents.clock.copy_(torch.maximum(residents.clock, now))
    places = residents.map.starts[index] + torch.arange(len(ids))
    slots = residents.map.replace_(places, ids, counts, last)
    rows, weight = tables.rows, weight.detach().cpu()
    values = rows.consecutive(*_span(tables, index)).clone()
    values[slots] = weight[theirs]
    rows.write_(_span(tables, index)[0], values)
    rows.write_(_span(tables, len(tables.specs) + index)[0], weight[-1:])


def _of_module(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _span(tables: DynamicTables, segment: int) -> tuple[int, int]:
    start = tables.rows.starts()[segment]
    return start, start + tables.rows.segments[segment]


def _policy(config: DynamicConfig) -> MCHEvictionPolicy:
    if config.policy == "lfu":
        return LFU_EvictionPolicy()
    return LRU_EvictionPolicy() if config.policy == "lru" else DistanceLFU_EvictionPolicy(config.decay)


def _check(specs: Sequence[TableSpec], config: DynamicConfig) -> None:
    wanted = {"rows": "float32", "unseen": "hash", "admission": "always", "start": "random", "sparse": False}
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise ConfigError(
                f"DynamicConfig({field}={getattr(config, field)!r}): TorchRec's managed collision modules have "
                f"{field}={value!r} alone; use build_tables for other rules"
            )
    if config.policy == "ttl":
        raise ConfigError(
            "DynamicConfig(policy='ttl'): TorchRec's is of hours and probing; take lfu, lru, distance_lfu"
        )
    for spec in specs:
        if (config.num_slots or {}).get(spec.name, 0) < 1 or (config.num_fallback or {}).get(spec.name) != 1:
            raise ConfigError(f"DynamicConfig: table {spec.name!r} needs num_slots, and num_fallback=1 as TorchRec has")
        if spec.padding_idx is not None:
            raise SpecError(f"table {spec.name!r}: TorchRec's managed collision modules know no padding_idx")


def _module_names(specs: Sequence[TableSpec]) -> list[str]:
    names = [re.sub(r"\W", "_", spec.name) for spec in specs]
    if len(set(names)) < len(names):
        raise SpecError(f"table names become {', '.join(names)} as names of modules, and must differ")
    return names
