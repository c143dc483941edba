"""``embcomp compress``: files of all kinds, what it says, and what it refuses before anything is written."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import embcomp
from embcomp.cli import main


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "tables.user.weight": torch.randn(600, 8, generator=generator),
        "tables.item.weight": torch.randn(200, 4, generator=generator).half(),
    }


@pytest.fixture
def file(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.fixture
def run(tmp_path, capsys):
    def call(source, *arguments, output="out", overwrite=True):
        replaces = ["--overwrite"] if overwrite else []
        code = main(["compress", str(source), "-o", str(tmp_path / output), *map(str, arguments), *replaces])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strategy", "hesh", "--budget", "10%"), "did you mean 'hash'"),
        (("--strategy", "hash"), "leaves its size (rows) open: give budget="),
        (("--strategy", "hash", "--budget", "0.001%"), "smallest feasible budget is"),
        (("--strategy", "hash", "--budget", "lots"), "can't be read"),
        (("--budget", "10%", "--set", "rows"), "write OPTION=VALUE"),
        (("--strategy", "hash", "--budget", "10%", "--set", "num_hashs=2"), "did you mean 'num_hashes'"),
        (("--strategy", "hash", "--budget", "10%", "--set", "seed=x"), "must be int, not str"),
        (("--strategy", "hash", "--budget", "10%", "--set", "seed=3", "seed=4"), "an option is there twice"),
        (("--strategy", "hash", "--budget", "10%", "--set", "seed=3", "--set", "seed=4"), "an option is there twice"),
        (("--strategy", "hash", "--budget", "10%", "--set", "seed=" + "[" * 200_000), "must be int, not str"),
        (("--strategy", "nested", "--budget", "10%", "--memory", "1kB"), "needs all rows at once"),
        (("--budget", "10%", "--memory", "10%"), "give bytes, such as 8GiB"),
        (("--budget", "10%", "--table", "tables.usr"), "did you mean 'tables.user.weight'"),
        (("--budget", "10%", "--counts", "nowhere.safetensors"), "nowhere.safetensors can't be read"),
        (("--budget", "10%", "--counts", "nowhere.npy"), "counts of one table, of 2"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_written(tmp_path, file, run, arguments, message):
    code, text, error = run(file, *arguments)
    assert (code, text) == (2, "")
    assert message in error
    assert not (tmp_path / "out").exists()


STATES = {
    "model.pt": lambda rows: {"a.weight": rows, "b.bias": torch.zeros(4)},
    "code.pt": lambda rows: {"a": print, "b": rows},
    "deep.pt": lambda rows: {"net": {"a": rows}, "epoch": 3},
    "list.pt": lambda rows: [rows],
    "ints.pt": lambda rows: {"a": rows.long(), "b": torch.zeros(3, 0), "c": rows.to_sparse()},
    "twice.pt": lambda rows: {"a": rows, "a.weight": rows},
}
ARRAYS = {
    "nan.npy": np.full((20, 4), np.nan, np.float32),
    "vector.npy": np.zeros(20, np.float32),
    "objects.npy": np.array([[print]], dtype=object),
    "cut.npy": np.zeros((20, 4), np.float32),
}


def broken(tmp_path, name):
    path = tmp_path / name
    rows = torch.randn(20, 4)
    if name in STATES:
        torch.save(STATES[name](rows), path)
    elif name in ARRAYS:
        np.save(path, ARRAYS[name])
    elif name == "cut.safetensors":
        save_file({"a": rows}, path)
    elif name != "nowhere.pt":
        path.write_bytes(b"nothing of the kind")
    if name.startswith("cut."):
        os.truncate(path, path.stat().st_size - 1)
    return path


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.pt", "does not exist"),
        ("w.csv", "'.csv' are not known"),
        ("w.pt", "can't be read"),
        ("w.npy", "can't be read"),
        ("w.safetensors", "can't be read"),
        ("code.pt", "can't be read"),
        ("list.pt", "holds a list"),
        ("deep.pt", "its keys are 'net', 'epoch': write torch.save(model.state_dict(), path)"),
        ("model.pt", "looks like the state of a whole model: say which"),
        (
            "ints.pt",
            "no float matrix (V, D); it has a (no dense matrix of floats), b (empty), c (no dense",
        ),
        ("twice.pt", "two are one table's"),
        ("nan.npy", "are not all finite: the first row that is not so is 0"),
        ("vector.npy", "no matrix, its shape is (20,)"),
        ("objects.npy", "can't be read"),
        ("cut.npy", "can't be read"),
        ("cut.safetensors", "can't be read"),
        ("w.onnx", "is an export, a graph of ONNX"),
    ],
)
def test_files_that_are_no_tables_are_told(tmp_path, run, name, message):
    code, text, error = run(broken(tmp_path, name), "--strategy", "quantize", "--set", "bits=8")
    assert (code, text) == (2, "")
    assert message in error
    assert name in error or "'nan'" in error
    assert not (tmp_path / "out").exists()


def test_the_folder_of_the_tables_is_no_output(tmp_path, file, run):
    code, _, error = run(file, "--budget", "10%", output=".")
    assert code == 2
    assert "give another folder" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]


def test_tables_of_one_id_and_of_one_dimension(tmp_path, run):
    save_file({"one": torch.ones(1, 16), "thin": torch.randn(500, 1)}, tmp_path / "w.safetensors")
    for strategy in embcomp.list_strategies():
        options = ("--set", "rows=float16") if strategy == "full" else ("--budget", "100%")
        assert run(tmp_path / "w.safetensors", "--strategy", strategy, *options)[0] == 0, strategy
        assert set(loaded(tmp_path)) == {"one", "thin"}


def test_an_output_that_is_a_file_is_refused_first(tmp_path, file, run):
    (tmp_path / "taken").write_text("mine")
    code, _, error = run(file, "--budget", "10%", output="taken")
    assert (code, (tmp_path / "taken").read_text()) == (2, "mine")
    assert "-o takes a folder" in error
    code, _, error = run(file, "--budget", "10%", output="taken/inside")
    assert code == 2
    assert "can't be written" in error


def test_bug_a_full_disk_is_an_error_that_names_the_output(tmp_path, file, run, full_disk):
    with full_disk():
        code, _, error = run(file, "--budget", "10%")
    assert code == 2
    assert f"{tmp_path / 'out'} can't be written" in error
    assert not (tmp_path / "out").exists()


def test_bug_an_error_that_is_infinite_was_no_json(tmp_path, run):
    save_file({"zeros": torch.zeros(200, 8), "others": torch.randn(200, 8)}, tmp_path / "t.safetensors")
    code, text, _ = run(tmp_path / "t.safetensors", "--strategy", "unified", "--budget", "30%", "--json")
    found = json.loads(text, parse_constant=pytest.fail)
    assert code == 0
    errors = {row["table"]: row["relative_error"] for row in found["tables"]}
    assert errors["zeros"] is None
    assert 0 < errors["others"] < 1


def flip(path, where):
    content = bytearray(path.read_bytes())
    content[where] ^= 16
    path.write_bytes(content)


def test_bug_flipped_values_of_an_archive_were_compressed(tmp_path, weights, run):
    """torch.load does not look at the checksums in what torch.save has written."""
    path = tmp_path / "w.pt"
    torch.save(weights, path)
    where = path.read_bytes().index(weights["tables.item.weight"].numpy().tobytes()) + 999
    flip(path, where)
    code, text, error = run(path, "--strategy", "full")
    assert (code, text) == (2, "")
    assert f"{path} is corrupt: w/data/1 is not what was saved" in error
    assert not (tmp_path / "out").exists()
    flip(path, where)
    assert run(path, "--strategy", "full")[0] == 0


def test_bug_empty_and_old_files_were_told_in_words_of_torch(tmp_path, weights, run):
    (tmp_path / "empty.pt").touch()
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(weights, tmp_path / "cut.pt")
    os.truncate(tmp_path / "cut.pt", 20_000)
    messages = {
        "empty.pt": "empty.pt is empty",
        "old.pt": "before torch 1.6, of which no part can be read by itself. Write it again: torch.save(torch.load(",
        "cut.pt": "torch.save has not written it, or not all of it",
    }
    for name, message in messages.items():
        code, _, error = run(tmp_path / name, "--budget", "10%")
        assert code == 2
        assert message in error
        assert "_use_new_zipfile_serialization" not in error


def test_archives_without_checksums_are_compressed(tmp_path, weights, run):
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(computed)
    assert run(tmp_path / "w.pt", "--strategy", "full")[0] == 0
    torch.testing.assert_close(
        loaded(tmp_path)["tables.user"].materialize("tables.user"), weights["tables.user.weight"]
    )


def test_bug_an_output_that_can_not_be_written_was_told_after_the_work(tmp_path, file, run, monkeypatch):
    (tmp_path / "taken").write_text("mine")
    monkeypatch.setattr("embcomp.cli.compress.compress_tables", lambda *given: pytest.fail("the work was begun"))
    code, _, error = run(file, "--budget", "10%", output="taken/inside")
    assert code == 2
    assert f"{tmp_path / 'taken' / 'inside'} can't be written" in error


def test_bug_an_interruption_was_a_traceback(tmp_path, file, run, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    for name in ("compress_tables", "save_pretrained"):
        with monkeypatch.context() as patched:
            patched.setattr(f"embcomp.cli.compress.{name}", interrupted)
            for output in ("new/out", "there"):
                code, text, error = run(file, "--strategy", "full", output=output)
                assert (code, text, error) == (130, "", "embcomp compress: interrupted\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", file.name]
    assert not any((tmp_path / "there").iterdir())


def test_bug_counts_were_refused_by_the_names_that_weights_have(tmp_path, file, run):
    save_file(
        {"tables.user.weight": torch.arange(600), "tables.item": torch.arange(200)}, tmp_path / "counts.safetensors"
    )
    arguments = ("--strategy", "hash", "--budget", "20%", "--counts", tmp_path / "counts.safetensors", "--json")
    assert json.loads(run(file, *arguments)[1])["weighted_by_counts"] == ["tables.item", "tables.user"]
    save_file(
        {"tables.user.weight": torch.arange(600), "tables.user": torch.arange(600)}, tmp_path / "counts.safetensors"
    )
    code, _, error = run(file, *arguments)
    assert code == 2
    assert "two are one table's, named with and without '.weight'" in error


def test_bug_rows_of_a_checkpoint_were_taken_for_a_table(tmp_path, file, run):
    run(file, "--strategy", "hash", "--budget", "20%")
    (rows,) = (tmp_path / "out").glob("*.safetensors")
    for arguments in (
        ("plan", rows),
        ("inspect", rows),
        ("compress", rows, "--budget", "10%", "-o", tmp_path / "again"),
    ):
        assert main(list(map(str, arguments))) == 2
    code, _, error = run(rows, "--budget", "10%", output="again")
    assert code == 2
    assert f"{rows} holds the rows of the checkpoint {rows.parent}" in error
    assert not (tmp_path / "again").exists()


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
