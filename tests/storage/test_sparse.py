"""The serving form of pruned rows against dense rows times a mask, and its bytes against arithmetic."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcomp import ConfigError
from embcomp.storage import RowFormat, make_row_store
from embcomp.storage.bitmap import WORD, bitmap_of, build_bitmap, look_up_bitmap
from embcomp.storage.sparse import SparseRows
from embcomp.storage.sparse_sizes import LAYOUTS, dense_bytes, most_slots, share_out, smallest_layout, sparse_bytes
from embcomp.testing.training import LargestTensor

SEGMENTS = [7, 0, 66, 1]
DIMS = (1, 2, 3, 6, 16, 300)
FORMATS = ["float32", "float16", "bfloat16"]
FORMATS += [f"int{bits}:{kind}" for bits, kind in itertools.product((8, 4, 3, 2, 1), ("row", "column", "table:offset"))]
FORMATS += ["int8:column:offset", "int4:row:after"]


def made(layout, rows, dim, segments=SEGMENTS, seed=0, share=0.3, mask=None):
    """A training store, its plain serving form, a mask, and the sparse form of both."""
    generator = torch.Generator().manual_seed(seed)
    store = make_row_store(rows, segments, dim)
    store.reset_parameters([0.5] * len(segments), generator)
    store.fit_scales_()
    if mask is None:
        mask = torch.rand(sum(segments), dim, generator=generator) < share
    served, number = store.eval().finalize(), int(mask.sum())
    row_format = RowFormat.parse(rows).resolve(dim)
    slots = most_slots(segments, number, layout)
    sparse = SparseRows(segments, dim, row_format, number, slots, layout)
    return store, served, mask, sparse.take_(served, lambda rows: mask[rows])


def every_row(segments=SEGMENTS):
    segment = torch.arange(len(segments)).repeat_interleave(torch.tensor(segments))
    return torch.arange(sum(segments)), segment


def slow_bytes(segments, dim, rows, mask, layout, slots):
    """What a list of everything that is stored takes."""
    row_format = RowFormat.parse(rows).resolve(dim)
    num_rows, number = sum(segments), int(mask.sum())
    size = -(-number * row_format.bits // 8)
    if row_format.granularity == "row":
        size += (slots if layout == "dcsr" else num_rows) * (8 if row_format.bits == 8 else 4)
    elif row_format.is_integer:
        per_table = (dim if row_format.granularity == "column" else 1) * (2 if row_format.offset else 1)
        size += 4 * per_table * len(segments)
    if layout != "csr":
        size += 12 * -(-(num_rows * dim if layout == "bitmap" else num_rows) // 64)
    if layout != "bitmap":
        size += 4 * ((num_rows if layout == "csr" else slots) + 1) + number * (1 if dim <= 256 else 2)
    return size


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rows", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_are_those_of_evaluation_times_the_mask(layout, rows, dim):
    store, served, mask, sparse = made(layout, rows, dim)
    index, segment = every_row()
    expected = torch.where(mask, (served if ":after" in rows else store)(index, segment), 0.0).detach()
    assert torch.equal(sparse(index, segment), expected)
    order = torch.randperm(len(index))[:12].view(3, 4)
    assert torch.equal(sparse(order, segment[order]), expected[order])
    assert torch.equal(sparse(index[3], segment[3]), expected[3])
    assert sparse(index[:0], segment[:0]).shape == (0, dim)
    assert sparse(index, segment).dtype == torch.float32
    size = slow_bytes(SEGMENTS, dim, rows, mask, layout, sparse.num_slots)
    assert sum(tensor.nbytes for tensor in sparse.state_dict().values()) == size
    assert sum(sparse.serve_bytes()) == size == sparse_bytes(SEGMENTS, dim, sparse.row_format, *_sizes(sparse))
    assert not any(p.requires_grad for p in sparse.parameters())
    assert sparse.finalize() is sparse


def _sizes(sparse):
    return sparse.num_values, sparse.num_slots, sparse.layout


@settings(deadline=None, max_examples=150)
@given(
    layout=st.sampled_from(LAYOUTS),
    rows=st.sampled_from(FORMATS),
    dim=st.sampled_from(DIMS),
    segments=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    share=st.sampled_from([0.0, 0.005, 0.1, 0.5, 0.95, 1.0]),
    empty=st.sampled_from([0.0, 0.5, 0.97]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_mask(layout, rows, dim, segments, share, empty, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(sum(segments), dim, generator=generator) < share
    mask &= torch.rand(sum(segments), 1, generator=generator) >= empty
    _, served, mask, sparse = made(layout, rows, dim, segments, seed, mask=mask)
    index, segment = every_row(segments)
    dense = served(index, segment).tolist()
    expected = [[v if keep else 0.0 for v, keep in zip(*row, strict=True)] for row in zip(dense, mask, strict=True)]
    assert sparse(index, segment).tolist() == expected
    size = slow_bytes(segments, dim, rows, mask, layout, sparse.num_slots)
    assert sum(sparse.serve_bytes()) == size == sum(tensor.nbytes for tensor in sparse.state_dict().values())
    assert min(sparse.serve_bytes()) >= 0
    assert len(sparse.serve_bytes()) == len(segments)


@pytest.mark.parametrize("rows", ["float32", "int8:row", "int4:row", "int2:column"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_at_the_end_or_none_at_all(layout, rows):
    mask = torch.zeros(74, 8, dtype=torch.bool)
    index, segment = every_row()
    _, _, _, sparse = made(layout, rows, 8, mask=mask)
    assert not sparse(index, segment).any()
    mask[-1, -1] = True
    _, served, _, sparse = made(layout, rows, 8, mask=mask)
    assert torch.equal(sparse(index, segment), torch.where(mask, served(index, segment), 0.0))


def test_slots_of_dcsr_go_to_rows_with_values_first():
    mask = torch.zeros(200, 4, dtype=torch.bool)
    mask[[3, 70, 199]] = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    _, served, _, sparse = made("dcsr", "int4:row", 4, [200], mask=mask)
    assert sparse.num_slots == 7
    has_slot, _ = look_up_bitmap(sparse.bits, sparse.ranks, torch.arange(200), torch.arange(200) >> 6)
    assert has_slot.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 70, 199]
    assert sparse.pointers.tolist() == [0, 0, 0, 0, 2, 2, 3, 7]
    assert sparse.columns.tolist() == [0, 2, 3, 0, 1, 2, 3]
    assert torch.equal(sparse(torch.arange(200)), torch.where(mask, served(torch.arange(200)), 0.0))


def test_wrong_sizes_raise():
    with pytest.raises(ConfigError, match="'int4:column'"):
        made("csr", "int4:group8", 4)
    with pytest.raises(ConfigError, match="coo"):
        SparseRows([4], 2, RowFormat(), 3, 0, "coo")
    for sizes in ((9, 0, "csr"), (-1, 0, "bitmap"), (3, 1, "dcsr"), (3, 5, "dcsr"), (3, 1, "csr")):
        with pytest.raises(ConfigError, match=r"num_values|num_slots"):
            SparseRows([4], 2, RowFormat(), *sizes)
    served = make_row_store("float32", [4], 2).finalize()
    with pytest.raises(ConfigError, match="room for 3 values, but 8"):
        SparseRows([4], 2, RowFormat(), 3, 0, "csr").take_(served, lambda rows: torch.ones(len(rows), 2).bool())
    one_each = torch.tensor([[1, 0]] * 3 + [[0, 0]]).bool()
    with pytest.raises(ConfigError, match="2 slots for 3 rows with values"):
        SparseRows([4], 2, RowFormat(), 3, 2, "dcsr").take_(served, lambda rows: one_each[rows])
    with pytest.raises(TypeError):
        SparseRows([4], 2, RowFormat(), 3, 0, "csr").take_(
            make_row_store("int8", [4], 2), lambda rows: torch.ones(len(rows), 2).bool()
        )


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["float32", "int8:column", "int8:row", "int4:row", "int1:table"])
@pytest.mark.parametrize("dim", [1, 2, 16, 300])
def test_the_smallest_layout_is_found_and_grows_with_the_values(rows, dim):
    row_format = RowFormat.parse(rows).resolve(dim)
    before, seen = 0, set()
    for number in sorted({0, 1, 2, 3, *range(0, 150 * dim + 1, max(1, dim // 3))}):
        sizes = {}
        for layout in LAYOUTS:
            slots = min(150, number) if layout == "dcsr" else 0
            sizes[layout] = sparse_bytes([100, 50], dim, row_format, number, slots, layout)
        layout, _ = smallest_layout([100, 50], dim, row_format, number)
        assert sizes[layout] == min(sizes.values()) >= before
        before = sizes[layout]
        seen.add(layout)
    assert len(seen) > 1 or dim == 1


@pytest.mark.parametrize(
    ("density", "layout"),
    [(0.5, "bitmap"), (0.2, "bitmap"), (0.1, "csr"), (0.03, "csr"), (0.001, "dcsr"), (0.00001, "dcsr")],
)
def test_which_layout_is_smallest(density, layout):
    assert smallest_layout([10**6], 128, RowFormat.parse("float32"), int(density * 128e6))[0] == layout


def test_billions_of_values_have_wide_pointers_and_take_no_time():
    segments, row_format = [10**9] * 3, RowFormat.parse("int4:column")
    for number in (2**31 - 1, 2**31, 10**11):
        for layout in LAYOUTS:
            slots = most_slots(segments, number, layout)
            with torch.device("meta"):
                sparse = SparseRows(segments, 64, row_format, number, slots, layout)
            state = sum(tensor.nbytes for tensor in sparse.state_dict().values())
            assert state == sum(sparse.serve_bytes()) == sparse_bytes(segments, 64, row_format, number, slots, layout)
            assert sparse.state_dict()["ranks" if layout == "bitmap" else "pointers"].dtype == (
                torch.int32 if number < 2**31 else torch.int64
            )


@pytest.mark.parametrize("rows", ["float32", "bfloat16", "int3:row", "int2:column:offset"])
def test_dense_bytes_are_those_of_the_plain_form(rows):
    _, served, _, _ = made("csr", rows, 5)
    assert dense_bytes(SEGMENTS, 5, RowFormat.parse(rows).resolve(5)) == sum(served.serve_bytes())


@settings(deadline=None)
@given(size=st.integers(0, 10**6), segments=st.lists(st.integers(0, 99), min_size=1, max_size=6))
def test_shared_bytes_are_shared_out_by_rows(size, segments):
    shares = share_out(size, segments)
    assert sum(shares) == size
    if any(segments):
        assert all(abs(share - size * rows / sum(segments)) < 1 for share, rows in zip(shares, segments, strict=True))


# ---- forms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["float32", "int8:row", "int3:row", "int2:column:offset"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_copied_and_moved_forms(layout, rows):
    _, _, _, sparse = made(layout, rows, 6)
    index, segment = every_row()
    wanted = sparse(index, segment)
    with torch.device("meta"):
        empty = SparseRows(SEGMENTS, 6, sparse.row_format, *_sizes(sparse))
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert empty(index.to("meta"), segment.to("meta")).shape == (74, 6)
    empty.load_state_dict(sparse.state_dict(), assign=True)
    for other in (empty, copy.deepcopy(sparse), copy.deepcopy(sparse).to(torch.float64)):
        assert torch.equal(other(index, segment), wanted)
    torch.testing.assert_close(copy.deepcopy(sparse).to(torch.bfloat16)(index, segment), wanted, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    ("rows", "dim"), [("float32", 3), ("int8:row", 16), ("int4:row", 3), ("int2:column:offset", 16)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_and_exported_forms_agree_bit_for_bit(rows, dim, layout):
    _, _, _, sparse = made(layout, rows, dim, [40, 40])
    index = torch.randint(0, 40, (6, 2)) + torch.tensor([0, 40])
    torch.compiler.reset()
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index), sparse(index))
    program = torch.export.export(sparse, (index[:4],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(program.module()(index), sparse(index))


@pytest.mark.parametrize("rows", ["float32", "int8:row", "int3:row", "int2:column"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lookup_makes_no_tensor_that_grows_with_the_rows(layout, rows):
    sizes = []
    for num_rows in (2000, 200_000):
        _, _, _, sparse = made(layout, rows, 16, [num_rows])
        with (largest := LargestTensor()):
            sparse(torch.arange(0, num_rows, num_rows // 50))
        sizes.append(largest.size)
    assert sizes[0] == sizes[1] <= 50 * 17 * 8


# ---- bitmaps --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=300))
def test_bitmaps_say_who_is_in_and_how_many_come_before(flags):
    members = [place for place, flag in enumerate(flags) if flag]
    bits, ranks = bitmap_of(torch.tensor(flags, dtype=torch.bool))
    assert len(bits) == len(ranks) == -(-len(flags) // WORD)
    positions = torch.arange(len(flags))
    found, before = look_up_bitmap(bits, ranks, positions, positions // WORD)
    assert found.tolist() == flags
    assert before.tolist() == [sum(flags[:place]) for place in range(len(flags))]
    again = build_bitmap(torch.tensor(members[::-1], dtype=torch.int64), len(flags))
    assert torch.equal(again[0], bits)
    assert torch.equal(again[1], ranks)
