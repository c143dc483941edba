"""Compression after training: the same as fitting and finalizing in memory, bit for bit, without the memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from embcomp import (
    BudgetError,
    IncompatibleStateError,
    SpecError,
    TableSpec,
    list_strategies,
    load_tables,
    make_config,
    plan,
)
from embcomp.config import get_strategy
from embcomp.post_training import compress_tables, relative_error
from embcomp.row_source import CHUNK_VALUES, RowSource
from embcomp.storage.base import MatrixRows, rows_are_lent

MEGABYTE = 2**20
STREAMED = [name for name in list_strategies() if get_strategy(name).tables_class.can_be_streamed]
TAKE_ROWS = [name for name in STREAMED if name not in ("compact", "quantize")]  # which choose them themselves
CASES = [
    *((name, {}) for name in STREAMED),
    *((name, {"unseen": "oov_row"}) for name in STREAMED),
    *((name, {"rows": rows}) for name in TAKE_ROWS for rows in ("int8", "int4:table:offset")),
    ("full", {"rows": "bfloat16:pure"}),
    ("quantize", {"bits": 4, "granularity": "group7"}),
    ("quantize", {"bits": 8, "granularity": "row", "aware": False}),
    ("hash", {"num_hashes": 2}),
    ("hash", {"num_hashes": 2, "combine": "concat"}),
    ("hash", {"num_hashes": 2, "combine": "weighted", "rows": "int8"}),
    ("compositional", {"shuffle": True}),
    ("compositional", {"shuffle": True, "combine": "concat"}),
    ("compositional", {"combine": "sum"}),
    ("unified", {"reader": "sign", "chunk_dim": 4}),
    ("frequency_cut", {"tail": "hash"}),
    ("magnitude", {"min_per_row": 1, "weighted": True}),
    ("compact", {"projection": "linear", "max_share": 8}),
]


def trained(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(1.0, 0.1, 8)
    sizes = {"user": 700, "item": 150, "country": 5}
    return {name: (torch.randn(size, 8, generator=generator) * scale).to(dtype) for name, size in sizes.items()}


def counted(weights):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randint(0, 50, (len(rows),), generator=generator) for name, rows in weights.items()}


def in_memory(weights, config, budget, counts, std):
    specs = [TableSpec(name, *rows.shape, init_std=std[name]) for name, rows in weights.items()]
    planned = plan(specs, config, budget, counts, weights)
    return planned.build().load_dense_(weights, counts).finalize_()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("embcomp.row_source.CHUNK_VALUES", 8 * 64)


def smallest_or(name, options, specs, budget):
    try:
        plan(specs, make_config(name, **options), budget)
    except BudgetError as error:
        return f"{error.minimum_bytes}B"
    return budget


@pytest.mark.parametrize("with_counts", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_streamed_tables_are_those_fitted_in_memory(small_chunks, name, options, with_counts):
    weights = trained(torch.float16)
    counts = counted(weights) if with_counts else None
    config = make_config(name, **options)
    specs = [TableSpec(table, *rows.shape) for table, rows in weights.items()]
    is_sized = name == "full" or "bits" in options
    budget = None if is_sized else smallest_or(name, options, specs, "40%")
    [found] = compress_tables(weights, config, budget, counts)
    wanted = in_memory(weights, config, budget, counts, {spec.name: spec.init_std for spec in found.specs})
    assert found.is_final
    assert found.config == wanted.config
    have, want = found.state_dict(), wanted.state_dict()
    assert have.keys() == want.keys()
    # Some processors round the product of a chunk otherwise than that of the whole.
    tolerance = 1e-5 if name in ("low_rank", "reduced_dim") else 0.0
    for key, tensor in want.items():
        torch.testing.assert_close(have[key], tensor, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize("name", STREAMED)
def test_streamed_stores_have_no_rows_of_their_own(name):
    with rows_are_lent():
        specs = [TableSpec("user", 1000, 16), TableSpec("item", 100, 16)]
        tables = plan(specs, name, None if name == "full" else "60%").build()
    stores = [module for module in tables.modules() if isinstance(module, MatrixRows)]
    assert stores
    assert all(store.weight.is_meta for store in stores)


def test_lending_ends():
    with rows_are_lent():
        pass
    tables = plan([TableSpec("user", 10, 4)], "full").build()
    assert not tables.rows.weight.is_meta


def test_every_dimension_is_a_group_under_one_budget():
    weights = {"a": torch.randn(500, 8), "b": torch.randn(300, 4), "c": torch.randn(200, 8)}
    groups = compress_tables(weights, "hash", "20%")
    assert [tables.names for tables in groups] == [("a", "c"), ("b",)]
    allowed = sum(4 * rows.numel() for rows in weights.values()) // 5
    assert 0.98 * allowed < sum(tables.memory().serve_bytes for tables in groups) <= allowed


def test_errors_are_relative_and_weighted():
    weights = {"a": torch.tensor([[3.0, 4.0], [1.0, 0.0]]), "b": torch.ones(4, 2)}
    groups = compress_tables(weights, make_config("quantize", bits=32))
    assert relative_error(groups, weights) == {"a": 0.0, "b": 0.0, "": 0.0}
    shifted = {"a": weights["a"] + torch.tensor([[0.0, 1.0], [2.0, 0.0]]), "b": weights["b"]}
    assert relative_error(groups, shifted)["a"] == pytest.approx((5 / (9 + 25 + 9)) ** 0.5)
    counts = {"a": torch.tensor([3, 1])}
    found = relative_error(groups, shifted, counts)
    assert found["a"] == pytest.approx(((3 + 4) / (3 * 34 + 9)) ** 0.5)
    assert found[""] == pytest.approx(((3 + 4) / (3 * 34 + 9 + 8)) ** 0.5)
    assert relative_error(groups, {"b": torch.zeros(4, 2)})["b"] == float("inf")


@pytest.mark.parametrize("name", sorted(set(list_strategies()) - set(STREAMED)))
def test_strategies_that_need_all_rows_say_so_before_any_work(name):
    def read(index):
        raise AssertionError("nothing is to be read but the sample")

    class Sampled(RowSource):
        def __getitem__(self, index):
            return torch.randn(100, 16)

    rows = Sampled(read, 2**24, 16)
    with pytest.raises(BudgetError, match=rf"strategy '{name}' needs all rows at once.*\(2147483648 B\)"):
        compress_tables({"user": rows}, name, "10%")


def test_weights_that_are_not_finite_are_named(small_chunks):
    rows = torch.zeros(1000, 8)
    rows[700, 3] = torch.nan
    with pytest.raises(SpecError, match="'user' are not all finite: the first row that is not so is 700"):
        compress_tables({"user": rows}, "hash", "10%")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
@pytest.mark.parametrize("name", STREAMED)
def test_tables_larger_than_memory_are_compressed(name, tmp_path):
    write_tables(tmp_path / "tables.safetensors", {"user": 120 * MEGABYTE, "item": 8 * MEGABYTE})
    options = {"full": ["--set", "rows=float16"], "mixed_dim": ["--budget", "15%"], "quantize": ["--budget", "13%"]}
    limit = 88 + 40 * (name == "full")
    budget = options.get(name, ["--budget", "4%"])
    arguments = [str(tmp_path / "tables.safetensors"), "--strategy", name, *budget, "-o", str(tmp_path / "out")]
    run_limited(arguments, limit * MEGABYTE, "more")
    [tables] = load_tables(tmp_path / "out")
    assert set(tables.names) == {"user", "item"}


def write_tables(path, sizes, dim=32):
    """Tables of so many bytes in a safetensors file without a copy of them in memory: random ends, zeros between."""
    header, end = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "F32", "shape": [size // (4 * dim), dim], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        file.truncate(8 + len(text) + end)
        file.write(len(text).to_bytes(8, "little") + text)
        for name, own in header.items():
            for place in (own["data_offsets"][0], own["data_offsets"][1] - sizes[name] // 8):
                file.seek(8 + len(text) + place)
                file.write(generator.normal(size=sizes[name] // 32).astype(np.float32).tobytes())


def run_limited(arguments, limit, counted):
    """Run ``embcomp compress`` in a process that may take so many bytes in all, or more than after its imports."""
    script = Path(__file__).parent / "limited_compress.py"
    # Every thread takes heaps of its own, and glibc keeps what is freed unless it came from a map.
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, str(script), str(limit), counted, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=alone,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_chunks_are_of_bounded_size():
    source = RowSource.of(torch.zeros(100_000, 64))
    assert {rows.stop - rows.start for rows in source.chunks()} == {CHUNK_VALUES // 64, 100_000 % (CHUNK_VALUES // 64)}


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
def test_4_gib_are_compressed_within_1_gib(tmp_path):
    file, rows = tmp_path / "user.npy", 2**24
    table = np.lib.format.open_memmap(file, "w+", np.float32, (rows, 64))  # a sparse file: nearly all of it is zeros
    for start in (0, rows // 2, rows - 10_000):
        table[start : start + 10_000] = np.random.default_rng(start).normal(size=(10_000, 64))
    del table
    arguments = [str(file), "--strategy", "hash", "--budget", "1%", "-o", str(tmp_path / "out"), "--json"]
    found = json.loads(run_limited(arguments, 1024 * MEGABYTE, "in all"))
    assert found["float32_bytes"] == 2**32
    assert 0.98 * 2**32 / 100 < found["serve_bytes"] <= 2**32 / 100


@pytest.mark.parametrize("name", list_strategies())
def test_bug_large_values_gave_vectors_that_were_infinite_or_none(name):
    weights = {"user": torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) * 1e11}
    budget = {"full": None, "mixed_dim": "100%", "compact": "30%", "quantize": "30%"}.get(name, "80%")
    groups = compress_tables(weights, name, budget, {"user": torch.full((300,), 10**9)})
    assert relative_error(groups, weights)[""] < 1.2
    weights["user"][7, 3] = 1e20
    with pytest.raises(SpecError, match=r"'user' are not all at most 1e\+12: the first row that is not so is 7"):
        compress_tables(weights, name, budget)


@pytest.mark.parametrize("name", ["hash", "magnitude", "nested", "low_rank"])
def test_bug_float16_rows_were_infinite_without_a_word(name):
    weights = {"user": torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) * 3e5}
    with pytest.raises(IncompatibleStateError, match="float16 can't hold values beyond 65504"):
        compress_tables(weights, make_config(name, rows="float16"), "45%")
