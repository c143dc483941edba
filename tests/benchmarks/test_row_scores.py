"""What scores of rows measure: the figures of made norms, and a short run."""

import numpy as np
import pytest

from benchmarks.row_scores import RECIPES, compared, main
from recsys_models.data import load_dataset


def test_norms_that_follow_counts_are_told_from_those_that_do_not():
    data = load_dataset("synthetic")
    counts = {known.name: np.asarray(known.counts) for known in data.fields}
    large = sum(known.num_ids >= 100 for known in data.fields)
    found = compared(data, {name: known.astype(np.float32) for name, known in counts.items()})
    assert found == pytest.approx([1.0] * (large + 3))
    turned = compared(data, {name: 1 / (1.0 + known) for name, known in counts.items()})
    assert turned[: large + 1] == pytest.approx([-1.0] * (large + 1))
    assert turned[large + 1] < 0.1


def test_a_short_run_prints_a_row_for_each_recipe(capsys):
    main(["--data", "synthetic", "--seeds", "1", "--epochs", "1"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == list(RECIPES)
    assert all(row.count("|") == head.count("|") for row in rows)
