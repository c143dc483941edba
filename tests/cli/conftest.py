"""Trained tables in a file, and ``embcomp compress`` of it."""

import pytest
import torch
from safetensors.torch import save_file

from embcomp.cli import main


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "tables.user.weight": torch.randn(600, 8, generator=generator),
        "tables.item.weight": torch.randn(200, 4, generator=generator).half(),
    }


@pytest.fixture
def file(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.fixture
def run(tmp_path, capsys):
    def call(source, *arguments, output="out", overwrite=True):
        replaces = ["--overwrite"] if overwrite else []
        code = main(["compress", str(source), "-o", str(tmp_path / output), *map(str, arguments), *replaces])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call
