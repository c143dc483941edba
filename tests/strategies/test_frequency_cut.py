"""The mathematics of ``frequency_cut``: which ids are kept, where the tail goes, what the remap says and costs."""

import pytest
import torch

from embcomp import ConfigError, FrequencyCutConfig, Knowledge, TableSpec, build_tables, make_config, plan
from embcomp.hashing import hash_seed, hash_to_range
from embcomp.storage.bitmap import build_bitmap, look_up_bitmap, popcount
from embcomp.strategies._frequency_sizes import kept_by_count

MOVIELENS = {"user": 6040, "gender": 2, "movie": 3706, "occupation": 21, "zip": 3439}


def make_specs(sizes=None, dim=4):
    return [TableSpec(name, size, dim) for name, size in (sizes or {"user": 300, "flag": 3}).items()]


def falling(size, most=1000):
    """Counts of ids that are numbered by falling frequency, with ties."""
    return most // torch.arange(1, size + 1)


def shuffled(size, most=1000):
    return falling(size, most)[torch.randperm(size, generator=torch.Generator().manual_seed(size))]


def make_tables(kept, sizes=None, counts=None, **options):
    return plan(make_specs(sizes), FrequencyCutConfig(num_kept=kept, **options), counts=counts).build()


def most_frequent(counts, number):
    """Kept ids in the order of ids: by count, then by id."""
    ranked = sorted(range(len(counts)), key=lambda value: (-int(counts[value]), value))
    return sorted(ranked[:number])


# ---- lookups ---------------------------------------------------------------------------------------------------------


def test_ordered_ids_need_no_remap():
    counts = {"user": falling(300), "flag": falling(3)}
    tables = make_tables({"user": 20, "flag": 3}, counts=counts)
    rows = tables.rows.weight
    assert tables.config.remapped == {"user": False, "flag": False}
    assert torch.equal(tables(torch.arange(300), "user"), rows[torch.arange(300).clamp(max=20)])
    assert torch.equal(tables(torch.arange(3), "flag"), rows[21:])
    assert list(tables.state_dict()) == ["rows.weight"]


@pytest.mark.parametrize("tail", ["oov_row", "hash", "zero"])
def test_unordered_ids_are_remapped(tail: str):
    counts = {"user": shuffled(300), "flag": falling(3)}
    tables = make_tables({"user": 50, "flag": 2}, counts=counts, tail=tail, num_tail=None)
    rows, kept = tables.rows.weight.detach(), most_frequent(counts["user"], 50)
    tail_rows = tables.config.num_tail["user"]
    assert tail_rows == {"oov_row": 1, "hash": 6, "zero": 0}[tail]
    assert tables.config.remapped == {"user": True, "flag": False}
    for value in range(300):
        got = tables(torch.tensor([value, value % 3]))
        if value in kept:
            expected = rows[kept.index(value)]
        elif tail == "zero":
            expected = torch.zeros(4)
        else:
            expected = rows[50 + int(hash_to_range(torch.tensor(value), hash_seed(0, "user", "tail"), tail_rows))]
        assert torch.equal(got[0], expected)
        assert tail == "zero" or torch.equal(got[1], rows[50 + tail_rows + min(value % 3, 2)])


def test_two_remapped_tables_share_the_words_of_one_remap():
    sizes = {"user": 300, "item": 130, "flag": 3}
    counts = {name: shuffled(size) for name, size in sizes.items()}
    counts["flag"] = torch.tensor([1, 5, 3])
    tables = make_tables({"user": 150, "item": 64, "flag": 1}, sizes, counts)
    first = 0
    for name, number in (("user", 150), ("item", 64), ("flag", 1)):
        kept = most_frequent(counts[name], number)
        expected = tables.rows.weight[first : first + number]
        assert torch.equal(tables(torch.tensor(kept), name), expected)
        others = torch.tensor([value for value in range(sizes[name]) if value not in kept])
        assert torch.equal(tables(others, name), tables.rows.weight[first + number].expand(len(others), -1))
        first += number + 1


def test_ids_that_are_not_in_training_join_the_tail():
    """Ids of the validation split that training never saw have a count of zero, and must not meet a kept id's row."""
    counts = torch.tensor([0, 7, 0, 9, 0, 8])
    tables = make_tables({"user": 2}, {"user": 6}, {"user": counts})
    got = tables(torch.arange(6))
    assert torch.equal(got[[3, 5]], tables.rows.weight[:2])
    assert torch.equal(got[[0, 1, 2, 4]], tables.rows.weight[[2, 2, 2, 2]])


@pytest.mark.parametrize("tail", ["oov_row", "hash", "zero"])
def test_the_oov_id_is_trained_whatever_the_tail(tail: str):
    tables = make_tables({"user": 20, "flag": 3}, tail=tail, unseen="oov_row")
    tables(torch.tensor([[10**9, 0], [-5, 1]]))[:, 0].sum().backward()
    assert tables.rows.weight.grad[20:].sum() == 8


def test_a_table_may_keep_nothing():
    tables = make_tables({"user": 0, "flag": 3})
    assert torch.equal(tables(torch.tensor([[0, 1], [299, 2]]))[:, 0], tables.rows.weight[[0, 0]])
    tables = make_tables({"user": 0, "flag": 3}, tail="zero")
    assert not tables(torch.tensor([[0, 1], [299, 2]]))[:, 0].any()


# ---- the remap -------------------------------------------------------------------------------------------------------


def test_popcount_counts():
    values = torch.tensor([0, 1, 2**62, 2**63 - 1, 0b1011, *(2**bit - 1 for bit in range(63))])
    assert popcount(values).tolist() == [bin(value).count("1") for value in values.tolist()]


@pytest.mark.parametrize("kept", [[0], [63], [64], [0, 63, 64, 127], list(range(200)), list(range(1, 200, 3))])
def test_remap_counts_kept_ids(kept: list[int]):
    bits, ranks = build_bitmap(torch.tensor(kept), 200)
    ids = torch.arange(200)
    found, rank = look_up_bitmap(bits, ranks, ids, ids >> 6)
    assert ids[found].tolist() == kept
    assert rank[found].tolist() == list(range(len(kept)))


def test_remap_bytes_are_counted_and_saved():
    """The benchmark of these methods leaves 4 bytes per id out of its adaptive embedding's budget."""
    specs, counts = [TableSpec("user", 64000, 16)], {"user": shuffled(64000, 10**6)}
    made = plan(specs, "frequency_cut", "10%", counts)
    parts = [(part.name, part.serve_bytes) for part in made.report.parts]
    assert sum(size for name, size in parts if name == "remap") == 12 * 1000
    assert dict(parts)["rows"] == 64 * (made.config.num_kept["user"] + 1)
    assert made.budget_bytes - 64 < made.report.serve_bytes <= made.budget_bytes
    state = made.build().state_dict()
    assert sum(tensor.nbytes for tensor in state.values()) == made.report.serve_bytes
    again = build_tables(specs, made.config)  # without counts: the state says it all
    assert torch.equal(again(torch.arange(9)), again.rows.weight[[made.config.num_kept["user"]] * 9])
    again.load_state_dict(state)
    assert torch.equal(again.materialize(), made.build().materialize())


# ---- sizes -----------------------------------------------------------------------------------------------------------


def known_of(**counts):
    return Knowledge.of([TableSpec(name, len(count), 2) for name, count in counts.items()], counts)


def test_rows_go_to_the_most_frequent_ids_of_all_tables():
    known = known_of(a=torch.tensor([90, 50, 10, 1]), b=torch.tensor([60, 55, 5, 4]))
    free = {"a": 0, "b": 0}
    assert kept_by_count(known, free, 1) == {"a": 1, "b": 0}
    assert kept_by_count(known, free, 4) == {"a": 2, "b": 2}
    assert kept_by_count(known, free, 7) == {"a": 3, "b": 4}
    assert kept_by_count(known, free, 99) == {"a": 4, "b": 4}


def test_ties_are_broken_so_that_the_budget_is_used_up():
    known = known_of(a=torch.full((10,), 3), b=torch.tensor([3.0, 3.0, 2.5, 0.0]))
    for total in range(15):
        kept = kept_by_count(known, {"a": 0, "b": 0}, total)
        assert sum(kept.values()) == min(total, 14)
    assert kept_by_count(known, {"a": 0, "b": 0}, 11) == {"a": 10, "b": 1}
    tables = make_tables({"user": 2}, {"user": 4}, {"user": torch.tensor([1, 5, 5, 5])})
    assert torch.equal(tables(torch.tensor([1, 2])), tables.rows.weight[:2])  # of equals, the smaller ids
    assert torch.equal(tables(torch.tensor([0, 3])), tables.rows.weight[[2, 2]])


def test_a_remap_must_be_worth_its_bytes():
    known = known_of(a=torch.tensor([100, 99, 98, 97]), b=torch.tensor([90, 80, 70, 60]))
    assert kept_by_count(known, {"a": 3, "b": 0}, 4) == {"a": 0, "b": 4}
    assert kept_by_count(known, {"a": 3, "b": 0}, 8) == {"a": 1, "b": 4}
    assert kept_by_count(known, {"a": 1, "b": 0}, 7) == {"a": 4, "b": 2}
    assert kept_by_count(known, {"a": 20, "b": 0}, 8) == {"a": 0, "b": 4}


@pytest.mark.parametrize("share", ["50%", "10%", "1%"])
@pytest.mark.parametrize("tail", ["oov_row", "hash", "zero"])
@pytest.mark.parametrize("known", ["nothing", "ordered", "unordered"])
def test_budgets_of_movielens_are_used_up(known: str, tail: str, share: str):
    make = {"ordered": falling, "unordered": shuffled}.get(known)
    counts = {name: make(size, 10**5) for name, size in MOVIELENS.items()} if make else None
    made = plan(make_specs(MOVIELENS, 30), make_config("frequency_cut", tail=tail), share, counts)
    assert 0.98 * made.budget_bytes < made.report.serve_bytes <= made.budget_bytes
    assert made.config.num_kept["gender"] == 2
    if make and share != "1%":
        assert made.config.num_kept["occupation"] == 21
    assert any(made.config.remapped.values()) == (known == "unordered")
    if tail == "hash":
        cut = [name for name, size in MOVIELENS.items() if made.config.num_kept[name] < size]
        tails = sum(made.config.num_tail[name] for name in cut)
        assert tails / sum(made.config.num_kept[name] + made.config.num_tail[name] for name in cut) < 0.15


def test_a_budget_for_everything_keeps_everything():
    counts = {"user": shuffled(300), "flag": shuffled(3)}
    made = plan(make_specs(), "frequency_cut", "100%", counts)
    assert made.config.num_kept == {"user": 300, "flag": 3}
    assert made.config.remapped == {"user": False, "flag": False}


# ---- fit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["oov_row", "hash", "zero"])
@pytest.mark.parametrize("counting", [falling, shuffled])
def test_fit_copies_kept_rows_and_averages_the_tail(counting, tail: str):
    counts = {"user": counting(300), "flag": falling(3)}
    tables = make_tables({"user": 40, "flag": 3}, counts=counts, tail=tail)
    weights = {"user": torch.randn(300, 4), "flag": torch.randn(3, 4)}
    tables.load_dense_(weights, counts)
    got, kept = tables.materialize("user").detach(), most_frequent(counts["user"], 40)
    assert torch.equal(got[kept], weights["user"][kept])
    assert torch.equal(tables.materialize("flag"), weights["flag"])
    others = torch.tensor([value for value in range(300) if value not in kept])
    if tail == "zero":
        assert not got[others].any()
        return
    slots = hash_to_range(others, hash_seed(0, "user", "tail"), tables.config.num_tail["user"])
    for slot in slots.unique():
        mine = others[slots == slot]
        weight = counts["user"][mine].float().clamp_min(1e-3 * counts["user"].float().mean())
        mean = (weights["user"][mine] * weight[:, None]).sum(0) / weight.sum()
        torch.testing.assert_close(got[mine], mean.expand(len(mine), -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tail": "hashed"}, "did you mean 'hash'"),
        ({"tail_share": 0.0}, "above 0 and below 1"),
        ({"num_kept": {"user": 20}}, "no entry for tables flag"),
        ({"num_kept": {"user": 301, "flag": 3}}, r"\{'user': 301\}\): must be in \[0, 300\]"),
        ({"num_kept": {"user": 20, "flag": 3}, "num_tail": {"user": 2, "flag": 0}}, "tail='oov_row' and 20 of 300"),
        ({"num_kept": {"user": 20, "flag": 3}, "remapped": {"user": False, "flag": True}}, "keeps 3 ids, which needs"),
        ({"num_kept": {"user": 0, "flag": 0}, "tail": "zero"}, "keep at least one id"),
        ({}, r"rows\) open: give budget="),
    ],
)
def test_wrong_configs_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        build_tables(make_specs(), make_config("frequency_cut", **options))
