"""From a name and options to data out of the cache: the way that click logs and session logs share."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from recsys_models.data.cache import cached, default_cache_dir
from recsys_models.data.errors import DataError
from recsys_models.data.fingerprint import fingerprint
from recsys_models.data.malformed import MalformedLine, MalformedLog
from recsys_models.data.reader import Source

ROOT_VARIABLE = "EMBCOMP_DATA"

S = TypeVar("S", bound=Source)
T = TypeVar("T")


def make_source(sources: Mapping[str, type[S]], name: str, options: Mapping[str, Any]) -> S:
    """Return the source called ``name`` with the given options, checked.

    Raises:
        DataError: if the name or an option is unknown, or the value of an option is not allowed.
    """
    if name not in sources:
        raise DataError(f"unknown data set {name!r}, must be one of {', '.join(sorted(sources))}")
    allowed = [option.name for option in fields(sources[name])]
    if unknown := sorted(set(options) - set(allowed)):
        raise DataError(f"{name}: unknown option {', '.join(unknown)}; the options are {', '.join(allowed)}")
    return sources[name](**options)


def load_source(
    source: Source,
    root: str | Path | None,
    cache_dir: str | Path | None,
    fill: Callable[[dict[str, Path], Path, MalformedLog], dict[str, Any]],
    load: Callable[[str, Path, dict[str, Any], MalformedLog], T],
) -> T:
    """Return what ``load`` makes of the cached form of a data set, which ``fill`` writes where it is missing.

    Args:
        source: the data set.
        root: the folder of the data sets, or of this one; None for what the environment says.
        cache_dir: where encoded data are kept; None for the default.
        fill: given the source files, an empty folder and a log of malformed lines, writes what is to be kept and
            returns what to remember about it (JSON).
        load: given the content hash, the folder, what was remembered and the log, returns the data.

    Raises:
        DataError: if the files cannot be read, the cache cannot be written, or too many lines are malformed.
    """
    files = source.files(_folder(source, root)) if source.folder else {}
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    key = fingerprint(source, files, cache / "hashes")

    def fill_logged(folder: Path) -> dict[str, Any]:
        log = MalformedLog()
        return {**fill(files, folder, log), "log": asdict(log)}

    def load_logged(folder: Path, info: dict[str, Any]) -> tuple[T, MalformedLog]:
        kept = [MalformedLine(**line) for line in info["log"]["kept"]]
        log = MalformedLog(**{**info["log"], "kept": kept})
        return load(key, folder, info, log), log

    data, log = cached(cache, f"{source.name}-{key[:24]}", fill_logged, load_logged)
    log.check_share(source.max_malformed)
    log.warn(source.name)
    return data


def map_array(path: Path) -> np.ndarray:
    """Return the array in an ``.npy`` file, memory-mapped and read-only."""
    array: np.ndarray = np.load(path, mmap_mode="r")
    return array


def _folder(source: Source, root: str | Path | None) -> Path:
    given = root if root is not None else os.environ.get(ROOT_VARIABLE)
    if not given:
        raise DataError(
            f"{source.name}: where are the data? Pass root, or set the environment variable {ROOT_VARIABLE}, to a "
            f"folder with the sub-folder {source.folder}/"
        )
    path = Path(given).expanduser()
    if not path.is_dir():
        raise DataError(f"{source.name}: {path} is no folder. Expected a folder with the sub-folder {source.folder}/")
    return path / source.folder if (path / source.folder).is_dir() else path
