"""Folders of derived files on disk that are either whole or not there."""

import contextlib
import json
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from recsys_models.data.errors import DataError
from recsys_models.data.fingerprint import replace_text

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "EMBCOMP_CACHE"
MANIFEST = "manifest.json"
_LAYOUT = 1

T = TypeVar("T")


class _DamagedError(Exception):
    """A cache folder is there but not whole."""


def default_cache_dir() -> Path:
    """Return the folder in the environment variable ``EMBCOMP_CACHE``, else ``~/.cache/embcomp``."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "embcomp")


def cached(
    cache_dir: Path, entry: str, fill: Callable[[Path], dict[str, Any]], load: Callable[[Path, dict[str, Any]], T]
) -> T:
    """Return what ``load`` makes of the cache folder ``entry``, filling it first if it is missing or damaged.

    The folder is filled under a temporary name and renamed when complete. Where the system has file locks, other
    processes that want the same entry wait for it; elsewhere the first to finish wins.

    Args:
        cache_dir: where cache folders live.
        entry: name of the folder.
        fill: writes the files into an empty folder and returns what to remember about them (JSON).
        load: opens a whole folder, given what ``fill`` returned.

    Raises:
        DataError: if the cache cannot be written.
    """
    folder = cache_dir / entry
    with contextlib.suppress(_DamagedError, FileNotFoundError):
        return _open(folder, load)
    with _writable(cache_dir), _locked(cache_dir / f"{entry}.lock") as exclusive:
        try:
            return _open(folder, load)
        except FileNotFoundError:
            pass
        except _DamagedError as damage:
            logger.warning("cache %s is damaged (%s); it is built again", folder, damage)
            _discard(folder)
        if exclusive:
            for leftover in cache_dir.glob(f".{entry}.*"):
                shutil.rmtree(leftover, ignore_errors=True)
        _build(folder, fill)
        try:
            return _open(folder, load)
        except _DamagedError as damage:
            raise OSError(f"what was just written is not whole ({damage})") from damage


def _open(folder: Path, load: Callable[[Path, dict[str, Any]], T]) -> T:
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["layout"] != _LAYOUT:
            raise _DamagedError(f"layout {manifest['layout']}, expected {_LAYOUT}")
        for name, size in manifest["files"].items():
            if (found := (folder / name).stat().st_size) != size:
                raise _DamagedError(f"{name} has {found} bytes, expected {size}")
        return load(folder, manifest["info"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _DamagedError(f"{type(error).__name__}: {error}") from error


def _build(folder: Path, fill: Callable[[Path], dict[str, Any]]) -> None:
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        info = fill(temporary)
        files = {path.name: path.stat().st_size for path in temporary.iterdir()}
        replace_text(temporary / MANIFEST, json.dumps({"layout": _LAYOUT, "files": files, "info": info}, indent=1))
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # if it is, another process was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _discard(folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _writable(cache_dir: Path) -> Iterator[None]:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(
            f"the cache in {cache_dir} could not be built: {error}. Free space there, or choose another folder with "
            f"the argument cache_dir or the environment variable {CACHE_VARIABLE}"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock file ``path``, which the system frees if the process dies; yield whether there are locks at all."""
    with path.open("w") as file:
        yield _lock(file)


def _lock(file: IO[str]) -> bool:
    if sys.platform == "win32":  # two processes may do the same work there, but publish one result all the same
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # some network file systems have no locks
        return False
    return True
