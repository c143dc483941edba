"""Rows may stay float32 for a while; what is served is rounded all the same."""

import pytest
import torch

from embcomp.storage import make_row_store

FORMATS = ["int2:column", "int4:table:offset", "int3:group8", "int8:row", "float16"]


@pytest.mark.parametrize("text", FORMATS)
def test_rows_are_float32_while_rounding_is_off(text):
    store = make_row_store(text, [20, 30], 4)
    store.reset_parameters([0.1, 0.3], torch.Generator().manual_seed(0))
    rows, segment = torch.tensor([0, 19, 20, 49]), torch.tensor([0, 0, 1, 1])
    rounded = store(rows, segment)
    store.set_rounding(False)
    assert torch.equal(store(rows, segment), store.weight[rows])
    assert not torch.equal(rounded, store.weight[rows])


@pytest.mark.parametrize("text", FORMATS)
def test_scales_are_fitted_when_rounding_begins(text):
    store = make_row_store(text, [20, 30], 4)
    store.reset_parameters([0.01, 0.01], torch.Generator().manual_seed(0))
    store.set_rounding(False)
    with torch.no_grad():
        store.weight.mul_(50)  # training moved the rows far beyond their first scales
    store.set_rounding(True)
    rows, segment = torch.arange(50), torch.tensor([0] * 20 + [1] * 30)
    error = (store(rows, segment) - store.weight).square().mean() / store.weight.square().mean()
    assert error < 0.2
    before = store(rows, segment)
    store.set_rounding(True)
    assert torch.equal(store(rows, segment), before)


@pytest.mark.parametrize("text", FORMATS)
def test_finalizing_rounds_in_any_case(text):
    store = make_row_store(text, [20, 30], 4)
    store.reset_parameters([0.01, 0.01], torch.Generator().manual_seed(0))
    store.set_rounding(False)
    with torch.no_grad():
        store.weight.mul_(50)
    served = store.finalize()
    store.set_rounding(True)
    rows, segment = torch.arange(50), torch.tensor([0] * 20 + [1] * 30)
    assert torch.equal(served(rows, segment), store(rows, segment))
    assert sum(t.nbytes for t in served.state_dict().values()) == sum(store.serve_bytes())
