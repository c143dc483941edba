"""The sizes of ``hash``: rows of each table, importance weights included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from embcomp.errors import ConfigError
from embcomp.hashing import MAX_RANGE
from embcomp.specs import TableSpec
from embcomp.storage import RowFormat, stored_bytes

if TYPE_CHECKING:
    from embcomp.strategies.hash import HashConfig


def width_of(specs: Sequence[TableSpec], config: HashConfig) -> int:
    """Values of D that one of the concatenated rows gives."""
    dim = specs[0].embedding_dim
    if dim % config.num_hashes:
        divisors = [number for number in range(1, dim + 1) if dim % number == 0]
        raise ConfigError(
            f"HashConfig(num_hashes={config.num_hashes}, combine='concat'): must divide the dimension {dim}: {divisors}"
        )
    return dim // config.num_hashes


def importance_format(config: HashConfig) -> str:
    return "int8" if RowFormat.parse(config.rows).is_integer else config.rows


def _costs(specs: Sequence[TableSpec], config: HashConfig) -> tuple[int, int]:
    """Bytes of 1024 rows, and of the importance weights of 1024 buckets."""

    def cost(dim: int, rows: str) -> int:
        return stored_bytes(1025, dim, rows) - stored_bytes(1, dim, rows)

    buckets = cost(config.num_hashes, importance_format(config)) if config.combine == "weighted" else 0
    return cost(specs[0].embedding_dim, config.rows), buckets


def num_ids_of(spec: TableSpec, config: HashConfig) -> int:
    return spec.num_embeddings + (config.unseen == "oov_row")


def largest_rows(specs: Sequence[TableSpec], config: HashConfig) -> list[int]:
    """Rows of each table that have an effect: one per id, or as many as can be hashed to."""
    return [min(num_ids_of(spec, config), MAX_RANGE) for spec in specs]


def smallest_rows(specs: Sequence[TableSpec], config: HashConfig) -> list[int]:
    """What one row of each table is worth in rows, its importance weights included."""
    row, bucket = _costs(specs, config)
    worth = [1 + math.ceil(min(config.buckets_per_row, num_ids_of(spec, config)) * bucket / row) for spec in specs]
    return [min(one, rows) for one, rows in zip(worth, largest_rows(specs, config), strict=True)]


def rows_worth(spec: TableSpec, config: HashConfig, worth: int) -> int:
    """The number of rows that takes, with its importance weights, the bytes of ``worth`` rows."""
    num_ids = num_ids_of(spec, config)
    if worth >= num_ids or config.combine != "weighted":
        return worth
    row, bucket = _costs([spec], config)
    rows = worth * row // (row + config.buckets_per_row * bucket)
    if config.buckets_per_row * rows >= num_ids:
        rows = (worth * row - num_ids * bucket) // row
    return max(rows, 1)
