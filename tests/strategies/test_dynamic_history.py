"""What ``dynamic`` remembers of ids without a slot, and what it forgets where there is no room."""

import pytest
import torch

from embcomp import DynamicConfig, TableSpec, build_tables
from embcomp.config import config_from_dict, config_to_dict
from embcomp.strategies._dynamic_history import History, Lookups
from embcomp.strategies._dynamic_policy import POLICIES, Policy
from tests.strategies.dynamic_tables import make_tables


def test_a_history_that_is_full_keeps_the_best_of_each_table():
    history = History([2, 1])  # six entries

    def add(step, *pairs):
        table, ids = torch.tensor(pairs).T
        ones = torch.ones_like(ids)
        history.add_(
            Lookups(table, ids, ones, ones * step).merged(), lambda every: every.counts.argsort(descending=True)
        )

    add(1, (0, 1), (0, 1), (0, 2), (0, 3), (1, 1), (1, 9))
    add(2, (0, 3))
    assert int(history.filled) == 6
    add(3, (0, 4), (0, 3), (1, 9))  # merged: 1 twice, 2 once, 3 three times, 4 once; 1 once, 9 twice
    assert int(history.filled) == 3
    found = history.take_()
    assert [values.tolist() for values in found] == [[0, 0, 1], [1, 3, 9], [2, 3, 2], [1, 3, 3]]
    assert not len(history.take_().ids)


@pytest.mark.parametrize("value", [2**61, -(2**62) - 1])
@pytest.mark.parametrize("policy", POLICIES)
def test_bug_an_id_that_comes_again_and_again_among_many_that_come_once_gets_a_slot(policy, value):
    """There was room for one id per slot, and of equal scores small ids stayed: large ones never got a slot."""
    tables = make_tables({"user": 10}, interval=100, policy=policy, admission="count", min_count=5)
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        ids = torch.randint(-(2**62), 2**62, (100,), generator=generator)
        ids[0] = value if step % 8 == 0 else ids[0]
        tables.note_(ids, "user")
        tables.step_()
    assert value in tables.residents_of("user")


@pytest.mark.parametrize("policy", POLICIES)
def test_bug_a_history_that_is_full_forgets_large_ids_no_more_than_small_ones(policy, caplog):
    tables = make_tables({"user": 500}, interval=100, policy=policy, history=1.0, min_history=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(99):
        tables.note_(torch.randint(-(2**62), 2**62, (200,), generator=generator), "user")
        tables.step_()
    known = tables.residents.history.copied().ids
    assert 500 <= len(known) <= 1000
    assert 0.4 < (known > 0).double().mean() < 0.6
    assert caplog.text.count("raise history=") == 1


def test_chance_in_a_full_history_is_another_in_every_interval():
    policy, ids = Policy(DynamicConfig(interval=10)), torch.arange(1000)
    lookups = Lookups(ids * 0, ids, torch.ones_like(ids), ids * 0 + 3)
    first, same, other = (policy.keeping(lookups, torch.tensor([7]), torch.tensor(now)) for now in (11, 19, 20))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert 300 < first[:500].double().mean() < 700
    more = lookups._replace(counts=torch.where(ids == 999, 2, 1))
    assert policy.keeping(more, torch.tensor([7]), torch.tensor(11))[0] == 999


def test_configs_of_the_first_version_have_the_room_that_they_had():
    raw = {**config_to_dict(DynamicConfig(num_slots={"user": 10}, num_fallback={"user": 2})), "version": 1}
    del raw["min_history"]
    config = config_from_dict(raw)
    assert config.min_history == 1
    assert build_tables([TableSpec("user", 100, 4)], config).residents.history._room.tolist() == [10]


@pytest.mark.parametrize("rows", ["float32", "int8", "int8:column", "int4:table", "int8:column:after"])
def test_bug_bags_count_each_lookup_once(rows):
    """Where scales are not of rows, bags counted twice: ids were admitted that had come once."""
    tables = make_tables({"user": 10}, interval=1, admission="count", min_count=2, rows=rows)
    tables.bag(torch.tensor([7, 8, 9, 8]), torch.tensor([0, 3]), "user").sum().backward()
    tables.step_()
    assert tables.residents_of("user").tolist() == [8]
