"""What is measured around a cell: latency of lookups, bytes of the saved file, peak memory, the environment."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import embcomp
from embcomp import EmbeddingTables

BATCH_SIZES = (1, 4096)
PACKAGES = ("numpy", "torch", "scikit-learn", "hydra-core", "safetensors", "fbgemm-gpu-cpu", "torchrec")
_WARM_UP = 5
_MOST_CALLS = 2000


def lookup_latency(
    tables: EmbeddingTables, ids: Tensor, batch_sizes: tuple[int, ...] = BATCH_SIZES, seconds: float = 0.3
) -> dict[str, dict[str, Any]]:
    """Time lookups of all tables at once, on rows of a real split, each batch another.

    Args:
        tables: the finalized tables.
        ids: int64 ``(N, T)``.
        batch_sizes: rows per lookup; those above N are taken with repetitions.
        seconds: to spend per batch size.

    Returns:
        batch size -> ``p50_microseconds``, ``p99_microseconds`` and ``calls``.
    """
    generator = torch.Generator().manual_seed(0)
    found = {}
    for size in batch_sizes:
        starts = torch.randint(max(len(ids) - size, 0) + 1, (_MOST_CALLS,), generator=generator).tolist()
        rows = ids if len(ids) >= size else ids.repeat(-(-size // len(ids)), 1)
        times = _timed(tables, rows, size, starts, seconds)
        p50, p99 = np.percentile(times, [50, 99]) * 1e6
        found[str(size)] = {
            "p50_microseconds": round(float(p50), 2),
            "p99_microseconds": round(float(p99), 2),
            "calls": len(times),
        }
    return found


@torch.inference_mode()
def _timed(tables: EmbeddingTables, ids: Tensor, size: int, starts: list[int], seconds: float) -> list[float]:
    wait = torch.cuda.synchronize if ids.is_cuda else _nothing
    times: list[float] = []
    end = time.perf_counter() + seconds
    for call, start in enumerate(starts):
        batch = ids[start : start + size]
        wait()
        began = time.perf_counter()
        tables(batch)
        wait()
        done = time.perf_counter()
        if call >= _WARM_UP:
            times.append(done - began)
            if done > end:
                break
    return times


def _nothing() -> None:
    pass


def state_bytes(module: nn.Module) -> int:
    """Bytes of a module's state dict."""
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def saved_bytes(tables: EmbeddingTables) -> int:
    """Bytes of the weights file that `embcomp.save_pretrained` writes."""
    with tempfile.TemporaryDirectory(prefix="embcomp-") as folder:
        saved = embcomp.save_pretrained(tables, folder)
        return sum(path.stat().st_size for path in Path(saved).glob("*.safetensors"))


def reset_peak_memory() -> None:
    """Start counting the process's peak memory anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """The highest resident memory of the process since the last reset, or since its start."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak


@functools.lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Versions, git commit and machine of this process."""
    commit = _git("rev-parse", "HEAD")
    return {
        "embcomp": embcomp.__version__,
        "git_commit": commit,
        "git_dirty": None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-c", f"safe.directory={root}", *arguments]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
