"""The example for several processes, as torchrun starts it: the losses of one process, saved and loaded."""

import json
import os
import subprocess
import sys

import pytest

from embcomp import load_tables
from tests.recsys_models.data.test_synthetic_criteo import columns, criteo_line

pytest.importorskip("torchrec", reason="needs torchrec")

pytestmark = pytest.mark.torchrec


def run(folder, processes, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["-m", "benchmarks.train_dlrm_distributed", "--batch-size", "300", *options]
    command += ["--data", "criteo", "--root", str(folder), "--cache", str(folder / "cache")]
    command += ["--output", str(folder / f"{processes}.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((folder / f"{processes}.json").read_text())


def test_two_processes_have_the_losses_of_one_which_goes_on_with_what_they_saved(tmp_path):
    (tmp_path / "train.txt").write_text("".join(map(criteo_line, *columns(rows=3000))))
    options = ("--strategy", "compositional", "--budget", "50%", "--sharding", "row_wise")
    _, alone = run(tmp_path, 1, *options, "--steps", "7")
    printed, both = run(tmp_path, 2, *options, "--steps", "5", "--save", str(tmp_path / "saved"))
    assert both["losses"] == pytest.approx(alone["losses"][:5], abs=1e-5)
    assert len(both["bytes_per_rank"]) == 2
    assert max(both["bytes_per_rank"]) < 0.6 * alone["bytes_per_rank"][0]
    assert "rank 1:" in printed
    (tables,) = load_tables(tmp_path / "saved")
    assert tables.memory().ratio <= 0.5
    _, later = run(tmp_path, 1, *options, "--steps", "2", "--skip", "5", "--resume", str(tmp_path / "saved"))
    assert later["losses"] == pytest.approx(alone["losses"][5:], abs=1e-5)
