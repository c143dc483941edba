"""The command line as people use it: sources of all kinds, text and JSON, errors and exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import embcomp
from embcomp.cli import main
from embcomp.cli.progress import progress_bar
from embcomp.cli.sources import read_specs
from embcomp.errors import SpecError


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


SOURCES = {
    "t.yaml": "dim: 16\ntables:\n  user: 1000\n  item: {size: 50, dim: 8, padding_idx: 0}\n  country: [de, fr]\n",
    "t.json": '{"user": 1000, "item": {"vocab_size": 50, "dim": 8, "padding_idx": 0}, "country": {"de": 0, "fr": 1}}',
    "t.tsv": "field\tvocab_size\tdim\nuser\t1000\t16\nitem\t50\t8\ncountry\t2\t\n",
}


@pytest.mark.parametrize("name", SOURCES)
def test_lists_of_tables_are_read(tmp_path, name):
    specs = read_specs(write(tmp_path, name, SOURCES[name]), dim=16)
    assert [(spec.name, spec.num_embeddings, spec.embedding_dim) for spec in specs] == [
        ("user", 1000, 16),
        ("item", 50, 8),
        ("country", 2, 16),
    ]
    assert specs[1].padding_idx == (None if name.endswith("tsv") else 0)


@pytest.mark.parametrize(
    ("name", "content"),
    [("city.json", '["de", "fr", "it"]'), ("city.txt", "de\nfr\n\nit\n"), ("city.yaml", "[de, fr, it]")],
)
def test_values_alone_are_the_vocabulary_of_one_table(tmp_path, name, content):
    (spec,) = read_specs(write(tmp_path, name, content), dim=8)
    assert (spec.name, spec.num_embeddings, spec.embedding_dim) == ("city", 3, 8)


@pytest.mark.parametrize(
    ("vocabulary", "rows"),
    [
        ({"size": 0, "rows": 1, "movie": 2}, 3),  # tokens that are called like options
        ({"dim": 2, "size": 3, "x": 4}, 5),  # after a padding and an unseen value
        ({"de": 1, "fr": 2}, 3),
        ({"de": 812, "fr": 64}, 2),  # counts
        ({"de": 1, "fr": 1, "it": 7}, 3),  # counts
        ({"de": 0, "fr": 5, "it": 9}, 10),  # those in between have gone, and row 9 is there
        (["size", "rows"], 2),
        ({"size": 7, "dim": 4}, 7),
    ],
)
def test_bug_values_called_size_are_no_sizes(tmp_path, vocabulary, rows):
    (spec,) = read_specs(write(tmp_path, "t.json", json.dumps({"word": vocabulary})), dim=16)
    assert spec.num_embeddings == rows


def test_weights_are_read(tmp_path):
    weights = {"a.weight": torch.zeros(30, 4), "b.weight": torch.zeros(20, 6)}
    save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.pt")
    np.save(tmp_path / "w.npy", np.zeros((30, 4), np.float32))
    wanted = [("a", 30, 4), ("b", 20, 6)]
    for name in ("w.safetensors", "w.pt"):
        specs = read_specs(tmp_path / name)
        assert [(spec.name, spec.num_embeddings, spec.embedding_dim) for spec in specs] == wanted
    (spec,) = read_specs(tmp_path / "w.npy")
    assert (spec.name, spec.num_embeddings) == ("w", 30)


def test_bug_plan_took_every_matrix_of_a_model_for_a_table(tmp_path, capsys):
    """Which are tables is what ``compress`` says, too."""
    save_file({"users.weight": torch.zeros(30, 4), "mlp.weight": torch.zeros(8, 4)}, tmp_path / "w.safetensors")
    save_file({"users.weight": torch.zeros(30, 4), "mlp.bias": torch.zeros(8)}, tmp_path / "m.safetensors")
    for name, table in (("w", "users"), ("m", "users.weight")):
        path = tmp_path / f"{name}.safetensors"
        _, text, _ = run(capsys, "plan", path, "--strategy", "full", "--table", table, "--json")
        assert [(row["table"], row["num_embeddings"]) for row in json.loads(text)["tables"]] == [("users", 30)]
    code, _, error = run(capsys, "plan", tmp_path / "m.safetensors")
    assert code == 2
    assert "by --table NAME" in error
    code, _, error = run(capsys, "plan", write(tmp_path, "t.json", '{"user": 9}'), "--table", "user")
    assert code == 2
    assert "--table chooses among the matrices of a file of weights" in error


def test_plan_puts_strategies_side_by_side(tmp_path, capsys):
    path = write(tmp_path, "t.yaml", SOURCES["t.yaml"])
    code, text, _ = run(capsys, "plan", path, "--budget", "20%", "2%", "--strategy", "hash", "low_rank", "full")
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == f"3 tables of {path}, 64.19 KiB as float32"
    assert lines[3].split()[:2] == ["hash", "160"]
    assert "too small" in text
    code, text, _ = run(capsys, "plan", path, "--budget", "20%", "--strategy", "hash", "--json")
    found = json.loads(text)
    (row,) = found["strategies"]
    (own,) = row["budgets"]
    assert own["serve_bytes"] <= 0.2 * found["float32_bytes"] < 1.1 * own["serve_bytes"]
    assert own["rows_read"] == [1, 1]
    assert own["train_bytes"]["adam"] == 4 * own["serve_bytes"]
    groups = [([s for s in read_specs(path) if s.embedding_dim == dim], "hash") for dim in (16, 8)]
    assert own["serve_bytes"] == sum(p.report.serve_bytes for p in embcomp.plan_groups(groups, "20%"))


def test_plan_knows_all_strategies(tmp_path, capsys):
    code, text, _ = run(capsys, "plan", write(tmp_path, "t.json", '{"user": 3000}'), "--dim", "8", "--json")
    assert code == 0
    rows = json.loads(text)["strategies"]
    assert [row["strategy"] for row in rows] == embcomp.list_strategies()
    for row in rows:
        for own in row["budgets"]:
            assert own["serve_bytes"] is None or row["smallest_bytes"] <= own["serve_bytes"] <= 9600


@pytest.mark.torchrec
def test_plan_says_what_each_process_holds(tmp_path, capsys):
    pytest.importorskip("torchrec", reason="needs torchrec")
    path = write(tmp_path, "t.yaml", SOURCES["t.yaml"])
    wanted = ("plan", path, "--budget", "20%", "1B", "--strategy", "hash", "dynamic", "--processes", "3")
    code, text, _ = run(capsys, *wanted)
    assert code == 0
    assert "weights in each of 3" in text
    assert "can't be sharded" in text
    hashed, dynamic = json.loads(run(capsys, *wanted, "--json")[1])["strategies"]
    ranks = hashed["budgets"][0]["bytes_per_rank"]
    assert len(ranks) == 3
    assert hashed["budgets"][0]["serve_bytes"] <= sum(ranks) <= 1.3 * hashed["budgets"][0]["serve_bytes"]
    assert dynamic["budgets"][0]["bytes_per_rank"] is None
    assert hashed["budgets"][1]["bytes_per_rank"] is None


@pytest.mark.parametrize("number", ["-1", "0", "two", "1.5"])
def test_processes_are_a_whole_number(number, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "t.yaml", "--processes", number])
    assert f"--processes: {number!r} must be a whole number of at least 1" in capsys.readouterr().err


@pytest.fixture
def saved(tmp_path):
    model = nn.ModuleDict({"user": nn.Embedding(1000, 8), "out": nn.Linear(8, 1)})
    handle = embcomp.compress_(model, embcomp.HashConfig(unseen="hash"), "25%", verbose=False)
    handle.finalize_()
    return embcomp.save_pretrained(handle, tmp_path / "saved")


def test_inspect_tells_what_is_in_a_checkpoint(saved, capsys):
    code, text, _ = run(capsys, "inspect", saved)
    assert code == 0
    assert "serving form" in text
    assert "unseen='hash'" in text
    assert "31.25 KiB of tables, 7.81 KiB to serve (25.00%)" in text
    assert "and 2 other tensors, 36 B" in text
    found = json.loads(run(capsys, "inspect", saved, "--json")[1])
    assert found["serve_bytes"] == 8000
    assert found["tables"][0]["table"] == "user"
    assert read_specs(saved)[0].num_embeddings == 1000


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (None, "'groups' must be a list, found None"),
        ([3], "'specs' must be a list, found None"),
        ([{}], "'specs' must be a list, found None"),
        ([{"specs": [7]}], "can't be read"),
        ([{"specs": [{"name": "user", "rows": 3}]}], "can't be read"),
        ([{"specs": [{"name": "user", "num_embeddings": "x", "embedding_dim": 4}]}], "num_embeddings='x'"),
        ([], "describes no table"),
    ],
)
def test_bug_plans_of_configs_that_describe_no_tables(saved, capsys, groups, message):
    file = saved / "embcomp_config.json"
    content = json.loads(file.read_text()) | {"format_version": 1, "groups": groups}
    del content["config_sha256"]
    file.write_text(json.dumps(content))
    code, text, error = run(capsys, "plan", saved)
    assert (code, text) == (2, "")
    assert message in error


def test_inspect_tells_of_the_state_of_optimizers(tmp_path, capsys):
    tables = embcomp.build_tables([embcomp.TableSpec("user", 1000, 8)], "hash", "25%")
    optimizer = torch.optim.Adagrad(tables.parameters())  # which has a count of steps in 4 bytes
    embcomp.save_pretrained(tables, tmp_path, [optimizer])
    assert "and state of training, 7.82 KiB" in run(capsys, "inspect", tmp_path)[1]
    assert json.loads(run(capsys, "inspect", tmp_path, "--json")[1])["training_bytes"] == 8004


def test_inspect_tells_a_damaged_checkpoint(saved, capsys):
    (weights,) = saved.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    code, text, error = run(capsys, "inspect", saved)
    assert (code, text) == (2, "")
    assert "SHA-256" in error


def test_inspect_tells_matrices(tmp_path, capsys):
    save_file({"a": torch.zeros(30, 4)}, tmp_path / "w.safetensors")
    code, text, _ = run(capsys, "inspect", tmp_path / "w.safetensors")
    assert code == 0
    assert text.splitlines()[-1].split() == ["a", "30", "4"]


def test_strategies_lists_what_each_can(capsys):
    code, text, _ = run(capsys, "strategies")
    assert code == 0
    assert [line.split()[0] for line in text.partition("\n\n")[0].splitlines()[1:]] == embcomp.list_strategies()
    rows = {row["strategy"]: row for row in json.loads(run(capsys, "strategies", "--json")[1])["strategies"]}
    assert [name for name, row in rows.items() if row["front"]] == ["nested"]
    assert [name for name, row in rows.items() if row["any_id"]] == ["dynamic", "hash", "unified"]
    assert [name for name, row in rows.items() if not row["sharded"]] == ["dynamic", "magnitude", "nested", "optembed"]
    assert [name for name, row in rows.items() if not row["streamed"]] == ["dynamic", "nested", "optembed"]
    grow = ["dynamic", "frequency_cut", "full", "hash", "quantize", "reduced_dim"]
    assert [name for name, row in rows.items() if row["grows"]] == grow
    assert [name for name, row in rows.items() if row["fbgemm"]] == ["full", "quantize"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.yaml", "tables: {user: [", "no YAML"),
        ("t.json", "[[1, 2]]", "must be a mapping"),
        ("t.json", "3", "must be a mapping"),
        ("t.json", '{"apple": 1, "pear": 2, "plum": 3}', "if those are indices of one table's values, write {t: "),
        ("t.txt", "", "no value of a vocabulary"),
        ("t.txt", "apple\npear\napple\n", "'apple' is there twice"),
        ("t.txt", "apple\npear\n", "does not say the dimension of table 't'"),
        ("t.json", "{", "can't be read"),
        ("t.json", '{"user": -3}', "user"),
        ("t.json", '{"user": "many"}', "user"),
        ("t.json", f'{{"user": {10**25}}}', "and at most 9223372036854775807, as ids are int64"),
        ("t.json", f'{{"user": {10**18}}}', "make tensors of strategy 'compact' that are larger than int64 can count"),
        ("t.csv", "name,dim\nuser,3\n", "needs table and size"),
        ("t.csv", "name,size\nuser,3\n", "does not say the dimension of table 'user'"),
        ("t.npy", "no numbers", "can't be read"),
        ("t.safetensors", "no tensors", "can't be read"),
        ("t.pt", "no pickle", "can't be read"),
        ("t.xls", "", "not known"),
        ("t.json", "{}", "no table"),
        ("t.json", '{"user": {"size": 5000, "dimm": 8}}', "did you mean 'dim'"),
        ("t.json", '{"user": 5000, "user": 50}', "'user' is there twice"),
        ("t.yaml", "dim: 16\ntables: {user: 5000, user: 50}\n", "'user' is there twice"),
        (
            "t.yaml",
            "dim: 16.7\ntables: {user: 50}\n",
            "the dimension of table 'user' is 16.7, and must be a whole number",
        ),
        ("t.yaml", "dim: wide\ntables: {user: 50}\n", "the dimension of table 'user' is 'wide'"),
        ("t.yaml", "dim: 16\ntables: {user: {size: 50, dim: true}}\n", "the dimension of table 'user' is True"),
        ("t.csv", "name,size,dim\nuser,x,4\n", "the size of table 'user' is 'x'"),
        ("t.csv", "name,size,dim\nuser\n", "the size of table 'user' is None"),
        ("t.json", '{"dim": 16, "user": 5000}', "beside 'tables', a mapping of them, there is the dimension"),
        ("t.json", '{"tables": {"user": 5000}, "item": 50}', "nothing else; found tables, item"),
        ("t.yaml", "dim: 16\ntables: [user, item]\n", "found dim, tables"),
        ("t.csv", "table,size,dim\nuser,100,8\nuser,50,4\n", "table 'user' is there twice"),
        ("t.csv", "table,size,dim\nuser,100,8\n,50,4\n", "line 3 does not name its table"),
        ("t.yaml", "dim: 16\ntables:\n  yes: 100\n  no: 3\n", "True is no name of a table"),
        ("t.yaml", "dim: 16\ntables:\n  010: 100\n", "8 is no name of a table, which is a string: write it in quotes"),
        ("t.yaml", "dim: 16\ntables: {user: {size: 50, 3: 8}}\n", "table 'user' has the option '3'"),
        ("t.yaml", "dim: 16\ntables: &all\n  user: *all\n", "recursive"),
        ("t.yaml", "dim: 16\ntables: {user: " + "[" * 5000, "can't be read"),
        ("t.json", "[" * 200_000, "can't be read"),
    ],
)
def test_wrong_sources_are_errors_that_say_what_would_be_right(tmp_path, capsys, name, content, message):
    path = write(tmp_path, name, content)
    dim = ("--dim", "16") if name == "t.json" else ()
    code, text, error = run(capsys, "plan", path, *dim)
    assert (code, text) == (2, "")
    assert message in error
    assert str(path) in error or "user" in error


@pytest.mark.parametrize("name", SOURCES)
def test_bug_a_byte_order_mark_was_part_of_the_first_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + SOURCES[name].encode())
    assert [spec.name for spec in read_specs(tmp_path / name, dim=16)] == ["user", "item", "country"]


def test_bug_of_an_option_that_was_repeated_the_last_was_taken(tmp_path, capsys):
    save_file({name: torch.zeros(30, 4) for name in "abc"}, tmp_path / "w.safetensors")
    repeated = ("--table", "a", "--table", "b", "--strategy", "hash", "--strategy", "full", "low_rank")
    code, text, _ = run(
        capsys, "plan", tmp_path / "w.safetensors", *repeated, "--budget", "50%", "--budget", "90%", "--json"
    )
    found = json.loads(text)
    assert code == 0
    assert [row["table"] for row in found["tables"]] == ["a", "b"]
    assert [row["strategy"] for row in found["strategies"]] == ["hash", "full", "low_rank"]
    assert [[own["budget"] for own in row["budgets"]] for row in found["strategies"]] == [["50%", "90%"]] * 3
    found = json.loads(run(capsys, "plan", tmp_path / "w.safetensors", "--strategy", "hash", "--json")[1])
    assert [own["budget"] for own in found["strategies"][0]["budgets"]] == ["10%"]


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"a": print}, tmp_path / "w.pt")
    with pytest.raises(SpecError, match=r"w\.pt can't be read: it holds \S*print, which is no tensor") as refused:
        read_specs(tmp_path / "w.pt")
    assert "torch.save(model.state_dict(), path)" in str(refused.value)
    assert "weights_only" not in str(refused.value), "no advice to run the code all the same"


@pytest.mark.parametrize("arguments", [("plan", "/nowhere"), ("inspect", "/nowhere"), ("inspect", ".")])
def test_what_is_not_there_is_an_error(arguments, capsys):
    code, _, error = run(capsys, *arguments)
    assert code == 2
    assert arguments[1] in error


def test_unknown_strategies_and_budgets_are_errors(tmp_path, capsys):
    path = write(tmp_path, "t.yaml", SOURCES["t.yaml"])
    assert "did you mean 'hash'" in run(capsys, "plan", path, "--strategy", "hesh")[2]
    assert "lots" in run(capsys, "plan", path, "--budget", "lots")[2]


def test_bug_a_reader_that_has_enough_is_no_traceback(tmp_path):
    path = write(tmp_path, "t.json", json.dumps({f"table {index}": 100 + index for index in range(3000)}))
    command = [sys.executable, "-m", "embcomp.cli", "plan", str(path), "--dim", "8", "--strategy", "full", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_bug_output_that_can_not_be_written_was_a_traceback():
    command = [sys.executable, "-m", "embcomp.cli", "strategies"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("embcomp strategies: what was found can't be printed (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere does not exist: give a folder"),
        ("empty", "empty has no embcomp_config.json, so it is no checkpoint"),
        ("t.pt2", "t.pt2 is an export, a graph of torch.export or AOTInductor: give the checkpoint"),
        ("t.onnx", "t.onnx is an export, a graph of ONNX"),
        ("t.parquet", "t.parquet is an export, a file of vectors"),
    ],
)
def test_bug_inspect_did_not_say_what_it_was_given(tmp_path, capsys, name, message):
    (tmp_path / "empty").mkdir()
    if "." in name:
        (tmp_path / name).write_text("some")
    code, text, error = run(capsys, "inspect", tmp_path / name)
    assert (code, text) == (2, "")
    assert message in error


def test_bug_paths_that_can_not_be_asked_about_were_tracebacks(tmp_path, capsys):
    for command in ("plan", "inspect"):
        code, _, error = run(capsys, command, tmp_path / ("a" * 300))
        assert code == 2
        assert error.startswith(f"embcomp {command}: ")


def test_it_runs_as_a_module_and_says_what_it_can():
    done = subprocess.run([sys.executable, "-m", "embcomp.cli", "--help"], capture_output=True, text=True, check=True)
    assert all(word in done.stdout for word in ("plan", "inspect", "strategies"))
    assert (
        subprocess.run([sys.executable, "-m", "embcomp.cli", "plane"], capture_output=True, check=False).returncode == 2
    )


def test_without_tqdm_a_line_on_a_terminal_says_what_goes_on(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    for is_terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda told=is_terminal: told)
        with progress_bar("reading") as watch:
            watch(3)
        assert capsys.readouterr().err.startswith("reading ... (pip install tqdm") == is_terminal


def test_files_that_are_read_again_are_more_to_do(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar("reading", total=10) as watch:
        for more in (7, 3, 14):
            watch(more)
    assert "24/30" in capsys.readouterr().err
