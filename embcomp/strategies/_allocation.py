"""Rows of a budget shared out over tables: a part of the strategies that give each table rows of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from embcomp.errors import ConfigError, did_you_mean

_HALVINGS = 100


def allocate_rows(
    total: int,
    largest: Sequence[int],
    power: float = 1.0,
    exempt_share: float = 0.0,
    smallest: Sequence[int] | None = None,
) -> list[int]:
    """Share rows out over tables, ``M_t ~ V_t ** power``, so that every table but the small ones is cut alike.

    Rows are handed out one after the other, each to the table that is furthest behind (Jefferson's method), so one
    more row to share never takes a row away from a table, but where it pays to exempt one more small table.

    Args:
        total: rows to share out, between the sums of ``smallest`` and ``largest``.
        largest: rows that each table can use at most: its number of ids V_t.
        power: 1 cuts all tables by the same factor, 0 gives all the same number of rows.
        exempt_share: the smallest tables get all their rows as long as those take no more than this share of ``total``.
        smallest: rows that each table needs at least; one each if None.

    Returns:
        rows of each table; their sum is ``total``.
    """
    floors = [1] * len(largest) if smallest is None else list(smallest)
    exempt = _exempt(largest, floors, exempt_share * total, total)
    floors = [cap if index in exempt else floor for index, (floor, cap) in enumerate(zip(floors, largest, strict=True))]
    weights = [float(cap) ** power for cap in largest]

    def at(level: float) -> list[int]:
        columns = zip(weights, floors, largest, strict=True)
        return [min(max(int(level * weight), floor), cap) for weight, floor, cap in columns]

    low, high = 0.0, 2.0 * max(cap / weight for cap, weight in zip(largest, weights, strict=True))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) <= total else (low, middle)
    rows = at(low)
    for _ in range(min(total, sum(largest)) - sum(rows)):
        behind = [index for index, cap in enumerate(largest) if rows[index] < cap]
        rows[min(behind, key=lambda index: (rows[index] + 1) / weights[index])] += 1
    return rows


def check_table_names(config: object, field: str, names: Sequence[str]) -> None:
    """Check that a config's dict has an entry for each table, and none for others.

    Raises:
        ConfigError: if it has not; the message says which.
    """
    given = getattr(config, field)
    where = f"{type(config).__name__}({field}=…)"
    for name in given:
        if name not in names:
            raise ConfigError(f"{where} names table {name!r}, which does not exist; {did_you_mean(name, names)}")
    missing = [name for name in names if name not in given]
    if missing:
        raise ConfigError(f"{where} has no entry for tables {', '.join(missing)}: give all, or none and a budget")


def _exempt(largest: Sequence[int], floors: Sequence[int], limit: float, total: int) -> set[int]:
    """The smallest tables whose rows together are within ``limit``; tables of one size go together."""
    exempt: set[int] = set()
    used, left = 0, sum(floors)
    for rows, group in groupby(sorted(range(len(largest)), key=largest.__getitem__), key=largest.__getitem__):
        indices = list(group)
        used += rows * len(indices)
        left -= sum(floors[index] for index in indices)
        if used > limit or used + left > total:
            break
        exempt.update(indices)
    return exempt
