"""``hash``: ids of a table are hashed to fewer rows, once or several times."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from embcomp.config import StrategyConfig, check_at_least, check_at_most, check_choice, register_strategy
from embcomp.errors import ConfigError
from embcomp.hashing import check_range, hash_seed, hash_to_range
from embcomp.row_source import RowSource, weighted_mean
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import RowStore, make_row_store
from embcomp.storage.base import as_matrix
from embcomp.strategies._allocation import allocate_rows, check_table_names
from embcomp.strategies._fitting import Factors, fit_importance, fit_summed_rows, shared_means
from embcomp.strategies._hash_sizes import importance_format, largest_rows, rows_worth, smallest_rows, width_of
from embcomp.stretches import RowTerm, Stretch
from embcomp.tables import EmbeddingTables

MOST_HASHES = 256
COMBINES = ("sum", "mean", "concat", "weighted")
_FIT_STEPS = 8
_FIT_ROUNDS = 3


@dataclass(frozen=True)
class HashConfig(StrategyConfig):
    """Rows that ids are hashed to.

    Attributes:
        num_rows: table name -> R, rows of D values, at most its number of ids, and then each id has its own row; None
            to let the budget choose.
        num_hashes: H, hash functions per table, at most 256.
        combine: how the H rows of an id make its vector: ``"sum"``, ``"mean"``, ``"concat"`` (D / H values from each,
            so H must divide D; each hash function has R such rows to itself), or ``"weighted"``, a sum with learned
            importance weights.
        allocation_power: the budget's rows are shared out ~ V ** ``allocation_power``.
        exempt_share: share of the budget's rows that may go to keeping the smallest tables whole, in [0, 1).
        buckets_per_row: importance weights are shared too: H of them for each of ``buckets_per_row`` · R buckets that
            ids are hashed to, or for each id where that is not more.
    """

    num_rows: dict[str, int] | None = None
    num_hashes: int = 1
    combine: str = "sum"
    allocation_power: float = 1.0
    exempt_share: float = 0.05
    buckets_per_row: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "combine", COMBINES)
        check_at_least(self, "num_hashes", 1)
        check_at_most(self, "num_hashes", MOST_HASHES)
        check_at_least(self, "allocation_power", 0)
        check_at_least(self, "buckets_per_row", 1)
        if not 0 <= self.exempt_share < 1:
            raise ConfigError(f"HashConfig(exempt_share={self.exempt_share!r}): must be in [0, 1)")


@register_strategy("hash", HashConfig)
class HashTables(EmbeddingTables):
    """The hashing trick and its kin: every table has fewer rows than ids, and ids that meet share them.

    One hash function is feature hashing ("Feature Hashing for Large Scale Multitask Learning", arXiv 0902.2206).
    Several with ``"sum"`` or ``"mean"`` are Bloom embeddings, or double hashing ("Getting Deep Recommenders Fit: Bloom
    Embeddings for Sparse Binary Input/Output Networks", arXiv 1706.03993; "Model Size Reduction Using Frequency Based
    Double Hashing for Recommender Systems", arXiv 2007.14523): two ids rarely share all their rows. ``"weighted"`` are
    hash embeddings ("Hash Embeddings for Efficient Word Representations", arXiv 1709.03933): their importance weights
    start at one here, not near zero, so that vectors start at the plain table's size.

    Ids are mixed by 64-bit hash functions seeded by the table's name, never taken modulo R, so raw ids of any order
    work. A table with a row per id is exempt: ids are their own rows, without collisions, in the same store; with
    several hash functions all of them give that row, and their mean is taken, so that it trains like a plain row.
    Trained tables are fitted by count-weighted least squares.
    """

    knob = "rows"
    can_be_sharded = True
    can_be_streamed = True
    takes_any_id = True
    config: HashConfig
    _owners: dict[str, tuple[bool, ...]]
    _starts: Tensor
    _ranges: Tensor
    _seeds: Tensor
    _columns: Tensor
    _scales: Tensor | None
    _rows_owners: Tensor
    _bucket_starts: Tensor
    _bucket_ranges: Tensor
    _bucket_seeds: Tensor

    def __init__(
        self, specs: Sequence[TableSpec], config: HashConfig, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(specs, config)
        self.num_rows = self._checked_rows()
        self._owners = {}
        exempt = [rows == ids for rows, ids in zip(self.num_rows, self.num_ids, strict=True)]
        self.combine, self.num_hashes = ("sum", 1) if all(exempt) else (config.combine, config.num_hashes)
        width = width_of(self.specs, config) if self.combine == "concat" else self.embedding_dim
        blocks = self.num_hashes if self.combine == "concat" else 1
        self.rows = make_row_store(config.rows, [blocks * rows for rows in self.num_rows], width, config.sparse)
        self.constant("_starts", self.rows.starts())
        self.constant("_ranges", self.num_rows)
        seeds = [[hash_seed(config.seed, name, number) for number in range(self.num_hashes)] for name in self.names]
        self.constant("_seeds", torch.tensor(seeds, device="cpu"))
        self.constant("_columns", torch.arange(self.num_tables, device="cpu").unsqueeze(1))
        self._register_owners("rows", exempt)
        self._register_scales(exempt)
        if self.combine == "weighted":
            self._build_importance(exempt)
        self.reset_parameters()

    # ---- lookups ----------------------------------------------------------------------------------------------------

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        own = self._owns("rows", ids, table)
        if self.combine == "concat":
            rows = torch.stack([self._rows_of(ids, table, j, own) for j in range(self.num_hashes)], dim=-1)
            return self.rows(rows, self._segment(table)).flatten(-2)
        if own is True:
            return self.rows(ids + self.pick(self._starts, table), table)
        if self.combine == "weighted":
            return self._weighted(ids, table, own)
        found = self._found(ids, table, own)
        vectors = next(found)
        for other in found:
            vectors = vectors.add_(other)
        if self._scales is not None:
            vectors = vectors.mul_(self.pick(self._scales, table))
        return vectors

    def stored_rows(self, ids: Tensor, table: Tensor | int | None) -> tuple[RowStore, Tensor] | None:
        if self.num_hashes > 1 or self.combine != "sum" or self._scales is not None:
            return None
        return self.rows, self._rows_of(ids, table, 0, self._owns("rows", ids, table))

    def _weighted(self, ids: Tensor, table: Tensor | int | None, own: Tensor | bool) -> Tensor:
        importance = self.importance(self._buckets_of(ids, table), table)
        if any(self._owners["rows"]):
            exempt = self.pick(self._rows_owners, table).unsqueeze(-1)
            importance = importance.masked_fill(exempt, 1 / self.num_hashes)
        found = self._found(ids, table, own)
        vectors = next(found) * importance[..., :1]
        for number, other in enumerate(found, start=1):
            vectors = vectors.addcmul_(other, importance[..., number : number + 1])
        return vectors

    def _found(self, ids: Tensor, table: Tensor | int | None, own: Tensor | bool) -> Iterator[Tensor]:
        """The rows of each hash, float32 ``(..., D)``, which may be written to.

        Sharded rows are looked up at once: TorchRec's optimizer makes a step in the backward pass of every lookup.
        """
        rows = (self._rows_of(ids, table, number, own) for number in range(self.num_hashes))
        if self.is_sharded and self.num_hashes > 1:
            found = self.rows(torch.stack(list(rows), dim=-1), self._segment(table))
            yield from (found.select(-2, number).clone() for number in range(self.num_hashes))
        else:
            yield from (self.rows(one, table) for one in rows)

    def stretches(self, index: int, queries: Tensor) -> list[Stretch]:
        [plain] = super().stretches(index, queries)
        start, size = self.rows.starts()[index], self.num_rows[index]
        if self._owners["rows"][index]:
            own = partial(self.rows.rows_from, start, segment=index)
            return [plain if self.combine == "concat" else replace(plain, vectors=own)]

        def term(part: Tensor, first: int, numbers: Sequence[int]) -> RowTerm:
            def places(ids: Tensor) -> list[Tensor]:
                return [self._rows_of(ids, index, number, own=False) - first for number in numbers]

            return RowTerm(part, self.rows, first, size, index, places, len(numbers))

        if self.combine == "concat":
            parts = enumerate(queries.split(self.rows.dim, dim=1))
            return [replace(plain, terms=[term(part, start + j * size, [j]) for j, part in parts])]
        scaled = queries if self._scales is None else queries * self.pick(self._scales, index)
        summed = term(scaled, start, range(self.num_hashes))
        if self.combine == "weighted":
            summed = replace(summed, weights=lambda ids: self.importance(self._buckets_of(ids, index), index))
        return [replace(plain, terms=[summed])]

    def _rows_of(self, ids: Tensor, table: Tensor | int | None, number: int, own: Tensor | bool) -> Tensor:
        """Stored rows that one hash function gives: int64, the shape of ``ids``."""
        starts, ranges = self.pick(self._starts, table), self.pick(self._ranges, table)
        rows = _own_or_hashed(ids, own, self.pick(self._seeds, table)[..., number], ranges)
        if self.combine == "concat" and number:
            starts = starts + number * ranges
        return rows + starts if rows is ids else rows.add_(starts)

    def _buckets_of(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        """Rows of importance weights: int64, the shape of ``ids``."""
        seeds, ranges = self.pick(self._bucket_seeds, table), self.pick(self._bucket_ranges, table)
        own = self._owns("buckets", ids, table)
        return _own_or_hashed(ids, own, seeds, ranges) + self.pick(self._bucket_starts, table)

    def _owns(self, what: str, ids: Tensor, table: Tensor | int | None) -> Tensor | bool:
        """Which ids have a row (or bucket) of their own: True for all, False for none, else bool, as ``ids``."""
        owners = self._owners[what]
        kinds = {owners[table]} if isinstance(table, int) else set(owners)
        if kinds == {False}:
            return False
        inside: Tensor | bool = True
        if self.config.unseen == "hash":
            inside = (ids >= 0) & (ids < self.pick(self._sizes, table))
        return inside if kinds == {True} else self.pick(getattr(self, f"_{what}_owners"), table) & inside

    def _segment(self, table: Tensor | int | None) -> Tensor | int:
        if table is None:
            return self._columns
        return table.unsqueeze(-1) if isinstance(table, Tensor) else table

    # ---- life -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self) -> None:
        std = [spec.init_std / self._spread(index) for index, spec in enumerate(self.specs)]
        self.rows.reset_parameters(std, self.generator())
        if self.combine == "weighted" and not any(tensor.is_meta for tensor in self.importance.parameters()):
            ones = torch.ones(self.importance.num_rows, self.num_hashes, device=self._sizes.device)
            self.importance.write_(0, ones)
            self.importance.fit_scales_()

    def _spread(self, index: int) -> float:
        """Standard deviation of a table's vectors, if that of its rows is one; two hashes agree on 1 of R rows."""
        hashes, own = self.num_hashes, self._owners["rows"][index]
        if own or self.combine == "concat":
            return 1.0
        total = math.sqrt(hashes + hashes * (hashes - 1) / self.num_rows[index])
        return total / hashes if self.combine == "mean" else total

    def fit(self, weights: Sequence[RowSource], counts: Sequence[Tensor]) -> None:
        for index, (start, weight, count) in enumerate(zip(self.rows.starts(), weights, counts, strict=True)):
            if self.combine == "concat":
                self._fit_blocks(index, weight, count)
            elif self._owners["rows"][index]:
                self.rows.write_(start, weight)
            elif self.combine == "weighted":
                self._fit_weighted(index, weight, count)
            elif self.num_hashes == 1:
                slots = partial(hash_to_range, seeds=self._seeds[index, 0], size=self.num_rows[index])
                self.rows.write_(start, shared_means(slots, weight, count, self.num_rows[index]))
            else:
                factor = 1.0 if self.combine == "sum" else 1 / self.num_hashes
                self.rows.write_(start, self._fit_rows(index, None, partial(self._same_factor, factor), weight, count))

    def _same_factor(self, factor: float, ids: Tensor) -> Tensor:
        return torch.full((len(ids), self.num_hashes), factor, device=ids.device)

    def _slots_of(self, index: int, ids: Tensor) -> list[Tensor]:
        """Rows within a table that is not exempt, for each hash function: int64 ``(n,)`` each."""
        seeds, size = self._seeds[index], self.num_rows[index]
        return [hash_to_range(ids, seeds[number], size) for number in range(self.num_hashes)]

    def _fit_blocks(self, index: int, weight: RowSource, count: Tensor) -> None:
        start, size, width = self.rows.starts()[index], self.num_rows[index], self.rows.dim
        for number in range(self.num_hashes):
            rows: RowSource | Tensor = weight.columns(number * width, (number + 1) * width)
            if not self._owners["rows"][index]:
                slots = partial(hash_to_range, seeds=self._seeds[index, number], size=size)
                rows = shared_means(slots, rows, count, size)
            self.rows.write_(start + number * size, rows)

    def _fit_rows(self, index: int, rows: Tensor | None, factors: Factors, weight: RowSource, count: Tensor) -> Tensor:
        if rows is None:  # rows that no id uses keep what a mean vector needs, for ids that come later
            first = factors(torch.zeros(1, dtype=torch.int64, device=weight.device))
            mean = weighted_mean(weight, count) / first.sum()
            rows = mean.expand(self.num_rows[index], -1).clone()
        steps = 1 if self.num_hashes == 1 else _FIT_STEPS
        return fit_summed_rows(rows, partial(self._slots_of, index), factors, weight, count, steps)

    def _fit_weighted(self, index: int, weight: RowSource, count: Tensor) -> None:
        """Alternate between rows (conjugate gradients) and importance weights (an H × H system per bucket)."""
        start, slots = self.importance.starts()[index], partial(self._slots_of, index)
        importance = torch.ones(self.importance.segments[index], self.num_hashes, device=weight.device)

        def buckets(ids: Tensor) -> Tensor:
            return self._buckets_of(ids, index) - start

        def factors(ids: Tensor) -> Tensor:
            return importance[buckets(ids)]

        rows = self._fit_rows(index, None, factors, weight, count)
        for _ in range(_FIT_ROUNDS):
            importance = fit_importance(importance, rows, slots, buckets, weight, count)
            rows = self._fit_rows(index, rows, factors, weight, count)
        self.importance.write_(start, importance)
        self.rows.write_(self.rows.starts()[index], rows)

    def _grown_config(self, specs: Sequence[TableSpec]) -> HashConfig:
        rows, oov = dict(self.config.num_rows or {}), int(self.config.unseen == "oov_row")
        for index, spec in enumerate(specs):
            ids, buckets = spec.num_embeddings + oov, self.config.buckets_per_row * rows[spec.name]
            if self._owners["rows"][index]:
                rows[spec.name] = ids
            elif self.combine == "weighted" and self._owners["buckets"][index] and buckets < ids:
                raise self.no_growth(f"would no longer have importance weights for each id of {spec.name!r}")
        return replace(self.config, num_rows=rows)

    def take_table_(self, index: int, old: HashTables, own: int, last: int) -> None:
        kept, blocks = last if self._owners["rows"][index] else 0, self.num_hashes if self.combine == "concat" else 1
        as_matrix(self.rows).take_segment_(index, as_matrix(old.rows), own, kept, blocks)
        if self.combine == "weighted":
            kept = last if self._owners["buckets"][index] else 0
            as_matrix(self.importance).take_segment_(index, as_matrix(old.importance), own, kept)

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: HashConfig, known: Knowledge) -> tuple[int, int]:
        if config.num_rows is not None:
            return 1, 1
        return sum(smallest_rows(specs, config)), sum(largest_rows(specs, config))

    @classmethod
    def resize(cls, specs: Sequence[TableSpec], config: HashConfig, size: int, known: Knowledge) -> HashConfig:
        if config.num_rows is not None:
            return config
        largest = largest_rows(specs, config)
        worth = allocate_rows(size, largest, config.allocation_power, config.exempt_share, smallest_rows(specs, config))
        rows = [rows_worth(spec, config, cost) for spec, cost in zip(specs, worth, strict=True)]
        return replace(config, num_rows=dict(zip([spec.name for spec in specs], rows, strict=True)))

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: HashConfig, known: Knowledge) -> StrategyConfig:
        return config if config.num_rows is not None else super().complete(specs, config, known)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _checked_rows(self) -> tuple[int, ...]:
        config = self.config
        if config.num_rows is None:
            raise ConfigError("HashConfig(num_rows=None): give num_rows, or plan with a budget")
        check_table_names(config, "num_rows", self.names)
        rows = tuple(config.num_rows[name] for name in self.names)
        for name, number, num_ids in zip(self.names, rows, self.num_ids, strict=True):
            if not 1 <= number <= num_ids:
                raise ConfigError(f"HashConfig(num_rows={{{name!r}: {number}}}): must be in [1, {num_ids}], its ids")
            if number < num_ids or config.unseen == "hash":
                check_range(name, number)
        return rows

    def _register_owners(self, what: str, owners: Sequence[bool]) -> None:
        self._owners[what] = tuple(owners)
        self.constant(f"_{what}_owners", owners)

    def _register_scales(self, exempt: Sequence[bool]) -> None:
        """What a plain sum of H rows is multiplied by: 1 / H where a mean is wanted; None where it is 1 everywhere."""
        mean = 1 / self.num_hashes
        scales = [[mean if own or self.combine == "mean" else 1.0] for own in exempt]
        trivial = self.combine not in ("sum", "mean") or all(scale == [1.0] for scale in scales)
        if trivial:
            self.register_buffer("_scales", None, persistent=False)
        else:
            self.constant("_scales", torch.tensor(scales, device="cpu"))

    def _build_importance(self, exempt: Sequence[bool]) -> None:
        sizes = [
            0 if own else min(self.config.buckets_per_row * rows, ids)
            for own, rows, ids in zip(exempt, self.num_rows, self.num_ids, strict=True)
        ]
        for name, size in zip(self.names, sizes, strict=True):
            check_range(name, size)
        self.importance = make_row_store(importance_format(self.config), sizes, self.num_hashes, self.config.sparse)
        starts = [0 if own else start for own, start in zip(exempt, self.importance.starts(), strict=True)]
        self.constant("_bucket_starts", starts)
        self.constant("_bucket_ranges", [max(size, 1) for size in sizes])
        self.constant("_bucket_seeds", [hash_seed(self.config.seed, name, "importance") for name in self.names])
        self._register_owners("buckets", [size == ids for size, ids in zip(sizes, self.num_ids, strict=True)])


def _own_or_hashed(ids: Tensor, own: Tensor | bool, seeds: Tensor, ranges: Tensor) -> Tensor:
    if own is True:
        return ids
    hashed = hash_to_range(ids, seeds, ranges)
    return hashed if own is False else torch.where(own, ids, hashed)
