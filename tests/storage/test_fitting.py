"""Grids fitted to rows: optimal for what has a known optimum, never worse than the obvious choices."""

import pytest
import torch

from embcomp.storage import fitting, grids

BITS = (8, 4, 3, 2, 1)


def squared_error(values, step, offset, bits):
    return (grids.dequantize(grids.quantize(values, step, offset, bits), step, offset, bits) - values).square().mean()


@pytest.mark.parametrize("bits", BITS)
def test_the_step_for_gaussian_rows_is_the_known_optimum(bits):
    values = 0.3 * torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    step, offset = fitting.fit_grid(values, bits, with_offset=False)
    assert step.item() == pytest.approx(0.3 * grids.GAUSSIAN_STEP[bits], rel=0.05)
    assert offset.item() == 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", ["gaussian", "heavy tails", "one outlier", "uniform", "two values"])
def test_no_step_of_a_fine_search_is_clearly_better(bits, shape):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1, 4000, generator=generator)
    if shape == "heavy tails":
        values = values**3
    if shape == "one outlier":
        values[0, 0] = 50.0
    if shape == "uniform":
        values = torch.rand(1, 4000, generator=generator) - 0.5
    if shape == "two values":
        values = torch.where(values > 0, 0.7, -0.7)
    zero = torch.zeros(1, 1)
    found = squared_error(values, *fitting.fit_grid(values, bits, with_offset=False), bits)
    top = values.abs().max() / grids.half_levels(bits)
    best = min(squared_error(values, top * ratio, zero, bits) for ratio in torch.logspace(-2.5, 0.1, 400))
    assert found <= best * 1.05 + 1e-9


@pytest.mark.parametrize("bits", BITS)
def test_an_offset_helps_rows_that_are_not_centred(bits):
    values = 2 + 0.1 * torch.randn(3, 500, generator=torch.Generator().manual_seed(2))
    without = squared_error(values, *fitting.fit_grid(values, bits, with_offset=False), bits)
    step, offset = fitting.fit_grid(values, bits, with_offset=True)
    assert squared_error(values, step, offset, bits) < 0.5 * without
    torch.testing.assert_close(offset, torch.full((3, 1), 2.0), rtol=0.1, atol=0)


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_units_are_fitted_one_by_one_and_degenerate_ones_too(bits, with_offset):
    sizes = torch.tensor([1, 1e-3, 0, 1e3, 1])
    values = torch.randn(5, 40, generator=torch.Generator().manual_seed(3)) * sizes[:, None]
    values[4] = 0.25
    step, offset = fitting.fit_grid(values, bits, with_offset)
    assert step.shape == offset.shape == (5, 1)
    assert (step > 0).all()
    assert step.isfinite().all()
    for unit in range(5):
        alone = fitting.fit_grid(values[unit : unit + 1], bits, with_offset)
        torch.testing.assert_close((step[unit], offset[unit]), (alone[0][0], alone[1][0]))
    snapped = grids.dequantize(grids.quantize(values, step, offset, bits), step, offset, bits)
    torch.testing.assert_close(snapped[2], values[2], rtol=0, atol=1e-9)
    torch.testing.assert_close(snapped[4], values[4], rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_steps_have_16_significant_bits(bits):
    step, _ = fitting.fit_grid(torch.randn(50, 7), bits, with_offset=False)
    assert ((step.view(torch.int32) & 255) == 0).all()
    codes = torch.arange(2**bits)
    assert ((codes * step).double() == codes * step.double()).all()


@pytest.mark.parametrize("bits", BITS)
def test_fitted_row_grids_beat_those_from_minimum_to_maximum(bits):
    values = torch.randn(300, 64, generator=torch.Generator().manual_seed(4))

    def error(scale, low):
        codes = grids.quantize_row(values, scale, low, bits)
        return (grids.dequantize_row(codes, scale, low) - values).square().mean()

    margin = 1.02 if bits == 8 else 0.99
    assert error(*fitting.fit_row_grid(values, bits)) < margin * error(*grids.row_grid(values, bits))
