"""Compressed tables in several processes: the losses of one process, whatever the way of sharding."""

import re

import pytest
import torch

import embcomp
from embcomp import ConfigError, IncompatibleStateError, TableSpec
from tests.integrations.workers import outcomes, run_workers

pytest.importorskip("torchrec", reason="needs torchrec")

from embcomp.integrations import sharding
from embcomp.integrations.sharding.plans import local_processes
from tests.integrations.sharded import (
    CASES,
    alone,
    answers,
    bags_alone,
    copies_of_dynamic_tables,
    copies_without_their_optimizer,
    fail_to_save,
    load_and_answer,
    model_of,
    models_that_differ,
    refusals,
    save_and_die,
    save_in_a_group,
    train,
    train_and_save,
    train_on_bags,
)

pytestmark = pytest.mark.torchrec


KINDS = ["row_wise", "table_wise", "column_wise", "data_parallel", None]
NAMED = ["full", "hash", "compositional", "unified", "low_rank", "quantize"]
EVERY = [
    (case, optimizer, kind, 8)
    for case in NAMED
    for optimizer in ("sgd", "rowwise_adagrad")
    for kind in KINDS
    if (optimizer, kind) != ("rowwise_adagrad", "column_wise")  # each part of a row has its own accumulator
]


@pytest.mark.parametrize(
    ("world_size", "plans"),
    [
        (2, [*EVERY, *((case, "rowwise_adagrad", "row_wise", 6) for case in CASES)]),
        (2, [(case, "sgd", kind, 8) for case in CASES if case not in NAMED for kind in KINDS[1:-1]]),
        (4, [*EVERY, *((case, "sgd", "row_wise", 6) for case in CASES)]),
    ],
)
def test_losses_are_those_of_one_process(world_size, plans):
    ranks = run_workers(train, world_size, plans, timeout=120)
    wrong = []
    for plan, *losses in zip(plans, *ranks, strict=True):
        wanted = alone(plan[0], plan[1], plan[3])
        off = max(abs(sum(own) / world_size - one) for own, one in zip(zip(*losses, strict=True), wanted, strict=True))
        if off > 1e-5:
            wrong.append((*plan, off))
    assert not wrong


def test_processes_that_hold_other_rows_are_told():
    for told in run_workers(models_that_differ, 2):
        assert "differ between process 0 and process 1" in told
        assert "torch.manual_seed" in told


def test_dynamic_tables_say_that_copies_of_them_drift_apart():
    for told in run_workers(copies_of_dynamic_tables, 2):
        assert len(told) == 1
        assert "tables user: several processes" in told[0]


def test_bug_copies_of_rows_are_told_not_to_be_trained_by_the_optimizer_given():
    """They were trained by that of the network, without a word."""
    (cut, first), (_, second) = run_workers(copies_without_their_optimizer, 2)
    assert cut == second == []
    (told,) = first
    assert "have a copy in each process, which optimizer='rowwise_adagrad' does not train" in told


def test_tables_that_processes_could_not_train_are_refused(tmp_path):
    told = run_workers(refusals, 2)
    for meta, sparse in told:
        assert "are on 'meta', without values" in meta
        assert "sparse=False" in sparse


def test_groups_of_some_processes(tmp_path):
    (_, wanted), (refused, same), (also, _) = run_workers(save_in_a_group, 3, tmp_path)
    assert "the group is of processes [1, 2]" in refused
    assert "take a group of processes 0 to 1" in also
    model = model_of("hash")
    embcomp.load_pretrained_(model, tmp_path, verbose=False)
    assert answers(model) == pytest.approx(wanted, abs=1e-6)
    assert same == pytest.approx(wanted, abs=1e-6)


def test_what_cannot_be_sharded_says_so_by_name():
    for strategy in ("optembed", "magnitude", "nested"):
        tables = embcomp.build_tables([TableSpec("user", 50, 8)], strategy, "60%")
        with pytest.raises(ConfigError, match=strategy):
            sharding.plan_sharding(tables, 2)


def test_what_four_processes_save_one_and_two_go_on_with(tmp_path):
    plans = [("low_rank", "row_wise"), *(("full, int4", kind) for kind in KINDS if kind)]
    folders = {plan: tmp_path / " ".join(plan) for plan in plans}
    saved = run_workers(train_and_save, 4, folders)[0]
    loaded = run_workers(load_and_answer, 2, folders)
    for ((case, _), folder), wanted, first, second in zip(folders.items(), saved, *loaded, strict=True):
        model = model_of(case, 6)
        assert answers(model) != pytest.approx(wanted, abs=1e-3)
        embcomp.load_pretrained_(model, folder, verbose=False)
        assert answers(model) == pytest.approx(wanted, abs=1e-6)
        model.tables.finalize_()
        assert answers(model) == pytest.approx(wanted, abs=1e-6)
        assert first[0] == second[0] == pytest.approx(wanted, abs=1e-6)
        assert first[1] == pytest.approx(wanted[:1], abs=1e-6)
        assert second[1] == pytest.approx(wanted[3:6], abs=1e-6)
        assert (len(first[2]), len(second[2])) == (2, 0)


@pytest.mark.parametrize(("world_size", "moment"), [(2, "backward"), (4, "forward"), (4, "save")])
def test_a_process_that_dies_ends_the_others_and_leaves_the_checkpoint_whole(tmp_path, world_size, moment):
    timeout = 20
    found, codes = outcomes(save_and_die, world_size, "hash", tmp_path, moment, timeout=timeout)
    assert codes == [0] * (world_size - 1) + [9]
    assert sorted(found) == list(range(world_size - 1))
    for (_, told, seconds), failure in found.values():
        assert not failure
        assert re.search(r"[Cc]onnection|[Tt]imed? ?out|Gloo|gloo", told)
        assert seconds < timeout + 5
    trained = found[0][0][0]
    model = model_of("hash", 6)
    assert answers(model) != pytest.approx(trained, abs=1e-3)
    embcomp.load_pretrained_(model, tmp_path, verbose=False)
    assert answers(model) == pytest.approx(trained, abs=1e-6)


def test_every_process_hears_that_a_checkpoint_was_not_written(tmp_path):
    (tmp_path / "file").touch()
    told = run_workers(fail_to_save, 2, "hash", tmp_path / "file" / "folder")
    assert len(told) == 2
    assert all("was not saved" in text for text in told)


@pytest.mark.parametrize("strategy", ["full", "quantize", "hash"])
def test_bags_that_differ_from_process_to_process_beside_a_plain_collection(strategy):
    alone, ranks = bags_alone(strategy, 2), run_workers(train_on_bags, 2, strategy)
    for rank, (wanted, found, is_dense, losses) in enumerate(ranks):
        for part, own in zip(found, wanted, strict=True):
            for row, one in zip(part, own, strict=True):
                assert row == pytest.approx(one, abs=1e-6)
        assert is_dense  # FBGEMM would train it by an optimizer that nobody asked for
        assert losses == pytest.approx([told[rank] for told in alone], rel=1e-5)


def test_a_plan_says_the_bytes_of_each_rank_before_anything_is_started():
    model = model_of("hash", 6)
    wanted = answers(model)
    report = sharding.plan_sharding(model, 4, {"group0_rows_genre": "table_wise", "group0_rows_user": "row_wise"})
    model.tables.finalize()  # it is what it was
    assert answers(model) == wanted
    parts = [shard for shard in report.shards if shard.table == "group0_rows_user"]
    assert [shard.rank for shard in parts] == [0, 1, 2, 3]
    rows = parts[-1].rows[1]
    assert sum(shard.bytes for shard in parts) == 4 * rows * 8  # six values, filled up to eight
    assert [shard.sharding for shard in report.shards if shard.table == "group0_rows_genre"] == ["table_wise"]
    assert sum(report.bytes_per_rank) == sum(s.bytes for s in report.shards) + 4 * report.replicated_bytes
    text = str(report)
    assert "rank 3:" in text
    assert "group0_rows_item" in text
    copies = sharding.plan_sharding(model_of("hash", 6), 2, "data_parallel")
    assert {shard.sharding for shard in copies.shards} == {"data_parallel"}
    assert copies.bytes_per_rank[0] == copies.bytes_per_rank[1]


@pytest.mark.parametrize(
    ("sharding_of", "message"),
    [
        ("row_wize", "did you mean 'row_wise'"),
        ("table_row_wise", "did you mean 'table_wise'"),
        ({"user": "row_wise"}, "no stored table 'user'"),
        ({"group0_rows_user": "data_parallel"}, "are one matrix"),
    ],
)
def test_wrong_ways_of_sharding(sharding_of, message):
    with pytest.raises(ConfigError, match=message):
        sharding.plan_sharding(model_of("hash", 6), 2, sharding_of)


@pytest.mark.parametrize(("world_size", "local"), [(0, None), (-2, None), (4, 3), (2, 4), (4, 0)])
def test_numbers_of_processes_that_do_not_go_together(world_size, local):
    with pytest.raises(ConfigError, match=f"world_size={world_size} .* must divide it"):
        sharding.plan_sharding(model_of("hash", 6), world_size, local_world_size=local)


@pytest.mark.parametrize(
    ("world_size", "device", "message"),
    [(2.5, "cpu", "world_size=2.5: give"), ("2", "cpu", "world_size='2': give"), (2, "tpu", "device='tpu'.*cpu, cuda")],
)
def test_processes_that_are_no_number_and_devices_that_are_not_known(world_size, device, message):
    with pytest.raises(ConfigError, match=message):
        sharding.plan_sharding(model_of("hash", 6), world_size, device=device)


@pytest.mark.parametrize(("world_size", "told", "wanted"), [(4, "2", 2), (4, "8", 4), (6, "4", 2), (3, None, 3)])
def test_processes_on_a_machine_are_what_torchrun_says_or_divide_the_group(monkeypatch, world_size, told, wanted):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if told is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
    assert local_processes(world_size) == wanted
    assert len(sharding.plan_sharding(model_of("hash", 6), world_size).bytes_per_rank) == world_size


@pytest.mark.parametrize("told", ["two", "", "-1", "1.5"])
def test_a_number_of_processes_on_a_machine_that_is_none(monkeypatch, told):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
    with pytest.raises(ConfigError, match=f"LOCAL_WORLD_SIZE is {told!r}: set it to"):
        local_processes(2)


def test_a_number_of_processes_that_does_not_divide_the_rows():
    report = sharding.plan_sharding(embcomp.build_tables([TableSpec("a", 7, 8)]), 3, "row_wise")
    assert [shard.rows for shard in report.shards] == [(0, 3), (3, 6), (6, 7)]


def test_bug_tables_of_fewer_rows_than_each_process_takes_are_placed_whole():
    """On a process without any rows FBGEMM's kernels for the CPU raise."""
    specs = [TableSpec(name, rows, 8) for name, rows in (("a", 5), ("b", 3), ("c", 8))]
    for wanted in ("row_wise", {f"group0_rows_{name}": "row_wise" for name in "abc"}):
        report = sharding.plan_sharding(embcomp.build_tables(specs), 4, wanted)
        kinds = {shard.table: shard.sharding for shard in report.shards}
        assert kinds == {"group0_rows_a": "table_wise", "group0_rows_b": "table_wise", "group0_rows_c": "row_wise"}
        for rank in range(4):
            assert any(shard.rank == rank and shard.rows[0] < shard.rows[1] for shard in report.shards)


def test_tables_that_no_process_has_room_for():
    tables = embcomp.plan([TableSpec("a", 10**12, 64)], "full").build(device="meta")
    with pytest.raises(ConfigError, match="finds no place for the rows in 2 processes"):
        sharding.plan_sharding(tables, 2)


def test_stored_tables_have_names_of_their_own():
    specs = [TableSpec("a.b", 50, 8), TableSpec("a_b", 40, 8)]
    tables = embcomp.build_tables(specs)
    assert sharding.stored_tables(tables) == ["group0_rows_a_b", "group0_rows_a_b_2"]
    assert len(sharding.plan_sharding(tables, 1).shards) == 2
    ids = torch.stack([torch.arange(40), torch.arange(40)], dim=1)
    wanted = tables(ids)
    assert torch.equal(sharding.shardable_(tables)(ids), wanted)


def test_frozen_tables_are_refused():
    tables = embcomp.build_tables([TableSpec("a", 50, 8)]).requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        sharding.shardable_(tables)


def test_rows_that_lie_elsewhere_are_not_finalized_or_written(tmp_path):
    model = sharding.shardable_(model_of("hash", 6))
    with pytest.raises(IncompatibleStateError, match="save_sharded"):
        embcomp.save_pretrained(model, tmp_path)
    with pytest.raises(IncompatibleStateError, match="save_sharded"):
        model.tables.finalize_()
    with pytest.raises(ConfigError, match="torchrun"):
        sharding.distribute(model)
    with pytest.raises(ConfigError, match="did you mean 'adagrad'"):
        sharding.distribute(model, "adagrat")


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        ("sgd", {"momentum": 0.9}, "no option 'momentum' that TorchRec's kernels obey; allowed: learning_rate$"),
        ("sgd", {"weight_decay": 0.1}, "no option 'weight_decay'"),
        ("rowwise_adagrad", {"weight_decay": 0.1}, "allowed: learning_rate, eps$"),
        ("adagrad", {"initial_accumulator_value": 0.1}, "no option 'initial_accumulator_value'"),
        ("adagrad", {"foo": 1}, "no option 'foo'"),
        ("adam", {}, "no Adam for rows on the CPU; use 'sgd'"),
    ],
)
def test_bug_options_of_optimizers_that_would_be_ignored_are_refused(optimizer, options, message):
    """Momentum and decay did nothing at all, and others were errors of FBGEMM's."""
    with pytest.raises(ConfigError, match=message):
        sharding.distribute(model_of("hash", 6), optimizer, **options)
