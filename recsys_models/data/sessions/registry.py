"""The one entry point: data sets of sessions by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recsys_models.data.loading import load_source, make_source, map_array
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.sessions.build import build_sessions
from recsys_models.data.sessions.catalogue import Attribute, Catalogue
from recsys_models.data.sessions.reader import SessionReader
from recsys_models.data.sessions.readers.amazon_beauty import AmazonBeauty
from recsys_models.data.sessions.readers.amazon_reviews import AmazonReviews
from recsys_models.data.sessions.readers.diginetica import Diginetica
from recsys_models.data.sessions.readers.diginetica_sessions import DigineticaSessions
from recsys_models.data.sessions.readers.movielens_1m import MovieLens1MSessions
from recsys_models.data.sessions.readers.movielens_100k import MovieLens100KSessions
from recsys_models.data.sessions.readers.retailrocket import Retailrocket
from recsys_models.data.sessions.readers.sasrec_text import SasrecText
from recsys_models.data.sessions.readers.synthetic import SyntheticSessions
from recsys_models.data.sessions.readers.yoochoose import Yoochoose
from recsys_models.data.sessions.sequences import Cases, Sequences
from recsys_models.data.sessions.sessionlog import SessionLog

SESSION_READERS: Mapping[str, type[SessionReader]] = {
    reader.name: reader
    for reader in (
        *(MovieLens1MSessions, MovieLens100KSessions, SasrecText, Diginetica, DigineticaSessions, Yoochoose),
        *(Retailrocket, AmazonReviews, AmazonBeauty, SyntheticSessions),
    )
}


def list_session_datasets() -> list[str]:
    """Return the names that :func:`load_sessions` knows."""
    return sorted(SESSION_READERS)


def load_sessions(
    name: str, root: str | Path | None = None, cache_dir: str | Path | None = None, **options: Any
) -> SessionLog:
    """Load a data set of sessions, from the cache if it was read before with the same options.

    Args:
        name: one of :func:`list_session_datasets`.
        root: the folder that holds the data sets in sub-folders (``ml-1m/``, ``ml-100k/``, ``sasrec/``,
            ``diginetica/``, ``yoochoose/``, ``retailrocket/``, ``amazon-reviews/``, ``amazon-beauty/``), or the folder
            of this one; default: the environment variable ``EMBCOMP_DATA``. The synthetic data set needs none.
        cache_dir: where encoded data are kept, memory-mapped; default: ``EMBCOMP_CACHE`` or ``~/.cache/embcomp``.
        options: of the reader; see its class. All readers have ``split_seed`` and ``max_malformed``.

    Returns:
        The encoded data set.

    Raises:
        DataError: if the name or an option is unknown, or the files cannot be read.
    """
    reader = make_session_reader(name, **options)

    def fill(files: dict[str, Path], folder: Path, log: MalformedLog) -> dict[str, Any]:
        return build_sessions(reader, files, folder, log)

    def load(key: str, folder: Path, info: dict[str, Any], log: MalformedLog) -> SessionLog:
        return SessionLog(
            name=reader.name,
            catalogue=_catalogue(folder, info["attributes"]),
            train=_sequences(folder, "train"),
            validation=_cases(folder, "validation"),
            test=_cases(folder, "test"),
            content_hash=key,
            filters_seen=reader.filters_seen,
            malformed=tuple(log.kept),
            num_malformed=log.total,
        )

    return load_source(reader, root, cache_dir, fill, load)


def make_session_reader(name: str, **options: Any) -> SessionReader:
    """Return the reader of a data set of sessions with the given options, checked."""
    return make_source(SESSION_READERS, name, options)


def _catalogue(folder: Path, infos: list[dict[str, Any]]) -> Catalogue:
    counts = np.load(folder / "items.counts.npy")
    attributes = tuple(_attribute(folder, position, **info) for position, info in enumerate(infos))
    return Catalogue(len(counts), counts, np.load(folder / "items.values.npy"), attributes)


def _attribute(folder: Path, position: int, name: str, is_bag: bool) -> Attribute:
    values, offsets = (map_array(folder / f"attribute{position}.{part}.npy") for part in ("values", "offsets"))
    counts, names = (np.load(folder / f"attribute{position}.{part}.npy") for part in ("counts", "names"))
    return Attribute(name, len(counts), values, offsets, counts, names, is_bag)


def _sequences(folder: Path, part: str) -> Sequences:
    return Sequences(*(map_array(folder / f"{part}.{array}.npy") for array in ("items", "offsets")))


def _cases(folder: Path, part: str) -> Cases:
    return Cases(_sequences(folder, part), *(map_array(folder / f"{part}.{array}.npy") for array in ("rows", "ends")))
