"""``embcomp compress``: tables of all kinds, what becomes of them, and what it says."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import embcomp


def loaded(tmp_path):
    return {name: tables for tables in embcomp.load_tables(tmp_path / "out") for name in tables.names}


def test_tables_of_a_file_become_a_checkpoint(tmp_path, file, weights, run):
    code, text, _ = run(file, "--strategy", "quantize", "--set", "bits=8", "granularity=row")
    assert code == 0
    assert text.splitlines()[0].startswith(f"{file} -> {tmp_path / 'out'}: quantize, 21.88 KiB as float32 -> ")
    assert "tables.user: relative error 0.00" in text
    tables = loaded(tmp_path)
    assert set(tables) == {"tables.user", "tables.item"}
    for name, own in tables.items():
        assert own.is_final
        torch.testing.assert_close(own.materialize(name), weights[f"{name}.weight"].float(), atol=0.02, rtol=0)


def test_a_model_takes_what_was_compressed(tmp_path, file, run):
    """Names are those that `compress_` gives, so hashes are the same, and the same tables come out."""
    run(file, "--strategy", "hash", "--budget", "20%", "--set", "seed=5")
    sizes = {"user": (600, 8), "item": (200, 4)}
    model = nn.ModuleDict({"tables": nn.ModuleDict({n: nn.Embedding(*size) for n, size in sizes.items()})})
    model.load_state_dict(load_file(file))
    handle = embcomp.compress_(model, embcomp.HashConfig(seed=5), "20%", init="trained", verbose=False).finalize_()
    for group in handle.tables:
        for name in group.names:
            torch.testing.assert_close(loaded(tmp_path)[name].materialize(name), group.materialize(name))


def test_json_has_bytes_errors_and_what_was_left_out(tmp_path, weights, run):
    torch.save({"epoch": 3, "state_dict": weights | {"head.bias": torch.zeros(3)}}, tmp_path / "w.pt")
    code, text, _ = run(tmp_path / "w.pt", "--table", "tables.user", "--budget", "25%", "--json")
    found = json.loads(text)
    assert code == 0
    assert found["float32_bytes"] == 600 * 8 * 4
    assert found["serve_bytes"] <= 600 * 8
    assert 0 < found["relative_error"] < 1
    assert [row["table"] for row in found["tables"]] == ["tables.user"]
    assert found["left_out"] == {"head.bias": "no matrix, its shape is (3,)", "tables.item.weight": "not chosen"}
    assert found["configs"][0]["strategy"] == "compact"
    assert found["seconds"] > 0


def test_a_matrix_of_numpy_is_a_table(tmp_path, run):
    rows = np.asfortranarray(np.random.default_rng(0).normal(size=(50, 4)).astype(">f8"))
    np.save(tmp_path / "item.npy", rows)
    assert run(tmp_path / "item.npy", "--strategy", "full")[0] == 0
    np.testing.assert_allclose(loaded(tmp_path)["item"].materialize("item").numpy(), rows.astype(np.float32))


def test_tables_of_torchrec_are_found_by_their_names(tmp_path, run):
    rows = torch.randn(30, 4)
    state = {
        "sparse.ebc.embedding_bags.t_user.weight": rows,
        "sparse.ec.embeddings.t_item.weight": rows + 1,
        "dense.0.weight": torch.randn(4, 4),
        "dense.0.bias": torch.zeros(4),
    }
    torch.save(state, tmp_path / "w.pt")
    code, text, _ = run(tmp_path / "w.pt", "--strategy", "full")
    assert code == 0
    assert "left out: dense.0.weight (not chosen)" in text
    assert set(loaded(tmp_path)) == {"sparse.ebc.embedding_bags.t_user", "sparse.ec.embeddings.t_item"}


def test_counts_weigh_errors(tmp_path, file, weights, run):
    counts = {"tables.user": torch.zeros(600, dtype=torch.int64)}
    counts["tables.user"][7] = 10**6
    save_file(counts, tmp_path / "counts.safetensors")
    arguments = ("--table", "tables.user", "--strategy", "hash", "--budget", "5%", "--json")
    plain = json.loads(run(file, *arguments)[1])
    weighted = json.loads(run(file, *arguments, "--counts", tmp_path / "counts.safetensors")[1])
    assert weighted["weighted_by_counts"] == ["tables.user"]
    assert weighted["relative_error"] < 0.05 < plain["relative_error"]
    got = loaded(tmp_path)["tables.user"](torch.tensor([7]), 0)
    torch.testing.assert_close(got, weights["tables.user.weight"][7:8], atol=0.05, rtol=0)
    np.save(tmp_path / "counts.npy", counts["tables.user"].numpy())
    again = json.loads(run(file, *arguments, "--counts", tmp_path / "counts.npy")[1])
    assert again["relative_error"] == weighted["relative_error"]


def test_bug_of_options_that_were_repeated_the_last_was_taken(tmp_path, weights, run):
    save_file(weights | {"other": torch.ones(9, 2)}, tmp_path / "w.safetensors")
    tables = ("--table", "tables.user", "--table", "tables.item")
    code, _, _ = run(tmp_path / "w.safetensors", *tables, "--strategy", "full", "--set", "rows=int8", "--set", "seed=3")
    assert code == 0
    assert set(loaded(tmp_path)) == {"tables.user", "tables.item"}
    config = loaded(tmp_path)["tables.user"].config
    assert (config.rows, config.seed) == ("int8", 3)


def test_an_older_checkpoint_is_replaced_whole_if_that_is_asked_for(tmp_path, file, run):
    run(file, "--strategy", "full", overwrite=False)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    code, text, error = run(file, "--strategy", "hash", "--budget", "10%", overwrite=False)
    assert (code, text) == (2, "")
    assert "has a checkpoint already: give another folder, or --overwrite" in error
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    run(file, "--strategy", "hash", "--budget", "10%")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    assert loaded(tmp_path)["tables.user"].config.num_hashes == 1


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_the_state_dict_of_a_training_loops_checkpoint_is_found(tmp_path, weights, run, key):
    torch.save({key: weights, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "loop.pt")
    code, _, _ = run(tmp_path / "loop.pt", "--strategy", "full")
    assert code == 0
    assert set(loaded(tmp_path)) == {"tables.user", "tables.item"}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.float32])
def test_bug_counts_of_any_real_dtype_are_taken(tmp_path, run, dtype):
    """Unsigned ones ended in a traceback."""
    np.save(tmp_path / "w.npy", np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32))
    np.save(tmp_path / "c.npy", np.arange(300)[::-1].astype(dtype) % 200)
    code, text, error = run(tmp_path / "w.npy", "--strategy", "hash", "--budget", "10%", "--counts", tmp_path / "c.npy")
    assert code == 0, error
    assert "ids weighted by their counts" in text


def test_bug_counts_that_are_all_zero_weigh_nothing(tmp_path, run):
    """All errors were told to be exact."""
    np.save(tmp_path / "w.npy", np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32))
    np.save(tmp_path / "c.npy", np.zeros(300, np.int64))
    arguments = (tmp_path / "w.npy", "--strategy", "hash", "--budget", "10%", "--json")
    plain, zeros = (json.loads(run(*arguments, *more)[1]) for more in ((), ("--counts", tmp_path / "c.npy")))
    assert zeros["weighted_by_counts"] == []
    assert zeros["relative_error"] == plain["relative_error"] > 0.5


def test_tables_of_one_id_and_of_one_dimension(tmp_path, run):
    save_file({"one": torch.ones(1, 16), "thin": torch.randn(500, 1)}, tmp_path / "w.safetensors")
    for strategy in embcomp.list_strategies():
        options = ("--set", "rows=float16") if strategy == "full" else ("--budget", "100%")
        assert run(tmp_path / "w.safetensors", "--strategy", strategy, *options)[0] == 0, strategy
        assert set(loaded(tmp_path)) == {"one", "thin"}


def test_bug_an_error_that_is_infinite_was_no_json(tmp_path, run):
    save_file({"zeros": torch.zeros(200, 8), "others": torch.randn(200, 8)}, tmp_path / "t.safetensors")
    code, text, _ = run(tmp_path / "t.safetensors", "--strategy", "unified", "--budget", "30%", "--json")
    found = json.loads(text, parse_constant=pytest.fail)
    assert code == 0
    errors = {row["table"]: row["relative_error"] for row in found["tables"]}
    assert errors["zeros"] is None
    assert 0 < errors["others"] < 1


def test_bug_progress_had_no_total(tmp_path, weights, run, monkeypatch):
    pytest.importorskip("tqdm")
    torch.save(weights, tmp_path / "w.pt")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    code, _, error = run(tmp_path / "w.pt", "--strategy", "quantize", "--set", "bits=8")
    assert code == 0
    assert "checking: 100%" in error
    assert "reading: 100%" in error


def test_bug_sizes_of_tables_of_several_dimensions_could_not_be_given(tmp_path, file, run):
    sizes = 'num_rows={"tables.user": 50, "tables.item": 20}'
    code, _, _ = run(file, "--strategy", "hash", "--set", sizes)
    assert code == 0
    assert {name: own.config.num_rows for name, own in loaded(tmp_path).items()} == {
        "tables.user": {"tables.user": 50},
        "tables.item": {"tables.item": 20},
    }
    for wrong, message in (
        ('num_rows={"tables.user": 50}', "has no entry for tables tables.item"),
        ('num_rows={"tables.user": 50, "tables.item": 20, "tables.itme": 3}', "names table 'tables.itme'"),
    ):
        code, _, error = run(file, "--strategy", "hash", "--set", wrong, output="other")
        assert code == 2
        assert message in error
