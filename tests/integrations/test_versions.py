"""What is said where TorchRec is missing or broken."""

import importlib.metadata
import subprocess
import sys
import warnings

import pytest
import torch

from embcomp import MissingDependencyError
from embcomp.integrations.versions import torchrec_error, warn_of_versions

BROKEN = """
import sys
sys.modules["torchrec"] = None
import embcomp
tables = embcomp.build_tables([embcomp.TableSpec("a", 10, 4)])
embcomp.compress_(__import__("torch").nn.Sequential(__import__("torch").nn.Embedding(9, 4)), "full", verbose=False)
from embcomp.integrations import sharding
"""


def test_the_line_that_installs_the_right_versions_is_told():
    error = torchrec_error(OSError("Could not load this library: fbgemm_gpu_config.so"))
    assert isinstance(error, MissingDependencyError)
    minor = int(torch.__version__.split(".")[1])
    for text in ("fbgemm_gpu_config.so", f"torch {torch.__version__}", f"fbgemm-gpu-cpu==1.{minor - 5}.0", "--no-deps"):
        assert text in str(error)


@pytest.mark.parametrize(
    ("package", "found", "told"),
    [
        ("torchrec", "1.{fits}.0", False),
        ("torchrec", "1.{fits}.1.dev3", False),
        ("torchrec", "1.{off}.0", True),
        ("fbgemm-gpu", "1.{off}.0", True),
        ("fbgemm-gpu-cpu", "2.{fits}.0", True),
    ],
)
def test_versions_that_can_be_imported_but_do_not_go_together_are_told(monkeypatch, package, found, told):
    fits = int(torch.__version__.split(".")[1]) - 5

    def version(name):
        if name != package:
            raise importlib.metadata.PackageNotFoundError(name)
        return found.format(fits=fits, off=fits - 1)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_of_versions()
    assert [f"torchrec==1.{fits}.0" in str(one.message) for one in seen] == [True] * told


def test_without_torchrec_only_what_needs_it_fails():
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "MissingDependencyError: TorchRec can't be imported" in done.stderr
    assert "line 7" in done.stderr
