"""The table of runs in several processes."""

import json

import pytest

from benchmarks import distributed

pytest.importorskip("torchrec", reason="needs torchrec")

pytestmark = pytest.mark.torchrec


def test_two_processes_are_compared_with_one(tmp_path, capsys):
    output = tmp_path / "found.json"
    sizes = ["--batch-size", "200", "--steps", "4", "--processes", "1", "2"]
    cases = ["--strategy", "hash", "--sharding", "row_wise", "--data", "synthetic", "--cache", str(tmp_path / "cache")]
    distributed.main([*cases, *sizes, "--control", "--output", str(output)])
    alone, control, both = json.loads(output.read_text())["rows"]
    assert [row["processes"] for row in (alone, control, both)] == [1, 1, 2]
    assert [row["order"] for row in (alone, control, both)] == [None, 1, None]
    assert alone["largest_difference"] == 0.0
    assert control["largest_difference"] < 1e-5
    assert both["largest_difference"] < 1e-5
    assert both["last_loss"] == pytest.approx(alone["last_loss"], abs=1e-5)
    assert len(both["bytes_per_rank"]) == 2
    assert max(both["bytes_per_rank"]) < 0.6 * alone["bytes_per_rank"][0]
    printed = capsys.readouterr().out
    assert "| hash | row_wise | 2 |" in printed
    assert "| hash | row_wise | 1, other order |" in printed


def test_a_run_that_fails_says_why_and_what_was_measured_before_is_kept(tmp_path, capsys):
    output, sizes = tmp_path / "found.json", ["--batch-size", "200", "--steps", "2", "--processes", "1"]
    cases = ["--strategy", "hash", "optembed", "--sharding", "row_wise", "--data", "synthetic"]
    with pytest.raises(SystemExit) as stopped:
        distributed.main([*cases, *sizes, "--cache", str(tmp_path / "cache"), "--output", str(output)])
    assert stopped.value.code == 1
    shown = capsys.readouterr()
    assert "ConfigError: strategy 'optembed'" in shown.err.split("failed in 1 processes:")[1].splitlines()[1]
    assert [row["strategy"] for row in json.loads(output.read_text())["rows"]] == ["hash"]
    assert "| hash | row_wise | 1 |" in shown.out
