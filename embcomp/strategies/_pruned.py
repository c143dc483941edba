"""Tables that leave out rows and the last dimensions of fields: a part of the strategies that search for such forms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from embcomp.config import check_choice
from embcomp.errors import ConfigError
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import QuantizedRows, make_row_store
from embcomp.storage.bitmap import bitmap_bytes
from embcomp.storage.ragged import RaggedRows, ragged_bytes
from embcomp.strategies._allocation import check_table_names
from embcomp.strategies._cut_rows import CutConfig, CutTables, resolved_format
from embcomp.strategies._fitting import shared_means
from embcomp.strategies._frequency_sizes import complete_sizes, is_falling, most_frequent, row_range
from embcomp.strategies._kept_ids import KeptIds
from embcomp.strategies._prefix_projection import fold
from embcomp.strategies.frequency_cut import FrequencyCutConfig
from embcomp.tables import EmbeddingTables

PRUNED = ("oov", "zero")


@dataclass(frozen=True)
class PrunedConfig(CutConfig):
    """A form with fewer rows and narrower fields; at first the most frequent ids of full width.

    Attributes:
        pruned: what ids without a row get: ``"oov"``: one learned row per table; ``"zero"``: zeros.
        num_kept: table name -> ids that have a row; None to let the budget, then training choose.
        dims: table name -> width of its rows, 1 to D; None for D.
        remapped: table name -> whether a bit per id says which ids are kept; where it is False they are the first.
    """

    pruned: str = "oov"
    num_kept: dict[str, int] | None = None
    dims: dict[str, int] | None = None
    remapped: dict[str, bool] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "pruned", PRUNED)


class PrunedTables(CutTables):
    """Rows of all ids at full width while training, those that are kept at their tables' widths when served.

    While training, ``kept`` and ``widths`` say what would be served, and lookups blank everything else; `choose_`
    changes them. The config follows, so that what is saved can be rebuilt. When finalized, kept rows lie in one
    `RaggedRows`, and `KeptIds` finds them.
    """

    knob = "rows"
    chosen_by_budget = ("limit_bytes", "num_kept", "dims", "remapped")
    config: PrunedConfig
    kept: Tensor
    widths: Tensor
    _starts: Tensor
    _shared: Tensor

    def __init__(
        self, specs: Sequence[TableSpec], config: PrunedConfig, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(specs, config)
        num_kept, dims, remapped = self._checked_form()
        self.has_shared = config.pruned == "oov" or config.unseen == "oov_row"
        self.sizes = tuple(spec.num_embeddings for spec in self.specs)
        self.rows = make_row_store(
            config.rows, [size + self.has_shared for size in self.sizes], self.embedding_dim, config.sparse
        )
        self.make_projection_()
        self.constant("_starts", self.rows.starts())
        self.register_buffer("kept", torch.zeros(self.rows.num_rows, dtype=torch.bool))
        self.register_buffer("widths", torch.tensor(dims, dtype=torch.int64))
        if not self.kept.is_meta:
            for start, size in zip(self.rows.starts(), self.sizes, strict=True):
                self.kept[start + size : start + size + self.has_shared] = True
            for table, (name, number, flag) in enumerate(zip(self.names, num_kept, remapped, strict=True)):
                ids = torch.arange(number)
                if flag and counts and name in counts:
                    ids = most_frequent(counts[name], number)
                self.kept[self.rows.starts()[table] + ids] = True
        self.reset_parameters()

    # ---- lookups ----------------------------------------------------------------------------------------------------

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        if self.is_final:
            return self._lookup_served(ids, table)
        rows = ids + self.pick(self._starts, table)
        kept = self.kept[rows]
        if self.config.pruned == "oov":
            shared = self.pick(self._starts, table) + self.pick(self._sizes, table)
            rows = torch.where(kept, rows, shared)
        vectors = self.rows(rows, table)
        shown = self.prefix(self.pick(self.widths, table))
        if self.config.pruned == "zero":
            shown = shown & kept.unsqueeze(-1)
        return self.projected(torch.where(shown, vectors, 0.0), table)

    def _lookup_served(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        starts = self.pick(self._starts, table)
        if self._is_whole:
            return self.projected(self.rows(ids + starts, table), table)
        last = self.pick(self._sizes, table) - 1
        kept, rows = self.remap(ids.minimum(last), table)
        if self.has_shared:
            own = kept & (ids <= last)
            rows = torch.where(own, rows, self.pick(self._shared, table))
            kept = own | (ids > last) if self.config.pruned == "zero" else torch.ones_like(own)
        else:
            rows = rows.minimum((self.pick(self._shared, table) - 1).clamp_min(0))
        vectors: Tensor = self.rows(rows + starts, table)
        if self.config.pruned == "zero":
            vectors = torch.where(kept.unsqueeze(-1), vectors, 0.0)
        return self.projected(vectors, table)

    # ---- the form that is served ------------------------------------------------------------------------------------

    def widths_of(self, table: int | str) -> Tensor:
        index = self.index_of(table)
        ids = torch.arange(self.sizes[index], device=self._sizes.device)
        width = (self.config.dims or {})[self.names[index]]
        if not self.is_final:
            return width * self.kept[ids + self._starts[index]].long()
        return torch.full_like(ids, width) if self._is_whole else width * self.remap(ids, index)[0].long()

    @torch.no_grad()
    def choose_(self, kept: Tensor, widths: Sequence[int]) -> None:
        """Take another form: bool ``(R,)`` rows that are kept, and widths of the tables."""
        self.kept.copy_(kept)
        for start, size in zip(self.rows.starts(), self.sizes, strict=True):
            self.kept[start + size : start + size + self.has_shared] = True
        self.widths.copy_(torch.tensor(list(widths)))
        self._tell_config()

    def _tell_config(self) -> None:
        kept = [flags[:size].cpu() for flags, size in zip(self.kept.split(self.rows.segments), self.sizes, strict=True)]
        number = {name: int(flags.sum()) for name, flags in zip(self.names, kept, strict=True)}
        first = {name: bool(flags[: number[name]].all()) for name, flags in zip(self.names, kept, strict=True)}
        self.config = replace(
            self.config,
            num_kept=number,
            remapped={name: not flag for name, flag in first.items()},
            dims=dict(zip(self.names, self.widths.tolist(), strict=True)),
        )

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if not self.is_final and not self.kept.is_meta:
            self._tell_config()

    def finalize_(self) -> EmbeddingTables:
        if self.is_final:
            return self
        with self._only_served_rows():
            served = self.rows.finalize()
        config, starts = self.config, self.rows.starts()
        num_kept, dims, remapped = self._checked_form()
        shared, segments, widths, matrices = served_form(self.specs, config)
        if self.projection is not None:
            ends = zip(starts, served.segments, dims, strict=True)
            pieces = [(table, start, start + rows, dim) for table, (start, rows, dim) in enumerate(ends)]
            self.projection.multiply_(served, [piece for piece in pieces if not matrices[piece[0]]])
            self.projection = self.projection.served(matrices) if any(matrices) else None
        self._is_whole = tuple(segments) == served.segments and all(width == self.embedding_dim for width in widths)
        if not self._is_whole:
            with self.kept.device:
                ragged = RaggedRows(segments, self.embedding_dim, resolved_format(self.specs, config), widths)
                remap = KeptIds(self.sizes, num_kept, remapped)
            if not self.kept.is_meta:
                ragged, remap = ragged.to(self.kept.device), remap.to(self.kept.device)
                flags = [
                    part[: size + own]
                    for part, size, own in zip(self.kept.split(self.rows.segments), self.sizes, shared, strict=True)
                ]
                ragged.take_(served, [start + f.nonzero().squeeze(1) for start, f in zip(starts, flags, strict=True)])
                for table, (flag, size) in enumerate(zip(remapped, self.sizes, strict=True)):
                    if flag:
                        remap.keep_(table, flags[table][:size].nonzero().squeeze(1))
            self.remap, served = remap, ragged
            self.constant("_starts", torch.tensor(served.starts(), device=self._sizes.device))
            self.constant("_shared", torch.tensor(num_kept, device=self._sizes.device))
        self.rows = served
        for name in self.training_only():
            delattr(self, name)
        return super().finalize_()

    @contextlib.contextmanager
    def _only_served_rows(self) -> Iterator[None]:
        """Let rows that are not served look like those that are, so that grids are fitted to those alone."""
        if not isinstance(self.rows, QuantizedRows) or self.kept.is_meta or bool(self.kept.all()):
            yield
            return
        weight, starts = self.rows.weight.detach(), self.rows.starts()
        before = weight.clone()
        for start, flags in zip(starts, self.kept.split(self.rows.segments), strict=True):
            served, others = (start + some.nonzero().squeeze(1) for some in (flags, ~flags))
            if len(served):
                weight[others] = weight[served[torch.arange(len(others), device=served.device) % len(served)]]
        yield
        weight.copy_(before)

    def load_dense_(self, weights: Mapping[str, Any], counts: Mapping[str, Tensor] | None = None) -> EmbeddingTables:
        super().load_dense_(weights, counts)
        with torch.no_grad(), self._only_served_rows():
            self.rows.fit_scales_()
        return self

    def training_only(self) -> list[str]:
        """Parameters and buffers that only training needs."""
        return ["kept", "widths"]

    def served_bytes(self) -> tuple[list[int], list[int], int]:
        return form_bytes(self.specs, self.config)

    # ---- life -------------------------------------------------------------------------------------------------------

    def fit(self, weights: Sequence[Tensor], counts: Sequence[Tensor]) -> None:
        for table, (start, trained, count) in enumerate(zip(self.rows.starts(), weights, counts, strict=True)):
            size, name = self.sizes[table], self.names[table]
            weight = self.rotated(table, trained, count)
            self.rows.write_(start, weight)
            number = (self.config.num_kept or {})[name]
            if (self.config.remapped or {})[name]:
                worth = weight[:size].square().sum(1) * count[:size]
                self.kept[start : start + size] = False
                self.kept[start + worth.argsort(descending=True, stable=True)[:number]] = True
            tail = ~self.kept[start : start + size]
            if self.config.pruned == "oov" and bool(tail.any()):
                slots = torch.zeros(int(tail.sum()), dtype=torch.int64, device=weight.device)
                self.rows.write_(start + size, shared_means(slots, weight[:size][tail], count[:size][tail], 1))

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: Any, known: Knowledge) -> tuple[int, int]:
        return (1, 1) if config.num_kept is not None else row_range(specs, _as_cut(config), known)

    @classmethod
    def resize(cls, specs: Sequence[TableSpec], config: Any, size: int, known: Knowledge) -> Any:
        if config.num_kept is not None:
            return cls.complete(specs, config, known)
        cut = complete_sizes(specs, _as_cut(config), known, size)
        num_kept, remapped = {}, {}
        for spec in specs:
            num_kept[spec.name] = min((cut.num_kept or {})[spec.name], spec.num_embeddings)
            remapped[spec.name] = (cut.remapped or {})[spec.name] and num_kept[spec.name] < spec.num_embeddings
        dims = config.dims or {spec.name: spec.embedding_dim for spec in specs}
        return replace(config, num_kept=num_kept, remapped=remapped, dims=dims)

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: Any, known: Knowledge) -> Any:
        num_kept = config.num_kept or {spec.name: spec.num_embeddings for spec in specs}
        dims = config.dims or {spec.name: spec.embedding_dim for spec in specs}
        remapped = config.remapped
        if remapped is None:
            remapped = {spec.name: _needs_remap(spec, num_kept.get(spec.name, 0), known) for spec in specs}
        return replace(config, num_kept=num_kept, dims=dims, remapped=remapped)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _checked_form(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
        config = self.config
        if config.num_kept is None or config.dims is None or config.remapped is None:
            raise ConfigError(f"{type(config).__name__} needs num_kept, dims and remapped: make a plan first")
        for field in ("num_kept", "dims", "remapped"):
            check_table_names(config, field, self.names)
        for spec in self.specs:
            self._check_table(spec, config.num_kept[spec.name], config.dims[spec.name])
        return (
            tuple(config.num_kept[name] for name in self.names),
            tuple(config.dims[name] for name in self.names),
            tuple(config.remapped[name] for name in self.names),
        )

    def _check_table(self, spec: TableSpec, kept: int, dim: int) -> None:
        for field, value, low, high in (
            ("num_kept", kept, 0, spec.num_embeddings),
            ("dims", dim, 1, spec.embedding_dim),
        ):
            if not low <= value <= high:
                raise ConfigError(
                    f"{type(self.config).__name__}({field}={{{spec.name!r}: {value}}}): must be in [{low}, {high}]"
                )


def form_bytes(specs: Sequence[TableSpec], config: Any) -> tuple[list[int], list[int], int]:
    """Serve bytes of each table's rows and of its matrix, and of the remap, for a complete config."""
    _, segments, widths, matrices = served_form(specs, config)
    rows = ragged_bytes(segments, specs[0].embedding_dim, resolved_format(specs, config), widths)
    remap = sum(bitmap_bytes(spec.num_embeddings) for spec in specs if config.remapped[spec.name])
    return rows, [4 * width * specs[0].embedding_dim for width in matrices], remap


def served_form(specs: Sequence[TableSpec], config: Any) -> tuple[list[bool], list[int], list[int], list[int]]:
    """Of each table: whether it has a shared row, its rows, their stored width, and rows of its matrix."""
    shared = _stored_shared(specs, config)
    segments = [config.num_kept[spec.name] + own for spec, own in zip(specs, shared, strict=True)]
    widths = [config.dims[spec.name] for spec in specs]
    if not config.is_projected:
        return shared, segments, widths, [0] * len(specs)
    dim, row_format = specs[0].embedding_dim, resolved_format(specs, config)
    return shared, segments, *fold(segments, widths, range(len(specs)), dim, row_format)


def _stored_shared(specs: Sequence[TableSpec], config: Any) -> list[bool]:
    """Whether each table serves a row for ids that have none: unseen ones, or pruned ones if there are any."""
    always, often = config.unseen == "oov_row", config.pruned == "oov"
    return [always or (often and config.num_kept[spec.name] < spec.num_embeddings) for spec in specs]


def _as_cut(config: PrunedConfig) -> FrequencyCutConfig:
    """The frequency cut that the first form is: its sizes are worked out there."""
    tail = "zero" if config.pruned == "zero" else "oov_row"
    return FrequencyCutConfig(rows=config.rows, unseen=config.unseen, seed=config.seed, tail=tail)


def _needs_remap(spec: TableSpec, number: int, known: Knowledge) -> bool:
    if not 0 < number < spec.num_embeddings or spec.name not in known.counts:
        return False
    return not is_falling(known.counts[spec.name])
