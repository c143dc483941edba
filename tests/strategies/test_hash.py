"""The mathematics of ``hash``: collisions, combinations, exemptions, importance weights and least squares."""

import math

import pytest
import torch

from embcomp import ConfigError, HashConfig, TableSpec, build_tables, make_config, plan
from embcomp.hashing import MAX_RANGE, hash_seed, hash_to_range
from embcomp.strategies._allocation import allocate_rows

MOVIELENS = {"user": 6040, "gender": 2, "movie": 3706, "occupation": 21, "zip": 3439}
COMBINES = [(1, "sum"), (2, "sum"), (3, "mean"), (2, "concat"), (2, "weighted")]


def make_specs(sizes=None, dim=6, **options):
    return [TableSpec(name, size, dim, **options) for name, size in (sizes or {"user": 300, "flag": 3}).items()]


def make_tables(sizes=None, rows=None, dim=6, **options):
    return build_tables(make_specs(sizes, dim), HashConfig(num_rows=rows or {"user": 40, "flag": 3}, **options))


def slot(name, number, value, size, seed=0):
    return int(hash_to_range(torch.tensor(value), hash_seed(seed, name, number), size))


def reference(tables, name, value):
    """One vector, row by row, from the docstrings; rows of exempt tables stand for themselves."""
    config, index = tables.config, tables.names.index(name)
    rows, size, hashes = tables.rows.weight.detach(), config.num_rows[name], config.num_hashes
    first = sum(config.num_rows[other] for other in tables.names[:index])
    exempt = size == tables.num_ids[index]
    slots = [value if exempt else slot(name, number, value, size) for number in range(hashes)]
    if config.combine == "concat":
        return torch.cat([rows[hashes * first + j * size + where] for j, where in enumerate(slots)])
    found = [rows[first + where] for where in slots]
    if exempt:
        return found[0]
    if config.combine == "weighted":
        buckets = min(tables.num_ids[index], config.buckets_per_row * size)
        hashed = int(hash_to_range(torch.tensor(value), hash_seed(0, name, "importance"), buckets))
        bucket = value if buckets == tables.num_ids[index] else hashed
        start = sum(tables.importance.segments[:index])
        return sum(w * row for w, row in zip(tables.importance.weight.detach()[start + bucket], found, strict=True))
    return sum(found) / (hashes if config.combine == "mean" else 1)


@pytest.mark.parametrize(("hashes", "combine"), COMBINES)
def test_lookup_is_the_reference(hashes: int, combine: str):
    sizes = {"user": 300, "flag": 3, "item": 50}
    tables = make_tables(sizes, {"user": 40, "flag": 3, "item": 20}, num_hashes=hashes, combine=combine)
    if combine == "weighted":
        torch.nn.init.normal_(tables.importance.weight, 1.0, 0.3)
        assert tables.importance.segments == (160, 0, 50)  # hashed, none, one per id
    ids = torch.tensor([[0, 0, 0], [299, 2, 49], [17, 1, 30]])
    expected = [[reference(tables, n, int(v)) for n, v in zip(sizes, row, strict=True)] for row in ids]
    torch.testing.assert_close(tables(ids), torch.stack([torch.stack(row) for row in expected]))


@pytest.mark.parametrize(("hashes", "combine"), COMBINES)
def test_exempt_tables_are_exact_and_train_like_plain_rows(hashes: int, combine: str):
    tables = make_tables(num_hashes=hashes, combine=combine)
    weights = {"user": torch.randn(300, 6), "flag": torch.randn(3, 6)}
    tables.load_dense_(weights)
    torch.testing.assert_close(tables.materialize("flag"), weights["flag"])
    tables(torch.tensor([[5, 2]]))[0, 1].sum().backward()
    rows = 3 * hashes if combine == "concat" else 3
    gradient = tables.rows.weight.grad[-rows:]
    assert gradient.sum() == pytest.approx(6.0)  # one per dimension, however many hash functions
    assert gradient.abs().sum() == pytest.approx(6.0)


def test_all_tables_exempt_is_the_full_table_in_one_gather():
    specs = make_specs()
    tables = build_tables(specs, HashConfig(num_hashes=2, combine="weighted", num_rows={"user": 300, "flag": 3}))
    assert tables.memory().serve_bytes == sum(spec.full_bytes for spec in specs)
    ids = torch.tensor([[299, 0]])
    assert torch.equal(tables(ids)[0], torch.stack([tables.rows.weight[299], tables.rows.weight[300]]))


def test_raw_64_bit_ids_need_no_vocabulary():
    tables = make_tables(unseen="hash")
    raw = torch.tensor([2**62 + 7, -(2**63), -1, 10**15])
    rows = torch.tensor([slot("user", 0, value, 40) for value in raw.tolist()])
    assert torch.equal(tables(raw, "user"), tables.rows.weight[rows])
    exact = torch.tensor([40 + slot("flag", 0, value, 3) for value in raw.tolist()])
    assert torch.equal(tables(raw, "flag"), tables.rows.weight[exact])
    assert torch.equal(tables(torch.tensor([0, 1, 2]), "flag"), tables.rows.weight[40:])


def test_two_hash_functions_tell_more_ids_apart():
    """With V ids in R rows, about V - R (1 - e^(-V/R)) ids have no row of their own; two rows are almost unique."""
    ids, rows = 2000, 500
    for hashes, expected in ((1, rows * (1 - math.exp(-ids / rows))), (2, ids - ids * ids / rows**2)):
        tables = make_tables({"user": ids}, {"user": rows}, num_hashes=hashes)
        vectors = len(torch.unique(tables.materialize().detach(), dim=0))
        assert vectors == pytest.approx(expected, rel=0.02)


def test_another_table_reshuffles_nobody():
    alone, beside = make_tables({"user": 300}, {"user": 40}), make_tables({"a": 9, "user": 300}, {"a": 5, "user": 40})
    same = [t.materialize("user")[:, None].eq(t.materialize("user")).all(-1) for t in (alone, beside)]
    assert torch.equal(*same)


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize(("hashes", "combine"), COMBINES)
def test_initial_spread_is_exact_even_where_hash_functions_agree(hashes: int, combine: str, rows: int):
    names = {f"t{index}": 50 for index in range(100)}
    tables = make_tables(names, dict.fromkeys(names, rows), dim=12, num_hashes=hashes, combine=combine)
    assert tables(torch.randint(50, (200, 100))).std().item() == pytest.approx(0.01, rel=0.06)


# ---- fit -------------------------------------------------------------------------------------------------------------


def errors_of(tables, weight, count):
    return float(((tables.materialize("user").detach() - weight).square().sum(1) * count).sum())


def test_fit_of_one_hash_is_the_weighted_mean_of_the_ids_that_meet():
    tables, weight, count = make_tables(), torch.randn(300, 6), torch.randint(1, 50, (300,)).float()
    tables.load_dense_({"user": weight, "flag": torch.zeros(3, 6)}, {"user": count})
    slots = torch.tensor([slot("user", 0, value, 40) for value in range(300)])
    for row in range(40):
        mine = slots == row
        mean = (weight[mine] * count[mine, None]).sum(0) / count[mine].sum()
        torch.testing.assert_close(tables.rows.weight[row], mean)


def test_fit_of_a_sum_is_least_squares():
    tables, weight = make_tables(num_hashes=2), torch.randn(300, 6) + 1
    count = torch.randint(1, 50, (300,)).float()
    tables.load_dense_({"user": weight, "flag": torch.zeros(3, 6)}, {"user": count})
    design = torch.zeros(300, 40, dtype=torch.float64)
    for value in range(300):
        for number in range(2):
            design[value, slot("user", number, value, 40)] += 1
    scale = count.double().sqrt()[:, None]
    best = torch.linalg.lstsq(design * scale, weight.double() * scale, driver="gelsd").solution
    least = float(((design @ best - weight) * scale).square().sum())
    assert least * (1 - 1e-5) <= errors_of(tables, weight, count) < 1.02 * least


def test_fit_of_importance_weights_beats_the_plain_sum_of_as_many_rows():
    weight, errors = torch.randn(300, 6), {}
    for combine in ("sum", "weighted"):
        tables = make_tables(num_hashes=2, combine=combine)
        tables.load_dense_({"user": weight, "flag": torch.zeros(3, 6)})
        errors[combine] = errors_of(tables, weight, torch.ones(300))
    assert errors["weighted"] < 0.95 * errors["sum"]


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_rows_are_shared_out():
    assert allocate_rows(100, [1000, 500, 500]) == [50, 25, 25]
    assert allocate_rows(150, [10000, 100], power=0.5) == [137, 13]  # of 136.4 and 13.6 the larger gets the odd one
    assert allocate_rows(100, [1000, 500, 500], power=0.0) == [34, 33, 33]
    assert allocate_rows(100, [1000, 4], exempt_share=0.05) == [96, 4]
    assert allocate_rows(100, [1000, 6], exempt_share=0.05) == [99, 1]
    assert allocate_rows(1504, [1000, 500, 4]) == [1000, 500, 4]
    assert allocate_rows(3, [1000, 500, 4], exempt_share=0.9) == [1, 1, 1]
    sizes, before = [6040, 2, 3706, 21, 3439], [1] * 5
    for total in range(5, sum(sizes) + 1, 7):
        rows = allocate_rows(total, sizes)
        assert sum(rows) == total
        assert all(old <= new <= size for old, new, size in zip(before, rows, sizes, strict=True))
        before = rows


@pytest.mark.parametrize("share", ["50%", "10%", "1%"])
@pytest.mark.parametrize(("hashes", "combine"), COMBINES)
def test_budgets_of_movielens_are_used_up(hashes: int, combine: str, share: str):
    specs = make_specs(MOVIELENS, dim=30)
    made = plan(specs, HashConfig(num_hashes=hashes, combine=combine), share)
    rows = made.config.num_rows
    assert 0.98 * made.budget_bytes < made.report.serve_bytes <= made.budget_bytes
    assert rows["gender"] == 2  # 2 rows are no share of the budget, and merging them would lose a whole feature
    assert rows["user"] / 6040 == pytest.approx(rows["movie"] / 3706, rel=0.1)


def test_importance_weights_are_paid_from_the_same_budget():
    made = plan([TableSpec("user", 10000, 16)], HashConfig(num_hashes=2, combine="weighted"), "10%")
    parts = {part.name: part.serve_bytes for part in made.report.parts}
    rows = made.config.num_rows["user"]
    assert rows == 10000 * 16 // 10 // (16 + 4 * 2)
    assert parts == {"rows": rows * 64, "importance": 4 * rows * 8}


def test_more_rows_than_hash_bits_are_refused_by_name():
    specs = [TableSpec("huge", 5 * 10**9, 1)]
    assert plan(specs, "hash", "90%").config.num_rows == {"huge": MAX_RANGE}
    with torch.device("meta"), pytest.raises(ConfigError, match=r"'huge': hashing into 2147483648 rows"):
        build_tables(specs, HashConfig(num_rows={"huge": MAX_RANGE + 1}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "concatenate"}, "did you mean 'concat'"),
        ({"num_hashes": 0}, "at least 1"),
        ({"exempt_share": 1.0}, r"exempt_share=1.0\): must be in \[0, 1\)"),
        ({"num_rows": {"user": 40}}, "no entry for tables flag"),
        ({"num_rows": {"user": 40, "flag": 3, "flags": 1}}, "'flags', which does not exist; did you mean 'flag'"),
        ({"num_rows": {"user": 40, "flag": 4}}, r"\{'flag': 4\}\): must be in \[1, 3\]"),
        ({"num_rows": {"user": 40, "flag": 3}, "num_hashes": 4, "combine": "concat"}, r"dimension 6: \[1, 2, 3, 6\]"),
        ({}, r"rows\) open: give budget="),
    ],
)
def test_wrong_configs_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        build_tables(make_specs(), make_config("hash", **options))
