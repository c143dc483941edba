"""Which versions of torch, TorchRec and FBGEMM go together, for those that do not."""

from __future__ import annotations

import importlib.metadata
import warnings

import torch

from embcomp.errors import MissingDependencyError

_BEHIND = 5
"""TorchRec and FBGEMM 1.N are built for torch 2.(N + 5); their metadata does not say so."""
_PACKAGES = ("torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu")
_ABSENT = "not installed"
_BESIDE = "tensordict torchmetrics==1.0.3 pyre-extensions tqdm"
"""What else TorchRec imports, where its metadata can't be followed since it names FBGEMM for CUDA."""


def torchrec_error(error: Exception) -> MissingDependencyError:
    """Say why TorchRec can't be imported, and by which lines it could.

    Args:
        error: that the import raised; another build's libraries raise ``OSError``.
    """
    return MissingDependencyError(f"TorchRec can't be imported ({type(error).__name__}: {error}). {_advice()}")


def warn_of_versions() -> None:
    """Warn where TorchRec can be imported, but it or FBGEMM was built for another torch.

    Their operators may be missing, or work otherwise, only once they are called.
    """
    fitting = _fitting()
    found = {name: _version(name) for name in _PACKAGES}
    if fitting and any(v != _ABSENT and v.split(".")[:2] != fitting.split(".")[:2] for v in found.values()):
        warnings.warn(f"TorchRec or FBGEMM is for another torch. {_advice()}", RuntimeWarning, stacklevel=2)


def _fitting() -> str | None:
    """The versions that go with this torch; None where that is not known."""
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return f"1.{max(int(minor) - _BEHIND, 0)}.0" if major == "2" else None


def _advice() -> str:
    fitting = _fitting()
    found = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    installed = f"Installed: torch {torch.__version__}, {found}."
    if fitting is None:
        return f"{installed} With this torch go torchrec and fbgemm of the same month"
    return (
        f"{installed} With this torch go torchrec and fbgemm {fitting}. "
        f"On a CPU: pip install fbgemm-gpu-cpu=={fitting} {_BESIDE} && pip install --no-deps torchrec=={fitting}; "
        f"with CUDA: pip install fbgemm-gpu=={fitting} torchrec=={fitting}"
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _ABSENT
