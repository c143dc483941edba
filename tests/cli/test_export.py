"""``embcomp export``: every kind of file, JSON, errors and exit codes."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import embcomp
from embcomp.cli import export, main


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def saved_in(folder, config, final=True, **sizes):
    model = nn.ModuleDict({name: nn.Embedding(200, dim) for name, dim in sizes.items()})
    handle = embcomp.compress_(model, config, verbose=False)
    if final:
        handle.finalize_()
    return embcomp.save_pretrained(handle, folder)


@pytest.fixture
def saved(tmp_path):
    return saved_in(tmp_path / "saved", embcomp.FullConfig(rows="int4:row", unseen="zero"), user=8, item=8)


def test_pt2(saved, tmp_path, capsys):
    code, text, error = run(capsys, "export", saved, "--to", "pt2", "-o", tmp_path / "t.pt2")
    assert (code, error) == (0, "")
    assert text.splitlines()[1:] == ["ids -> vectors", "unseen ids: zero"]
    ids, (tables,) = torch.tensor([[1, 2], [3, 4], [999, -1]]), embcomp.load_tables(saved)
    assert torch.equal(torch.export.load(tmp_path / "t.pt2").module()(ids), tables(ids))


def test_onnx_of_bags_as_json(saved, tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime")
    output = tmp_path / "t.onnx"
    code, text, _ = run(
        capsys, "export", saved, "--to", "onnx", "-o", output, "--table", "item", "--bag", "sum", "--json"
    )
    found = json.loads(text)
    assert code == 0
    assert (found["kind"], found["table"], found["inputs"]) == ("onnx", "item", ["ids", "offsets"])
    assert found["file_bytes"] == output.stat().st_size > found["serve_bytes"]
    session, (tables,) = runtime.InferenceSession(output), embcomp.load_tables(saved)
    ids, offsets = torch.tensor([5, 6, 7]), torch.tensor([0, 2])
    (got,) = session.run(None, {"ids": ids.numpy(), "offsets": offsets.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), tables.bag(ids, offsets, "item"), rtol=0, atol=1e-6)


def test_vectors(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, _, error = run(capsys, "export", saved, "--to", "npy", "-o", tmp_path / "v.npy", "--table", "item")
    assert code == 0
    assert "writing: 100%" in error
    assert "200/200" in error
    (tables,) = embcomp.load_tables(saved)
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "v.npy")), tables.materialize("item"))


@pytest.mark.torchrec
def test_fbgemm(saved, tmp_path, capsys):
    pytest.importorskip("torchrec")
    from embcomp.integrations.export import load_fbgemm

    assert run(capsys, "export", saved, "--to", "fbgemm", "-o", tmp_path / "t.safetensors")[0] == 0
    assert load_fbgemm(tmp_path / "t.safetensors").names == ["user", "item"]


def test_training_forms_are_finalized_in_memory(tmp_path, capsys):
    folder = saved_in(tmp_path / "saved", embcomp.FullConfig(rows="int8:row", unseen="zero"), final=False, user=8)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, text, _ = run(capsys, "export", folder, "--to", "npy", "-o", tmp_path / "v.npy")
    assert code == 0
    assert "finalized for this" in text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    wanted = embcomp.from_pretrained(folder).finalize_().materialize("user")
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "v.npy")), wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "npy", "-o", "v.npy"), "give --table, one of user, item"),
        (("--to", "npy", "-o", "v.npz", "--table", "user"), "must end with '.npy'"),
        (("--to", "npy", "-o", "v.npy", "--table", "users"), "did you mean 'user'"),
        (("--to", "parquet", "-o", "v.parquet", "--table", "user", "--bag", "sum"), "--bag is of lookups"),
        (("--to", "pt2", "-o", "v.pt2", "--bag", "sum"), "bags are of one table"),
        (("--to", "pt2", "-o", "v.onnx"), "must end with '.pt2'"),
    ],
)
def test_wrong_arguments(saved, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, text, error = run(capsys, "export", saved, *arguments)
    assert (code, text) == (2, "")
    assert error.startswith("embcomp export: ")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_what_is_there_stays(saved, tmp_path, capsys):
    output = tmp_path / "v.npy"
    output.write_text("mine")
    arguments = ("export", saved, "--to", "npy", "-o", output, "--table", "user")
    code, _, error = run(capsys, *arguments)
    assert (code, output.read_text()) == (2, "mine")
    assert "--overwrite" in error
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert np.load(output).shape == (200, 8)


def test_bad_checkpoints(saved, tmp_path, capsys):
    arguments = ("--to", "pt2", "-o", tmp_path / "t.pt2")
    two = saved_in(tmp_path / "two", "full", user=8, item=4)
    assert "2 groups of tables" in run(capsys, "export", two, *arguments)[2]
    assert "does not exist" in run(capsys, "export", tmp_path / "nowhere", *arguments)[2]
    (weights,) = saved.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    code, _, error = run(capsys, "export", saved, *arguments)
    assert code == 2
    assert "truncated" in error
    assert not (tmp_path / "t.pt2").exists()


def test_unknown_kinds_and_help(saved, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "export", saved, "--to", "tflite", "-o", tmp_path / "t")
    assert "invalid choice: 'tflite'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        run(capsys, "export", "--help")
    text = capsys.readouterr().out
    assert all(word in text for word in (*export.KINDS, "--table", "--overwrite", "--json"))
