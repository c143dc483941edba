"""Vectors of a table in .npy and .parquet files."""

import sys

import numpy as np
import pytest
import torch

from embcomp.errors import ExportError, InputError, MissingDependencyError, UnseenIdError
from embcomp.integrations.export import dump_vectors, vectors
from embcomp.testing._cases import build

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setattr(vectors, "CHUNK", 64)  # so that a table has several chunks
    return build("hash", rows="int8:row", unseen="hash").finalize()


def test_npy(tables, tmp_path):
    seen = []
    told = dump_vectors(tables, "user", tmp_path / "v.npy", progress=seen.append)
    matrix = np.load(told.path, mmap_mode="r")
    assert matrix.dtype == np.float32
    assert torch.equal(torch.from_numpy(np.array(matrix)), tables.materialize("user"))
    assert seen == [64, 64, 64, 64, 44]
    assert (told.kind, told.file_bytes) == ("npy", 128 + 300 * 6 * 4)


def test_parquet(tables, tmp_path):
    dump_vectors(tables, 0, tmp_path / "v.parquet")
    file = parquet.ParquetFile(tmp_path / "v.parquet")
    assert file.metadata.num_row_groups == 5
    table = file.read()
    assert table.column_names == ["id", "vector"]
    assert table["id"].to_pylist() == list(range(300))
    assert str(table.schema.field("vector").type).startswith("fixed_size_list<")
    found = torch.from_numpy(np.stack(table["vector"].to_pandas()))
    assert torch.equal(found, tables.materialize("user"))


def test_chosen_ids_with_names(tables, tmp_path):
    ids = torch.tensor([7, 3, -5, 2**40])
    dump_vectors(tables, "item", tmp_path / "v.npy", ids=ids)
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "v.npy")), tables(ids, "item"))
    dump_vectors(tables, "item", tmp_path / "v.parquet", ids=ids, names=["a", "b", "c", "ü"])
    table = parquet.read_table(tmp_path / "v.parquet")
    assert table.column_names == ["id", "name", "vector"]
    assert table["name"].to_pylist() == ["a", "b", "c", "ü"]
    assert table["id"].to_pylist() == ids.tolist()
    for suffix in (".npy", ".parquet"):
        path = dump_vectors(tables, "item", tmp_path / f"none{suffix}", ids=ids[:0]).path
        found = np.load(path).shape[0] if suffix == ".npy" else parquet.read_table(path).num_rows
        assert found == 0


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_no_more_than_a_chunk_is_composed_at_once(tables, tmp_path, suffix):
    sizes = []
    tables.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    dump_vectors(tables, "user", tmp_path / f"v{suffix}")
    assert sizes == [64, 64, 64, 64, 44]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("v.csv", {}, "written to .npy or .parquet"),
        ("v.npy", {"names": ["a"]}, "a .parquet file has a name for each"),
        ("v.parquet", {"names": ["a"]}, "1 of them for 300 vectors"),
        ("v.parquet", {"names": [1] * 300}, "must be strings"),
        ("v.npy", {"ids": [1, 2]}, "not list"),
        ("v.npy", {"ids": torch.zeros(2)}, "float32"),
        ("v.npy", {"ids": torch.zeros(2, 2, dtype=torch.int64)}, r"\(2, 2\)"),
    ],
)
def test_wrong_arguments(tables, tmp_path, name, options, message):
    with pytest.raises(ExportError, match=message):
        dump_vectors(tables, "user", tmp_path / name, **options)
    assert not any(tmp_path.iterdir())


def test_what_can_not_be_written_leaves_nothing(tables, tmp_path, monkeypatch):
    strict = build("hash").finalize()
    with pytest.raises(UnseenIdError):
        dump_vectors(strict, "user", tmp_path / "v.npy", ids=torch.tensor([1, 300]))
    with pytest.raises(InputError, match="no table"):
        dump_vectors(tables, "users", tmp_path / "v.npy")
    with pytest.raises(ExportError, match="training form"):
        dump_vectors(build("hash"), "user", tmp_path / "v.npy")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"embcomp\[serve\]"):
        dump_vectors(tables, "user", tmp_path / "v.parquet")
    assert not any(tmp_path.iterdir())
