"""Numbers items and values, and writes what is to be kept."""

from pathlib import Path
from typing import Any

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.sessions.attributes import encode_attribute
from recsys_models.data.sessions.catalogue import Attribute
from recsys_models.data.sessions.raw import RawSessions
from recsys_models.data.sessions.reader import SessionReader
from recsys_models.data.sessions.sequences import Sequences
from recsys_models.data.vocabulary import Vocabulary


def build_sessions(reader: SessionReader, files: dict[str, Path], folder: Path, log: MalformedLog) -> dict[str, Any]:
    """Read, split and encode a data set into ``.npy`` files in ``folder``. All events are held in memory.

    Writes ``<part>.items.npy`` and ``<part>.offsets.npy`` for train, validation and test, ``<part>.rows.npy`` and
    ``<part>.ends.npy`` for the latter two, ``items.counts.npy`` and ``items.values.npy``, and the arrays of attribute
    ``i`` as ``attribute<i>.<array>.npy``.

    Args:
        reader: of the data set.
        files: its source files.
        folder: an empty folder.
        log: where malformed lines are recorded.

    Returns:
        Names and kinds of the attributes.

    Raises:
        DataError: if the files hold nothing to train or test on; and what the reader raises.
    """
    raw = reader.open(files, log)
    _check_parts(reader, raw)
    vocabulary = _count(raw)
    counts = vocabulary.counts[:-1]
    numbers = np.full(len(raw.item_values), -1, np.int32)
    numbers[vocabulary.values] = np.arange(len(counts), dtype=np.int32)
    train, validation, test = raw.parts.train, raw.parts.validation, raw.parts.test
    _save_sequences(folder, "train", train, numbers)
    for name, cases in (("validation", validation), ("test", test)):
        _save_sequences(folder, name, cases.sequences, numbers)
        np.save(folder / f"{name}.rows.npy", cases.rows)
        np.save(folder / f"{name}.ends.npy", cases.ends)
    np.save(folder / "items.counts.npy", counts)
    np.save(folder / "items.values.npy", raw.item_values[vocabulary.values])
    attributes = [encode_attribute(attribute, raw.item_values, numbers, counts) for attribute in raw.attributes]
    for position, attribute in enumerate(attributes):
        _save_attribute(folder, position, attribute)
    return {"attributes": [{"name": attribute.name, "is_bag": attribute.is_bag} for attribute in attributes]}


def _check_parts(reader: SessionReader, raw: RawSessions) -> None:
    for name, size in (("train on", len(raw.parts.train)), ("test on", len(raw.parts.test))):
        if not size:
            raise DataError(
                f"{reader.name}: the files hold nothing to {name}. Check the files, and the options that drop sessions "
                "or items or say how to split"
            )


def _count(raw: RawSessions) -> Vocabulary:
    """Return the raw items that occur in any part or are kept without, by frequency in training."""
    counts = np.bincount(raw.parts.train.items, minlength=len(raw.item_values))
    used = counts > 0
    for cases in (raw.parts.validation, raw.parts.test):
        used[cases.sequences.items] = True
    if raw.described is not None:
        used[raw.described] = True
    occurring = np.flatnonzero(used)
    return Vocabulary.from_counts(occurring, counts[occurring], min_count=0)


def _save_sequences(folder: Path, part: str, sequences: Sequences, numbers: np.ndarray) -> None:
    np.save(folder / f"{part}.items.npy", numbers[sequences.items])
    np.save(folder / f"{part}.offsets.npy", sequences.offsets)


def _save_attribute(folder: Path, position: int, attribute: Attribute) -> None:
    for name in ("values", "offsets", "counts", "names"):
        np.save(folder / f"attribute{position}.{name}.npy", getattr(attribute, name))
