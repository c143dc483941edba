"""Rows of different widths against the dense rows that they were taken from, times a mask."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcomp import ConfigError
from embcomp.storage import RowFormat, make_row_store, packing
from embcomp.storage.packed import PackedRows
from embcomp.storage.ragged import RaggedRows, ragged_bytes
from embcomp.testing.training import LargestTensor

DIMS = (1, 2, 3, 6, 16)
FORMATS = ["float32", "bfloat16", "float16", "float16:pure", "int8", "int2"]
FORMATS += [f"int{bits}:{kind}" for bits, kind in itertools.product((8, 4, 3, 2, 1), ("row", "column:offset", "table"))]
FORMATS += ["int4:row:after", "int3:column:after", "int8:table:offset:after"]
TABLES = [[(5, 6), (0, 3), (7, 2)], [(0, 6)], [(9, 3)], [(4, 0), (1, 1), (0, 2)]]
"""For each table its segments, each with a number of rows and a width."""


def made(rows, dim, tables, seed=0):
    """Ragged rows, what their segments must look up ``(n, d)``, and the store that they were taken from."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [sum(number for number, _ in table) + 2 for table in tables]
    store = make_row_store(rows, sizes, dim)
    store.reset_parameters([0.01, 1.0, 0.3, 5.0][: len(sizes)], generator)
    store.fit_scales_()
    served, starts = store.eval().finalize(), store.starts()
    kept, expected = [], []
    for owner, table in enumerate(tables):
        order = starts[owner] + torch.randperm(sizes[owner], generator=generator)
        chosen = order.split([number for number, _ in table] + [2])[:-1]
        for (_, width), own in zip(table, chosen, strict=True):
            dense = served(own, owner).detach()
            expected.append(torch.where(torch.arange(dim) < width, dense, 0.0))
            kept.append(own)
    ragged = empty(rows, dim, tables)
    for tensor in ragged.state_dict().values():
        tensor.fill_(7)
    return ragged.take_(served, kept), expected, served


def empty(rows, dim, tables):
    owners = [owner for owner, table in enumerate(tables) for _ in table]
    segments, widths = zip(*itertools.chain(*tables), strict=True)
    return RaggedRows(segments, dim, RowFormat.parse(rows).resolve(dim), widths, owners)


def every_row(segments):
    segment = torch.arange(len(segments)).repeat_interleave(torch.tensor(segments))
    return torch.arange(sum(segments)), segment


def state_bytes(module):
    return sum(tensor.nbytes for tensor in module.state_dict().values())


@st.composite
def shapes(draw):
    dim = draw(st.sampled_from(DIMS))
    table = st.lists(st.tuples(st.integers(0, 9), st.integers(0, dim)), min_size=1, max_size=3)
    return dim, draw(st.lists(table, min_size=1, max_size=3))


@settings(deadline=None, max_examples=400)
@given(rows=st.sampled_from(FORMATS), shape=shapes(), seed=st.integers(0, 2**32 - 1))
def test_vectors_are_the_first_values_of_dense_rows(rows, shape, seed):
    dim, tables = shape
    ragged, expected, _ = made(rows, dim, tables, seed)
    index, segment = every_row(ragged.segments)
    dense = torch.cat(expected)
    assert torch.equal(ragged(index, segment), dense)
    for number, (start, own) in enumerate(zip(ragged.starts(), expected, strict=True)):
        assert torch.equal(ragged(torch.arange(start, start + len(own)), number), own)
    assert state_bytes(ragged) == sum(ragged.serve_bytes())
    assert min(ragged.serve_bytes()) >= 0
    assert ragged.serve_bytes() == ragged_bytes(ragged.segments, dim, ragged.row_format, ragged.widths, ragged.owners)


@pytest.mark.parametrize("rows", FORMATS)
@pytest.mark.parametrize("dim", DIMS)
def test_rows_and_segments_of_any_shape(rows, dim):
    tables = [[(number, min(width, dim)) for number, width in table] for table in TABLES]
    ragged, expected, _ = made(rows, dim, tables)
    index, segment = every_row(ragged.segments)
    dense = torch.cat(expected)
    for shape in [(3, 4), (2, 0, 3), (2, 1, 5), ()]:
        asked = torch.randint(0, len(index), shape)
        found = ragged(asked, segment[asked])
        assert found.dtype == torch.float32
        assert torch.equal(found, dense[asked])
    # A column for each segment; an empty one may be asked for the row that it would begin with.
    asked = torch.tensor(ragged.starts()) + torch.stack([torch.arange(6) % max(n, 1) for n in ragged.segments], 1)
    full = [number for number, own in enumerate(expected) if len(own)]
    wanted = dense[asked[:, full]]
    assert torch.equal(ragged(asked)[:, full], wanted)
    assert torch.equal(ragged(asked.view(2, 3, -1))[..., full, :], wanted.view(2, 3, len(full), dim))
    assert torch.equal(ragged(asked, torch.arange(len(expected)))[:, full], wanted)
    assert torch.equal(ragged(asked.T, torch.arange(len(expected))[:, None])[full], wanted.transpose(0, 1))
    assert torch.equal(ragged(asked[0, 0], 0), dense[0])
    assert ragged.finalize() is ragged
    assert not any(p.requires_grad for p in ragged.parameters())


@pytest.mark.parametrize("rows", FORMATS)
@pytest.mark.parametrize("tables", [[[(0, 6)], [(0, 6)]], [[(0, 0), (0, 3)]], [[(3, 0)], [(2, 0), (4, 0)]]])
def test_a_store_without_values_gives_zeros(rows, tables):
    ragged, _, _ = made(rows, 6, tables)
    for number, start in enumerate(ragged.starts()):
        assert torch.equal(ragged(torch.tensor([start, start]), number), torch.zeros(2, 6))
    assert not torch.cat([t.view(-1) for name, t in ragged.state_dict().items() if name in ("codes", "values")]).any()


@pytest.mark.parametrize("rows", ["float32", "int8:row", "int3:column"])
def test_rows_are_taken_in_chunks_without_a_seam(rows, monkeypatch):
    whole = made(rows, 6, TABLES)[0].state_dict()
    monkeypatch.setattr("embcomp.storage.ragged._CHUNK_ROWS", 2)
    assert all(torch.equal(t, whole[name]) for name, t in made(rows, 6, TABLES)[0].state_dict().items())


@pytest.mark.parametrize("rows", FORMATS)
def test_loaded_copied_and_moved_forms(rows):
    ragged, expected, _ = made(rows, 6, TABLES)
    index, segment = every_row(ragged.segments)
    with torch.device("meta"):
        loaded = empty(rows, 6, TABLES)
    assert all(tensor.is_meta for tensor in loaded.state_dict().values())
    loaded.load_state_dict(ragged.state_dict(), assign=True)
    plain = empty(rows, 6, TABLES)
    plain.load_state_dict(ragged.state_dict())
    for other in (loaded, plain, copy.deepcopy(ragged)):
        assert torch.equal(other(index, segment), torch.cat(expected))
    with torch.device("meta"):
        store = make_row_store(rows, [14, 2, 11, 7], 6)
        taken = empty(rows, 6, TABLES).take_(store.finalize(), [torch.empty(n) for n in ragged.segments])
    assert taken.serve_bytes() == ragged.serve_bytes()


@pytest.mark.parametrize(
    "rows", ["float32", "float16", "int8:row", "int8:column", "int4:row", "int3:table", "int1:row"]
)
@pytest.mark.parametrize("tables", [[[(9, 2), (9, 6)], [(9, 3)]], [[(9, 6)], [(9, 6)]]], ids=["ragged", "full"])
def test_compiled_and_exported_forms_agree_bit_for_bit(rows, tables):
    ragged, _, _ = made(rows, 6, tables)
    index = torch.randint(0, 9, (7, len(ragged.segments))) + torch.tensor(ragged.starts())
    torch.compiler.reset()
    compiled = torch.compile(ragged, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index), ragged(index))
    program = torch.export.export(ragged, (index[:4],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(program.module()(index), ragged(index))


@pytest.mark.parametrize(
    "rows", ["float32", "float16", "int8:row", "int8:column", "int4:row", "int3:table", "int1:row"]
)
def test_a_lookup_makes_no_tensor_that_grows_with_the_rows(rows):
    sizes = []
    for number in (1000, 100_000):
        ragged, _, _ = made(rows, 16, [[(number, 5), (number, 16)]])
        with (largest := LargestTensor()):
            ragged(torch.arange(0, number, number // 50), 0)
        sizes.append(largest.size)
    assert sizes[0] == sizes[1] <= 50 * 17 * 8


def test_groups_of_rows_and_training_forms_are_refused():
    with pytest.raises(ConfigError, match="int4:column"):
        RaggedRows([3], 4, RowFormat.parse("int4:group8"), [2])
    ragged = RaggedRows([3], 4, RowFormat.parse("int4:column"), [2])
    for store in (make_row_store("int4:column", [3], 4), ragged):
        with pytest.raises(TypeError, match=type(store).__name__):
            ragged.take_(store, [torch.arange(3)])


# ---- reading parts of packed rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", packing.BITS)
def test_runs_may_begin_at_any_code(bits):
    codes = torch.randint(0, 2**bits, (50,), dtype=torch.uint8)
    packed, starts = packing.pack(codes, bits), torch.arange(50)
    for length in (1, 2, 3, 7, 8, 9, 16, 21):
        found = packing.gather_runs(packed, starts.view(5, 10), length, bits).view(50, length)
        for start in range(50):
            assert torch.equal(found[start, : 50 - start], codes[start : start + length])


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", packing.BITS)
def test_codes_and_grids_are_read_back_as_they_were_stored(bits, dim):
    codes = torch.randint(0, 2**bits, (20, dim), dtype=torch.uint8)
    scale, low = torch.rand(20, 1).half(), torch.randn(20, 1).half()
    rows = torch.tensor([19, 0, 7, 7, 3])
    by_row, by_table = (PackedRows([13, 7], dim, RowFormat.parse(f"int{bits}:{kind}")) for kind in ("row", "table"))
    by_row.store_(0, codes, scale, low)
    by_table.store_(0, codes)
    for packed in (by_row, by_table):
        assert torch.equal(packed.codes_of(rows), codes[rows])
        assert packed.codes_of(rows[:0]).shape == (0, dim)
    for asked in (rows, rows[:1], rows[:0]):
        for part, stored in zip(by_row.row_grids_of(asked), (scale, low), strict=True):
            assert part.dtype == (torch.float32 if bits == 8 else torch.float16)
            assert torch.equal(part.half(), stored[asked])
        if by_row.fused:
            assert torch.equal(by_row._lookup_rows(asked), by_row(asked))
