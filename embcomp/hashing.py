"""Seeded 64-bit hash functions on int64 tensors: the same values on CPU and CUDA, eager, compiled and exported.

A seed is derived from stable names (a table's name, a chunk number), never from positions, so adding a table
reshuffles nobody. The mixer is two odd multiplications around one xor-shift (the construction of MurmurHash3's and
SplitMix64's finalisers), after the high half is added to the low one: a product carries upwards only, so ids that
differ in high bits alone would hardly be mixed. A range reduction takes the high 32 bits by Lemire's multiply-shift
("Fast Random Integer Generation in an Interval", arXiv 1805.10941), so no modulo bias that matters and no division.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from embcomp.errors import ConfigError, InputError

MAX_RANGE = 2**31 - 1
"""The largest range that `hash_to_range` can reduce to: 32 hash bits times 31 range bits fit in an int64."""

_MULTIPLIER_1 = -7046029254386353131  # 0x9E3779B97F4A7C15, the 64-bit golden ratio
_MULTIPLIER_2 = -4658895280553007687  # 0xBF58476D1CE4E5B9, SplitMix64's first multiplier
_LOW_32 = 0xFFFFFFFF


def hash_seed(*parts: str | int) -> int:
    """Derive a signed 64-bit seed from names and numbers, the same in every process, machine and version.

    Args:
        parts: e.g. the config's seed, the table's name, the number of the hash function.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _mix(ids: Tensor, seeds: Tensor | int) -> Tensor:
    """Mix int64 ``(...)`` so that the high 32 bits avalanche; the low ones are finished by `hash_ids`."""
    # In place on our own temporaries: a new tensor of a whole batch costs as much as the arithmetic.
    mixed = ids ^ seeds
    mixed += mixed >> 32
    mixed *= _MULTIPLIER_1
    mixed ^= _high_bits(mixed)
    mixed *= _MULTIPLIER_2
    return mixed


def _high_bits(mixed: Tensor) -> Tensor:
    """The high 32 bits of each value as a number in ``[0, 2**32)``; torch shifts int64 arithmetically."""
    high = mixed >> 32
    high &= _LOW_32
    return high


def hash_ids(ids: Tensor, seeds: Tensor | int) -> Tensor:
    """Hash int64 ids to 64 bits.

    Args:
        ids: int64 ``(...)``, any value.
        seeds: int64, an int or a tensor broadcastable with ``ids``.

    Returns:
        int64 ``(...)``, all 64 bits used (so half of the values are negative).
    """
    mixed = _mix(ids, seeds)
    mixed ^= _high_bits(mixed)
    return mixed


def hash_to_range(ids: Tensor, seeds: Tensor | int, size: Tensor | int) -> Tensor:
    """Hash int64 ids to ``[0, size)``.

    Args:
        ids: int64 ``(...)``, any value.
        seeds: int64, an int or a tensor broadcastable with ``ids``.
        size: at least 1 and at most `MAX_RANGE`, an int or an int64 tensor broadcastable with ``ids``. Tensors are not
            checked, since that would stall a GPU: whoever makes them calls `check_range`.

    Returns:
        int64 ``(...)`` in ``[0, size)``.

    Raises:
        InputError: if ``size`` is an int outside ``[1, MAX_RANGE]``.
    """
    if isinstance(size, int) and not 1 <= size <= MAX_RANGE:
        raise InputError(f"hash_to_range: size={size} must be in [1, {MAX_RANGE}]")
    high = _mix(ids, seeds)
    high >>= 32
    high &= _LOW_32
    scaled = high * size
    scaled >>= 32
    return scaled


def check_range(table: str, size: int) -> None:
    """Check that ids of a table can be hashed to ``[0, size)``.

    Raises:
        ConfigError: if the range is too large for `hash_to_range`; the message names the table.
    """
    if size > MAX_RANGE:
        raise ConfigError(
            f"table {table!r}: hashing into {size} rows is more than the {MAX_RANGE} that 32 hash bits can address; "
            "give the table fewer rows, or split it"
        )


def hash_strings(values: Iterable[str]) -> Tensor:
    """Hash strings to int64 ids in ``[0, 2**63)``, stable across processes (unlike Python's ``hash``).

    Args:
        values: an iterable (list, numpy array, pandas Series) of strings.

    Returns:
        int64 ``(N,)``.

    Raises:
        InputError: if an element is not a string: numbers have no one spelling, so convert them yourself.
    """
    codes = np.fromiter((_hash_string(value, i) for i, value in enumerate(values)), dtype=np.int64)
    return torch.from_numpy(codes)


def _hash_string(value: str, position: int) -> int:
    if not isinstance(value, str):
        raise InputError(f"hash_strings: element {position} is {value!r} of type {type(value).__name__}, not a str")
    digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
