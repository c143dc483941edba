"""Peak memory of a lookup: it must depend on the batch, not on the table."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.contest import Contestant, Row, Seconds, Versus, rows_of
from benchmarks.speed.setting import Setting
from embcomp import build_tables, format_bytes, make_config

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints two lines at every use

GROWTH = 10
"""How many times larger the larger tables are."""


def measure_memory(setting: Setting) -> Iterator[Row]:
    """Measure the peak of memory taken by int8 lookups from small and from large tables."""
    for dim in setting.dims:
        contestants: list[Contestant] = []
        peaks: dict[str, Seconds] = {}
        for rows in (max(1, setting.rows // GROWTH), setting.rows):
            sized = replace(setting, rows=rows, batches=1)
            tables = build_tables(sized.specs(dim), make_config("full", rows="int8")).finalize_()
            [ids] = sized.draw("frequency")
            name = f"full, rows=int8, {setting.tables} x {rows} rows"
            versus = (Versus((contestants[0].name,), 1.0),) if contestants else ()
            note = f"stored: {format_bytes(tables.memory().serve_bytes)}"
            contestants.append(Contestant(name, versus=versus, note=note))
            peaks[name] = np.array([float(peak_bytes(lambda tables=tables, ids=ids: tables(ids)))])  # type: ignore[misc]
        yield from rows_of("memory", f"D={dim}", contestants, peaks, "B/id", 1 / setting.ids_per_batch)


@torch.no_grad()
def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that a call holds allocated on CPU at one time, its result included, after a call to warm up."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    held = np.cumsum([size for _, size in sorted(changes, key=lambda change: change[0])])
    return int(held.max(initial=0))
