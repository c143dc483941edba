"""Sweeps: what they write, and what they do when cells fail, processes die, folders are shared or read-only."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import runner
from benchmarks.errors import OverrideError
from benchmarks.exported import check_kind
from benchmarks.measure import lookup_latency, saved_bytes, state_bytes
from benchmarks.overrides import check_overrides, number_of_jobs
from benchmarks.progress import NOTE
from benchmarks.report import main as report
from embcomp import TableSpec, build_tables
from tests.benchmarks.small import cell_of, results_in, run_sweep, start_sweep


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    """Data are made once for all tests of this file, and torch keeps its number of threads."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBCOMP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


def notes_in(folder):
    return [json.loads(path.read_text()) for path in Path(folder).glob(f".hydra/*/*/{NOTE}")]


def test_a_sweep_writes_whole_cells_and_reuses_them(tmp_path, capsys):
    sweep = ("-m", "strategy=full,hash,quantize", "budget=25%,1%", "without_budget=[full]")
    assert run_sweep(tmp_path, *sweep) == 0
    assert "5 cells: 4 success, 1 infeasible" in capsys.readouterr().out
    found = results_in(tmp_path)
    done = {(r.strategy, r.budget): r for r in found.values()}
    assert set(done) == {
        ("full", None),
        *(("hash", b) for b in ("25%", "1%")),
        *(("quantize", b) for b in ("25%", "1%")),
    }

    hashed = done["hash", "25%"]
    sizes = hashed.sizes
    assert hashed.status == "success"
    assert hashed.error is None
    assert sizes.planned_bytes == sizes.built_bytes == sizes.served_bytes <= sizes.budget_bytes
    assert sizes.budget_bytes == int(sizes.float32_bytes * 0.25)
    assert sizes.served_bytes < sizes.file_bytes < sizes.served_bytes + 4096
    assert sizes.served_bytes < sizes.model_bytes
    assert sizes.train_bytes == 4 * sizes.served_bytes  # Adam: weights, gradients and two moments
    assert sizes.peak_memory_bytes > 50_000_000
    assert 0 < hashed.metric("test_auc") < 1
    assert hashed.metrics["test_log_loss"]["higher_is_better"] is False
    assert hashed.training["samples_per_second"] > 0
    assert hashed.dataset["train_rows"] == 1600
    assert set(hashed.lookup) == {"1", "4096"}
    assert all(0 < times["p50_microseconds"] <= times["p99_microseconds"] for times in hashed.lookup.values())
    assert hashed.environment["packages"]["torch"] == torch.__version__
    assert "strategy=hash" in hashed.command

    tiny = done["quantize", "1%"]
    assert tiny.status == "infeasible"
    assert tiny.sizes.minimum_bytes > tiny.sizes.float32_bytes // 100
    assert tiny.metrics == {}
    assert done["full", None].sizes.served_bytes == done["full", None].sizes.float32_bytes

    times = {path: path.stat().st_mtime_ns for path in found}
    for same in (sweep, (*sweep, "strategy=full,hash,quantize")):  # recognized at once, and cell by cell
        assert run_sweep(tmp_path, *same) == 0
        assert "5 cells: 4 success, 1 infeasible (5 from an earlier run)" in capsys.readouterr().out
        assert {path: path.stat().st_mtime_ns for path in found} == times
    assert run_sweep(tmp_path, "-m", "strategy=hash", "budget=25%", "overwrite=true") == 0
    renewed = {path for path, before in times.items() if path.stat().st_mtime_ns > before}
    assert renewed == {path for path, result in found.items() if (result.strategy, result.budget) == ("hash", "25%")}


def test_a_failing_cell_is_named_and_stops_nothing(tmp_path, capsys):
    """A budget above 100 % shows only when the data are known; it stands before the others, which must still run."""
    sweep = ("-m", "strategy=hash", "budget=1GiB,50%")
    assert run_sweep(tmp_path, *sweep) == 1
    failed = next(r for r in results_in(tmp_path).values() if r.status == "failed")
    assert "above 100%" in failed.error["message"]
    assert "Traceback" in failed.error["traceback"]
    text = capsys.readouterr().err
    log = tmp_path / "small" / f"{failed.cell}.log"
    assert f"FAILED {failed.cell}" in text
    assert str(log) in text
    assert "Traceback" in log.read_text()
    assert sorted(r.status for r in results_in(tmp_path).values()) == ["failed", "success"]


def test_failed_cells_are_tried_again(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "fit", broken)
        assert run_sweep(tmp_path, "strategy=hash", "budget=50%") == 1
    assert "out of luck" in capsys.readouterr().err
    assert list((tmp_path / "small").glob("*.log"))
    assert run_sweep(tmp_path, "strategy=hash", "budget=50%") == 0
    assert "test AUC" in capsys.readouterr().out
    assert [r.status for r in results_in(tmp_path).values()] == ["success"]
    assert not list((tmp_path / "small").glob("*.log"))


def test_an_interrupt_stops_the_sweep(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "fit", interrupted)
    assert run_sweep(tmp_path, "-m", "strategy=hash", "budget=50%,25%") == 130
    assert results_in(tmp_path) == {}
    assert "goes on where it was" in capsys.readouterr().err


def test_a_finished_sweep_is_not_taken_for_finished_when_a_result_is_gone(tmp_path, capsys):
    sweep = ("-m", "strategy=hash", "budget=50%,25%")
    assert run_sweep(tmp_path, *sweep) == 0
    lost = next(iter(results_in(tmp_path)))
    lost.unlink()
    capsys.readouterr()
    assert run_sweep(tmp_path, *sweep) == 0
    assert "(1 from an earlier run)" in capsys.readouterr().out
    assert lost.exists()


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_where_it_was(tmp_path):
    sweep = ("-m", "strategy=hash,unified", "budget=50%,10%", "seed=1,2")
    process = start_sweep(tmp_path, *sweep)
    until = time.monotonic() + 120
    while len(list((tmp_path / "small").glob("*.json"))) < 3 and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in results_in(tmp_path)}  # all whole
    assert 3 <= len(before) < 8
    assert run_sweep(tmp_path, *sweep) == 0
    after = results_in(tmp_path)
    assert len(after) == 8
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items())


@pytest.mark.slow
def test_two_sweeps_share_the_cells_of_a_folder(tmp_path):
    sweep = ("-m", "strategy=hash,unified", "budget=50%,25%,10%,5%")
    processes = [start_sweep(tmp_path, *sweep) for _ in range(2)]
    texts = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert [r.status for r in results_in(tmp_path).values()] == ["success"] * 8
    ran = [note["cell"] for note in notes_in(tmp_path) if not note["reused"] and note["status"] == "success"]
    assert len(ran) == len(set(ran)) == 8


def test_a_folder_that_cannot_be_written_to_ends_the_sweep_at_once(tmp_path, capsys):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    for mode in ((), ("-m",)):
        assert run_sweep(in_the_way / "results", *mode, "strategy=hash", "budget=50%") == 2
        assert "can't be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("strategy=full,hsah", "no strategy 'hsah'; did you mean 'hash'"),
        ("model=DeepFM", "no model 'DeepFM'; did you mean 'deepfm'"),
        ("data=movielens1m", "did you mean 'movielens_1m'"),
        ("experiment=embeded", "did you mean 'embedded'"),
        ("budgt=10%", "did you mean 'budget'"),
        ("budget=10%,0", "above zero"),
        ("budget=-5%", "above zero"),
        ("budget=101%", "above 100%"),
        ("budget=lots", "can't be read"),
        ("seed=1,x", "seed='x'"),
        ("seed=-1", "whole number"),
    ],
)
def test_wrong_arguments_are_told_before_anything_runs(argument, message):
    with pytest.raises(OverrideError, match=message):
        check_overrides(["-m", argument])


def test_a_wrong_argument_ends_with_status_2(tmp_path, capsys):
    assert run_sweep(tmp_path, "strategy=hsah") == 2
    assert "did you mean 'hash'" in capsys.readouterr().err


def test_right_arguments_pass():
    check_overrides(["-m", "strategy=hash,unified", "budget=10%,0.1,10x,64MiB,null", "seed=1,2", "hydra.verbose=true"])
    check_overrides(["--config-dir", "mine", "strategy=mine"])


def test_jobs_are_counted_as_hydra_makes_them():
    assert number_of_jobs(["a=1,2", "b=1,2,3", "a=1,2,3,4", "c=x", "seed=range(1,4)"]) == 4 * 3 * 3


def test_a_seed_of_the_strategy_that_is_not_the_cells_is_an_error():
    cell = cell_of(strategy={"name": "hash", "seed": 7})
    result = runner.run_cell(cell)
    assert result.status == "failed"
    assert "set seed=" in result.error["message"]


def test_tables_over_their_budget_fail_the_cell():
    with pytest.raises(ValueError, match="over the budget of 10 B"):
        runner._check_budget({"budget_bytes": 10, "served_bytes": 11})


def test_saved_bytes_are_those_of_the_state_and_a_header():
    tables = build_tables([TableSpec("a", 1000, 8), TableSpec("b", 10, 8)], "quantize", "30%").finalize_()
    assert state_bytes(tables) == tables.memory().serve_bytes
    assert 0 < saved_bytes(tables) - state_bytes(tables) < 4096


def test_lookups_are_timed_even_on_fewer_rows_than_a_batch():
    tables = build_tables([TableSpec("a", 50, 4)], "full").finalize_()
    found = lookup_latency(tables, torch.zeros(3, 1, dtype=torch.int64), (1, 8), seconds=0.01)
    assert set(found) == {"1", "8"}
    assert found["8"]["calls"] >= 1


def test_cells_that_differ_in_the_budget_share_phases_and_come_to_the_same(tmp_path, monkeypatch):
    magnitude = ("-m", "strategy=magnitude", "strategy.finetune_epochs=1", "seed=1,2")
    for name, budgets in (("alone", "25%"), ("together", "50%,25%")):
        monkeypatch.setattr(runner, "_shared_folder", lambda name=name: tmp_path / f"{name}-phases")
        assert run_sweep(tmp_path / name, *magnitude, f"budget={budgets}") == 0
    alone, together = (
        {(r.budget, r.seed): r for r in results_in(tmp_path / name).values()} for name in ("alone", "together")
    )
    shared = {cell: [phase["shared"] for phase in result.training["phases"]] for cell, result in together.items()}
    assert shared == {(b, s): [b == "25%", False] for b in ("50%", "25%") for s in (1, 2)}
    assert not any(phase["shared"] for result in alone.values() for phase in result.training["phases"])
    for cell, result in alone.items():
        assert result.metrics == together[cell].metrics
        assert result.tables == together[cell].tables


def test_sessions_are_swept_as_clicks_are(tmp_path, capsys):
    sweep = ("-m", "data=sessions/synthetic_sessions", "data.sessions=400", "data.items=60", "model=sasrec,m2trec")
    assert run_sweep(tmp_path, *sweep, "strategy=full,hash", "budget=60%", "without_budget=[full]", sessions=True) == 0
    results = results_in(tmp_path).values()
    assert len(results) == 4
    assert "test NDCG@10 0." in capsys.readouterr().err
    for result in results:
        metrics = {name: metric["value"] for name, metric in result.metrics.items()}
        assert 0 < metrics["test_mrr@10"] <= metrics["test_ndcg@10"] <= metrics["test_hr@10"] <= metrics["test_hr@20"]
        assert metrics["validation_ndcg@10"] == pytest.approx(metrics["trained_validation_ndcg@10"], abs=0.02)
        for cutoff in (10, 20):
            assert metrics[f"test_hr@{cutoff}"] <= metrics[f"test_hr@{cutoff}_random_ties"] < 1
        assert result.slices["unseen"]["ndcg@10"] <= result.slices["unseen"]["ndcg@10_random_ties"]
        cases = [part["cases"] for name, part in result.slices.items() if "seen" in name]
        assert sum(cases) == result.dataset["test_cases"]
        assert 30 < result.dataset["num_items"] <= 60
        assert result.sizes.served_bytes <= (result.sizes.budget_bytes or result.sizes.float32_bytes)
        assert result.lookup["4096"]["calls"] > 0
    report(["--markdown", "-", str(tmp_path)])
    text = capsys.readouterr().out
    assert "## synthetic_sessions, m2trec" in text
    assert "test NDCG@10 | to float32 | test MRR@20" in text
    assert "items, 5 attributes" in text
    assert all((r.sizes.composing_bytes > 0) == (r.model == "m2trec") for r in results)
    (rate,) = {r.dataset["metadata_twin_rate"] for r in results if r.model == "m2trec"}
    assert {r.dataset["metadata_twin_rate"] for r in results if r.model == "sasrec"} == {None}
    assert text.count(f", {100 * rate:.1f} % of test targets with the same used attributes as another item.") == 3
    assert "## synthetic_sessions: models" in text
    assert "test NDCG@10 | test HR@10 | test MRR@20 | test HR@20 | steps to 95 % of MRR | seeds" in text
    assert text.count("test NDCG@10 by part of the test split") == 3
    page = (tmp_path / "report.html").read_text()
    assert page.count("By part of the test split") == 3
    assert 'href="#models0"' in page


def test_sparsity_counts_the_values_that_are_stored(tmp_path):
    sweep = ("-m", "strategy=full,reduced_dim,magnitude,hash", "strategy.rows=float32", "budget=50%", "seed=1")
    assert run_sweep(tmp_path, *sweep, "without_budget=[full]") == 0
    results = {result.strategy: result for result in results_in(tmp_path).values()}
    full, magnitude, narrow = (results[name] for name in ("full", "magnitude", "reduced_dim"))
    assert full.tables["sparsity"] == 0
    values = magnitude.sizes.float32_bytes // 4
    assert magnitude.tables["sparsity"] == pytest.approx(1 - magnitude.tables["num_values"] / values)
    shares = narrow.tables["dim"] / 5, narrow.sizes.served_bytes / narrow.sizes.float32_bytes
    assert 1 - shares[1] < narrow.tables["sparsity"] <= 1 - shares[0]  # matrices are no values of ids
    assert "sparsity" not in results["hash"].tables
    assert not results["hash"].tables["mean_widths_by_decile"]


@pytest.mark.torchrec
def test_cells_are_exported_for_their_sizes_even_if_they_were_run_before(tmp_path, capsys):
    pytest.importorskip("torchrec", reason="needs torchrec")
    sweep = ("-m", "strategy=full,hash", "budget=25%", "without_budget=[full]")
    assert run_sweep(tmp_path, *sweep) == 0
    assert run_sweep(tmp_path, *sweep, "exports=[pt2,fbgemm]") == 0
    assert "2 cells: 2 success" in capsys.readouterr().out.splitlines()[-1]
    found = {result.strategy: result for result in results_in(tmp_path).values()}
    assert len(found) == 2
    for result in found.values():
        assert result.exports["pt2"]["refused"] is None
        assert result.sizes.served_bytes < result.exports["pt2"]["file_bytes"] < result.sizes.served_bytes + 200_000
    assert found["full"].exports["fbgemm"]["file_bytes"] > found["full"].sizes.served_bytes
    assert found["hash"].exports["fbgemm"]["file_bytes"] is None
    assert "strategy 'hash' shares rows" in found["hash"].exports["fbgemm"]["refused"]
    for fewer in ("exports=pt2", "exports=[]", "exports=null"):
        assert run_sweep(tmp_path, *sweep, fewer) == 0
        assert "(2 from an earlier run)" in capsys.readouterr().out


def test_kinds_of_exports_that_there_are_not_are_told_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "fit", None)
    assert run_sweep(tmp_path, "-m", "strategy=hash", "budget=25%", "exports=[onxx]") == 1
    assert "no kind of file 'onxx'; did you mean 'onnx'?" in capsys.readouterr().out
    check_kind.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # importing it raises, as if it were not installed
    assert run_sweep(tmp_path, "-m", "strategy=hash", "budget=25%", "exports=onnx") == 1
    assert "pip install embcomp[serve]" in capsys.readouterr().out


def test_only_the_latest_shared_phases_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_shared_folder", lambda: tmp_path / "phases")
    monkeypatch.setattr(runner, "_MOST_SHARED", 2)
    sweep = ("-m", "strategy=magnitude", "strategy.finetune_epochs=1", "budget=50%", "seed=1,2,3")
    assert run_sweep(tmp_path, *sweep) == 0
    assert sorted(path.name[-2:] for path in (tmp_path / "phases").iterdir()) == ["-2", "-3"]
