"""A progress bar on a terminal, where tqdm is installed, or a line that says what goes on; nothing elsewhere."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

BYTES = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
"""Options of a bar that counts bytes."""


@contextmanager
def progress_bar(doing: str, **options: Any) -> Iterator[Callable[[int], None]]:
    """Show progress while inside; what is yielded is told how much more is done.

    Args:
        doing: in front of the bar.
        options: of tqdm, such as ``total`` and ``unit``. Where more is done than the total, as files are read several
            times over, that much is added to it again.
    """
    if not sys.stderr.isatty():
        yield lambda more: None
        return
    try:
        bars = importlib.import_module("tqdm")
    except ImportError:
        print(f"{doing} ... (pip install tqdm to see how far it is)", file=sys.stderr)
        yield lambda more: None
        return
    with bars.tqdm(desc=doing, **options) as bar:
        once = bar.total

        def update(more: int) -> None:
            while once and bar.n + more > bar.total:
                bar.total += once
            bar.update(more)

        yield update
