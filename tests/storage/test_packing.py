"""Packed bit streams against one big Python integer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcomp.storage import packing


def stream_of(codes: torch.Tensor, bits: int) -> list[int]:
    """The stream as one number, low bits first: slow, and obviously right."""
    number = sum(code << (bits * v) for v, code in enumerate(codes.flatten().tolist()))
    return list(number.to_bytes(-(-codes.numel() * bits // 8), "little"))


def random_codes(rows: int, dim: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, dim), generator=generator, dtype=torch.uint8)


@settings(deadline=None, max_examples=300)
@given(
    bits=st.sampled_from(packing.BITS), dim=st.integers(1, 40), rows=st.integers(0, 60), seed=st.integers(0, 2**32 - 1)
)
def test_round_trip(bits, dim, rows, seed):
    codes = random_codes(rows, dim, bits, seed)
    packed = packing.pack(codes, bits)
    assert packed.tolist() == stream_of(codes, bits)
    assert packed.numel() == packing.packed_bytes(rows, dim, bits)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(packing.gather(packed, order, dim, bits), codes[order])


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("dim", [1, 2, 3, 6, 8, 16, 17, 30, 64])
def test_gather_keeps_any_leading_shape(bits, dim):
    codes = random_codes(37, dim, bits)
    packed = packing.pack(codes, bits)
    for shape in [(), (0,), (5,), (2, 3), (2, 0, 3)]:
        rows = torch.randint(0, 37, shape)
        found = packing.gather(packed, rows, dim, bits)
        assert found.dtype == torch.uint8
        assert torch.equal(found, codes[rows])


@pytest.mark.parametrize("bits", packing.BITS)
def test_pack_joins_its_chunks_without_a_seam(bits, monkeypatch):
    codes = random_codes(101, 3, bits)
    whole = packing.pack(codes, bits)
    monkeypatch.setattr(packing, "_PACK_CHUNK", 16)
    assert torch.equal(packing.pack(codes, bits), whole)


@pytest.mark.parametrize("bits", packing.BITS)
def test_pack_leaves_the_codes_alone(bits):
    codes = random_codes(16, 8, bits)
    before = codes.clone()
    packing.pack(codes, bits).zero_()
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("dim", [3, 8])
@pytest.mark.parametrize("row", [-1, 1000])
def test_rows_outside_raise(bits, dim, row):
    packed = packing.pack(random_codes(40, dim, bits), bits)
    with pytest.raises((IndexError, RuntimeError)):
        packing.gather(packed, torch.tensor([row]), dim, bits)


@pytest.mark.parametrize("row_bytes", [1, 2, 3, 4, 8, 12, 16, 24, 32])
@pytest.mark.parametrize("shift", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("offset_of_view", [True, False])
def test_streams_may_begin_at_any_address(row_bytes, shift, offset_of_view):
    """As in a memory-mapped file: 16-byte words at such an address would end the process."""
    stream = random_codes(50, row_bytes, 8)
    memory = np.zeros(50 * row_bytes + 32, dtype=np.uint8)
    start = -memory.ctypes.data % 16 + shift
    memory[start : start + stream.numel()] = stream.flatten()
    if offset_of_view:
        packed = torch.from_numpy(memory)[start : start + stream.numel()]
    else:
        packed = torch.from_numpy(memory[start : start + stream.numel()])
    assert packed.data_ptr() % 16 == shift
    rows = torch.randint(0, 50, (200,))
    assert torch.equal(packing.gather(packed, rows, row_bytes, 8), stream[rows])


@pytest.mark.parametrize("bits", packing.BITS)
def test_streams_of_more_than_2_to_the_31_bits(bits):
    """The last row of a table whose bit offsets need more than 32 bits; the pages before it are never touched."""
    rows, dim = (1 << 33) // (3 * bits) // 8 * 8, 3
    packed = torch.empty(packing.packed_bytes(rows, dim, bits), dtype=torch.uint8)
    codes = random_codes(8, dim, bits)
    tail = packing.pack(codes, bits)
    packed[-tail.numel() :] = tail
    assert torch.equal(packing.gather(packed, torch.arange(rows - 8, rows), dim, bits), codes)


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("dim", [3, 16])
def test_traced_gather_is_the_same(bits, dim):
    codes = random_codes(50, dim, bits)

    class Gather(torch.nn.Module):
        def forward(self, packed, rows):
            return packing.gather(packed, rows, dim, bits)

    packed, rows = packing.pack(codes, bits), torch.randint(0, 50, (4, 5))
    program = torch.export.export(Gather(), (packed, rows), dynamic_shapes=({}, {0: torch.export.Dim("batch")}))
    rows = torch.randint(0, 50, (7, 5))
    assert torch.equal(program.module()(packed, rows), codes[rows])
