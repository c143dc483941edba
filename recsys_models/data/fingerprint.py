"""Identity of a data set: what it was read from, by which reader, with which options."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from recsys_models.data.lines import check_readable
from recsys_models.data.reader import Source

_BLOCK = 1 << 22
_LARGE = 1 << 26
_NOT_CONTENT = "max_malformed"
_LATER = {"all_items": False}
"""Options that came when there were caches and results already -> the value that means what was done before; with it
they are left out, so that those stand."""


def fingerprint(reader: Source, files: Mapping[str, Path], memo: Path) -> str:
    """Return the hash of the source files, the reader, its version and its options, as 64 hexadecimal digits.

    The names and places of the files do not count, nor does ``max_malformed``, which changes no row.

    Args:
        reader: the source of the data set.
        files: its source files by role.
        memo: folder that remembers the hashes of large files by path, size and time of change.
    """
    given = asdict(reader).items()
    options = {name: value for name, value in given if name != _NOT_CONTENT and (name, value) not in _LATER.items()}
    for path in files.values():
        check_readable(path, f"a file of the data set {reader.name}")
    hashes = {role: _hash_large(path, memo) if _is_large(path) else hash_file(path) for role, path in files.items()}
    identity = {"reader": reader.name, "version": reader.version, "options": options, "files": hashes}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    bar = tqdm(
        total=path.stat().st_size, desc=f"hash {path.name}", unit="B", unit_scale=True, leave=False, disable=None
    )
    with path.open("rb") as file, bar:
        while block := file.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that no reader ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _is_large(path: Path) -> bool:
    return path.stat().st_size >= _LARGE


def _hash_large(path: Path, memo: Path) -> str:
    status = path.stat()
    state = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]
    note = memo / f"{hashlib.sha256(json.dumps(state).encode()).hexdigest()}.txt"
    if note.is_file() and len(known := note.read_text(encoding="utf-8")) == 64:
        return known
    digest = hash_file(path)
    with contextlib.suppress(OSError):  # a whole cache on a read-only disk is still of use
        replace_text(note, digest)
    return digest
