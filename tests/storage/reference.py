"""Quantized rows as slow, plain loops: what the stores are compared with."""

import struct
from fractions import Fraction

import numpy as np

KERNEL_BITS = (8, 4, 2)


def float32(value) -> np.float32:
    return np.float32(value)


def round_half_even(value: Fraction) -> int:
    return round(value)


def centred_value(code: int, step: float, offset: float, bits: int) -> np.float32:
    """step·(code − L) + offset: the product exact, the lowest level rounded once, the sum rounded once."""
    low = float32(float(-Fraction(2**bits - 1, 2) * Fraction(step)))
    if offset:
        low = float32(float(Fraction(float(low)) + Fraction(offset)))
    return nearest_float32(Fraction(step) * code + Fraction(float(low)))


def row_value(code: int, scale: float, low: float) -> np.float32:
    return nearest_float32(Fraction(scale) * code + Fraction(low))


def nearest_float32(value: Fraction) -> np.float32:
    """Round once, as a fused multiply-add does; going through float64 could round twice."""
    guess = np.float32(float(value))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda f: (abs(Fraction(float(f)) - value), struct.unpack("<I", f.tobytes())[0] & 1))


def packed_size(segments, dim: int, bits: int, granularity: str, group: int, offset: bool) -> int:
    rows = sum(segments)
    size = -(-rows * dim * bits // 8)
    per_scale = 4 * (2 if offset else 1)
    if granularity == "row":
        return size + rows * (8 if bits == 8 else 4)
    if granularity == "group":
        return size + -(-rows // group) * per_scale
    return size + len(segments) * (dim if granularity == "column" else 1) * per_scale
