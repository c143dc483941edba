"""The serving form of integer rows against plain loops over rational numbers."""

import copy
import itertools
import pickle
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from embcomp.storage import make_row_store, stored_bytes
from embcomp.storage.packed import PackedRows

SEGMENTS = [7, 0, 12, 1]
GRANULARITIES = ("row", "column", "table", "group5", "column:offset", "table:offset", "group5:offset")
FORMATS = [f"int{bits}:{kind}" for bits, kind in itertools.product((8, 4, 3, 2, 1), GRANULARITIES)]
DIMS = (1, 2, 3, 6, 16)


def trained_store(row_format: str, dim: int, segments=SEGMENTS):
    """A store as training might leave it: rows of different sizes, uneven scales, some of them negative."""
    store = make_row_store(row_format, segments, dim)
    generator = torch.Generator().manual_seed(dim)
    store.reset_parameters([0.01, 1.0, 0.3, 5.0][: len(segments)], generator)
    with torch.no_grad():
        if store.span is not None:
            store.span *= torch.empty_like(store.span).uniform_(-1.5, 1.5, generator=generator)
        if store.offset is not None:
            store.offset.normal_(0, 0.1, generator=generator)
    return store


def every_row(segments=SEGMENTS):
    segment = torch.arange(len(segments)).repeat_interleave(torch.tensor(segments))
    return torch.arange(sum(segments)), segment


def nearest_float32(value: Fraction) -> float:
    guess = np.float32(float(value))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return float(min(around, key=lambda f: (abs(Fraction(float(f)) - value), f.view(np.uint32) & 1)))


def snapped(value: float, low: float, step: float, bits: int) -> float:
    """The grid value nearest to ``value``: low + step·q, rounded once."""
    code = min(range(2**bits), key=lambda q: abs(Fraction(value) - Fraction(low) - Fraction(step) * q))
    return nearest_float32(Fraction(low) + Fraction(step) * code)


def reference_row(store, row: int, segment: int) -> list[float]:
    values, bits = store.weight[row].tolist(), store.bits
    if store.row_format.granularity == "row":
        dtype = np.float32 if bits == 8 else np.float16
        low = float(dtype(min(values)))
        scale = float(dtype((np.float32(max(values)) - np.float32(low)) / np.float32(2**bits - 1)))
        if bits == 8:
            mantissa, exponent = np.frexp(scale)
            scale = float(np.floor(mantissa * 2**16 + 0.5) * 2.0 ** (exponent - 16))
        return [snapped(value, low, scale, bits) if scale else low for value in values]
    unit = row // 5 if store.row_format.granularity == "group" else segment
    found = []
    for column, value in enumerate(values):
        scale_column = column if store.row_format.granularity == "column" else 0
        mantissa, exponent = np.frexp(abs(store.span[unit, scale_column].item()) / 2 ** (bits - 1))
        step = float(np.floor(mantissa * 2**16 + 0.5) * 2.0 ** (exponent - 16))
        low = Fraction(step) * Fraction(1 - 2**bits, 2)
        if store.offset is not None:
            low = Fraction(nearest_float32(low + Fraction(store.offset[unit, scale_column].item())))
        found.append(snapped(value, float(low), step, bits))
    return found


@pytest.mark.parametrize("dim", [1, 3, 16])
@pytest.mark.parametrize("row_format", FORMATS)
def test_vectors_are_the_nearest_grid_values(row_format, dim):
    store = trained_store(row_format, dim)
    rows, segment = every_row()
    owners = zip(rows.tolist(), segment.tolist(), strict=True)
    expected = torch.tensor([reference_row(store, row, owner) for row, owner in owners])
    found = store.finalize()(rows, segment)
    # A value half-way between two grid values may fall to either side: its distance is what must be right.
    exact = store.weight.double()
    torch.testing.assert_close((found - exact).abs(), (expected - exact).abs(), rtol=1e-5, atol=1e-9)
    assert (found == expected).float().mean() > 0.9


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("row_format", FORMATS)
def test_evaluation_and_serving_agree_bit_for_bit(row_format, dim):
    store = trained_store(row_format, dim).eval()
    rows, segment = every_row()
    before = store(rows, segment)
    served = store.finalize()
    assert torch.equal(served(rows, segment), before)
    order = torch.randperm(len(rows))[:12].view(3, 4)
    assert torch.equal(served(order, segment[order]), before[order])
    assert torch.equal(served(rows[3], segment[3]), before[3])
    assert served(rows[:0], segment[:0]).shape == (0, dim)
    assert before.dtype == torch.float32


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("row_format", FORMATS)
def test_bytes_are_those_of_the_state_dict(row_format, dim):
    kind, _, rest = row_format.partition(":")
    bits, values = int(kind[3:]), {"row": 0, "column": dim, "table": 1}.get(rest.split(":")[0], 0)
    size = -(-sum(SEGMENTS) * dim * bits // 8) + len(SEGMENTS) * values * 4 * (1 + rest.endswith("offset"))
    size += sum(SEGMENTS) * (8 if bits == 8 else 4) if rest == "row" else 0
    size += 4 * 4 * (1 + rest.endswith("offset")) if "group" in rest else 0
    store = make_row_store(row_format, SEGMENTS, dim)
    store.reset_parameters([0.1] * 4)
    served = store.finalize()
    assert size == sum(tensor.nbytes for tensor in served.state_dict().values())
    assert size == sum(store.serve_bytes())
    assert store.serve_bytes() == served.serve_bytes()
    assert len(store.serve_bytes()) == len(SEGMENTS)
    assert not list(served.parameters())
    assert dict(served.named_buffers()).keys() == served.state_dict().keys()
    alone = [make_row_store(row_format, [rows], dim).serve_bytes()[0] for rows in SEGMENTS]
    assert alone[0] == store.serve_bytes()[0] == stored_bytes(SEGMENTS[0], dim, row_format)


@pytest.mark.parametrize("row_format", ["int4:column", "int2:table:offset", "int1:column"])
def test_the_three_ways_to_name_segments_agree(row_format):
    store = trained_store(row_format, 6, [5, 6, 7])
    rows = torch.stack([torch.randint(low, high, (8,)) for low, high in [(0, 5), (5, 11), (11, 18)]], 1)
    for form in (store, store.finalize()):
        by_column = form(rows)
        assert torch.equal(form(rows, torch.arange(3)), by_column)
        assert torch.equal(form(rows.T, torch.arange(3)[:, None]), by_column.transpose(0, 1))
        for segment in range(3):
            assert torch.equal(form(rows[:, segment], segment), by_column[:, segment])
            assert torch.equal(form(rows[0, segment], segment), by_column[0, segment])


@pytest.mark.parametrize("row_format", ["int8:column", "int3:row", "int2:table:offset", "int1:group5"])
@pytest.mark.parametrize("size", [1, 30, 100])
def test_lookups_in_blocks_agree_bit_for_bit(row_format, size, monkeypatch):
    served = trained_store(row_format, 6, [5, 6, 7]).finalize()
    rows = torch.stack([torch.randint(low, high, (8,)) for low, high in [(0, 5), (5, 11), (11, 18)]], 1)
    segment = torch.arange(3)
    calls = [(rows, None), (rows, segment), (rows, segment.expand(8, 3)), (rows[:, 1], 1), (rows.T, segment[:, None])]
    calls += [(rows[:1], segment[None]), (rows.unsqueeze(0), segment), (rows[:, 2], segment[2:].expand(8))]
    whole = [served(*call) for call in calls]
    monkeypatch.setattr("embcomp.storage.packed._BLOCK_VALUES", size)
    for call, expected in zip(calls, whole, strict=True):
        assert torch.equal(served(*call), expected)


@pytest.mark.parametrize("row_format", [*FORMATS, "int2:column:after", "int4:row:after", "int1:group5:after"])
@pytest.mark.parametrize("segments", [[0], [0, 0], [1], [0, 1]])
def test_no_rows_or_a_single_one(row_format, segments):
    store = make_row_store(row_format, segments, 4)
    store.reset_parameters([0.1] * len(segments))
    store.fit_scales_()
    served = store.finalize()
    rows, segment = every_row(segments)
    assert served(rows, segment).shape == store(rows, segment).shape == (sum(segments), 4)
    assert sum(served.serve_bytes()) == sum(tensor.nbytes for tensor in served.state_dict().values())


def test_a_single_segment_needs_no_name():
    for form in (store := trained_store("int2:column", 3, [9]), store.finalize()):
        rows = torch.randint(0, 9, (4, 2))
        for segment in (None, 0, torch.zeros(4, 2, dtype=torch.int64)):
            assert torch.equal(form(rows, segment), form(rows, 0))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_fused_rows_have_the_layout_of_torchs_kernels(bits):
    prepack = {8: "embedding_bag_byte_prepack", 4: "embedding_bag_4bit_prepack", 2: "embedding_bag_2bit_prepack"}[bits]
    store = trained_store(f"int{bits}:row", 16, [300])
    theirs = getattr(torch.ops.quantized, prepack)(store.weight.detach())
    ours = store.finalize().codes
    assert ours.shape == theirs.shape
    assert (ours == theirs).float().mean() > (0.7 if bits == 8 else 0.99)


@pytest.mark.parametrize("row_format", ["int8:row", "int4:row", "int2:row"])
def test_fused_kernels_and_plain_operations_agree_bit_for_bit(row_format):
    served = trained_store(row_format, 24, [5000]).finalize()
    rows = torch.randint(0, 5000, (300, 7))
    assert torch.equal(served._lookup_fused(rows), served._lookup_rows(rows))


@pytest.mark.parametrize(
    "row_format", ["int8:row", "int4:row", "int3:row", "int8:column", "int3:column", "int1:group5"]
)
@pytest.mark.parametrize("dim", [6, 16])
def test_exported_forms_agree_bit_for_bit(row_format, dim):
    store = trained_store(row_format, dim, [9, 9]).eval()
    rows = torch.randint(0, 9, (6, 2)) + torch.tensor([0, 9])
    for form in (store, store.finalize()):
        program = torch.export.export(form, (rows[:4],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert torch.equal(program.module()(rows), form(rows))


@pytest.mark.parametrize("row_format", ["int8:row", "int4:row", "int3:column", "int2:group5:offset"])
def test_compiled_forms_agree_bit_for_bit(row_format):
    store = trained_store(row_format, 8, [9, 9])
    rows = torch.randint(0, 9, (6, 2)) + torch.tensor([0, 9])
    served = store.finalize()
    assert torch.equal(torch.compile(served, fullgraph=True)(rows), served(rows))
    expected = store(rows)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in store.parameters()]
    store.zero_grad()
    found = torch.compile(store, fullgraph=True)(rows)
    found.square().sum().backward()
    assert torch.equal(found, expected)
    torch.testing.assert_close([p.grad for p in store.parameters()], grads)


@pytest.mark.parametrize("row_format", FORMATS)
def test_state_dict_copy_and_pickle_are_exact(row_format):
    served = trained_store(row_format, 6).finalize()
    rows, segment = every_row()
    with torch.device("meta"):
        loaded = make_row_store(row_format, SEGMENTS, 6).finalize()
    assert all(tensor.is_meta for tensor in loaded.state_dict().values())
    loaded.load_state_dict(served.state_dict(), assign=True)
    for other in (loaded, copy.deepcopy(served), pickle.loads(pickle.dumps(served))):
        assert torch.equal(other(rows, segment), served(rows, segment))
        assert torch.equal(other.finalize()(rows, segment), served(rows, segment))


@pytest.mark.parametrize("row_format", ["int2:column", "int8:row", "int4:group64", "int3:row"])
def test_a_billion_rows_on_meta_take_no_time_and_no_memory(row_format):
    began = time.perf_counter()
    with torch.device("meta"):
        store = make_row_store(row_format, [10**9], 16)
    store.reset_parameters([0.01])
    assert sum(store.serve_bytes()) == sum(tensor.nbytes for tensor in store.finalize().state_dict().values())
    assert time.perf_counter() - began < 1


def bytes_taken(lookup) -> int:
    """Bytes that the operations of a lookup allocate, freed ones included."""
    lookup()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        lookup()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profiler.events())


@pytest.mark.parametrize("row_format", FORMATS)
def test_a_lookup_takes_memory_for_its_batch_only(row_format):
    num_rows, dim = 200_000, 6 if "int3" in row_format else 16
    store = make_row_store(row_format, [num_rows], dim, sparse=True)
    served = PackedRows([num_rows], dim, store.row_format)
    for buffer in served.buffers():
        buffer.zero_()
    rows = torch.arange(0, num_rows, num_rows // 64)
    table = num_rows * dim // 8
    assert bytes_taken(lambda: served.codes.to(torch.float32)) > table
    assert bytes_taken(lambda: served(rows)) < table / 2
    assert bytes_taken(lambda: store(rows).sum().backward()) < table / 2


@pytest.mark.parametrize("rows", ["int8:row", "int4:row", "int2:row"])
def test_portable_rows_are_the_same_in_the_same_bytes(rows):
    store = make_row_store(rows, [40, 7], 8)
    store.reset_parameters([1.0, 1.0], torch.Generator().manual_seed(0))
    store = store.finalize()
    apart, index = store.portable(), torch.arange(47)
    assert store.fused
    assert not apart.fused
    assert torch.equal(apart(index), store(index))
    assert apart.serve_bytes() == store.serve_bytes()
    assert sum(tensor.nbytes for tensor in apart.state_dict().values()) == sum(store.serve_bytes())
    assert apart.portable() is apart
