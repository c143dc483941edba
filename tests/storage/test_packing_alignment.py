"""Codes that lie at any address: files are read into memory as they are, and wide words there would crash."""

import pytest
import torch

from embcomp.storage.packing import gather_bytes


@pytest.mark.parametrize("shift", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("row_bytes", [1, 2, 4, 8, 16, 48])
def test_rows_are_read_from_any_address(shift: int, row_bytes: int):
    rows = torch.randint(0, 256, (50, row_bytes), dtype=torch.uint8)
    buffer = torch.empty(64 + rows.numel(), dtype=torch.uint8)
    start = -buffer.data_ptr() % 16 + shift
    shared = torch.from_numpy(buffer.numpy()[start : start + rows.numel()])
    shared.copy_(rows.view(-1))
    assert shared.data_ptr() % 16 == shift
    for stream in (shared, buffer[start : start + rows.numel()]):
        index = torch.tensor([[3, 49], [0, 3]])
        assert torch.equal(gather_bytes(stream, index, row_bytes), rows[index])
