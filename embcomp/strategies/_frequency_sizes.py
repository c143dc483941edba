"""The sizes of ``frequency_cut``: how many ids each table keeps, the rows of its tail, and whether it needs a remap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import stored_bytes
from embcomp.storage.bitmap import bitmap_bytes
from embcomp.strategies._allocation import allocate_rows, check_table_names

if TYPE_CHECKING:
    from embcomp.strategies.frequency_cut import FrequencyCutConfig


def row_range(specs: Sequence[TableSpec], config: FrequencyCutConfig, known: Knowledge) -> tuple[int, int]:
    """Smallest and largest number of rows, of kept ids and tails together."""
    largest, tables = sum(id_numbers(specs, config)), len(specs)
    if not _by_counts(specs, known):
        return tables, largest
    fees = _fees(specs, config, known).values()
    low = tables if _tail_of(config, 1) else 1 + min(fees)
    share = config.tail_share if config.tail == "hash" else 0.0
    return low, math.ceil((largest + tables + sum(fees)) / (1 - share)) + 1


def complete_sizes(
    specs: Sequence[TableSpec], config: FrequencyCutConfig, known: Knowledge, total: int | None
) -> FrequencyCutConfig:
    """Fill in every size.

    Args:
        specs: the tables.
        config: a config, complete or not.
        known: counts, where there are some.
        total: rows of kept ids and tails together; None where the config gives ``num_kept``.

    Raises:
        ConfigError: if names in the config are not those of tables.
    """
    names, num_ids = [spec.name for spec in specs], id_numbers(specs, config)
    kept, tails = _given(config, names, num_ids) if total is None else _chosen(specs, config, known, total)
    remapped, fees = {}, _fees(specs, config, known)
    for name, ids in zip(names, num_ids, strict=True):
        remapped[name] = fees[name] > 0 and 0 < kept[name] < ids
        if total is not None and kept[name] + tails[name] + remapped[name] * fees[name] >= ids:
            kept[name], tails[name], remapped[name] = ids, 0, False
    if config.remapped is not None:
        check_table_names(config, "remapped", names)
        remapped = dict(config.remapped)
    return replace(config, num_kept=kept, num_tail=tails, remapped=remapped)


def most_frequent(counts: Tensor, number: int) -> Tensor:
    """The ids that are kept: int64 ``(number,)``; of ids that occur equally often the smaller ones."""
    return counts.argsort(stable=True, descending=True)[:number]


def is_falling(counts: Tensor) -> bool:
    """Whether ids are numbered by falling frequency."""
    return bool((counts[1:] <= counts[:-1]).all())


def frequency_stops(counts: Tensor, tiers: int) -> list[int]:
    """Cut a table's ids into at most ``tiers`` ranges of consecutive ids by frequency: where they stop, the last at V.

    Steps are equal in the logarithm of the count. What decides for an id is the largest count from it on, which falls
    whatever the order of ids, so that an id out of order only joins a better tier.
    """
    if tiers == 1 or not bool((counts > 0).any()):
        return [len(counts)]
    level = counts.flip(0).cummax(0).values.flip(0)
    top, bottom = float(level[0]), max(float(level[level > 0][-1]), 1.0)
    cuts = [top * (bottom / top) ** (i / tiers) for i in range(1, tiers)]
    return [*sorted({int((level >= cut).sum()) for cut in cuts} - {0, len(counts)}), len(counts)]


def id_numbers(specs: Sequence[TableSpec], config: FrequencyCutConfig) -> list[int]:
    """Ids of each table, its OOV id included."""
    return [spec.num_embeddings + (config.unseen == "oov_row") for spec in specs]


def kept_by_count(known: Knowledge, fees: Mapping[str, int], total: int) -> dict[str, int]:
    """How many ids each table keeps, so that the kept ids together occur as often as can be.

    Ids are kept down to one count for all tables; a table whose ids are not ordered pays a fee, and takes part once
    what it keeps occurs often enough to be worth it. Ties go to the tables that come first.

    Args:
        known: the counts of all tables.
        fees: table name -> rows that its remap is worth, 0 where it needs none.
        total: rows to spend on kept ids and fees.
    """
    rankings = {name: _ranking(known, name) for name in fees}
    left_out: set[str] = set()
    while True:
        taking = {name: (rankings[name], fee) for name, fee in fees.items() if name not in left_out}
        kept, left = _cut(taking, total)
        too_dear = {name for name, fee in fees.items() if name not in left_out and kept[name] == 0 and fee >= left > 0}
        if not left or not too_dear:
            return {name: kept.get(name, 0) for name in fees}
        left_out |= too_dear


def _cut(taking: Mapping[str, tuple[Ranking, int]], total: int) -> tuple[dict[str, int], int]:
    """Ids that each table keeps at the lowest count that ``total`` allows, and what is left of it.

    Counts are bisected as the int64 patterns of their float64 values, which have the same order.
    """

    def kept_above(key: int) -> dict[str, int]:
        return {name: ranking.kept_above(key, fee) for name, (ranking, fee) in taking.items()}

    def cost(kept: Mapping[str, int]) -> int:
        return sum(number + (taking[name][1] if number else 0) for name, number in kept.items())

    low, high = -1, max((int(ranking.keys[-1]) for ranking, _ in taking.values()), default=0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(kept_above(middle)) <= total else (middle, high)
    kept = kept_above(high)
    left = total - cost(kept)
    for name, more in kept_above(low).items():
        fee = 0 if kept[name] else taking[name][1]
        extra = min(more - kept[name], left - fee)
        if extra > 0:
            kept[name] += extra
            left -= extra + fee
    return kept, left


@dataclass(frozen=True)
class Ranking:
    """The counts of one table, sorted.

    Attributes:
        keys: int64 ``(V,)``, float64 patterns of the counts, rising.
        sums: float64 ``(V + 1,)``, sums of the smallest 0, 1, … V counts.
        ordered: whether counts fall with the id.
    """

    keys: np.ndarray
    sums: np.ndarray
    ordered: bool

    def kept_above(self, key: int, fee: int) -> int:
        """Ids with counts above ``key``'s; none if rows of that count are worth more elsewhere, the fee included."""
        first = int(np.searchsorted(self.keys, key, side="right"))
        number = len(self.keys) - first
        count = float(np.int64(max(key, 0)).view(np.float64))
        return number if self.sums[-1] - self.sums[first] >= count * (number + fee) else 0


def _chosen(
    specs: Sequence[TableSpec], config: FrequencyCutConfig, known: Knowledge, total: int
) -> tuple[dict[str, int], dict[str, int]]:
    names, num_ids = [spec.name for spec in specs], id_numbers(specs, config)
    if not _by_counts(specs, known):
        rows = allocate_rows(total, num_ids, exempt_share=config.exempt_share)
        tails = [_tail_of(config, number) for number in rows]
        kept = [number - tail for number, tail in zip(rows, tails, strict=True)]
        return dict(zip(names, kept, strict=True)), dict(zip(names, tails, strict=True))
    if config.tail == "hash":
        share = min(max(int(config.tail_share * total), len(specs)), sum(num_ids))
        tails = allocate_rows(share, num_ids)
    else:
        tails = [_tail_of(config, 1)] * len(specs)
    kept_ids = kept_by_count(known, _fees(specs, config, known), total - sum(tails))
    return kept_ids, dict(zip(names, tails, strict=True))


def _given(
    config: FrequencyCutConfig, names: Sequence[str], num_ids: Sequence[int]
) -> tuple[dict[str, int], dict[str, int]]:
    check_table_names(config, "num_kept", names)
    kept = dict(config.num_kept or {})
    if config.num_tail is not None:
        check_table_names(config, "num_tail", names)
        return kept, dict(config.num_tail)
    tails = {}
    for name, ids in zip(names, num_ids, strict=True):
        wanted = _tail_of(config, round(kept[name] / (1 - config.tail_share)))
        tails[name] = min(wanted, max(ids - kept[name], 0))
    return kept, tails


def _tail_of(config: FrequencyCutConfig, rows: int) -> int:
    """Rows of a tail, where a table has ``rows`` rows in all."""
    if config.tail == "hash":
        return max(round(config.tail_share * rows), 1)
    return int(config.tail == "oov_row" or config.unseen == "oov_row")


def _by_counts(specs: Sequence[TableSpec], known: Knowledge) -> bool:
    return all(spec.name in known.counts for spec in specs)


def _fees(specs: Sequence[TableSpec], config: FrequencyCutConfig, known: Knowledge) -> dict[str, int]:
    """Table name -> rows that its remap is worth, 0 where ids are ordered, or assumed to be."""
    dim = specs[0].embedding_dim
    thousand = stored_bytes(1025, dim, config.rows) - stored_bytes(1, dim, config.rows)
    fees = {}
    for spec, num_ids in zip(specs, id_numbers(specs, config), strict=True):
        ordered = spec.name not in known.counts or _ranking(known, spec.name).ordered
        fees[spec.name] = 0 if ordered else math.ceil(1024 * bitmap_bytes(num_ids) / thousand)
    return fees


def _ranking(known: Knowledge, name: str) -> Ranking:
    key = ("frequency_cut", name)
    if key not in known.derived:
        counts = known.counts[name].to("cpu", torch.float64) + 0.0  # no negative zeros
        patterns = counts.view(torch.int64).numpy()
        ordered = bool((patterns[1:] <= patterns[:-1]).all())
        keys = patterns[::-1] if ordered else np.sort(patterns)
        known.derived[key] = Ranking(keys, np.append(0.0, np.cumsum(keys.view(np.float64))), ordered)
    ranking: Ranking = known.derived[key]
    return ranking
