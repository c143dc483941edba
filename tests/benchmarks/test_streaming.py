"""The stream whose ids drift, and a tiny run of the comparison on it."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.drift import DriftingClicks
from benchmarks.streaming import METHODS, main
from embcomp import ConfigError

TINY = [
    *("--live", "200", "50", "--chunks", "8", "--rows", "400", "--batch-size", "100", "--interval", "4"),
    *("--seeds", "2", "--warm-up", "2", "--dim", "4", "--budgets", "50%"),
]


def test_one_percent_of_the_ids_is_new_in_each_chunk():
    clicks = DriftingClicks({"a": 500, "b": 100}, 60_000, new_share=0.02, seed=1, zipf=0.2)
    chunks = list(clicks.chunks(4))
    for column, (size, new) in enumerate(((500, 10), (100, 2))):
        for number, (before, after) in enumerate(pairwise(chunks)):
            fresh = set(after.numbers[:, column].tolist()) - set(before.numbers[:, column].tolist())
            assert len(fresh) == pytest.approx(new, abs=1)
            assert min(fresh) >= size + number * new
        pairs = torch.cat([torch.stack([c.ids[:, column], c.numbers[:, column]], dim=1) for c in chunks]).unique(dim=0)
        assert len(pairs) == len(pairs[:, 0].unique()) == len(pairs[:, 1].unique()) <= clicks.num_ids(4)["ab"[column]]
    again = list(clicks.chunks(4))
    assert all(torch.equal(a, b) for one, two in zip(chunks, again, strict=True) for a, b in zip(one, two, strict=True))


def test_labels_have_something_to_learn():
    (chunk,) = DriftingClicks({"a": 20, "b": 10}, 20_000, seed=0).chunks(1)
    rates = [chunk.labels[chunk.numbers[:, 0] == number].mean().item() for number in range(20)]
    assert np.std(rates) > 0.1
    assert 0.1 < chunk.labels.mean() < 0.7


@pytest.mark.parametrize("values", [{"live": {}}, {"live": {"a": 0}}, {"new_share": -0.1}, {"new_share": float("nan")}])
def test_wrong_streams(values):
    with pytest.raises(ConfigError, match="DriftingClicks"):
        DriftingClicks(**{"live": {"a": 5}, "num_rows": 3, **values})


def test_a_tiny_run_prints_a_table_and_writes_the_runs(tmp_path, capsys):
    path = tmp_path / "deep" / "streaming.json"
    main([*TINY, "--output", str(path)])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("| method | budget | bytes | AUC, quarter 1 |")
    assert [row.split("|")[1].strip() for row in rows] == list(METHODS)
    written = json.loads(path.read_text())
    runs = {(run["method"], run["seed"]): run for run in written["runs"]}
    assert len(runs) == 2 * len(METHODS)
    assert all(len(run["auc"]) == len(run["owned"]) == 8 for run in runs.values())
    limit = (4 + 1) * 4 * 250 // 2
    for (method, _), run in runs.items():
        assert method == "full" or 0.95 * limit <= run["serve_bytes"] <= limit
    assert runs["dynamic", 0]["serve_bytes"] == runs["frequency_cut", 0]["serve_bytes"]
    assert runs["dynamic", 0]["owned"][0] == 0.0
    assert runs["dynamic", 0]["owned"][-1] > 0.3
    assert runs["dynamic", 0]["auc"] != runs["dynamic", 1]["auc"]
    assert [path.name for path in path.parent.iterdir()] == ["streaming.json"]

    main([*TINY, "--output", str(path), "--methods", "dynamic"])
    (again, _) = json.loads(path.read_text())["runs"]
    assert again == runs["dynamic", 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "dynamo"], "invalid choice"),
        (["--chunks", "0"], "at least 1"),
        (["--new-share", "7"], r"new_share=7"),
        (["--methods", "dynamic", "--budgets", "0.01%"], "smallest feasible"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*TINY, *arguments])
    assert message in capsys.readouterr().err
