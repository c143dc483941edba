"""Which versions of torch, TorchRec and FBGEMM go together, for those that do not."""

from __future__ import annotations

import importlib.metadata

import torch

from embcomp.errors import MissingDependencyError

_BEHIND = 5
"""TorchRec and FBGEMM 1.N are built for torch 2.(N + 5); their metadata does not say so."""


def torchrec_error(error: Exception) -> MissingDependencyError:
    """Say why TorchRec can't be imported, and by which lines it could.

    Args:
        error: that the import raised; another build's libraries raise ``OSError``.
    """
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    fitting = f"1.{max(int(minor) - _BEHIND, 0)}.0" if major == "2" else "of the same month"
    found = ", ".join(f"{name} {_version(name)}" for name in ("torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu"))
    return MissingDependencyError(
        f"TorchRec can't be imported ({type(error).__name__}: {error}). Installed: torch {torch.__version__}, {found}. "
        f"With this torch go torchrec and fbgemm {fitting}. On a CPU: pip install 'embcomp[torchrec]' fbgemm-gpu-cpu=="
        f"{fitting} && pip install --no-deps torchrec=={fitting}; with CUDA: pip install fbgemm-gpu=={fitting} "
        f"torchrec=={fitting}"
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
