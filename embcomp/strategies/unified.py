"""``unified``: one pool of rows that all tables share, each through hash functions of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embcomp.config import StrategyConfig, check_at_least, check_choice, register_strategy
from embcomp.errors import ConfigError
from embcomp.hashing import hash_ids, hash_seed, hash_to_range
from embcomp.row_source import RowSource, ids_of
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import make_row_store
from embcomp.strategies._unified_diagnostics import UnifiedDiagnostics, diagnose, first_layer_overlap
from embcomp.strategies._unified_sizes import check_choices, chunk_dim_of, complete_sizes, row_range
from embcomp.stretches import RowTerm, Stretch
from embcomp.tables import EmbeddingTables

READERS = ("none", "sign", "diagonal")
ALIKE = 0.05
"""Relative difference up to which tables' ``init_std`` count as the same, which saves a multiplication per lookup."""


@dataclass(frozen=True)
class UnifiedConfig(StrategyConfig):
    """A pool of ``pool_rows`` rows of ``chunk_dim`` values.

    Attributes:
        pool_rows: R, rows that are hashed into; None to let the budget choose.
        chunk_dim: c, values per row, a divisor of D; None for D / ``lookups`` where that is one number, else D. With
            c = D a vector is one row; with less it is several, and two ids rarely share them all.
        lookups: how many rows of the pool make a vector, at most D / c; fewer leave zeros behind. One number for all
            tables, a dict from table name to number (tables that are not named: by the rule), or ``"auto"``, the rule:
            wide enough for the table's size, and more until ids have less than ``twin_limit`` twins.
        twin_limit: expected number of other ids of its table that an id may share all its rows with.
        sub_tables: K, equal parts of the pool (more if a part would have 2^31 rows). Lookup j of a table uses part
            (offset given by its name + j) mod K.
        exempt: tables that keep a row per id: ``"auto"``, the smallest ones within ``exempt_share``, and all where all
            fit; ``"none"``; or a dict from table name to bool (tables that are not named: false).
        exempt_share: share of all stored rows that ``exempt="auto"`` may give away, in [0, 1).
        reader: what is laid over a row before it is used: ``"none"``; ``"sign"``, fixed random signs per table, chunk
            and coordinate, in no file; ``"diagonal"``, learned factors, D per table, starting at one.
    """

    pool_rows: int | None = None
    chunk_dim: int | None = None
    lookups: Any = "auto"
    twin_limit: float = 0.01
    sub_tables: int = 1
    exempt: Any = "auto"
    exempt_share: float = 0.05
    reader: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "pool_rows", 0)
        check_at_least(self, "chunk_dim", 1)
        check_at_least(self, "sub_tables", 1)
        check_choice(self, "reader", READERS)
        check_choices(self)


@register_strategy("unified", UnifiedConfig)
class UnifiedTables(EmbeddingTables):
    """All tables hash into one pool of rows, so that memory goes where ids are, and few ids of one table meet.

    Unified Embedding: "Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML Systems"
    (arXiv 2305.12102), also known as feature multiplexing. A vector is the concatenation of L_t rows of width c, with
    hash functions seeded by the config's seed, the table's name and the lookup's number: adding or reordering tables
    reshuffles nobody. Ids are hashed as they are, so with ``unseen="hash"`` any int64 is an id.

    Where we differ: small tables keep exact rows in the same parameter, behind the pool (``exempt``); the number of
    lookups has a rule; sub-tables are assigned by name, not by a counter over all tables, hence equally used only on
    average; and ``reader="sign"`` makes rows that two tables share zero-mean in dot products, for models without a
    weight per table on the first layer (FM, DLRM). Tables of different ``init_std`` are scaled by a fixed factor,
    ``scales``, which takes four bytes a table.
    """

    knob = "pool rows"
    can_be_sharded = True
    can_be_streamed = True
    takes_any_id = True
    config: UnifiedConfig
    _seeds: Tensor
    _exempt: Tensor
    _first_exact_rows: Tensor
    _pool_starts: Tensor
    _pool_sizes: Tensor
    _factors: Tensor | None
    scales: Tensor | None
    _version = 2

    def __init__(
        self, specs: Sequence[TableSpec], config: UnifiedConfig, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(specs, config)
        self._check_complete()
        self.is_exempt = tuple(config.exempt.get(name, False) for name in self.names)
        self.chunk_dim = chunk_dim_of(self.specs, config)
        self.width = self.embedding_dim // self.chunk_dim
        self.num_lookups = tuple(
            self.width if exempt else config.lookups[name]
            for name, exempt in zip(self.names, self.is_exempt, strict=True)
        )
        self.slots = max(self.num_lookups)
        self.exact_starts, num_rows = self._layout()
        self.rows = make_row_store(config.rows, [num_rows], self.chunk_dim, config.sparse)
        self._register_hashes()
        self._register_factors()
        if config.reader == "diagonal":
            self.diagonal = nn.Parameter(torch.empty(self.num_tables, self.embedding_dim))
        self.reset_parameters()

    # ---- lookups ----------------------------------------------------------------------------------------------------

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        vectors = self.rows(self.rows_of(ids, table), 0).flatten(-2)
        if self._factors is not None:
            vectors = vectors.mul_(self.pick(self._factors, table))
        if self.slots < self.width:
            vectors = F.pad(vectors, (0, self.embedding_dim - vectors.shape[-1]))
        if self.config.reader == "diagonal":
            vectors = vectors * self.pick(self.diagonal, table)
        return vectors

    def stretches(self, index: int, queries: Tensor) -> list[Stretch]:
        [plain] = super().stretches(index, queries)
        if self.is_exempt[index]:
            return [plain]
        if self._factors is not None:
            queries = queries[:, : self.slots * self.chunk_dim] * self._factors[index]
        if self.config.reader == "diagonal":
            queries = queries * self.diagonal[index, : queries.shape[1]]
        blocks = queries.split(self.chunk_dim, dim=1)[: self.num_lookups[index]]
        return [replace(plain, terms=[self._term(index, lookup, block) for lookup, block in enumerate(blocks)])]

    def _term(self, table: int, lookup: int, queries: Tensor) -> RowTerm:
        first, size = self._pools[table][lookup]

        def places(ids: Tensor) -> list[Tensor]:
            return [hash_to_range(ids, self._seeds[table, lookup], size)]

        return RowTerm(queries, self.rows, first, size, 0, places)

    def rows_of(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        """Say which stored rows ids use.

        Args:
            ids: int64 ``(...)``, any value.
            table: as in `lookup`.

        Returns:
            int64 ``(..., slots)``; tables with fewer lookups than slots repeat their first row, and nobody reads it.
        """
        own = self.is_exempt if not isinstance(table, int) else self.is_exempt[table : table + 1]
        if all(own):
            return self._exact_rows(ids, table)
        rows = self._pool_rows(ids, table)
        if any(own):
            rows = torch.where(self.pick(self._exempt, table), self._exact_rows(ids, table), rows)
        return rows

    def _pool_rows(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        ids, seeds = ids.unsqueeze(-1), self.pick(self._seeds, table)
        if self.config.sub_tables == 1:
            return hash_to_range(ids, seeds, self.config.pool_rows or 0)
        return hash_to_range(ids, seeds, self.pick(self._pool_sizes, table)) + self.pick(self._pool_starts, table)

    def _exact_rows(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        if self.config.unseen == "hash":
            sizes = self.pick(self._sizes, table)
            hashed = hash_to_range(ids, self.pick(self._unseen_seeds, table), sizes)
            ids = torch.where((ids < 0) | (ids >= sizes), hashed, ids)
        return ids.unsqueeze(-1) * self.width + self.pick(self._first_exact_rows, table)

    # ---- weights ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.rows.reset_parameters([self.init_std], self.generator())
        if self.config.reader == "diagonal":
            self.diagonal.fill_(1.0)

    def fit(self, weights: Sequence[RowSource], counts: Sequence[Tensor]) -> None:
        """Fit by least squares: a row becomes the count-weighted mean of all that collides in it; unused rows, zero.

        Signs and scales are undone first. Since every value of a vector is one value of one row, this is the optimum.
        """
        if self.config.reader == "diagonal":
            self.diagonal.fill_(1.0)
        total = torch.zeros(self.config.pool_rows or 0, self.chunk_dim, device=self._sizes.device)
        mass = torch.zeros(len(total), device=total.device)
        for index, (weight, count) in enumerate(zip(weights, counts, strict=True)):
            if self.is_exempt[index]:
                self._write_exact(index, weight)
                continue
            for part in weight.chunks():
                self._collect(index, ids_of(part, weight.device), weight[part], count[part], total, mass)
        if len(total):
            self.rows.write_(0, total.div_(mass.clamp_min(torch.finfo(mass.dtype).tiny).unsqueeze(1)))

    def _collect(self, index: int, ids: Tensor, target: Tensor, count: Tensor, total: Tensor, mass: Tensor) -> None:
        """Add the normal equations of some ids of one table, in place."""
        factors = self._factors_of(index)
        rows = self.rows_of(ids, index)
        for lookup in range(self.num_lookups[index]):
            columns = slice(lookup * self.chunk_dim, (lookup + 1) * self.chunk_dim)
            factor = factors[columns]
            total.index_add_(0, rows[:, lookup], target[:, columns] * factor * count.unsqueeze(1))
            mass.index_add_(0, rows[:, lookup], count * factor[0].square())

    def _write_exact(self, index: int, weight: RowSource) -> None:
        factors = self._factors_of(index)
        scaled = weight.mapped(lambda rows: rows / factors, self.embedding_dim)
        self.rows.write_(self.exact_starts[index], scaled.cut(self.chunk_dim))

    def _factors_of(self, index: int) -> Tensor:
        if self._factors is None:
            return torch.ones(self.slots * self.chunk_dim, device=self._sizes.device)
        return self._factors[index]

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: UnifiedConfig, known: Knowledge) -> tuple[int, int]:
        return row_range(specs, config) if config.pool_rows is None else (0, 0)

    @classmethod
    def resize(cls, specs: Sequence[TableSpec], config: UnifiedConfig, size: int, known: Knowledge) -> UnifiedConfig:
        return complete_sizes(specs, config, size if config.pool_rows is None else None)

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: UnifiedConfig, known: Knowledge) -> UnifiedConfig:
        if config.pool_rows is None:
            return super().complete(specs, config, known)
        return complete_sizes(specs, config, None)

    # ---- what there is to know --------------------------------------------------------------------------------------

    def diagnostics(self, counts: Mapping[str, Tensor] | None = None) -> UnifiedDiagnostics:
        """Measure collisions, the use of rows and their norms; takes time and memory in proportion to all ids.

        Args:
            counts: table name -> ``(V,)`` how often ids occur; rates are also given weighted by them.
        """
        return diagnose(self, Knowledge.of(self.specs, counts).counts)

    def first_layer_overlap(self, weight: Tensor) -> Tensor:
        """How much of table s the first layer sees where it reads table t: 1 is all, and 0 makes collisions harmless.

        Args:
            weight: float ``(O, T * D)``, of a linear layer on the concatenated vectors of all tables, in order.

        Returns:
            float ``(T, T)``: Frobenius norms ``‖A_t A_sᵀ‖ / (‖A_t‖ ‖A_s‖)``, A_t the columns of t times its reader.
        """
        return first_layer_overlap(weight, self.readers())

    def readers(self) -> Tensor:
        """What is laid over the rows of each table: float32 ``(T, D)``; zeros where a table has fewer lookups."""
        filled = torch.stack([self._factors_of(index) for index in range(self.num_tables)])
        filled = F.pad(filled, (0, self.embedding_dim - filled.shape[1]))
        for index, lookups in enumerate(self.num_lookups):
            filled[index, lookups * self.chunk_dim :] = 0.0
        return filled * self.diagonal.detach() if self.config.reader == "diagonal" else filled

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _check_complete(self) -> None:
        config = self.config
        complete = None not in (config.pool_rows, config.chunk_dim)
        if not (complete and isinstance(config.lookups, dict) and isinstance(config.exempt, dict)):
            raise ConfigError(f"{config} has open sizes: build it by build_tables, or complete it by plan(...).config")
        if complete_sizes(self.specs, config, None) != config:
            raise ConfigError(f"{config} was completed for other tables than {self._some_names()}: complete it anew")

    def _layout(self) -> tuple[dict[int, int], int]:
        """First row of each exempt table, behind the pool so that adding one moves nobody, and the number of rows."""
        starts, total = {}, self.config.pool_rows or 0
        for index, num_ids in enumerate(self.num_ids):
            if self.is_exempt[index]:
                starts[index] = total
                total += num_ids * self.width
        return starts, total

    def _register_hashes(self) -> None:
        """Constants of `rows_of`, ``(T, slots)`` or ``(T, 1)``."""
        config, slots, pool_rows = self.config, range(self.slots), self.config.pool_rows or 0
        lookups = [[j if j < count else 0 for j in slots] for count in self.num_lookups]
        named = list(zip(self.names, lookups, strict=True))
        self._pairs("_seeds", [[hash_seed(config.seed, name, j) for j in own] for name, own in named])
        self.constant("_exempt", torch.tensor(self.is_exempt, device="cpu").unsqueeze(1))
        firsts = [[self.exact_starts.get(index, 0) + j for j in slots] for index in range(self.num_tables)]
        self._pairs("_first_exact_rows", firsts)
        bounds = [pool_rows * part // config.sub_tables for part in range(config.sub_tables + 1)]
        parts = [[(hash_seed(name, "part") + j) % config.sub_tables for j in own] for name, own in named]
        self._pools = [[(bounds[part], bounds[part + 1] - bounds[part]) for part in own] for own in parts]
        if config.sub_tables > 1:
            self._pairs("_pool_starts", [[start for start, _ in own] for own in self._pools])
            self._pairs("_pool_sizes", [[size for _, size in own] for own in self._pools])

    def _pairs(self, name: str, values: list[list[int]]) -> None:
        self.constant(name, torch.tensor(values, dtype=torch.int64, device="cpu"))

    def _register_factors(self) -> None:
        self.init_std, scales = common_std(self.specs)
        # With the state, as weights are: tables that take it over may have begun with other deviations.
        self.register_buffer("scales", None if scales is None else torch.tensor(scales, device=self._seeds.device))
        self.register_buffer("_factors", self._all_factors(), persistent=False)

    def _all_factors(self) -> Tensor | None:
        """Fixed factors of all vectors, ``(T, slots * c)``: signs, scales, and zeros behind a table's lookups."""
        slots = torch.arange(self.slots, device="cpu")
        used = slots < torch.tensor(self.num_lookups, device="cpu").unsqueeze(1)
        factors = used.float().repeat_interleave(self.chunk_dim, 1)
        if self.config.reader == "sign":
            factors = factors * self._signs().flatten(1)
        if self.scales is not None:
            factors = factors * self.scales.cpu().unsqueeze(1)
        return None if bool((factors == 1.0).all()) else factors.to(self._seeds.device)

    def take_specs_(self, specs: Sequence[TableSpec]) -> None:
        super().take_specs_(specs)
        self._register_factors()

    def adapt_(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if "scales" in state:
            self._make_scales_()
        return state if self.scales is None else {"scales": self.scales} | state

    def _make_scales_(self) -> None:
        """Make room for scales of other tables."""
        if self.scales is None:
            self.scales = torch.ones(self.num_tables, device=self._seeds.device)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        key = f"{prefix}scales"
        is_older = metadata.get("version", 1) < 2  # from before scales were in it
        if key in state_dict:
            self._make_scales_()
        elif self.scales is not None and not is_older:
            self.scales = torch.ones_like(self.scales)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if key in missing:
            missing.remove(key)
        self._factors = self._all_factors()

    def _signs(self) -> Tensor:
        """Random signs, float32 ``(T, slots, c)``; plus where rows are exact and have nothing to tell apart."""
        seeds = [[hash_seed(self.config.seed, name, "sign", j) for j in range(self.slots)] for name in self.names]
        values = torch.arange(self.chunk_dim, device="cpu")
        bits = hash_ids(values, torch.tensor(seeds, device="cpu").unsqueeze(2)) >= 0
        return (bits | self._exempt.unsqueeze(2)).float() * 2 - 1


def common_std(specs: Sequence[TableSpec]) -> tuple[float, list[float] | None]:
    """The standard deviation of shared rows, and the factors that give each table its own; None where all are alike.

    A table that starts at zero keeps factor one: with zero it could never be trained.
    """
    positive = [spec.init_std for spec in specs if spec.init_std > 0]
    if not positive:
        return 0.0, None
    shared = (sum(std * std for std in positive) / len(positive)) ** 0.5
    scales = [spec.init_std / shared or 1.0 for spec in specs]
    alike = all(abs(scale - 1) <= ALIKE for scale in scales)
    return shared, None if alike else scales
