"""``embcomp compress``: what it refuses, before anything is written: options, files, damage, and outputs."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import embcomp
from embcomp.cli import main


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
        embcomp.load_tables(tmp_path / "out")[0].materialize("tables.user"), weights["tables.user.weight"]
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
