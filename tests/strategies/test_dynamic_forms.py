"""The forms of ``dynamic``: what is served, saved, resumed, compiled and exported, and loops without steps."""

import copy
import math

import pytest
import torch

import embcomp
from embcomp import ConfigError, DynamicConfig, IncompatibleStateError
from embcomp.io import write_pretrained
from tests.strategies.dynamic_tables import make_tables, slots_of, stream, train


@pytest.mark.parametrize("rows", ["float32", "bfloat16", "int8", "int4:row:after", "int2:column", "int8:table"])
def test_what_is_served_is_what_was_evaluated(rows):
    tables = make_tables(dim=16, rows=rows, interval=3)
    optimizer = torch.optim.SGD(tables.parameters(), lr=0.01)
    for ids in stream(20):
        train(tables, ids, optimizer)
    asked = torch.cat(list(stream(30)))
    wanted = tables.eval()(asked).detach()
    final = tables.finalize()
    assert final.residents.map.state_dict().keys() == {"ids"}
    tolerance = (
        {"rtol": 0.1, "atol": 0.1 * wanted.abs().max().item()} if "after" in rows else {"rtol": 1e-5, "atol": 1e-6}
    )
    torch.testing.assert_close(final(asked), wanted, **tolerance)
    serve = sum(tensor.nbytes for tensor in final.state_dict().values())
    assert serve == final.memory().serve_bytes == tables.memory().serve_bytes
    ids = final.memory().by_table()
    assert set(ids) == {"user", "item"}
    assert torch.equal(final.residents_of("user"), tables.residents_of("user"))


def test_a_state_goes_on_as_if_nothing_had_happened():
    tables, batches = make_tables(policy="distance_lfu", admission="probability"), list(stream(40))
    optimizer = torch.optim.Adagrad(tables.parameters(), lr=0.1)
    for ids in batches[:18]:  # in the middle of an interval
        train(tables, ids, optimizer)
    resumed = make_tables(policy="distance_lfu", admission="probability")
    again = torch.optim.Adagrad(resumed.parameters(), lr=0.1)
    resumed.load_state_dict(tables.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for ids in batches[18:]:
        train(tables, ids, optimizer)
        train(resumed, ids, again)
    for name, tensor in tables.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_the_training_form_is_saved_and_loaded(tmp_path):
    tables = make_tables()
    for ids in stream(10):
        train(tables, ids)
    loaded = embcomp.from_pretrained(embcomp.save_pretrained(tables, tmp_path))
    for ids in stream(10, seed=1):
        train(tables, ids)
        train(loaded, ids)
    assert torch.equal(loaded.rows.weight, tables.rows.weight)


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("map.ids", 0, 2**62, "not sorted"),
        ("map.ids", 1, None, "there twice"),
        ("map.slots", 0, None, "not there once each"),
        ("map.slots", 0, 99, "not there once each"),
        ("history.filled", (), 10**6, "contradicts itself"),
        ("history.entries", (0, 0), 7, "contradicts itself"),
    ],
)
@pytest.mark.parametrize("way", ["state", "folder"])
def test_a_checkpoint_that_contradicts_itself_changes_nothing(tmp_path, name, index, value, message, way):
    tables = make_tables()
    for ids in stream(10):
        train(tables, ids)
    state = {key: tensor.clone() for key, tensor in tables.state_dict().items()}
    damaged = state[f"residents.{name}"]
    damaged[index] = damaged[1 - index] if value is None else value
    fresh = make_tables()
    before = {key: tensor.clone() for key, tensor in fresh.state_dict().items()}
    if way == "state":
        with pytest.raises(IncompatibleStateError, match=message):
            fresh.load_state_dict(state)
    else:
        write_pretrained(tables, tmp_path, state)
        with pytest.raises(IncompatibleStateError, match=message):
            embcomp.load_tables(tmp_path)
    assert all(torch.equal(fresh.state_dict()[key], tensor) for key, tensor in before.items())


def test_rows_that_can_not_be_served_leave_the_training_form_as_it_was():
    tables = make_tables(rows="int8", interval=1)
    for ids in stream(5):
        train(tables, ids)
    asked = torch.cat(list(stream(8)))
    before = tables.eval()(asked).detach()
    with torch.no_grad():
        kept = tables.rows.weight[-1].clone()
        tables.rows.weight[-1] = math.nan
    with pytest.raises(IncompatibleStateError, match="did training diverge"):
        tables.finalize_()
    with torch.no_grad():
        tables.rows.weight[-1] = kept
    assert torch.equal(tables(asked).detach(), before)
    train(tables.train(), asked)


def test_compiled_training_counts_too():
    eager, compiled = make_tables(interval=2), make_tables(interval=2)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for ids in stream(6):
        train(eager, ids)
        call(ids).square().sum().backward()
        compiled.step_()
    torch.compiler.reset()
    assert [slots_of(compiled, table) for table in (0, 1)] == [slots_of(eager, table) for table in (0, 1)]


def test_an_export_in_training_mode_counts_nothing():
    tables = make_tables(interval=1)
    program = torch.export.export(tables, (torch.tensor([[3, 30]]),))
    asked = torch.tensor([[5, 50]])
    torch.testing.assert_close(program.module()(asked), tables.eval()(asked))
    tables.train().step_()
    assert not len(tables.residents_of("user"))


def test_a_loop_without_steps_is_told_and_does_not_fill_the_memory(caplog):
    tables = make_tables(interval=1)
    for ids in [*stream(400)] * 2:
        tables(ids)
    assert "call handle.step_(optimizer)" in caplog.text
    assert len(caplog.records) == 1
    assert len(tables.residents._waiting) < 256


def test_ids_that_the_caller_writes_to_afterwards_were_counted_as_they_were():
    tables = make_tables(interval=1)
    ids = torch.tensor([[3, 30]])
    tables(ids).sum().backward()
    ids.fill_(4)
    tables.step_()
    assert tables.residents_of("user").tolist() == [3]


def test_steps_after_finalizing_do_nothing():
    tables = make_tables().finalize_()
    tables.train()(torch.tensor([[1, 2]]))
    tables.step_()
    tables.compete_()
    assert tables.reassigned_() == []


def test_it_can_not_be_sharded_and_says_so():
    sharding = pytest.importorskip("embcomp.integrations.sharding")
    model = torch.nn.ModuleDict({"user": torch.nn.Embedding(100, 4)})
    embcomp.compress_(model, DynamicConfig(num_slots={"user": 10}), verbose=False)
    with pytest.raises(ConfigError, match=r"'dynamic'.*one process"):
        sharding.plan_sharding(model, 2)
