"""The one entry point: data sets by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recsys_models.data.build import build
from recsys_models.data.clicklog import ClickLog, Field, Split
from recsys_models.data.loading import load_source, make_source, map_array
from recsys_models.data.malformed import MalformedLog
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

    def fill(files: dict[str, Path], folder: Path, log: MalformedLog) -> dict[str, Any]:
        raw = build(reader, files, folder, log)
        return {"fields": raw.fields, "dense_names": raw.dense_names}

    def load(key: str, folder: Path, info: dict[str, Any], log: MalformedLog) -> ClickLog:
        return ClickLog(
            name=reader.name,
            fields=tuple(_field(folder, position, field) for position, field in enumerate(info["fields"])),
            dense_names=tuple(info["dense_names"]),
            **{split: _split(folder, split) for split in SPLIT_NAMES},
            content_hash=key,
            malformed=tuple(log.kept),
            num_malformed=log.total,
        )

    return load_source(reader, root, cache_dir, fill, load)


def make_reader(name: str, **options: Any) -> Reader:
    """Return the reader of a data set with the given options, checked."""
    return make_source(READERS, name, options)


def _field(folder: Path, position: int, name: str) -> Field:
    counts = np.load(folder / f"field{position}.counts.npy")
    return Field(name, len(counts), counts, np.load(folder / f"field{position}.values.npy"))


def _split(folder: Path, name: str) -> Split:
    return Split(*(map_array(folder / f"{name}.{part}.npy") for part in ("ids", "dense", "labels")))
