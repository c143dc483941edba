"""Sweeps that were finished before: recognized by their command line and all config files, without composing a cell.

Composing takes Hydra a tenth of a second per cell, twice; a sweep of which nothing is left to do should end at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from benchmarks.errors import ResultError
from benchmarks.overrides import has_own_configs, parse
from benchmarks.progress import Note
from benchmarks.results import FINISHED, read_result, write_whole


def remember(arguments: Sequence[str], notes: Sequence[Note]) -> None:
    """Note that a sweep is finished.

    Args:
        arguments: of its command line.
        notes: one per cell, all finished.
    """
    write_whole(_path(arguments), json.dumps([asdict(note) for note in notes]))


def recall(arguments: Sequence[str]) -> list[Note] | None:
    """The cells of a sweep that was finished, if every result is still there; else None."""
    if has_own_configs(arguments) or any(argument.startswith("overwrite=") for argument in arguments):
        return None
    try:
        notes = [Note(**values) for values in json.loads(_path(arguments).read_text(encoding="utf-8"))]
        is_whole = all(read_result(Path(note.path)).status in FINISHED for note in notes)
    except (OSError, ValueError, TypeError, ResultError):
        return None
    return [replace(note, reused=True) for note in notes] if is_whole else None


def _path(arguments: Sequence[str]) -> Path:
    given = [override.value() for override in parse(arguments) if override.key_or_group == "results_dir"]
    folder = Path(str(given[-1] if given else "results")).expanduser()
    digest = hashlib.sha256(json.dumps(list(arguments)).encode())
    for name, text in sorted(_config_files(files("configs"), "")):
        digest.update(f"{name}\n{text}\n".encode())
    return folder / ".hydra" / f"finished-{digest.hexdigest()[:16]}.json"


def _config_files(folder: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _config_files(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name, entry.read_text(encoding="utf-8")
