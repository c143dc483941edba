"""The sizes of ``unified``: which tables keep exact rows, how many lookups the others do, how large the pool is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

from embcomp.errors import ConfigError, did_you_mean
from embcomp.hashing import MAX_RANGE
from embcomp.specs import TableSpec

if TYPE_CHECKING:
    from embcomp.strategies.unified import UnifiedConfig

_Value = TypeVar("_Value", bool, int)


def check_choices(config: UnifiedConfig) -> None:
    """Raise `ConfigError` for values of ``lookups``, ``exempt`` and the two shares that are never possible."""
    if not 0 <= config.exempt_share < 1:
        raise ConfigError(f"UnifiedConfig(exempt_share={config.exempt_share!r}): must be in [0, 1)")
    if not config.twin_limit > 0:
        raise ConfigError(f"UnifiedConfig(twin_limit={config.twin_limit!r}): must be above 0")
    lookups = config.lookups.values() if isinstance(config.lookups, dict) else [config.lookups]
    if config.lookups != "auto" and not all(type(number) is int and number >= 1 for number in lookups):
        raise ConfigError(
            f"UnifiedConfig(lookups={config.lookups!r}): write 'auto', a number of at least 1, or a dict from table "
            "name to number"
        )
    exempt = config.exempt
    if not (isinstance(exempt, dict) and all(type(flag) is bool for flag in exempt.values())) and exempt not in (
        "auto",
        "none",
    ):
        raise ConfigError(f"UnifiedConfig(exempt={exempt!r}): write 'auto', 'none', or a dict from table name to bool")


def chunk_dim_of(specs: Sequence[TableSpec], config: UnifiedConfig) -> int:
    """The width c of a row.

    Raises:
        ConfigError: if c does not divide D, or a table's lookups take more than D values.
    """
    dim = specs[0].embedding_dim
    single = config.lookups if isinstance(config.lookups, int) else 1
    chunk_dim = config.chunk_dim or dim // single
    if chunk_dim == 0 or dim % chunk_dim or (config.chunk_dim is None and dim % single):
        raise ConfigError(
            f"UnifiedConfig(chunk_dim={config.chunk_dim!r}, lookups={config.lookups!r}): vectors of {dim} values can't "
            f"be cut so; chunk_dim must be one of {[c for c in range(1, dim + 1) if dim % c == 0]}"
        )
    wanted = config.lookups if isinstance(config.lookups, dict) else {spec.name: single for spec in specs}
    for name, number in wanted.items():
        if number > dim // chunk_dim:
            raise ConfigError(
                f"UnifiedConfig(lookups={config.lookups!r}): {number} rows of {chunk_dim} values are more than the "
                f"{dim} of table {name!r}; at most {dim // chunk_dim} lookups, or a smaller chunk_dim"
            )
    return chunk_dim


def row_range(specs: Sequence[TableSpec], config: UnifiedConfig) -> tuple[int, int]:
    """Smallest and largest number of stored rows, exact ones and the pool together."""
    exact = _exact_rows(specs, config)
    everything, kept = sum(exact.values()), 0
    if isinstance(config.exempt, dict):
        flags = _named(config.exempt, specs, "exempt", False)
        kept = sum(rows for name, rows in exact.items() if flags[name])
        if kept == everything:
            return kept, kept
    low = kept + config.sub_tables
    if config.exempt == "auto":
        low = min(low, everything)
    return low, max(low, everything)


def complete_sizes(specs: Sequence[TableSpec], config: UnifiedConfig, num_rows: int | None) -> UnifiedConfig:
    """Fill in every size.

    Args:
        specs: the tables.
        config: a config, complete or not.
        num_rows: stored rows, exact ones and the pool together; None where the config gives ``pool_rows``.

    Raises:
        ConfigError: if names in the config are not those of tables, or numbers do not go together.
    """
    chunk_dim = chunk_dim_of(specs, config)
    if isinstance(config.lookups, dict):
        _named(config.lookups, specs, "lookups", 0)
    exempt, pool_rows = _split_rows(specs, config, num_rows)
    sub_tables = max(config.sub_tables, math.ceil(pool_rows / MAX_RANGE))
    if pool_rows < sub_tables and not all(exempt.values()):
        raise ConfigError(f"UnifiedConfig(pool_rows={pool_rows}, sub_tables={sub_tables}): every part needs a row")
    lookups = {
        spec.name: _lookups_of(spec, config, chunk_dim, exempt[spec.name], pool_rows // sub_tables) for spec in specs
    }
    return replace(
        config, pool_rows=pool_rows, chunk_dim=chunk_dim, lookups=lookups, sub_tables=sub_tables, exempt=exempt
    )


def auto_lookups(spec: TableSpec, chunk_dim: int, pool_rows: int, twin_limit: float) -> int:
    """The number of lookups by rule: enough for the width that the table deserves, and to tell its ids apart.

    The width is 6 V^¼, a rule of thumb of TensorFlow's feature columns, at most D. Two ids share all of L rows with
    probability R^-L, so an id has V R^-L twins; L grows until that is below ``twin_limit``.

    Args:
        spec: the table.
        chunk_dim: c.
        pool_rows: rows that one lookup chooses from.
        twin_limit: expected twins per id, not reached.
    """
    limit = spec.embedding_dim // chunk_dim
    lookups = min(limit, math.ceil(6 * spec.num_embeddings**0.25 / chunk_dim))
    while lookups < limit and spec.num_embeddings * float(pool_rows) ** -lookups >= twin_limit:
        lookups += 1
    return lookups


def _lookups_of(spec: TableSpec, config: UnifiedConfig, chunk_dim: int, exempt: bool, pool_rows: int) -> int:
    if exempt:
        return spec.embedding_dim // chunk_dim
    if isinstance(config.lookups, int):
        return config.lookups
    if isinstance(config.lookups, dict) and spec.name in config.lookups:
        return config.lookups[spec.name]
    return auto_lookups(spec, chunk_dim, pool_rows, config.twin_limit)


def auto_exempt(exact: dict[str, int], limit: float) -> dict[str, bool]:
    """Mark the smallest tables whose exact rows together are at most ``limit``; tables of one size go together."""
    marked, total = dict.fromkeys(exact, False), 0
    for rows, group in groupby(sorted(exact, key=exact.__getitem__), key=exact.__getitem__):
        names = list(group)
        total += rows * len(names)
        if total > limit:
            break
        marked |= dict.fromkeys(names, True)
    return marked


def _split_rows(specs: Sequence[TableSpec], config: UnifiedConfig, num_rows: int | None) -> tuple[dict[str, bool], int]:
    """Which tables are exempt, and the rows that are left for the pool."""
    exact = _exact_rows(specs, config)
    if isinstance(config.exempt, dict):
        exempt = _named(config.exempt, specs, "exempt", False)
    elif config.exempt == "none":
        exempt = dict.fromkeys(exact, False)
    elif num_rows is None:
        share = config.exempt_share / (1 - config.exempt_share)
        exempt = auto_exempt(exact, share * (config.pool_rows or 0))
    elif sum(exact.values()) <= num_rows:
        exempt = dict.fromkeys(exact, True)
    else:
        exempt = auto_exempt(exact, min(config.exempt_share * num_rows, num_rows - config.sub_tables))
    kept = sum(rows for name, rows in exact.items() if exempt[name])
    if all(exempt.values()):
        return exempt, 0
    return exempt, (config.pool_rows or 0) if num_rows is None else num_rows - kept


def _exact_rows(specs: Sequence[TableSpec], config: UnifiedConfig) -> dict[str, int]:
    """Rows that each table takes if every id has its own."""
    per_id = specs[0].embedding_dim // chunk_dim_of(specs, config)
    oov = 1 if config.unseen == "oov_row" else 0
    return {spec.name: (spec.num_embeddings + oov) * per_id for spec in specs}


def _named(values: dict[str, _Value], specs: Sequence[TableSpec], field: str, default: _Value) -> dict[str, _Value]:
    names = [spec.name for spec in specs]
    for name in values:
        if name not in names:
            raise ConfigError(f"UnifiedConfig({field}=…) names table {name!r}; {did_you_mean(name, names)}")
    return {name: values.get(name, default) for name in names}
