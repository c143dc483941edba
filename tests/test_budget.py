"""Budgets as they are written, and the solver that meets them."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcomp import (
    Budget,
    BudgetError,
    ConfigError,
    FullConfig,
    ReducedDimConfig,
    SpecError,
    TableSpec,
    build_tables,
    plan,
)
from embcomp.budget import measure

SPECS = (TableSpec("user", 1000, 16), TableSpec("flag", 2, 16), TableSpec("item", 300, 16))
FULL = sum(spec.full_bytes for spec in SPECS)


class TestParse:
    @pytest.mark.parametrize(
        ("written", "count"),
        [
            ("10%", 1000),
            ("0.1", 1000),
            (0.1, 1000),
            (np.float64(0.1), 1000),
            ("10x", 1000),
            (" 12.5 % ", 1250),
            ("1e1%", 1000),
            ("100%", 10_000),
            (1, 10_000),
            ("1x", 10_000),
            ("33.3%", 3330),
            ("7%", 700),
            ("4096B", 4096),
            ("4096b", 4096),
            ("4 KiB", 4096),
            ("4kb", 4000),
            ("2.5KB", 2500),
        ],
    )
    def test_ten_thousand_bytes_of_tables(self, written, count):
        assert Budget.parse(written).bytes(10_000) == count

    def test_large_units(self):
        units = {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30, "TB": 10**12, "TiB": 2**40}
        assert {unit: Budget.parse(f"1{unit}").bytes(2**50) for unit in units} == units

    @pytest.mark.parametrize(
        "written",
        ["", "ten", "10 percent", "5ib", "1.2.3", ".", "--5%", "5%%", "nan", "inf", True, None, [], "1e%", "1,5%"],
    )
    def test_what_cannot_be_read(self, written):
        with pytest.raises(BudgetError, match=r"can't be read; write '10%'") as caught:
            Budget.parse(written)
        assert caught.value.minimum_bytes is None

    @pytest.mark.parametrize("written", [0, "0", "0%", "0B", "0x", "-5%", -0.1, "-1MiB", "-0", "1e-400"])
    def test_nothing_and_less(self, written):
        with pytest.raises(BudgetError, match="must be above zero"):
            Budget.parse(written)

    def test_less_than_a_byte(self):
        with pytest.raises(BudgetError, match="less than one byte"):
            Budget.parse("0.5B")

    @pytest.mark.parametrize("written", ["101%", 1.01, "0.5x", 64, "1e999%"])
    def test_more_than_everything(self, written):
        with pytest.raises(BudgetError, match=r"100%|above zero"):
            Budget.parse(written)
        with pytest.raises(BudgetError, match=r"above 100%.*float32 tables take 9.77 KiB \(10000 B\)"):
            Budget.parse("10001B").bytes(10_000)

    def test_reads_itself_and_is_shown_as_written(self):
        budget = Budget.parse("10x")
        assert Budget.parse(budget) is budget
        assert str(budget) == "10x"

    @settings(deadline=None)
    @given(st.floats(1e-9, 1.0), st.integers(1, 2**45))
    def test_a_share_is_never_more_than_itself(self, share, full):
        count = Budget.parse(share).bytes(full)
        assert count <= full
        assert count == pytest.approx(share * full, abs=1 + 1e-9 * full)


class TestPlan:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 2 * 4 * 1302) | st.integers(1, FULL))
    def test_meets_the_budget_or_names_the_smallest(self, budget):
        smallest = measure(SPECS, ReducedDimConfig(dim=1)).serve_bytes
        if budget < smallest:
            with pytest.raises(BudgetError, match=f"smallest feasible budget is {smallest} B") as caught:
                plan(SPECS, "reduced_dim", f"{budget}B")
            assert caught.value.minimum_bytes == smallest
            return
        made = plan(SPECS, "reduced_dim", f"{budget}B")
        assert made.report.serve_bytes <= budget == made.budget_bytes
        larger = ReducedDimConfig(dim=min(made.config.dim + 1, 16))
        assert made.config.dim == 16 or measure(SPECS, larger).serve_bytes > budget

    def test_known_numbers(self):
        """5 of 16 dimensions: 1300 rows and two 5 × 16 projections; the table of 2 ids stays plain."""
        made = plan(SPECS, "reduced_dim", "35%")
        assert made.config == ReducedDimConfig(dim=5)
        assert made.report.serve_bytes == 4 * (1300 * 5 + 2 * 5 * 16 + 2 * 16)
        assert made.build().memory() == made.report

    def test_plain_tables_meet_100_percent_and_not_a_byte_less(self):
        assert plan(SPECS, "full", "100%").report.serve_bytes == FULL
        with pytest.raises(BudgetError, match=rf"'full'.*3 tables.*{FULL - 1} B.*smallest feasible budget is {FULL} B"):
            plan(SPECS, "full", f"{FULL - 1}B")

    def test_no_budget(self):
        assert plan(SPECS, ReducedDimConfig(dim=3)).budget_bytes is None
        with pytest.raises(ConfigError, match="leaves its size"):
            plan(SPECS, "reduced_dim")

    def test_a_fixed_size_is_kept_whatever_the_budget(self):
        assert plan(SPECS, ReducedDimConfig(dim=3), "90%").config.dim == 3
        with pytest.raises(BudgetError):
            plan(SPECS, ReducedDimConfig(dim=15), "50%")

    def test_takes_no_memory_and_no_time_whatever_the_size(self):
        specs = [TableSpec(f"field_{index}", 10**9, 64) for index in range(26)]
        started = time.process_time()
        made = plan(specs, "reduced_dim", "1TB")
        assert time.process_time() - started < 1
        assert 0.8e12 < made.report.serve_bytes <= 1e12

    @pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adagrad", "rowwise_adagrad", "adam"])
    def test_budget_on_training(self, optimizer):
        made = plan(SPECS, "reduced_dim", "95%", budget_on=f"train:{optimizer}")
        assert 0.7 * FULL < made.report.train_bytes(optimizer) <= 0.95 * FULL
        assert made.report.serve_bytes < 0.6 * FULL

    def test_training_can_take_more_than_the_float32_tables(self):
        made = plan(SPECS, "full", f"{4 * FULL}B", budget_on="train")
        assert made.report.train_bytes("adam") == 4 * FULL == made.budget_bytes
        with pytest.raises(BudgetError, match=f"smallest feasible budget is {4 * FULL} B"):
            plan(SPECS, "full", f"{4 * FULL - 1}B", budget_on="train")

    @pytest.mark.parametrize("where", ["", "train:lion", "serve:adam", "disk"])
    def test_budget_on_something_else(self, where):
        with pytest.raises(ConfigError, match=r"lion.*Allowed: adagrad, adam|budget_on=.*write 'serve'"):
            plan(SPECS, "reduced_dim", "50%", budget_on=where)

    def test_knowledge_of_tables_that_do_not_exist(self):
        with pytest.raises(SpecError, match="did you mean 'user'"):
            plan(SPECS, "reduced_dim", "50%", counts={"users": torch.ones(1000)})

    def test_shows_strategy_budget_and_parts(self):
        shown = str(plan(SPECS, "reduced_dim", "35%"))
        assert "reduced_dim, budget 28.48 KiB" in shown
        assert "projection" in shown
        assert "as float32" in shown
        assert "no budget" in str(plan(SPECS, "full"))

    def test_builds_on_a_device(self):
        assert plan(SPECS, FullConfig()).build("meta").rows.weight.is_meta


def test_on_meta_nothing_is_allocated():
    tables = build_tables([TableSpec("user", 10**12, 64)], "full", device="meta")
    assert tables.memory().serve_bytes == 4 * 64 * 10**12
    assert all(parameter.is_meta for parameter in tables.parameters())
