"""How a sweep goes: each job leaves a note in its Hydra folder, and the sweep's process reads them as they come.

Notes are files so that any launcher will do: jobs may run in this process, in others, or on other machines.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.results import FAILED, METRICS, SUCCESS, CellResult, main_metrics, write_whole
from benchmarks.runner import ELSEWHERE, Outcome
from embcomp import format_bytes

NOTE = "cell.json"
_POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Note:
    """What a job says when it is done.

    Attributes:
        cell: its name.
        path: of its result.
        status: of its result, or `ELSEWHERE`.
        text: one line for people.
        reused: whether the result is of an earlier run.
    """

    cell: str
    path: str
    status: str
    text: str
    reused: bool = False


def note_of(cell: str, path: Path, outcome: Outcome) -> Note:
    """Say in one line what became of a cell."""
    if outcome.result is None:
        return Note(cell, str(path), ELSEWHERE, f"under way in {outcome.owner}")
    result = outcome.result
    label = f"({result.label}) " if result.label != result.strategy else ""
    return Note(cell, str(path), outcome.status, label + describe(result), outcome.reused)


def describe(result: CellResult) -> str:
    """A result in one line."""
    if result.status == SUCCESS:
        served, full = result.sizes.served_bytes or 0, result.sizes.float32_bytes or 1
        quality = ", ".join(_told(result, name) for name in main_metrics(result.metrics))
        return f"{quality}, {format_bytes(served)} ({served / full:.2%} of float32), {result.wall_seconds:.1f} s"
    if result.status == FAILED:
        error = result.error or {}
        return f"failed: {error.get('type')}: {error.get('message')}"
    return f"infeasible: {result.strategy} needs at least {result.sizes.minimum_bytes} B"


def _told(result: CellResult, name: str) -> str:
    value = result.metric(name)
    return f"{METRICS[name].title} {'undefined' if value is None else f'{value:.5f}'}"


def write_note(folder: Path, note: Note) -> None:
    """Leave a note in a job's folder."""
    write_whole(folder / NOTE, json.dumps(asdict(note)))


def read_note(folder: Path) -> Note | None:
    """The note of a job, None where it has left none (yet)."""
    try:
        return Note(**json.loads((folder / NOTE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


class Watcher:
    """Shows the progress of a sweep with the time left: a bar on a terminal, else a line per cell.

    Args:
        sweep_dir: where jobs have their folders.
        total: number of jobs.
    """

    def __init__(self, sweep_dir: Path, total: int) -> None:
        self._sweep_dir = sweep_dir
        self._total = total
        self._seen: set[str] = set()
        self._shown: set[tuple[str, str]] = set()
        self._ran = 0
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._bar = tqdm(total=total, unit="cell", desc="sweep", disable=not sys.stderr.isatty(), smoothing=0)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Show what is new, and stop."""
        self._stop.set()
        self._thread.join()
        self._look()
        self._bar.close()

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._look()

    def _look(self) -> None:
        for path in sorted(self._sweep_dir.glob(f"*/{NOTE}")):
            note = read_note(path.parent) if path.parent.name not in self._seen else None
            if note is not None:
                self._seen.add(path.parent.name)
                self._show(note)

    def _show(self, note: Note) -> None:
        self._ran += not note.reused and note.status != ELSEWHERE
        self._bar.update()
        if (note.cell, note.status) in self._shown:  # a cell without a budget comes once per budget
            return
        self._shown.add((note.cell, note.status))
        line = f"{note.cell}: {note.text}{' (from an earlier run)' if note.reused else ''}"
        if self._bar.disable:
            print(f"[{len(self._seen)}/{self._total}, {self.time_left()} left] {line}", file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)

    def time_left(self) -> str:
        """How long the rest will take if it goes on as it went, ``"?"`` before the first cell has run."""
        if not self._ran:
            return "?"
        seconds = (time.monotonic() - self._began) / self._ran * (self._total - len(self._seen))
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
