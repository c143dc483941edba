"""Truly packed bit streams: codes of 8, 4, 3, 2 or 1 bits without a gap, whatever the width of a row.

Value ``v = row·d + j`` takes the bits ``[v·bits, (v + 1)·bits)`` of the stream, low bits first within a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (8, 4, 3, 2, 1)
_PACK_CHUNK = 1 << 20
# Rows are gathered as words: in as few as possible, and best as a single one.
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


def packed_bytes(num_rows: int, dim: int, bits: int) -> int:
    """Bytes of a stream of ``num_rows`` rows of ``dim`` codes."""
    return (num_rows * dim * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into a stream.

    Args:
        codes: uint8 ``(R, d)`` in ``[0, 2^bits)``.
        bits: 8, 4, 3, 2 or 1.

    Returns:
        uint8 ``(⌈R·d·bits / 8⌉,)``; temporaries stay below a few megabytes.
    """
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.clone()
    packed = torch.empty(packed_bytes(1, flat.numel(), bits), dtype=torch.uint8, device=codes.device)
    if codes.is_meta:
        return packed
    for start in range(0, flat.numel(), _PACK_CHUNK):
        part = _pack_chunk(flat[start : start + _PACK_CHUNK], bits)
        first = start * bits // 8
        packed[first : first + part.numel()] = part
    return packed


def gather(packed: Tensor, rows: Tensor, dim: int, bits: int) -> Tensor:
    """Read rows from a stream.

    Args:
        packed: uint8 ``(⌈R·d·bits / 8⌉,)``.
        rows: int64 ``(...)`` in ``[0, R)``.
        dim: codes per row, d.
        bits: 8, 4, 3, 2 or 1.

    Returns:
        uint8 ``(..., d)``; memory taken is O(rows asked for).
    """
    if dim * bits % 8 == 0:
        return unpack(gather_bytes(packed, rows, dim * bits // 8), bits, dim)
    return unpack(_gather_shifted(packed, rows * dim, dim, bits), bits, dim)


def gather_runs(packed: Tensor, first: Tensor, length: int, bits: int) -> Tensor:
    """Read runs of codes that begin anywhere in a stream.

    Args:
        packed: uint8 ``(⌈n·bits / 8⌉,)``.
        first: int64 ``(...)``, number of the first code of each run; what lies behind the stream's end is anything.
        length: codes per run.
        bits: 8, 4, 3, 2 or 1.

    Returns:
        uint8 ``(..., length)``; memory taken is O(codes asked for).
    """
    if bits < 8:
        return unpack(_gather_shifted(packed, first, length, bits), bits, length)
    index = first.unsqueeze(-1) + torch.arange(length, device=first.device)
    index = index.clamp_max(max(packed.numel() - 1, 0))
    return packed.index_select(0, index.reshape(-1)).view(index.shape)


def gather_bytes(packed: Tensor, rows: Tensor, row_bytes: int) -> Tensor:
    """Read rows of whole bytes: uint8 ``(R·row_bytes,)`` and int64 ``(...)`` to uint8 ``(..., row_bytes)``."""
    index = rows.reshape(-1)
    if torch.compiler.is_compiling():
        return packed.view(-1, row_bytes)[rows]
    # Words must lie at multiples of their width: the bytes of a loaded file need not, and unaligned words crash.
    place = row_bytes | int(packed.data_ptr()) | int(packed.storage_offset())
    single = [(16, torch.complex128)] if row_bytes == 16 else []
    width, dtype = next((width, dtype) for width, dtype in [*single, *_WORDS] if place % width == 0)
    words = packed.view(dtype)
    found = words if width == row_bytes else words.view(-1, row_bytes // width)
    return found.index_select(0, index).view(torch.uint8).view(*rows.shape, row_bytes)


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Unpack rows that begin at a byte: uint8 ``(..., n)``, n a multiple of 3 for 3 bits, to uint8 ``(..., d)``."""
    if bits == 8:
        return packed
    codes = _unpack_traced(packed, bits) if torch.compiler.is_compiling() else _SPREAD[bits](packed)
    return codes if codes.shape[-1] == dim else codes[..., :dim]


def _pack_chunk(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 ``(n,)`` codes; the chunk begins at a byte."""
    if bits == 3:
        wide = _padded(codes, 8).view(-1, 8).to(torch.int32)
        word = wide[:, 0].clone()
        for j in range(1, 8):
            word |= wide[:, j] << (3 * j)
        return torch.stack([(word >> shift).to(torch.uint8) for shift in (0, 8, 16)], 1).view(-1)[
            : packed_bytes(1, codes.numel(), 3)
        ]
    per_byte = 8 // bits
    columns = _padded(codes, per_byte).view(-1, per_byte)
    byte = columns[:, 0].clone()
    for j in range(1, per_byte):
        byte |= columns[:, j] << (bits * j)
    return byte


def _padded(codes: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.numel() % multiple))


def _gather_shifted(packed: Tensor, first: Tensor, length: int, bits: int) -> Tensor:
    """Read runs that begin anywhere within a byte and shift them to its beginning: uint8 ``(..., n)``."""
    count = -(-length // 8) * 3 if bits == 3 else packed_bytes(1, length, bits)
    start = (first * bits).unsqueeze(-1)
    byte = start >> 3
    index = byte + torch.arange(count + 1, device=first.device)
    # Bytes behind the stream are asked for only where none of their bits is used.
    index = torch.maximum(index.clamp_max(packed.numel() - 1), byte)
    found = packed.index_select(0, index.reshape(-1)).view(index.shape).to(torch.int32)
    return (((found[..., 1:] << 8) | found[..., :-1]) >> (start & 7)).to(torch.uint8)


def _spread4(packed: Tensor) -> Tensor:
    word = packed.to(torch.int16)
    word |= word << 4
    word &= 0x0F0F
    return word.view(torch.uint8)


def _spread3(packed: Tensor) -> Tensor:
    triple = packed.unflatten(-1, (-1, 3)).to(torch.int32)
    word = triple[..., 0] | (triple[..., 1] << 8) | (triple[..., 2] << 16)
    half = torch.stack([word & 0xFFF, word >> 12], -1)
    half |= half << 10
    half &= 0x003F003F
    half |= half << 5
    half &= 0x07070707
    return half.view(torch.uint8).flatten(-2)


def _spread2(packed: Tensor) -> Tensor:
    word = packed.to(torch.int32)
    word *= (1 << 12) + 1
    word &= 0x000F000F
    word *= (1 << 6) + 1
    word &= 0x03030303
    return word.view(torch.uint8)


def _spread1(packed: Tensor) -> Tensor:
    word = packed.to(torch.int64)
    word |= word << 28
    word &= 0x0000000F0000000F
    word |= word << 14
    word &= 0x0003000300030003
    word |= word << 7
    word &= 0x0101010101010101
    return word.view(torch.uint8)


_SPREAD = {4: _spread4, 3: _spread3, 2: _spread2, 1: _spread1}
"""Spread each code to a byte of its own, within words: a handful of vectorised operations instead of one per code."""


def _unpack_traced(packed: Tensor, bits: int) -> Tensor:
    """The same in operations that a compiler fuses."""
    if bits == 3:
        triple = packed.unflatten(-1, (-1, 3)).to(torch.int32)
        word = triple[..., 0] | (triple[..., 1] << 8) | (triple[..., 2] << 16)
        shifts = torch.arange(0, 24, 3, device=packed.device, dtype=torch.int32)
    else:
        word = packed
        shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    return ((word.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)
