"""Hash functions: frozen values, an independent reference in Python integers, and statistics that catch weak mixing."""

import math

import pytest
import torch

from embcomp import ConfigError, InputError, TableSpec, make_config, plan
from embcomp.hashing import MAX_RANGE, check_range, hash_ids, hash_seed, hash_strings, hash_to_range

SEED = hash_seed(0, "user", 0)
IDS = [0, 1, 2, -1, 2**31, 2**63 - 1, -(2**63), 123456789]
COUNT = 20000

# Ids as they occur: numbered, near the ends of int64, negative, and with their information in high bits only.
PATTERNS = {
    "sequential": torch.arange(COUNT),
    "near the end": 2**63 - 1 - torch.arange(COUNT),
    "negative": -1 - torch.arange(COUNT),
    "strided": torch.arange(COUNT) * 1024,
    "high half": torch.arange(COUNT) << 32,
    "top bits": torch.arange(COUNT) << 49,
}


def to_signed(value):
    return (value + 2**63) % 2**64 - 2**63


def python_high(value, seed):
    """The high 32 bits of the mixed value, in Python's integers."""
    mixed = to_signed(value ^ seed)
    mixed = to_signed(mixed + (mixed >> 32))
    mixed = mixed * 0x9E3779B97F4A7C15 % 2**64
    mixed ^= mixed >> 32
    return (mixed * 0xBF58476D1CE4E5B9 % 2**64) >> 32


# ---- frozen values: a change here loses every trained model ----------------------------------------------------------


def test_seeds_are_frozen():
    assert hash_seed("a") == 8260280544287282447
    assert SEED == -9017272462521039396
    assert hash_seed("0", "user", 0) == 1551407219176480288  # a number is not its spelling
    assert hash_seed(1, "user", 0) == -3192218773117975480


@pytest.mark.parametrize(
    ("seed", "frozen"),
    [
        (0, [0, 664, 216, 927, 398, 326, 797, 347]),
        (1, [664, 0, 687, 974, 114, 194, 478, 687]),
        (SEED, [128, 962, 378, 482, 9, 197, 15, 430]),
    ],
)
def test_ranges_are_frozen(seed: int, frozen: list[int]):
    assert hash_to_range(torch.tensor(IDS), seed, 1000).tolist() == frozen


def test_64_bits_are_frozen():
    assert hash_ids(torch.tensor(IDS), SEED).tolist() == [
        2372348888445704644,
        -689612987799267475,
        6981252102262422075,
        8909441786390993621,
        170703998598990369,
        3634541060795973647,
        290541637323122721,
        7942489522673077936,
    ]


def test_strings_are_frozen():
    codes = hash_strings(["", "a", "Über", "user\x1f0"])
    assert codes.tolist() == [6510301506637419378, 1702698405120146464, 4198330116692211013, 6416166455309352037]
    with pytest.raises(InputError, match=r"element 1 is 5 of type int"):
        hash_strings(["a", 5])


# ---- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 97, 1000, 2**16, 6040, MAX_RANGE])
def test_range_is_the_high_bits_scaled(size: int):
    ids = torch.cat([pattern[:50] for pattern in PATTERNS.values()])
    expected = [python_high(value, SEED) * size >> 32 for value in ids.tolist()]
    assert hash_to_range(ids, SEED, size).tolist() == expected
    assert hash_to_range(ids, torch.tensor(SEED), torch.tensor(size)).tolist() == expected
    assert max(expected) < size


def test_arguments_broadcast_and_are_left_alone():
    ids, seeds, sizes = torch.arange(12).view(4, 3), torch.tensor([5, -6, 7]), torch.tensor([10, 20, 30])
    rows = hash_to_range(ids, seeds, sizes)
    for column in range(3):
        expected = hash_to_range(ids[:, column], int(seeds[column]), int(sizes[column]))
        assert torch.equal(rows[:, column], expected)
    assert torch.equal(hash_to_range(ids[:, :1], seeds[:1], sizes)[:, 0], rows[:, 0])
    assert hash_to_range(torch.tensor(4), 5, sizes).shape == (3,)
    assert torch.equal(ids, torch.arange(12).view(4, 3))
    assert seeds.tolist() == [5, -6, 7]


def test_ranges_beyond_31_bits_are_refused():
    assert int(hash_to_range(torch.arange(COUNT), SEED, MAX_RANGE).max()) > 0.999 * MAX_RANGE
    for size in (0, MAX_RANGE + 1):
        with pytest.raises(InputError, match=rf"size={size} must be in \[1, {MAX_RANGE}\]"):
            hash_to_range(torch.arange(3), SEED, size)
    check_range("user", MAX_RANGE)
    with pytest.raises(ConfigError, match=r"'user': hashing into 2147483648 rows"):
        check_range("user", MAX_RANGE + 1)


@pytest.mark.parametrize("strategy", ["full", "compositional", "frequency_cut"])
def test_tables_that_are_too_large_to_hash_unseen_ids_into(strategy: str):
    config = make_config(strategy, unseen="hash")
    with pytest.raises(ConfigError, match=r"'huge': hashing into 3000000000 rows"):
        plan([TableSpec("huge", 3 * 10**9, 2)], config, None if strategy == "full" else "50%")


# ---- quality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, SEED], ids=["zero", "derived"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_input_bit_flips_every_used_output_bit_half_of_the_time(pattern: str, seed: int):
    ids = PATTERNS[pattern][:4096]
    flips = torch.tensor([1 << bit if bit < 63 else -(2**63) for bit in range(64)])
    changed = hash_ids(ids, seed) ^ hash_ids(ids ^ flips[:, None], seed)
    rates = torch.stack([((changed >> bit) & 1).double().mean(1) for bit in range(32, 64)])
    assert (rates - 0.5).abs().max() < 0.06  # 2048 rates with a standard deviation of 1/128; five of them is 0.04


@pytest.mark.parametrize("size", [2, 3, 97, 1000, 1024, 6040])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_ranges_are_uniform(pattern: str, size: int):
    for number in range(3):
        rows = hash_to_range(PATTERNS[pattern], hash_seed(0, "user", number), size)
        expected = COUNT / size
        chi_square = float(((torch.bincount(rows, minlength=size) - expected) ** 2 / expected).sum())
        assert abs(chi_square - (size - 1)) < 5.5 * math.sqrt(2 * (size - 1)), number


@pytest.mark.parametrize("pattern", PATTERNS)
def test_seeds_are_independent(pattern: str):
    """Rows of two functions are jointly uniform: ids that meet under one are no more likely to meet under the other."""
    size = 50
    pair = [hash_to_range(PATTERNS[pattern], hash_seed(0, "user", number), size) for number in range(2)]
    cells = torch.bincount(pair[0] * size + pair[1], minlength=size * size)
    expected = COUNT / size**2
    chi_square = float(((cells - expected) ** 2 / expected).sum())
    assert abs(chi_square - (size**2 - 1)) < 5.5 * math.sqrt(2 * (size**2 - 1))


def test_64_bit_codes_do_not_collide():
    ids = torch.cat(list(PATTERNS.values())).unique()
    assert len(hash_ids(ids, SEED).unique()) == len(ids)


def test_compiled_and_exported_functions_agree_with_eager():
    class Hash(torch.nn.Module):
        def forward(self, ids: torch.Tensor, seeds: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
            return hash_to_range(ids, seeds, sizes)

    given = (torch.tensor(IDS).repeat(2, 1), torch.arange(8) - 4, torch.arange(8) + 100)
    expected = hash_to_range(*given)
    compiled = torch.compile(Hash(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), expected)
    assert torch.equal(torch.export.export(Hash(), given).module()(*given), expected)
