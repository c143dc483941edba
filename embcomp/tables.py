"""The interface that everything speaks: a group of embedding tables behind one lookup, ``forward(ids, table)``.

Shapes: ``B`` batch, ``T`` tables of the group, ``L`` bag or sequence length, ``V`` ids of a table, ``D`` output
dimension, ``...`` any leading dimensions.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from embcomp.bags import are_single, bag_bounds, check_pooling, pool_vectors
from embcomp.config import StrategyConfig
from embcomp.constants import keeping_constants
from embcomp.errors import ConfigError, IncompatibleStateError, SpecError
from embcomp.hashing import hash_seed
from embcomp.incoming import IncomingIds
from embcomp.memory import SHARED, MemoryPart, MemoryReport, format_bytes
from embcomp.range_scores import RangeScores, assemble, check_queries
from embcomp.row_source import RowSource, weighted_mean
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import Ids, RowStore
from embcomp.stretches import Stretch

CHUNK = 65536
"""Ids that are composed at once where a whole vocabulary is asked for."""


class EmbeddingTables(IncomingIds):
    """A group of logical tables that share an output dimension D: the base of every strategy.

    A subclass writes `lookup` (ids to vectors), `fit` (trained tables to its own form), `size_range` and `resize` (what
    the budget turns), and builds its row stores in ``__init__``, which ends with ``self.reset_parameters()``.

    Args:
        specs: the tables; all of one ``embedding_dim``, with different names.
        config: the strategy's config, with every size filled in.
        counts: optional id counts, for strategies that keep a remap.

    Raises:
        SpecError: if the specs do not make a group.
    """

    knob: ClassVar[str] = "nothing"
    """What the budget turns, for people: ``"rows"``, ``"rank"``, ``"bits"``, …"""
    knob_is_fine: ClassVar[bool] = True
    """Whether steps of the knob are small enough to use 98 % of a budget."""
    has_zero_vectors: ClassVar[bool] = False
    """Whether vectors that are evaluated or served may be zero, because the strategy prunes values."""
    can_be_streamed: ClassVar[bool] = False
    """Whether `fit` reads trained tables some rows at a time, and keeps no more of them than its own form needs."""
    can_be_sharded: bool = False
    """Whether training does nothing to stored rows but look them up, so that other processes can hold them."""
    is_sharded: bool = False
    """Whether other processes hold some rows: then all processes make every lookup together, be it of no id."""

    is_paused: bool = False
    """Whether a phase of training has switched its gradients off for a while (`embcomp.training.Phases`)."""
    current_phase: str | None = None
    """Which of several phases training is in, or has left last; None before the first and after the last."""
    loaded_from: str | None = None
    """The digest of the checkpoint that the tables are of; None if they were built."""

    _counts: bool = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("stretches", "stored_rows"):  # those inherited are of other vectors
            if "lookup" in vars(cls) and name not in vars(cls):
                setattr(cls, name, getattr(EmbeddingTables, name))

    def __init__(
        self, specs: Sequence[TableSpec], config: StrategyConfig, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(specs, config)
        self.built_config: Any = config  # config follows what training chooses
        self.embedding_dim = self.specs[0].embedding_dim
        self.is_final = False

    # ---- what a strategy writes -------------------------------------------------------------------------------------

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        """Compose vectors of ids that are known to be in ``[0, num_ids[t])``; the strategy's mathematics.

        Args:
            ids: int64 ``(...)``.
            table: int, or int64 broadcastable to ``ids``, or None where ids are ``(..., T)``, one column per table.

        Returns:
            float32 ``(..., D)``.
        """
        raise NotImplementedError

    def stored_rows(self, ids: Tensor, table: Tensor | int | None) -> tuple[RowStore, Tensor] | None:
        """Where vectors are stored rows and nothing else: the store, and the row of each id, int64 ``(...)``.

        Arguments are those of `lookup`. None where vectors are composed.
        """
        return None

    def stretches(self, index: int, queries: Tensor) -> list[Stretch]:
        """Say how the ids of a table are scored; for strategies that need not compose every vector to do so.

        Args:
            index: of the table.
            queries: float32 ``(N, D)``.

        Returns:
            Stretches from id 0 to V. Their scores are inner products with what `lookup` returns.
        """
        return [Stretch(range(self.specs[index].num_embeddings), queries, partial(self._compose, index))]

    def _compose(self, index: int, ids: Ids) -> Tensor:
        return self.lookup(self.as_ids(ids), index)

    def as_ids(self, ids: Ids) -> Tensor:
        """Turn a range into int64 ``(n,)``."""
        return torch.arange(ids.start, ids.stop, device=self._sizes.device) if isinstance(ids, range) else ids

    def reset_parameters(self) -> None:
        """Draw initial weights, such that composed vectors have each table's ``init_std``."""
        raise NotImplementedError

    def fit(self, weights: Sequence[Any], counts: Sequence[Tensor]) -> None:
        """Fit the compressed form to trained tables, weighted by counts.

        Args:
            weights: float32 tensors ``(num_ids[t], D)``; a `RowSource` each where the class `can_be_streamed`.
            counts: float32 ``(num_ids[t],)``, above 0; one number, expanded, where they are not known.
        """
        raise NotImplementedError

    def fit_rows(self, sources: Sequence[RowSource], counts: Sequence[Tensor]) -> None:
        """`fit`, with the tables in the form that the class takes."""
        self.fit(sources if self.can_be_streamed else [source[:] for source in sources], counts)

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: Any, known: Knowledge) -> tuple[int, int]:
        """Smallest and largest value of the size that the budget turns; serve bytes never fall as it grows."""
        raise NotImplementedError

    @classmethod
    def resize(cls, specs: Sequence[TableSpec], config: Any, size: int, known: Knowledge) -> Any:
        """Fill in the config's sizes for one value of the size; the result builds the tables without ``known``."""
        raise NotImplementedError

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: Any, known: Knowledge) -> Any:
        """Fill in the config's sizes where no budget is given.

        Raises:
            ConfigError: where the config leaves the size open and the strategy has no default for it.
        """
        raise ConfigError(f"{type(config).__name__} leaves its size ({cls.knob}) open: give budget=, for example '10%'")

    @classmethod
    def within(cls, config: Any, allowed: int) -> Any:
        """Note the budget in serve bytes in a complete config, for strategies that choose their form in training."""
        return config

    def penalty(self) -> Tensor:
        """The strategy's own loss term, a float32 scalar to add to the training loss."""
        return torch.zeros((), device=self._sizes.device)

    # ---- lookups ----------------------------------------------------------------------------------------------------

    def forward(self, ids: Tensor, table: Tensor | int | str | None = None) -> Tensor:
        """Look up vectors: the one primitive.

        Args:
            ids: int64 (or int32) ``(...)``; values outside ``[0, V)`` follow the config's ``unseen`` policy.
            table: which table each id is of: an index or a name, an int64 tensor broadcastable to ``ids``, or None
                for ``(..., T)`` ids with one column per table (and for groups of a single table).

        Returns:
            float32 ``(..., D)``.

        Raises:
            UnseenIdError: if ``unseen="error"`` and an id is outside its table.
            InputError: if ids or table have the wrong dtype, device or shape.
        """
        return self._vectors(*self._checked(ids, table), is_seen=self._is_counted)

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Lookups within do not count for strategies that count them: those of items that are scored, and not read."""
        before, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = before

    def note_(self, ids: Tensor, table: Tensor | int | str | None = None) -> None:
        """Count ids as if they were looked up, for tables that are scored and never read; arguments as in `forward`."""
        ids, index = self._checked(ids, table)
        ids, blank = self._apply_unseen(ids, index)
        if self._is_counted:
            self.seen_(ids, index, blank)

    @property
    def _is_counted(self) -> bool:
        return self._counts and self.training and torch.is_grad_enabled()

    def _vectors(self, ids: Tensor, table: Tensor | int | None, is_seen: bool) -> Tensor:
        ids, blank = self._apply_unseen(ids, table)
        if is_seen:
            self.seen_(ids, table, blank)
        vectors = self.lookup(ids, table)
        if blank is not None:
            vectors = vectors.masked_fill(blank.unsqueeze(-1), 0.0)
        return vectors

    def bag(
        self,
        ids: Tensor,
        offsets: Tensor | None = None,
        table: Tensor | int | str | None = 0,
        per_sample_weights: Tensor | None = None,
        mode: str = "sum",
        include_last_offset: bool = False,
    ) -> Tensor:
        """Compose first, pool second: like ``nn.EmbeddingBag``, which pads and empty bags follow too.

        Args:
            ids: int64 ``(N,)`` with ``offsets``, or ``(B, L)`` without.
            offsets: int64 ``(B,)`` start of each bag, or ``(B + 1,)`` with ``include_last_offset``.
            table: as in `forward`, broadcastable to ``ids``.
            per_sample_weights: float ``(N,)`` or ``(B, L)``; only with ``mode="sum"``.
            mode: ``sum``, ``mean`` or ``max``. Padding ids count for nothing; empty bags give zeros.
            include_last_offset: whether ``offsets`` ends with N.

        Returns:
            float32 ``(B, D)``.

        Raises:
            InputError: if ids, offsets, weights or mode do not make bags; else as `forward`.
        """
        bounds = bag_bounds(ids, offsets, include_last_offset)
        check_pooling(ids, per_sample_weights, mode)
        weights = None if per_sample_weights is None else per_sample_weights.reshape(-1).to(torch.float32)
        is_pooled = weights is None and are_single(bounds, ids.numel())
        if not is_pooled and (pooled := self._bag_rows(ids, table, bounds, mode, weights)) is not None:
            return pooled
        vectors = self(ids, table).reshape(-1, self.embedding_dim)
        if is_pooled:
            return vectors
        padding = None if mode == "sum" else self._bag_padding(ids, table)  # sums don't see zeros
        return pool_vectors(vectors, bounds, mode, weights, None if padding is None else padding.reshape(-1))

    def materialize(self, table: int | str = 0, ids: Tensor | None = None) -> Tensor:
        """Dense rows of a table: float32 ``(V, D)``, or ``(len(ids), D)``; differentiable, composed chunk by chunk."""
        index = self.index_of(table)
        if ids is None:
            ids = torch.arange(self.specs[index].num_embeddings, device=self._sizes.device)
        ids, _ = self._checked(ids, index)
        chunks = [self._vectors(chunk, index, is_seen=False) for chunk in ids.split(CHUNK)]
        return torch.cat(chunks)

    def scores(self, table: int | str, queries: Tensor, chunk: int | None = None) -> Tensor:
        """Inner products with every row of a table, ``queries @ materialize(table).T``, without all rows at once.

        They are composed chunk by chunk, or gathered from scores of the stored rows where that moves fewer bytes
        (`embcomp.stretches.rows_come_first`). Beside the result this takes memory for a chunk, for at most 64 MiB of
        scores of stored rows, and for the gradients. In the backward pass several chunks are composed again, by calling
        `lookup` a second time; a chunk then has at least `gradient_rows` ids. (Scales that are learned get gradients by
        LSQ's rule for the rows that are read at once, which differ from those of other chunks by a factor.)

        Args:
            table: index or name.
            queries: float ``(..., D)``; float32, or 16 bits, which count as float32.
            chunk: ids at once; None for as many as are fast.

        Returns:
            float32 ``(..., V)``; under autocast in its dtype.

        Raises:
            InputError: if there is no such table, or queries or chunk are wrong.
        """
        index = self.index_of(table)
        flat = self.check_queries(queries).reshape(-1, self.embedding_dim)
        spec = self.specs[index]
        least = self.gradient_rows
        found = RangeScores(
            self.stretches(index, flat), spec.padding_idx, least=least, chunk=chunk, repeatable=self.repeatable
        )
        scores = assemble(found, flat, spec.num_embeddings, chunk, least, self.repeatable)
        return scores.view(*queries.shape[:-1], spec.num_embeddings)

    def check_queries(self, queries: Tensor) -> Tensor:
        """Return queries ``(..., D)`` as float32.

        Raises:
            InputError: if they have the wrong dtype, device or last dimension.
        """
        return check_queries(queries, self.embedding_dim, self._sizes.device, f"tables {self._some_names()}")

    @property
    def gradient_rows(self) -> int:
        """Ids that are best composed at once where there are gradients.

        They have as many values as are trained, since a dense gradient of any lookup has that size; and they are all
        ids where a lookup can't be repeated in the backward pass.
        """
        if self.repeatable() is None:
            return max(self.num_ids)
        return sum(p.numel() for p in self.parameters() if p.requires_grad) // self.embedding_dim

    # ---- life -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_dense_(self, weights: Mapping[str, Any], counts: Mapping[str, Tensor] | None = None) -> EmbeddingTables:
        """Fit the compressed form to trained tables, as closely as the strategy can.

        Args:
            weights: table name -> float ``(V, D)``, a tensor or a `RowSource`, for every table.
            counts: table name -> ``(V,)`` how often ids occur: errors are weighted by them.

        Raises:
            SpecError: if a table is missing or has another shape.
            IncompatibleStateError: if the tables are finalized already.
        """
        if self.is_final:
            raise IncompatibleStateError("load_dense_: these tables are finalized; fit first, finalize afterwards")
        known = Knowledge.of(self.specs, counts, weights)
        missing = [name for name in self.names if name not in known.weights]
        if missing:
            raise SpecError(f"load_dense_: no weights for tables {', '.join(missing)}")
        dense, frequency = [], []
        for spec, num_ids in zip(self.specs, self.num_ids, strict=True):
            rows, count = known.weights[spec.name].on(self._sizes.device), self._frequency_of(spec, known)
            if num_ids > len(rows):
                rows = RowSource.joined([rows, RowSource.of(weighted_mean(rows, count))])
                known_count = spec.name in known.counts
                count = torch.cat([count, count.min()[None]]) if known_count else count[:1].expand(num_ids)
            dense.append(rows)
            frequency.append(count)
        self.fit_rows(dense, frequency)
        for module in self.modules():
            if isinstance(module, RowStore):
                module.fit_scales_()
        return self

    def set_rounding_(self, enabled: bool) -> EmbeddingTables:
        """Whether training rounds rows to what will be served (the default), or leaves them float32 for now.

        Low-bit rows train better after some epochs in float32: ``set_rounding_(False)`` before the first one, then
        ``set_rounding_(True)``, which fits scales to the rows as they are. Formats that are rounded after training,
        and plain float32, are not concerned. `finalize` rounds in any case. `save_pretrained` keeps which it is.
        """
        for module in self.modules():
            if isinstance(module, RowStore):
                module.set_rounding(enabled)
        return self

    def finalize_(self) -> EmbeddingTables:
        """Turn into the serving form, in place: smallest bytes, no gradients, the same vectors as evaluation."""
        modules = list(self.modules())
        children = [(module, name, child) for module in modules for name, child in module.named_children()]
        served = [(module, name, own.finalize()) for module, name, own in children if isinstance(own, RowStore)]
        for module, name, store in served:  # none before all are made: one that can't be leaves the training form whole
            setattr(module, name, store)
        for module in modules:
            if isinstance(module, EmbeddingTables):
                module.is_final = True
        self.requires_grad_(False)
        return self.eval()

    def finalize(self) -> EmbeddingTables:
        """Return the serving form and keep this one."""
        return copy.deepcopy(self).finalize_()

    def memory(self) -> MemoryReport:
        """Count every byte, part by part; the serve bytes are those of the finalized form, before and after it."""
        parts: list[MemoryPart] = []
        for name, child in self.named_children():
            if isinstance(child, RowStore):
                parts += self._store_parts(name, child)
            elif any(True for _ in child.parameters()) or any(True for _ in child.buffers()):
                state = child.state_dict(keep_vars=True)  # else nothing in it would count as trained
                parts += [part for tensor in state.values() for part in self._tensor_parts(name, tensor)]
        own = dict(self.named_parameters(recurse=False)) | dict(self.named_buffers(recurse=False))
        for name, tensor in own.items():
            if name not in self._non_persistent_buffers_set:
                parts += self._tensor_parts(name, tensor)
        return MemoryReport(tuple(parts), sum(spec.full_bytes for spec in self.specs))

    def _apply(self, fn: Any, recurse: bool = True) -> EmbeddingTables:
        with keeping_constants(self):
            super()._apply(fn, recurse)
        return self

    def generator(self, purpose: str = "init") -> torch.Generator:
        """A CPU random generator seeded by the config's seed, the group's names and a purpose."""
        generator = torch.Generator(device="cpu")
        generator.manual_seed(hash_seed(self.config.seed, purpose, *self.names) & 0x7FFFFFFFFFFFFFFF)
        return generator

    def extra_repr(self) -> str:
        """Tables, dimension and bytes, for ``repr``."""
        report = self.memory()
        return (
            f"tables={self.num_tables}, dim={self.embedding_dim}, serve={format_bytes(report.serve_bytes)} "
            f"({report.ratio:.2%} of float32), rows={self.config.rows!r}, unseen={self.config.unseen!r}"
        )

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Check what names, shapes and dtypes of a state can't say, for strategies that choose rows by ids.

        Raises:
            IncompatibleStateError: if the state contradicts itself.
        """

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _frequency_of(self, spec: TableSpec, known: Knowledge) -> Tensor:
        """How much each id's error weighs, float32 ``(V,)``: its count, but unseen ids still matter a little."""
        if spec.name not in known.counts:
            return torch.ones(1, device=self._sizes.device).expand(spec.num_embeddings)
        count = known.counts[spec.name].to(self._sizes.device, torch.float32)
        return count.clamp_min(1e-3 * float(count.mean().clamp_min(1e-3)))

    def _bag_rows(
        self, ids: Tensor, table: Tensor | int | str | None, bounds: Tensor, mode: str, weights: Tensor | None
    ) -> Tensor | None:
        """Pool stored rows as they are read, where vectors are nothing else and none is blank."""
        if type(self).stored_rows is EmbeddingTables.stored_rows or self._has_padding or self.config.unseen == "zero":
            return None
        ids, column = self._checked(ids, table)
        ids, _ = self._apply_unseen(ids, column)
        if (found := self.stored_rows(ids, column)) is None:
            return None
        if self._is_counted:
            self.seen_(ids, column, None)
        return found[0].pool(found[1], column, bounds, mode, weights)

    def _store_parts(self, name: str, store: RowStore) -> list[MemoryPart]:
        owners = self.names if len(store.segments) == self.num_tables else (SHARED,) * len(store.segments)
        values = sum(p.numel() for p in store.parameters() if p.requires_grad)
        size = sum(tensor.nbytes for tensor in _kept_here(store))
        sparse = bool(getattr(store, "sparse", False))
        parts = []
        for owner, rows, served in zip(owners, store.segments, store.serve_bytes(), strict=True):
            share = rows / max(store.num_rows, 1)
            count = round(values * share)
            parts.append(MemoryPart(owner, name, served, count, rows if values else 0, round(size * share), sparse))
        return parts

    def _tensor_parts(self, name: str, tensor: Tensor) -> list[MemoryPart]:
        owners = self.names if tensor.dim() and len(tensor) == self.num_tables else (SHARED,)
        share = len(owners)
        values = tensor.numel() // share if tensor.requires_grad else 0
        rows = 1 if values else 0
        size = tensor.nbytes // share
        return [MemoryPart(owner, name, size, values, rows, size) for owner in owners]


def _kept_here(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and persistent buffers: what a state dict has, of rows in several processes those of this one."""
    yield from module.parameters()
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield buffer
