"""The mathematics of ``dynamic``: who gets a slot, what becomes of rows and their optimizer state, sizes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import embcomp
from embcomp import ConfigError, DynamicConfig, InputError, TableSpec, build_tables, plan
from embcomp.scoring import TableScorer, cross_entropy, sampled_cross_entropy
from embcomp.strategies._dynamic_map import EMPTY, IdMap
from embcomp.training import Phases, RowwiseAdagrad, reset_rows_
from tests.optimizers import Wrapping
from tests.strategies.dynamic_reference import Reference
from tests.strategies.dynamic_tables import SLOTS, make_tables, slots_of, stream, train

POLICIES = ("lfu", "lru", "distance_lfu", "ttl")
ADMISSIONS = ("always", "count", "probability")


# ---- who gets a slot -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("admission", ADMISSIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_residents_are_those_of_the_reference_slot_for_slot(policy, admission):
    tables = make_tables(policy=policy, admission=admission, ttl=5, admit_probability=0.4, decay=0.7, history=20.0)
    references = [Reference(name, slots, tables.config) for name, slots in SLOTS.items()]
    changes = 0
    for ids in stream(80):
        before = tables.residents_of("user").tolist()
        train(tables, ids)
        for column, reference in enumerate(references):
            reference.step(ids[:, column].tolist())
            assert slots_of(tables, column) == reference.residents
        changes += bool(before) and before != tables.residents_of("user").tolist()
    assert changes >= 3


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 12), max_size=8), min_size=1, max_size=12),
    st.sampled_from(POLICIES),
    st.integers(1, 6),
)
def test_any_ids_and_any_number_of_slots(batches, policy, slots):
    tables = make_tables({"user": slots}, policy=policy, interval=2, ttl=1, history=50.0)
    reference = Reference("user", slots, tables.config)
    for ids in batches:
        train(tables, torch.tensor(ids, dtype=torch.int64)[:, None])
        reference.step(ids)
        assert slots_of(tables, 0) == reference.residents


def test_several_lookups_of_a_step_count_together_whatever_way_the_table_is_given():
    ids = torch.tensor([[3, 30], [3, 31], [4, 30]])
    whole, parts = make_tables(interval=1), make_tables(interval=1)
    train(whole, ids)
    parts(ids[:, 0], "user").sum().backward()
    parts.bag(ids[:1, 1:], None, "item").sum().backward()
    parts(ids[1:, 1], torch.tensor([1, 1])).sum().backward()
    parts.step_()
    assert [slots_of(parts, table) for table in (0, 1)] == [slots_of(whole, table) for table in (0, 1)]
    assert slots_of(whole, 0)[3][1:] == [2, 1]


def test_only_training_lookups_with_gradients_are_counted():
    tables = make_tables(interval=1)
    ids = torch.tensor([[3, 30]])
    with torch.no_grad():
        tables(ids)
    tables.materialize("user").sum().backward()
    tables.scores("user", torch.ones(1, 4))
    scorer, queries = TableScorer(tables, "user"), torch.ones(1, 4)
    sampled_cross_entropy(scorer, queries, torch.tensor([3]), torch.tensor([5, 7])).backward()
    cross_entropy(scorer, queries, torch.tensor([3])).backward()
    with tables.uncounted():
        tables(ids)
        tables.bag(ids[:, :1], None, "user")
        tables.note_(ids)
    tables.eval()(ids)
    tables.train().step_()
    assert not len(tables.residents_of("user"))
    tables.requires_grad_(False)
    tables(ids)
    tables.step_()
    assert int(tables.residents.clock) == 1  # nor do steps count in which the rows are frozen
    tables.requires_grad_(True)
    train(tables, ids)
    assert tables.residents_of("user").tolist() == [3]


def test_what_is_noted_counts_as_looked_up():
    looked_up, noted = make_tables(interval=1), make_tables(interval=1)
    ids = torch.tensor([[3, 30], [3, 31], [4, 30]])
    train(looked_up, ids)
    noted.note_(ids)
    noted.step_()
    assert [slots_of(noted, table) for table in (0, 1)] == [slots_of(looked_up, table) for table in (0, 1)]
    with pytest.raises(InputError, match="no table 'items'"):
        noted.note_(ids[:, 0], "items")


def test_padding_blank_and_unseen_ids_take_no_slot():
    specs = [TableSpec("user", 50, 4, padding_idx=0)]
    sizes = {"num_slots": {"user": 4}, "num_fallback": {"user": 2}, "interval": 1}
    for unseen in ("zero", "oov_row", "hash"):
        tables = build_tables(specs, DynamicConfig(unseen=unseen, **sizes))
        train(tables, torch.tensor([0, 7, 60, -3]))
        wanted = [-3, 7, 60] if unseen == "hash" else [7]
        assert tables.residents_of("user").tolist() == wanted
    weights = {"user": torch.randn(50, 4)}
    tables.load_dense_(weights, {"user": torch.arange(50, 0, -1)})
    assert tables.residents_of("user").tolist() == [1, 2, 3, 4]


def test_known_counts_give_slots_to_the_most_frequent_ids():
    counts = torch.zeros(100, dtype=torch.long)
    counts[torch.tensor([90, 7, 50])] = torch.tensor([5, 9, 1])
    tables = build_tables([TableSpec("user", 100, 16)], DynamicConfig(num_slots={"user": 2}), counts={"user": counts})
    assert slots_of(tables, 0).keys() == {7, 90}
    assert slots_of(tables, 0)[7][1] == 9
    assert tables.residents_of("user").tolist() == [7, 90]


# ---- the map -------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sets(st.integers(-(2**63), 2**63 - 2), max_size=9), min_size=1, max_size=4), st.integers(0, 3))
def test_lookups_in_the_map_are_exact(members, spare):
    places = IdMap([len(ids) + spare for ids in members])
    if places.total == 0:
        return
    for table, ids in enumerate(members):
        own = torch.tensor(sorted(ids, reverse=True), dtype=torch.int64)
        where = places.starts[table] + torch.arange(len(own))
        places.replace_(where, own, torch.ones_like(own), torch.ones_like(own))
    asked = torch.tensor(sorted({value + d for ids in members for value in ids for d in (0, 1)} | {0, EMPTY}))
    for table, ids in enumerate(members):
        if places.num_slots[table]:
            found, slots = places(asked, table)
            again, same = places(asked, torch.full_like(asked, table))
            assert found.tolist() == again.tolist() == [value in ids for value in asked.tolist()]
            assert torch.equal(slots[found], same[found])
            assert len(set(slots[found].tolist())) == len(ids)


def test_one_id_in_two_tables_has_two_rows():
    tables = make_tables({"user": 3, "item": 3}, interval=1)
    for ids in ([[5, 5]], [[6, 5]]):
        train(tables, torch.tensor(ids))
    assert not torch.equal(*tables(torch.tensor([5, 5]), torch.tensor([0, 1])).detach())
    assert tables.residents_of("item").tolist() == [5]


# ---- rows and optimizer state --------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.1),
    "fused adam": lambda params: torch.optim.Adam(params, lr=0.1, fused=True),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, initial_accumulator_value=0.25),
    "rowwise_adagrad": lambda params: RowwiseAdagrad(params, lr=0.1, initial_accumulator_value=0.25),
    "rprop": lambda params: torch.optim.Rprop(params, lr=0.1),
    "sparse adam": lambda params: torch.optim.SparseAdam(params, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stale_state_does_not_move_a_row_that_went_to_another_id(name):
    rowwise = name in ("rowwise_adagrad", "sparse adam")
    tables = make_tables({"user": 1}, policy="lru", interval=2, sparse=rowwise)
    optimizer = OPTIMIZERS[name](list(tables.parameters()))
    for value in (7, 7, 7, 7, 7):
        train(tables, torch.tensor([[value]]), optimizer)
    state = optimizer.state[tables.rows.weight]
    used = {key: t.clone() for key, t in state.items() if isinstance(t, torch.Tensor) and t.dim()}
    train(tables, torch.tensor([[8]]), optimizer)  # id 8 takes the slot of id 7
    assert tables.residents_of("user").tolist() == [8]
    for key, before in used.items():
        first = {"sum": 0.25, "step_size": 0.1}.get(key, 0.0)
        assert before[0].ne(first).all(), f"{key} was never used"
        assert state[key][0].eq(first).all(), key
        assert state[key][1:].ne(first).any(), f"{key} of other rows is gone too"
    if not rowwise:
        row = tables.rows.weight[0].detach().clone()
        train(tables, torch.tensor([[9]]), optimizer)  # a gradient for fallback rows alone
        assert torch.equal(tables.rows.weight[0], row)


def test_bug_momenta_of_row_sparse_gradients_are_reset_as_dense_ones_are():
    """They are sparse tensors, and a slot that was given away raised a TypeError."""
    runs = []
    for sparse in (False, True):
        torch.manual_seed(0)
        tables = make_tables(policy="lru", interval=2, sparse=sparse)
        optimizer = OPTIMIZERS["momentum"](tables.parameters())
        runs.append((tables, optimizer))
    (dense, one), (sparse, other) = runs
    given_away = 0
    for ids in stream(30):
        before = dense.residents_of("user").tolist()
        train(dense, ids, one)
        train(sparse, ids, other)
        given_away += bool(before) and before != dense.residents_of("user").tolist()
        mine, momentum = (own.state[t.rows.weight]["momentum_buffer"] for t, own in runs)
        assert momentum.is_sparse
        torch.testing.assert_close(momentum.to_dense(), mine)
        torch.testing.assert_close(sparse.rows.weight, dense.rows.weight)
    assert given_away >= 3


def test_bug_state_within_a_wrapped_optimizer_was_not_reset():
    tables = make_tables({"user": 1}, policy="lru", interval=2)
    inner = OPTIMIZERS["momentum"](tables.parameters())
    for value in (7, 7, 7, 8):
        train(tables, torch.tensor([[value]]), Wrapping(inner))
    assert tables.residents_of("user").tolist() == [8]
    momentum = inner.state[tables.rows.weight]["momentum_buffer"]
    assert momentum[0].eq(0).all()
    assert momentum[1:].any()


def test_without_the_reset_stale_momentum_does_move_it():
    tables = make_tables({"user": 1}, policy="lru", interval=2)
    optimizer = OPTIMIZERS["momentum"](tables.parameters())
    for value in (7, 7, 7, 8, 9):
        row = tables.rows.weight[0].detach().clone()
        tables(torch.tensor([[value]])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        tables.step_()
    assert not torch.equal(tables.rows.weight[0], row)
    rows = dict(tables.reassigned_())[tables.rows.weight]
    assert rows.tolist() == [0]
    assert tables.reassigned_() == []


def test_a_new_resident_begins_with_a_drawn_row_or_with_the_row_it_shared():
    drawn = make_tables({"user": 4000}, dim=8, init_std=0.3, interval=1)
    before = drawn.rows.weight.detach().clone()
    train(drawn, torch.arange(2000)[:, None])
    values = drawn(torch.arange(2000)[:, None]).detach()
    assert values.std().item() == pytest.approx(0.3, rel=0.05)
    assert len(values.unique(dim=0).view(-1, 8)) == 2000
    assert len(torch.cat([values.view(-1, 8), before]).unique(dim=0)) == 2000 + 4002  # none of those that were there

    kept = make_tables({"user": 4}, interval=1, start="fallback")
    ids = torch.tensor([[3], [-9]])
    shared = kept(ids).detach()
    train(kept, ids)
    assert kept.residents_of("user").tolist() == [-9, 3]
    assert torch.equal(kept(ids), shared)


@pytest.mark.parametrize("way", ["handle", "groups"])
def test_bug_a_step_without_optimizers_leaves_the_reset_to_whoever_makes_it(way):
    """`handle.step_()` forgot the rows, so that `reset_rows_` after it cleared nothing."""
    model = torch.nn.ModuleDict({"user": torch.nn.Embedding(100, 4)})
    config = DynamicConfig(num_slots={"user": 1}, num_fallback={"user": 1}, unseen="hash", policy="lru", interval=2)
    handle = embcomp.compress_(model, config, verbose=False)
    optimizer, (tables,) = torch.optim.Adam(handle.parameters()), handle.tables
    for value in (7, 7, 7, 8):
        model["user"](torch.tensor([value])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.step_() if way == "handle" else tables.step_()
        reset_rows_([tables], optimizer)
    assert optimizer.state[tables.rows.weight]["exp_avg"][0].eq(0).all()


def test_phases_and_the_handle_reset_what_a_loop_hands_over():
    for way in ("phases", "handle"):
        model = torch.nn.ModuleDict({"user": torch.nn.Embedding(100, 4)})
        config = DynamicConfig(num_slots={"user": 1}, num_fallback={"user": 1}, unseen="hash", policy="lru", interval=2)
        handle = embcomp.compress_(model, config, verbose=False)
        phases, optimizer = Phases(model), torch.optim.Adam(handle.parameters())
        for value in (7, 7, 7, 8):
            model["user"](torch.tensor([value])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            (phases if way == "phases" else handle).step_(optimizer)
        (tables,) = handle.tables
        state = optimizer.state[tables.rows.weight]
        assert state["exp_avg"][0].eq(0).all()
        assert state["exp_avg"][1].ne(0).all()


# ---- sizes and bad input -------------------------------------------------------------------------------------------


def test_a_slot_costs_its_row_and_eight_bytes():
    tables = make_tables({"user": 10}, dim=16, fallback=3)
    assert tables.memory().serve_bytes == 10 * (64 + 8) + 3 * 64
    (history,) = [part for part in tables.memory().parts if part.name == "history"]
    assert history.serve_bytes == 0
    assert history.train_bytes == 16 + 64 * 16_384
    (closed,) = [part for part in make_tables({"user": 10}, unseen="zero").memory().parts if part.name == "history"]
    assert closed.train_bytes == 16 + 64 * 100  # there are no more ids
    few = make_tables({"user": 10}, history=3.0, min_history=20)
    assert few.residents.history._room.tolist() == [30]


def test_open_ids_are_never_taken_for_numbers_below_v():
    specs = [TableSpec("user", 10_000, 16)]
    closed = plan(specs, DynamicConfig(rows="int8:column"), "100%").config
    assert closed.num_slots == {"user": 10_000}
    assert closed.num_fallback == {"user": 0}
    opened = plan(specs, DynamicConfig(rows="int8:column", unseen="hash"), "100%").config
    assert 9_900 <= opened.num_slots["user"] <= 10_000
    assert opened.num_fallback["user"] > 400


def test_small_tables_keep_all_their_ids():
    specs = [TableSpec("user", 10_000, 16), TableSpec("flag", 2, 16), TableSpec("country", 30, 16)]
    config = plan(specs, "dynamic", "10%").config
    assert config.num_fallback["flag"] == config.num_fallback["country"] == 0
    assert config.num_slots["country"] == 30
    assert config.num_fallback["user"] == pytest.approx(0.05 * (config.num_slots["user"] / 0.95), abs=1)


def test_fallback_rows_follow_given_slots_and_slots_given_fallback_rows():
    specs = [TableSpec("user", 10_000, 16)]
    assert plan(specs, DynamicConfig(num_slots={"user": 190})).config.num_fallback == {"user": 10}
    given = plan(specs, DynamicConfig(num_fallback={"user": 7}), "10%")
    assert given.config.num_fallback == {"user": 7}
    assert given.report.serve_bytes > 0.98 * 64_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "lfuu"}, "did you mean 'lfu'"),
        ({"admission": "never"}, "Allowed: always, count, probability"),
        ({"start": "zero"}, "Allowed: fallback, random"),
        ({"decay": math.nan}, "decay=nan"),
        ({"decay": -0.5}, "at least 0"),
        ({"decay": math.inf}, "finite"),
        ({"ttl": 0}, "ttl=0"),
        ({"interval": 0}, "interval=0"),
        ({"interval": 2.5}, "must be int"),
        ({"min_count": 0}, "min_count=0"),
        ({"admit_probability": 0.0}, "above 0, at most 1"),
        ({"admit_probability": math.nan}, "above 0, at most 1"),
        ({"history": 0.0}, "above 0, and finite"),
        ({"history": math.inf}, "above 0, and finite"),
        ({"history": math.nan}, "above 0, and finite"),
        ({"fallback_share": 1.0}, "below 1"),
        ({"fallback_share": math.nan}, "below 1"),
        ({"exempt_share": math.nan}, r"in \[0, 1\)"),
        ({"rows": "int4:group64"}, "groups"),
    ],
)
def test_wrong_configs(values, message):
    with pytest.raises(ConfigError, match=message):
        DynamicConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_slots": {"user": 0}}, "'user': 0.*in \\[1, 50\\]"),
        ({"num_slots": {"user": 51}}, "'user': 51"),
        ({"num_slots": {"user": 0}, "unseen": "hash"}, "at least 1"),
        ({"num_slots": {"user": 5}, "num_fallback": {"user": -1}}, "at least 1"),
        ({"num_slots": {"user": 5}, "num_fallback": {"user": 0}}, "at least 1, or 0 where"),
        ({"num_slots": {"usr": 5}}, "did you mean 'user'"),
        ({"num_slots": {"user": 5}, "num_fallback": {"user": 2**31}}, "hashing into"),
    ],
)
def test_wrong_sizes(values, message):
    with pytest.raises(ConfigError, match=message):
        build_tables([TableSpec("user", 50, 4)], DynamicConfig(**values))


def test_ids_of_the_wrong_kind():
    tables = make_tables()
    for ids in (torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.uint8)):
        with pytest.raises(InputError, match="int64"):
            tables(ids)
    tables.step_()
    assert not len(tables.residents_of("user"))
