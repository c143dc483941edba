"""One process per cell: locks that the system frees when their process dies, however it dies."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from benchmarks.errors import ResultError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[str | None]:
    """Try to hold the lock file ``path``; it stays behind, and means nothing once its process has gone.

    Where the system has no file locks, the lock is always got: cells may then be run twice, but files stay whole.

    Yields:
        None if the lock is held, else who holds it.

    Raises:
        ResultError: if the folder can't be written to.
    """
    with _opened(path) as file:
        if not _lock(file):
            yield _owner(file)
            return
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
        file.flush()
        yield None


def _opened(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ResultError(f"{path} can't be written: {error}; give another results_dir") from error


def _lock(file: IO[str]) -> bool:
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s can't be locked (%s): sweeps that share this folder may run a cell twice", file.name, error)
    return True


def _owner(file: IO[str]) -> str:
    file.seek(0)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        owner = json.loads(file.read())
        return f"process {owner['pid']} on {owner['host']}"
    return "another process"
