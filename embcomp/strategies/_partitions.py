"""Complementary partitions of ids: sizes and strides, in exact integers.

Part j has ``m_j`` classes, and puts an id into class ``(id // w_j) mod m_j``. The strides are ``w_1 = 1`` and
``w_(j+1) = w_j b_j`` with ``b_j <= m_j`` and ``w_k m_k >= V``. Then no two ids share all their classes: the last class
says which block of ``w_k`` consecutive ids an id is in, and inside a block of ``w_(j+1)`` ids, ``id // w_j`` takes
``b_j`` consecutive values, which differ modulo ``m_j``; so going down from the last part, the id is found.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from embcomp.errors import ConfigError


def parse_parts(table: str, text: str, num_parts: int, num_ids: int) -> list[int]:
    """Read ``"593x11"``, sizes of the parts of one table.

    Returns:
        ``num_parts`` sizes, or one that is the number of ids, for a table that is kept whole.

    Raises:
        ConfigError: if it can't be read, or does not tell all ids apart.
    """
    sizes = [int(size) for size in text.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text) else []
    if sizes == [num_ids] or (len(sizes) == num_parts > 1 and math.prod(sizes) >= num_ids and max(sizes) <= num_ids):
        return sizes
    raise ConfigError(
        f"CompositionalConfig(parts={{{table!r}: {text!r}}}): write {num_parts} sizes such as "
        f"'{format_parts(smallest_parts(num_ids, num_parts))}', each at most {num_ids} and with a product of at least "
        f"{num_ids}, or '{num_ids}' to keep the table whole"
    )


def format_parts(sizes: Sequence[int]) -> str:
    """Write sizes as `parse_parts` reads them."""
    return "x".join(str(size) for size in sizes)


def strides(num_ids: int, sizes: Sequence[int]) -> list[int]:
    """The strides ``w_j`` of parts; blocks are as alike in size as the parts allow.

    Args:
        num_ids: V.
        sizes: m_j; their product is at least V.
    """
    *inner, last = sizes
    bases, need = [1] * len(inner), -(-num_ids // last)
    for done, part in enumerate(sorted(range(len(inner)), key=inner.__getitem__)):
        bases[part] = min(inner[part], root_above(need, len(inner) - done))
        need = -(-need // bases[part])
    return [math.prod(bases[:part]) for part in range(len(sizes))]


def smallest_parts(num_ids: int, num_parts: int) -> list[int]:
    """The sizes with the smallest sum whose product is at least V; sizes differ by at most one."""
    total = num_parts * (root_above(num_ids, num_parts) - 1)
    while math.prod(_even(total, num_parts)) < num_ids:
        total += 1
    return _even(total, num_parts)


def uneven_parts(num_ids: int, num_parts: int, total: int) -> list[int]:
    """Sizes with a given sum, below V: the first part as large as can be, the others as small as the ids allow.

    Args:
        num_ids: V.
        num_parts: k, at least 2.
        total: the sum, at least that of `smallest_parts`.
    """
    others = num_parts - 1
    low, high = others - 1, sum(smallest_parts(num_ids, num_parts)[1:])
    while high - low > 1:
        middle = (low + high) // 2
        enough = math.prod(_even(middle, others)) * (total - middle) >= num_ids
        low, high = (low, middle) if enough else (middle, high)
    return [total - high, *_even(high, others)]


def permutation(seed: int, num_ids: int) -> tuple[int, int, int]:
    """A bijection of ``[0, V)``, ``x -> (x * factor + shift) mod V``, in numbers that don't overflow int64.

    Returns:
        factor, coprime to V, then shift, then V.
    """
    limit = min(num_ids, 2**63 // num_ids - 2)
    factor = limit // 3 + seed % max(limit // 3, 1) + 1
    while math.gcd(factor, num_ids) > 1:
        factor += 1
    return factor, (seed >> 20) % num_ids, num_ids


def root_above(value: int, degree: int) -> int:
    """The smallest int whose ``degree``-th power is at least ``value``."""
    root = max(round(value ** (1 / degree)), 1)
    while root**degree < value:
        root += 1
    while root > 1 and (root - 1) ** degree >= value:
        root -= 1
    return root


def _even(total: int, num_parts: int) -> list[int]:
    """The sizes of one sum with the largest product, falling."""
    return [total // num_parts + (part < total % num_parts) for part in range(num_parts)]
