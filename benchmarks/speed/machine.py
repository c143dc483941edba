"""The machine: what is printed above all figures, and how fast it copies memory."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """What figures depend on.

    Attributes:
        cpu: model name.
        threads: that torch uses.
        torch: version.
        fbgemm: version, or ``"not installed"``.
        python: version.
        copy_gigabytes_per_second: of a tensor larger than the caches, bytes read plus bytes written.
    """

    cpu: str
    threads: int
    torch: str
    fbgemm: str
    python: str
    copy_gigabytes_per_second: float

    @classmethod
    def measure(cls, copied_bytes: int = 1 << 28, repeats: int = 10) -> Machine:
        """Look at the machine that this runs on."""
        return cls(
            cpu=_cpu(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            fbgemm=_fbgemm(),
            python=platform.python_version(),
            copy_gigabytes_per_second=copy_bandwidth(copied_bytes, repeats),
        )

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.threads} threads, Python {self.python}, torch {self.torch}, fbgemm {self.fbgemm}\n"
            f"copies memory at {self.copy_gigabytes_per_second:.1f} GB/s (read + written)"
        )


def copy_bandwidth(copied_bytes: int, repeats: int) -> float:
    """Gigabytes per second, read plus written, that a tensor is copied at: the best of some repeats."""
    source = torch.ones(copied_bytes // 4)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best / 1e9


def _cpu() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _fbgemm() -> str:
    for package in ("fbgemm-gpu-cpu", "fbgemm-gpu"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"
