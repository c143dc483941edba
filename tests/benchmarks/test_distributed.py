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
    distributed.main([*cases, *sizes, "--output", str(output)])
    alone, both = json.loads(output.read_text())["rows"]
    assert (alone["processes"], both["processes"]) == (1, 2)
    assert alone["largest_difference"] == 0.0
    assert both["largest_difference"] < 1e-5
    assert both["last_loss"] == pytest.approx(alone["last_loss"], abs=1e-5)
    assert len(both["bytes_per_rank"]) == 2
    assert max(both["bytes_per_rank"]) < 0.6 * alone["bytes_per_rank"][0]
    assert "| hash | row_wise | 2 |" in capsys.readouterr().out


def test_a_run_that_fails_says_so(tmp_path, capsys):
    options = ["--strategy", "hash", "--sharding", "row_wise", "--processes", "1", "--data", "no_such_log"]
    with pytest.raises(SystemExit) as stopped:
        distributed.main([*options, "--output", str(tmp_path / "found.json")])
    assert stopped.value.code == 1
    assert "no_such_log" in capsys.readouterr().err
    assert not (tmp_path / "found.json").exists()
