"""What a sweep does before its first job and after its last: check the folder, show progress, sum up, exit status."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from benchmarks.finished import remember
from benchmarks.overrides import number_of_jobs
from benchmarks.progress import Note, Watcher, read_note
from benchmarks.results import FAILED, FINISHED
from benchmarks.runner import ELSEWHERE


class SweepCallback(Callback):
    """Hydra calls this around a sweep or a single run; it ends the process with status 1 if a cell failed."""

    _watcher: Watcher | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # launchers send callbacks to their workers; the watcher stays here

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check that results can be written."""
        check_writable(Path(config.results_dir))

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Sum up a single run."""
        _end([("this run", read_note(Path(config.hydra.run.dir)))])

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check that results can be written, and start to show progress."""
        check_writable(Path(config.results_dir))
        params = [f"{key!s}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
        total = number_of_jobs([*params, *config.hydra.overrides.task])
        self._watcher = Watcher(Path(config.hydra.sweep.dir), total)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Sum up a sweep."""
        if self._watcher is not None:
            self._watcher.close()
        folders = sorted(
            (p for p in Path(config.hydra.sweep.dir).iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
        )
        jobs = [(f"job {folder.name}, see {folder}", read_note(folder)) for folder in folders]
        cells = cells_of([note for _, note in jobs]).values()
        if len(folders) == len([note for _, note in jobs if note]) and all(c.status in FINISHED for c in cells):
            remember(sys.argv[1:], list(cells))
        _end(jobs)


def check_writable(folder: Path) -> None:
    """End the process with status 2, and say why, if results can't be written to a folder."""
    try:
        folder.expanduser().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.expanduser()):
            pass
    except OSError as error:
        print(f"results_dir={folder} can't be written to: {error}\nGive another: results_dir=FOLDER", file=sys.stderr)
        raise SystemExit(2) from None


def cells_of(notes: Sequence[Note | None]) -> dict[str, Note]:
    """The cells of a sweep. One without a budget comes once per budget: the note of the job that ran it counts."""
    cells: dict[str, Note] = {}
    for note in notes:
        if note is not None and _rank(note) <= _rank(cells.get(note.cell, note)):
            cells[note.cell] = note
    return cells


def summary(jobs: Sequence[tuple[str, Note | None]]) -> tuple[str, bool]:
    """Sum up jobs.

    Args:
        jobs: what to call each job, and its note, None where it has left none.

    Returns:
        the text, and whether every cell is fine.
    """
    cells = cells_of([note for _, note in jobs])
    lost = [name for name, note in jobs if note is None]
    counts = Counter(note.status for note in cells.values())
    reused = sum(note.reused for note in cells.values())
    parts = [f"{number} {status}" for status, number in counts.items()] + [f"{len(lost)} without a result"] * bool(lost)
    lines = [f"{len(cells)} cells: {', '.join(parts)}" + f" ({reused} from an earlier run)" * bool(reused)]
    lines += [f"  {note.cell}: {note.text}" for note in cells.values() if note.status == ELSEWHERE]
    failed = [note for note in cells.values() if note.status == FAILED]
    lines += [f"FAILED {note.cell}: {note.text}\n  {Path(note.path).with_suffix('.log')}" for note in failed]
    lines += [f"FAILED {name}: ended without a result" for name in lost]
    return "\n".join(lines), not failed and not lost


def _rank(note: Note) -> tuple[bool, bool]:
    return note.status == ELSEWHERE, note.reused


def _end(jobs: Sequence[tuple[str, Note | None]]) -> None:
    text, is_fine = summary(jobs)
    if len(jobs) == 1 and jobs[0][1] is not None:
        print(f"{jobs[0][1].cell}: {jobs[0][1].text}\n{jobs[0][1].path}")
    if len(jobs) > 1 or not is_fine:
        print(text, file=sys.stdout if is_fine else sys.stderr, flush=True)
    if not is_fine:
        raise SystemExit(1)
