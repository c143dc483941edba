"""The mathematics of ``compositional``: complementary partitions in exact integers, compositions, sizes and fits."""

import itertools
import math

import pytest
import torch

from embcomp import CompositionalConfig, ConfigError, TableSpec, build_tables, make_config, plan
from embcomp.hashing import hash_seed
from embcomp.strategies._partitions import permutation, root_above, smallest_parts, strides, uneven_parts

MOVIELENS = {"user": 6040, "gender": 2, "movie": 3706, "occupation": 21, "zip": 3439}
SIZES = {"user": 300, "flag": 3, "item": 50}
PARTS = {2: {"user": "40x8", "flag": "3", "item": "20x3"}, 3: {"user": "30x4x3", "flag": "3", "item": "9x3x2"}}
COMBINES = [(2, "product"), (3, "product"), (2, "sum"), (3, "sum"), (2, "concat"), (3, "concat")]


def make_tables(parts, combine="product", dim=6, sizes=None, init_std=0.01, **options):
    specs = [TableSpec(name, size, dim, init_std=init_std) for name, size in (sizes or SIZES).items()]
    table_parts = PARTS[parts] if isinstance(parts, int) else parts
    number = max(text.count("x") for text in table_parts.values()) + 1
    config = CompositionalConfig(parts=table_parts, num_parts=max(number, 2), combine=combine, **options)
    return build_tables(specs, config)


def classes_of(value, num_ids, sizes):
    """Peel classes off, with the strides of `strides` but Python's own integers."""
    return [value // stride % size for stride, size in zip(strides(num_ids, sizes), sizes, strict=True)]


def rows_of(tables, part, name):
    """Rows of one table in one part, or None where the table is kept whole and has none."""
    weight, first = tables.store(part).weight.detach(), 0
    for other in tables.names:
        sizes = [int(size) for size in tables.config.parts[other].split("x")]
        whole = len(sizes) == 1
        size = sizes[0] if whole else sizes[part]
        if whole and part > 0 and tables.config.combine != "concat":
            size = 0
        if other == name:
            return weight[first : first + size] if size else None
        first += size
    raise AssertionError(name)


def reference(tables, name, value):
    config, num_ids = tables.config, tables.num_ids[tables.names.index(name)]
    sizes = [int(size) for size in config.parts[name].split("x")]
    whole = len(sizes) == 1
    if config.shuffle:
        factor, shift, _ = permutation(hash_seed(0, name, "shuffle"), num_ids)
        value = (value * factor + shift) % num_ids
    classes = [value] * config.num_parts if whole else classes_of(value, num_ids, sizes)
    if config.combine == "concat":
        return torch.cat([rows_of(tables, part, name)[where] for part, where in enumerate(classes)])
    vector = rows_of(tables, 0, name)[classes[0]].clone()
    for part in range(1, 1 if whole else config.num_parts):
        row = rows_of(tables, part, name)[classes[part]]
        vector = vector * (1 + row) if config.combine == "product" else vector + row
    return vector


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("parts", "combine"), COMBINES)
def test_lookup_is_the_reference(parts: int, combine: str, shuffle: bool):
    tables = make_tables(parts, combine, shuffle=shuffle, init_std=1.0)
    ids = torch.tensor([[0, 0, 0], [299, 2, 49], [40, 1, 20], [151, 0, 33]])
    expected = [[reference(tables, n, int(v)) for n, v in zip(SIZES, row, strict=True)] for row in ids]
    torch.testing.assert_close(tables(ids), torch.stack([torch.stack(row) for row in expected]))


# ---- partitions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_parts", [2, 3, 4])
@pytest.mark.parametrize("num_ids", [30, 97, 1000])
def test_no_two_ids_share_all_their_classes(num_ids: int, num_parts: int):
    smallest = smallest_parts(num_ids, num_parts)
    shapes = [uneven_parts(num_ids, num_parts, total) for total in range(sum(smallest), num_ids, 17)]
    shapes += [[size] * num_parts for size in range(root_above(num_ids, num_parts), num_ids, 19)] + [smallest]
    for sizes in shapes:
        classes = {tuple(classes_of(value, num_ids, sizes)) for value in range(num_ids)}
        assert len(classes) == num_ids, sizes
        # The lookup leaves the last modulo out.
        assert (num_ids - 1) // strides(num_ids, sizes)[-1] < sizes[-1]


@pytest.mark.parametrize("num_parts", [2, 3])
def test_smallest_parts_are_the_smallest(num_parts: int):
    for num_ids in range(1, 60):
        every = itertools.product(range(1, num_ids + 1), repeat=num_parts)
        best = min(sum(sizes) for sizes in every if math.prod(sizes) >= num_ids)
        assert sum(smallest_parts(num_ids, num_parts)) == best


def test_a_larger_budget_goes_to_the_first_part():
    assert uneven_parts(6040, 2, 604) == [593, 11]  # 593 x 10 would leave ids without a class
    assert uneven_parts(6040, 2, 3020) == [3017, 3]
    assert uneven_parts(6040, 3, 604) == [597, 4, 3]
    for total in range(sum(smallest_parts(6040, 2)), 6040, 13):
        assert sum(uneven_parts(6040, 2, total)) == total


def test_large_ids_are_exact():
    """Float32 is exact to 2**24 only, and float64 to 2**53: a quotient by float division gives the wrong class."""
    num_ids = 2**60 + 12345
    sizes = smallest_parts(num_ids, 4)
    with torch.device("meta"):
        tables = make_tables({"huge": "x".join(map(str, sizes))}, "sum", 1, {"huge": num_ids})
    values = [0, 2**24 + 1, 2**53 + 1, 2**60 + 12344, 123456789012345678]
    for part in range(4):
        found = tables._class_of(part, torch.tensor(values), 0)
        assert found.tolist() == [classes_of(value, num_ids, sizes)[part] for value in values]


@pytest.mark.parametrize("num_ids", [1, 2, 3, 50, 97, 1024, 6040])
def test_shuffling_is_a_bijection(num_ids: int):
    for seed in (0, -1, hash_seed(0, "user", "shuffle"), 2**63 - 1):
        factor, shift, size = permutation(seed, num_ids)
        assert sorted((value * factor + shift) % size for value in range(num_ids)) == list(range(num_ids))


@pytest.mark.parametrize("num_ids", [10**9, 10**10, 2**62])
def test_shuffling_does_not_overflow(num_ids: int):
    factor, shift, _ = permutation(hash_seed(0, "user", "shuffle"), num_ids)
    assert math.gcd(factor, num_ids) == 1
    assert factor >= 1
    assert (num_ids - 1) * factor + shift < 2**63


def test_shuffling_separates_neighbours():
    shared = {}
    for shuffle in (False, True):
        tables = make_tables({"user": "600x10"}, "sum", sizes={"user": 6000}, shuffle=shuffle)
        groups = tables._class_of(1, tables._permuted(torch.arange(100), 0), 0)
        shared[shuffle] = groups.bincount().max().item()
    assert shared == {False: 100, True: pytest.approx(10, abs=6)}


# ---- compositions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "combine"), COMBINES)
def test_initial_vectors_have_the_plain_tables_spread(parts: int, combine: str):
    """The reference code's uniform factors in [0, 1] suit products, and make sums start about 100 times too large."""
    tables = make_tables({"user": "x".join(["600", "40", "30"][:parts])}, combine, 12, {"user": 6000}, init_std=0.02)
    vectors = tables.materialize().detach()
    assert vectors.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(vectors.mean().item()) < 0.002
    assert len(torch.unique(vectors, dim=0)) == 6000


def test_bags_compose_first_and_pool_second():
    """The reference code pools each part by itself; then a product of sums takes the place of a sum of products."""
    tables = make_tables(2, init_std=1.0)
    bags = torch.tensor([[3, 250, 17], [44, 44, 299]])
    expected = [sum(reference(tables, "user", int(value)) for value in bag) for bag in bags]
    torch.testing.assert_close(tables.bag(bags, table="user"), torch.stack(expected))


@pytest.mark.parametrize("combine", ["product", "sum"])
def test_whole_tables_pass_no_gradient_to_rows_of_others(combine: str):
    tables = make_tables(2, combine)
    tables(torch.tensor([[7, 2, 11]]))[0, 1].sum().backward()
    assert tables.store(0).weight.grad.nonzero()[:, 0].unique().tolist() == [42]  # flag's last row, behind user's 40
    assert not tables.store(1).weight.grad.any()


@pytest.mark.parametrize("combine", ["product", "sum"])
def test_every_part_learns(combine: str):
    tables = make_tables(2, combine, init_std=1.0)
    tables(torch.tensor([[7, 2, 11]])).sum().backward()
    assert all(tables.store(part).weight.grad.abs().sum() > 0 for part in range(2))


# ---- fit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "combine"), COMBINES)
def test_what_can_be_composed_is_fitted_exactly(parts: int, combine: str):
    made, fitted = make_tables(parts, combine, init_std=1.0), make_tables(parts, combine, seed=9)
    weights = {name: made.materialize(name).detach() for name in SIZES}
    counts = {name: torch.randint(1, 9, (size,)) for name, size in SIZES.items()}
    fitted.load_dense_(weights, counts)
    for name, weight in weights.items():
        torch.testing.assert_close(fitted.materialize(name), weight, atol=0.02, rtol=0.02)


def test_fit_of_a_sum_is_least_squares():
    tables, weight = make_tables({"user": "40x8"}, "sum", 4, {"user": 300}), torch.randn(300, 4) + 1
    count = torch.randint(1, 50, (300,)).float()
    tables.load_dense_({"user": weight}, {"user": count})
    design = torch.zeros(300, 48, dtype=torch.float64)
    for value in range(300):
        first, second = classes_of(value, 300, [40, 8])
        design[value, first] = design[value, 40 + second] = 1
    scale = count.double().sqrt()[:, None]
    best = torch.linalg.lstsq(design * scale, weight.double() * scale, driver="gelsd").solution
    least = float(((design @ best - weight) * scale).square().sum())
    error = float(((tables.materialize().detach() - weight) * scale).square().sum())
    assert least * (1 - 1e-5) <= error < 1.01 * least


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["50%", "10%", "5%"])
@pytest.mark.parametrize(("parts", "combine"), COMBINES)
def test_budgets_of_movielens_are_used_up(parts: int, combine: str, share: str):
    specs = [TableSpec(name, size, 30) for name, size in MOVIELENS.items()]
    made = plan(specs, CompositionalConfig(num_parts=parts, combine=combine), share)
    assert 0.98 * made.budget_bytes < made.report.serve_bytes <= made.budget_bytes
    assert made.config.parts["gender"] == "2"
    rows = {name: sum(map(int, text.split("x"))) for name, text in made.config.parts.items()}
    assert rows["user"] / 6040 == pytest.approx(rows["movie"] / 3706, rel=0.1)


def test_every_table_reaches_its_own_smallest_size():
    """One divisor for all tables, as the benchmark of these methods has it, stops at 0.138 % of Criteo."""
    sizes = [10131227, 8351593, 7046547, 5461306, 2202608, 286181, 142572, 93145, 12517, 5683, 5652, 3194, 2173, 1460]
    specs = [TableSpec(str(index), size, 16) for index, size in enumerate(sizes)]
    minimum = sum(math.ceil(2 * math.sqrt(size)) for size in sizes)
    assert plan(specs, "compositional", f"{minimum * 64}B").report.serve_bytes == minimum * 64
    assert minimum < 0.0009 * sum(sizes)


def test_tables_that_parts_would_not_shrink_are_whole():
    specs = [TableSpec("user", 5000, 4), TableSpec("four", 4, 4), TableSpec("five", 5, 4), TableSpec("seven", 7, 4)]
    parts = plan(specs, CompositionalConfig(exempt_share=0.0), "4%").config.parts
    assert (parts["four"], parts["five"]) == ("4", "5")
    assert parts["seven"] == "4x2"  # 6 rows for 7 ids
    report = plan(specs, CompositionalConfig(exempt_share=0.0), "4%").report
    assert report.by_table()["seven"] == 6 * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_parts": 1}, "at least 2"),
        ({"combine": "sums"}, "did you mean 'sum'"),
        ({"parts": {"user": "40x8"}}, "no entry for tables flag, item"),
        ({"parts": PARTS[2] | {"user": "40x7"}}, r"\{'user': '40x7'\}\): write 2 sizes such as '18x17'"),
        ({"parts": PARTS[2] | {"user": "40"}}, "at least 300, or '300' to keep the table whole"),
        ({"parts": PARTS[2] | {"user": "301x2"}}, "each at most 300"),
        ({"parts": PARTS[2] | {"user": "40*8"}}, "write 2 sizes such as"),
        ({"parts": PARTS[3]}, "write 2 sizes such as"),
        ({"parts": PARTS[3], "num_parts": 4, "combine": "concat"}, "write 4 sizes such as"),
        ({}, r"rows\) open: give budget="),
    ],
)
def test_wrong_configs_are_refused(options: dict, message: str):
    specs = [TableSpec(name, size, 6) for name, size in SIZES.items()]
    with pytest.raises(ConfigError, match=message):
        build_tables(specs, make_config("compositional", **options))


def test_a_concatenation_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"num_parts=2, combine='concat'\): must divide the dimension 5: \[5\]"):
        make_tables(2, "concat", dim=5)
