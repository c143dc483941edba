"""The one entry point: data sets by name."""

import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from recsys_models.data.build import build
from recsys_models.data.cache import cached, default_cache_dir
from recsys_models.data.clicklog import ClickLog, Field, Split
from recsys_models.data.errors import DataError
from recsys_models.data.fingerprint import fingerprint
from recsys_models.data.malformed import MalformedLine, MalformedLog
from recsys_models.data.reader import Reader
from recsys_models.data.readers.avazu import Avazu
from recsys_models.data.readers.criteo import Criteo
from recsys_models.data.readers.frappe import Frappe
from recsys_models.data.readers.lastfm_tags import LastfmTags
from recsys_models.data.readers.movielens_1m import MovieLens1M
from recsys_models.data.readers.movielens_100k import MovieLens100K
from recsys_models.data.readers.synthetic import Synthetic
from recsys_models.data.readers.synthetic_criteo import SyntheticCriteo
from recsys_models.data.splits import SPLIT_NAMES

ROOT_VARIABLE = "EMBCOMP_DATA"

READERS: Mapping[str, type[Reader]] = {
    reader.name: reader
    for reader in (Frappe, MovieLens1M, MovieLens100K, LastfmTags, Criteo, Avazu, Synthetic, SyntheticCriteo)
}


def list_datasets() -> list[str]:
    """Return the names that :func:`load_dataset` knows."""
    return sorted(READERS)


def load_dataset(
    name: str, root: str | Path | None = None, cache_dir: str | Path | None = None, **options: Any
) -> ClickLog:
    """Load a data set, from the cache if it was read before with the same options.

    Args:
        name: one of :func:`list_datasets`.
        root: the folder that holds the data sets in sub-folders (``frappe/``, ``ml-1m/``, ``ml-100k/``,
            ``hetrec-lastfm/``, ``criteo/``, ``avazu/``), or the folder of this one; default: the environment variable
            ``EMBCOMP_DATA``. The synthetic data sets need none.
        cache_dir: where encoded data are kept, memory-mapped; default: ``EMBCOMP_CACHE`` or ``~/.cache/embcomp``.
        options: of the reader; see its class. All readers have ``min_count``, ``split_seed`` and ``max_malformed``.

    Returns:
        The encoded data set.

    Raises:
        DataError: if the name or an option is unknown, or the files cannot be read.
    """
    reader = make_reader(name, **options)
    files = reader.files(_folder(reader, root)) if reader.folder else {}
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    key = fingerprint(reader, files, cache / "hashes")

    def fill(folder: Path) -> dict[str, Any]:
        log = MalformedLog()
        raw = build(reader, files, folder, log)
        return {"fields": raw.fields, "dense_names": raw.dense_names, "log": asdict(log)}

    def load(folder: Path, info: dict[str, Any]) -> tuple[ClickLog, MalformedLog]:
        return _open(reader.name, key, folder, info)

    data, log = cached(cache, f"{name}-{key[:24]}", fill, load)
    log.check_share(reader.max_malformed)
    log.warn(name)
    return data


def make_reader(name: str, **options: Any) -> Reader:
    """Return the reader of a data set with the given options, checked."""
    if name not in READERS:
        raise DataError(f"unknown data set {name!r}, must be one of {', '.join(list_datasets())}")
    allowed = [option.name for option in fields(READERS[name])]
    if unknown := sorted(set(options) - set(allowed)):
        raise DataError(f"{name}: unknown option {', '.join(unknown)}; the options are {', '.join(allowed)}")
    return READERS[name](**options)


def _folder(reader: Reader, root: str | Path | None) -> Path:
    given = root if root is not None else os.environ.get(ROOT_VARIABLE)
    if not given:
        raise DataError(
            f"{reader.name}: where are the data? Pass root, or set the environment variable {ROOT_VARIABLE}, to a "
            f"folder with the sub-folder {reader.folder}/"
        )
    path = Path(given).expanduser()
    if not path.is_dir():
        raise DataError(f"{reader.name}: {path} is no folder. Expected a folder with the sub-folder {reader.folder}/")
    return path / reader.folder if (path / reader.folder).is_dir() else path


def _open(name: str, key: str, folder: Path, info: dict[str, Any]) -> tuple[ClickLog, MalformedLog]:
    kept = [MalformedLine(**line) for line in info["log"]["kept"]]
    log = MalformedLog(**{**info["log"], "kept": kept})
    data = ClickLog(
        name=name,
        fields=tuple(_field(folder, position, field) for position, field in enumerate(info["fields"])),
        dense_names=tuple(info["dense_names"]),
        **{split: _split(folder, split) for split in SPLIT_NAMES},
        content_hash=key,
        malformed=tuple(kept),
        num_malformed=log.total,
    )
    return data, log


def _field(folder: Path, position: int, name: str) -> Field:
    counts = np.load(folder / f"field{position}.counts.npy")
    return Field(name, len(counts), counts, np.load(folder / f"field{position}.values.npy"))


def _split(folder: Path, name: str) -> Split:
    return Split(*(_map(folder / f"{name}.{part}.npy") for part in ("ids", "dense", "labels")))


def _map(path: Path) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r")
    return array
