"""``compositional``: a vector is composed of the rows of several coarse partitions; the quotient–remainder trick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from embcomp.config import StrategyConfig, check_at_least, check_at_most, check_choice, register_strategy
from embcomp.errors import ConfigError
from embcomp.hashing import hash_seed
from embcomp.memory import MemoryPart
from embcomp.row_source import RowSource
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import RowFormat, RowStore, make_row_store, stored_bytes
from embcomp.strategies._allocation import allocate_rows, check_table_names
from embcomp.strategies._fitting import fit_parts, shared_means
from embcomp.strategies._partitions import (
    format_parts,
    parse_parts,
    permutation,
    root_above,
    smallest_parts,
    strides,
    uneven_parts,
)
from embcomp.stretches import RowTerm, Stretch
from embcomp.tables import EmbeddingTables

MOST_PARTS = 256
COMBINES = ("product", "sum", "concat")
FACTOR_STD = 0.1
"""Initial spread of the product's factors around one."""


@dataclass(frozen=True)
class CompositionalConfig(StrategyConfig):
    """Partitions of ids, with a row per class.

    Attributes:
        parts: table name -> sizes of its parts such as ``"593x11"``: the first says how many ids in a row differ in
            their first row, the last how many groups of consecutive ids share their last one. Their product is at least
            the number of ids; a single size, the number of ids, keeps the table whole. None to let the budget choose.
        num_parts: k, rows that make a vector, 2 to 256.
        combine: ``"product"`` or ``"sum"`` of the rows, or ``"concat"`` (D / k values from each; k must divide D).
        shuffle: permute ids first, by a fixed bijection, so that neighbours don't share rows. Ids that are sorted by
            frequency need none for the first part, which tells frequent ids apart, but share the rows of the others.
        allocation_power: the budget's rows are shared out ~ V ** ``allocation_power``.
        exempt_share: share of the budget's rows that may go to keeping the smallest tables whole, in [0, 1).
    """

    parts: dict[str, str] | None = None
    num_parts: int = 2
    combine: str = "product"
    shuffle: bool = False
    allocation_power: float = 1.0
    exempt_share: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "combine", COMBINES)
        check_at_least(self, "num_parts", 2)
        check_at_most(self, "num_parts", MOST_PARTS)
        check_at_least(self, "allocation_power", 0)
        if not 0 <= self.exempt_share < 1:
            raise ConfigError(f"CompositionalConfig(exempt_share={self.exempt_share!r}): must be in [0, 1)")


@register_strategy("compositional", CompositionalConfig)
class CompositionalTables(EmbeddingTables):
    """Rows of k partitions of the ids, such that no two ids share all of them: every id has a vector of its own.

    "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation Systems"
    (arXiv 1909.02107), the quotient–remainder trick for k = 2: ``id mod m`` and ``id // w``, in integers, so that large
    ids are exact. The partitions are described in `embcomp.strategies._partitions`.

    Where we differ: every table has its own sizes, not one divisor for all, and ``w m_k >= V`` instead of ``w = m``, so
    that a table can take any number of rows from about ``k V^(1/k)`` on. With ``"product"`` and ``"sum"`` a larger
    budget goes to the first part, as in the paper; with ``"concat"`` all parts grow alike. The factors of a product are
    stored less one, ``e = r (1 + q)``: they start near one, so that vectors have the plain table's size, and decay and
    quantize around it. Tables that would not become smaller keep a row per id. Trained tables are fitted by alternating
    count-weighted least squares.
    """

    knob = "rows"
    can_be_sharded = True
    can_be_streamed = True
    config: CompositionalConfig
    _moduli: Tensor
    _strides: Tensor
    _starts: Tensor
    _segments: Tensor
    _whole: Tensor
    _permutations: Tensor

    def __init__(
        self, specs: Sequence[TableSpec], config: CompositionalConfig, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(specs, config)
        parts = self._checked_parts()
        self.is_whole = tuple(len(sizes) == 1 for sizes in parts)
        self.num_parts, self.combine = config.num_parts, config.combine
        if all(self.is_whole):
            self.num_parts, self.combine = 1, "sum"
        width = _width(self.specs, config) if self.combine == "concat" else self.embedding_dim
        self._owners = [self._tables_in(part) for part in range(self.num_parts)]
        for part, owners in enumerate(self._owners):
            segments = [parts[table][part if len(parts[table]) > 1 else 0] for table in owners]
            self.add_module(f"rows_{part}", make_row_store(config.rows, segments, width, config.sparse))
        self._register_partitions(parts)
        self.reset_parameters()

    # ---- lookups ----------------------------------------------------------------------------------------------------

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        ids = self._permuted(ids, table)
        vectors = self._row(0, ids, table)
        if self.combine == "concat":
            return torch.cat([vectors, *(self._row(part, ids, table) for part in range(1, self.num_parts))], dim=-1)
        if isinstance(table, int) and self.is_whole[table]:
            return vectors
        for part in range(1, self.num_parts):
            row = self._row(part, ids, table)
            if not isinstance(table, int) and any(self.is_whole):
                row = row.masked_fill_(self.pick(self._whole, table).unsqueeze(-1), 0.0)
            vectors = vectors.add_(row) if self.combine == "sum" else torch.addcmul(vectors, vectors, row)
        return vectors

    def stretches(self, index: int, queries: Tensor) -> list[Stretch]:
        [plain] = super().stretches(index, queries)
        if self.is_whole[index] and self.combine != "concat" and not self.config.shuffle:
            segment, first, _ = self._rows_in(0, index)
            return [replace(plain, vectors=partial(self.store(0).rows_from, first, segment=segment))]
        if self.is_whole[index] or self.combine == "product":  # no product of scores is the score of a product
            return [plain]
        blocks = queries.split(self.store(0).dim, dim=1) if self.combine == "concat" else [queries] * self.num_parts
        return [replace(plain, terms=[self._term(part, index, block) for part, block in enumerate(blocks)])]

    def _term(self, part: int, table: int, queries: Tensor) -> RowTerm:
        segment, first, size = self._rows_in(part, table)

        def places(ids: Tensor) -> list[Tensor]:
            return [self._class_of(part, self._permuted(ids, table), table)]

        return RowTerm(queries, self.store(part), first, size, segment, places)

    def _row(self, part: int, ids: Tensor, table: Tensor | int | None) -> Tensor:
        classes = self._class_of(part, ids, table) + self.pick(self._starts, table)[..., part]
        every_table = len(self._owners[part]) == self.num_tables
        segment = table if every_table else self.pick(self._segments, table)[..., part]
        return self.store(part)(classes, segment)

    def _class_of(self, part: int, ids: Tensor, table: Tensor | int | None) -> Tensor:
        """The class that each (permuted) id is in: int64, the shape of ``ids``."""
        if part > 0:
            ids = torch.div(ids, self.pick(self._strides, table)[..., part], rounding_mode="floor")
        if part < self.num_parts - 1:
            ids = ids % self.pick(self._moduli, table)[..., part]
        return ids

    def _permuted(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        if not self.config.shuffle:
            return ids
        factor, shift, num_ids = self.pick(self._permutations, table).unbind(-1)
        return (ids * factor + shift) % num_ids

    def store(self, part: int) -> RowStore:
        """The rows of one part, for all tables; those of products, but the first, are stored less one."""
        store: RowStore = getattr(self, f"rows_{part}")
        return store

    # ---- life -------------------------------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        generator = self.generator()
        for part in range(self.num_parts):
            std = [self._std(table, part) for table in self._owners[part]]
            self.store(part).reset_parameters(std, generator)

    def _std(self, table: int, part: int) -> float:
        """Initial standard deviation of a table's rows in one part, such that its vectors have ``init_std``."""
        std = self.specs[table].init_std
        if self.is_whole[table] or self.combine == "concat":
            return std
        if self.combine == "product":
            return FACTOR_STD if part else std * (1 + FACTOR_STD**2) ** ((1 - self.num_parts) / 2)
        # Rows that many ids share get a small share of the variance, or ids would start out alike.
        rows = [self._rows_in(index, table)[2] for index in range(self.num_parts)]
        return std * (rows[part] / sum(rows)) ** 0.5

    def fit(self, weights: Sequence[RowSource], counts: Sequence[Tensor]) -> None:
        for table, (weight, count) in enumerate(zip(weights, counts, strict=True)):
            for part, rows in enumerate(self._fitted(table, weight, count)):
                self.store(part).write_(self._rows_in(part, table)[1], rows)

    def _fitted(self, table: int, weight: RowSource, count: Tensor) -> Sequence[Tensor | RowSource]:
        """The rows of each part that come closest to a trained table."""
        sizes = [self._rows_in(part, table)[2] for part in range(self.num_parts)]
        width = self.store(0).dim
        columns = [weight.columns(first, first + width) for first in range(0, self.embedding_dim, width)]
        if self.is_whole[table]:
            if not self.config.shuffle:
                return columns
            order = self._permuted(torch.arange(len(weight), device=weight.device), table).argsort()
            return [column.take(order) for column in columns]
        if self.combine == "concat":
            each = enumerate(zip(columns, sizes, strict=True))
            slots = [partial(self._slots_of, table, part) for part in range(self.num_parts)]
            return [shared_means(slots[part], column, count, size) for part, (column, size) in each]
        ridge = 0.02 if RowFormat.parse(self.config.rows).is_integer else 1e-6  # a grid is as wide as its largest row
        return fit_parts(partial(self._all_slots_of, table), sizes, weight, count, self.combine == "product", ridge)

    def _slots_of(self, table: int, part: int, ids: Tensor) -> Tensor:
        return self._class_of(part, self._permuted(ids, table), table)

    def _all_slots_of(self, table: int, ids: Tensor) -> list[Tensor]:
        return [self._slots_of(table, part, ids) for part in range(self.num_parts)]

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: CompositionalConfig, known: Knowledge) -> tuple[int, int]:
        if config.parts is not None:
            return 1, 1
        return sum(_smallest(spec, config) for spec in specs), sum(_num_ids(spec, config) for spec in specs)

    @classmethod
    def resize(
        cls, specs: Sequence[TableSpec], config: CompositionalConfig, size: int, known: Knowledge
    ) -> CompositionalConfig:
        if config.parts is not None:
            return config
        smallest = [_smallest(spec, config) for spec in specs]
        largest = [_num_ids(spec, config) for spec in specs]
        rows = allocate_rows(size, largest, config.allocation_power, config.exempt_share, smallest)
        sizes = [_parts_of(spec, total, config) for spec, total in zip(specs, rows, strict=True)]
        names = [spec.name for spec in specs]
        return replace(config, parts=dict(zip(names, map(format_parts, sizes), strict=True)))

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: CompositionalConfig, known: Knowledge) -> StrategyConfig:
        return config if config.parts is not None else super().complete(specs, config, known)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _checked_parts(self) -> list[list[int]]:
        config = self.config
        if config.parts is None:
            raise ConfigError("CompositionalConfig(parts=None): give parts, or plan with a budget")
        check_table_names(config, "parts", self.names)
        return [
            parse_parts(name, config.parts[name], config.num_parts, num_ids)
            for name, num_ids in zip(self.names, self.num_ids, strict=True)
        ]

    def _tables_in(self, part: int) -> list[int]:
        """The tables that have rows in the store of one part: whole ones are in the first alone, or in all."""
        everywhere = part == 0 or self.combine == "concat"
        return [table for table, whole in enumerate(self.is_whole) if everywhere or not whole]

    def _rows_in(self, part: int, table: int) -> tuple[int, int, int]:
        """Segment, first row and rows of a table in the store of one part; all 0 where it has none."""
        if table not in self._owners[part]:
            return 0, 0, 0
        segment, store = self._owners[part].index(table), self.store(part)
        return segment, store.starts()[segment], store.segments[segment]

    def _store_parts(self, name: str, store: RowStore) -> list[MemoryPart]:
        owners = self._owners[int(name.removeprefix("rows_"))]
        parts = super()._store_parts(name, store)
        return [replace(part, table=self.names[table]) for part, table in zip(parts, owners, strict=True)]

    def _register_partitions(self, parts: Sequence[Sequence[int]]) -> None:
        moduli, steps = [], []
        for sizes, num_ids in zip(parts, self.num_ids, strict=True):
            if len(sizes) > 1:
                moduli.append(list(sizes))
                steps.append(strides(num_ids, sizes))
            else:  # its id in every part of a concatenation; else class 0, which is masked
                step = 1 if self.combine == "concat" else num_ids
                moduli.append([num_ids] * self.num_parts)
                steps.append([1] + [step] * (self.num_parts - 1))
        self.constant("_moduli", torch.tensor(moduli, device="cpu"))
        self.constant("_strides", torch.tensor(steps, device="cpu"))
        tables, each = range(self.num_tables), range(self.num_parts)
        where = torch.tensor([[self._rows_in(part, table) for part in each] for table in tables], device="cpu")
        self.constant("_segments", where[..., 0].contiguous())
        self.constant("_starts", where[..., 1].contiguous())
        self.constant("_whole", torch.tensor(self.is_whole, device="cpu"))
        if self.config.shuffle:
            seeds = [hash_seed(self.config.seed, name, "shuffle") for name in self.names]
            numbers = [permutation(seed, num_ids) for seed, num_ids in zip(seeds, self.num_ids, strict=True)]
            self.constant("_permutations", torch.tensor(numbers, device="cpu"))


def _width(specs: Sequence[TableSpec], config: CompositionalConfig) -> int:
    """Values of D that one of the concatenated rows gives."""
    dim = specs[0].embedding_dim
    if dim % config.num_parts:
        divisors = [number for number in range(2, dim + 1) if dim % number == 0]
        raise ConfigError(
            f"CompositionalConfig(num_parts={config.num_parts}, combine='concat'): must divide the dimension {dim}: "
            f"{divisors}"
        )
    return dim // config.num_parts


def _num_ids(spec: TableSpec, config: CompositionalConfig) -> int:
    return spec.num_embeddings + (config.unseen == "oov_row")


def _smallest(spec: TableSpec, config: CompositionalConfig) -> int:
    """The fewest rows of D values that a table can take: where parts save nothing, its number of ids."""
    num_ids = _num_ids(spec, config)
    if config.combine == "concat":
        return root_above(num_ids, config.num_parts)
    return min(sum(smallest_parts(num_ids, config.num_parts)), num_ids)


def _parts_of(spec: TableSpec, rows: int, config: CompositionalConfig) -> list[int]:
    """Sizes of the parts that take the bytes of ``rows`` rows of D values; one, if that saves nothing."""
    num_ids, dim = _num_ids(spec, config), spec.embedding_dim
    if rows >= num_ids:
        return [num_ids]
    if config.combine == "concat":
        return [rows] * config.num_parts
    parts = uneven_parts(num_ids, config.num_parts, rows)
    saves = sum(stored_bytes(size, dim, config.rows) for size in parts) < stored_bytes(num_ids, dim, config.rows)
    return parts if saves else [num_ids]
