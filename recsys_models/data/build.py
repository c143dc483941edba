"""Turns raw rows into encoded splits on disk, block by block, whatever their number.

How many rows there are, hence their splits, hence the vocabularies, is known only once all have been read. So the rows
are first parsed into files of raw values, one per chunk; these are then gone through twice, to count and to encode.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

from recsys_models.data.errors import DataError
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.reader import Chunk, RawLog, Reader
from recsys_models.data.splits import SPLIT_NAMES, TRAIN
from recsys_models.data.vocabulary import ValueCounter, Vocabulary

_MAX_IDS = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class _Spill:
    """Files of raw rows: per chunk its ``path``, and the split of each row, int8 ``(N,)``."""

    paths: list[Path]
    codes: np.ndarray

    def chunks(self, description: str) -> Iterator[tuple[Chunk, np.ndarray]]:
        """Iterate over the chunks and the splits of their rows."""
        start = 0
        for path in tqdm(self.paths, desc=description, leave=False, disable=None):
            with np.load(path) as stored:
                chunk = Chunk(**stored)
            stop = start + len(chunk.labels)
            yield chunk, self.codes[start:stop]
            start = stop


def build(reader: Reader, files: dict[str, Path], folder: Path, log: MalformedLog) -> RawLog:
    """Read, split, count and encode a data set into ``.npy`` files in ``folder``.

    Writes ``<split>.ids.npy``, ``<split>.dense.npy``, ``<split>.labels.npy`` and, for field ``i``,
    ``field<i>.counts.npy`` and ``field<i>.values.npy``.

    Args:
        reader: of the data set.
        files: its source files.
        folder: an empty folder.
        log: where malformed lines are recorded.

    Returns:
        The raw log that was read, for its names.

    Raises:
        DataError: if the files cannot be read, hold no usable rows, or too many malformed lines.
    """
    raw = reader.open(files, log)
    spill = _spill(reader, raw, folder)
    log.sort()
    log.check_share(reader.max_malformed)
    vocabularies = _count(spill, raw, reader.min_count)
    _encode(spill, raw, vocabularies, folder)
    for position, (name, vocabulary) in enumerate(zip(raw.fields, vocabularies, strict=True)):
        values = vocabulary.values
        np.save(folder / f"field{position}.counts.npy", vocabulary.counts)
        np.save(folder / f"field{position}.values.npy", raw.texts[name][values] if name in raw.texts else values)
    for path in spill.paths:
        path.unlink()
    return raw


def _spill(reader: Reader, raw: RawLog, folder: Path) -> _Spill:
    paths: list[Path] = []
    given: list[np.ndarray] = []
    rows = 0
    for chunk in raw.chunks:
        paths.append(folder / f"spill{len(paths)}.npz")
        parts = {"values": chunk.values, "labels": chunk.labels, "dense": chunk.dense}
        _save(paths[-1], parts)
        rows += len(chunk.labels)
        if chunk.split is not None:
            given.append(chunk.split)
    if not rows:
        raise DataError(f"{reader.name}: the files hold no usable rows. Check the files and the options that drop rows")
    codes = np.concatenate(given) if given else reader.assign(rows)
    for code, name in enumerate(SPLIT_NAMES):
        if not np.any(codes == code):
            raise DataError(f"{reader.name}: the {name} split holds no usable rows. Check its file")
    return _Spill(paths, codes)


def _save(path: Path, parts: Mapping[str, np.ndarray | None]) -> None:
    arrays: dict[str, Any] = {name: part for name, part in parts.items() if part is not None}
    np.savez(path, **arrays)


def _count(spill: _Spill, raw: RawLog, min_count: int) -> list[Vocabulary]:
    counters = [ValueCounter() for _ in raw.fields]
    for chunk, codes in spill.chunks("count"):
        train = chunk.values[codes == TRAIN]
        for position, counter in enumerate(counters):
            counter.add(train[:, position])
    vocabularies = [Vocabulary.from_counts(*counter.result(), min_count) for counter in counters]
    for name, vocabulary in zip(raw.fields, vocabularies, strict=True):
        if vocabulary.num_ids > _MAX_IDS:
            raise DataError(f"field {name} has {vocabulary.num_ids} ids, over {_MAX_IDS}: raise the option min_count")
    return vocabularies


def _encode(spill: _Spill, raw: RawLog, vocabularies: list[Vocabulary], folder: Path) -> None:
    sizes = np.bincount(spill.codes, minlength=len(SPLIT_NAMES)).tolist()
    outputs = [_create(folder, split, rows, raw) for split, rows in zip(SPLIT_NAMES, sizes, strict=True)]
    filled = [0] * len(SPLIT_NAMES)
    for chunk, codes in spill.chunks("encode"):
        ids = np.column_stack([vocab.encode(chunk.values[:, i]) for i, vocab in enumerate(vocabularies)])
        for code, (out_ids, out_dense, out_labels) in enumerate(outputs):
            rows = np.flatnonzero(codes == code)
            target = slice(filled[code], filled[code] + len(rows))
            out_ids[target] = ids[rows]
            out_labels[target] = chunk.labels[rows]
            if chunk.dense is not None:
                out_dense[target] = chunk.dense[rows]
            filled[code] = target.stop
    for arrays in outputs:
        for array in arrays:
            array.flush()


def _create(folder: Path, split: str, rows: int, raw: RawLog) -> tuple[np.memmap, np.memmap, np.memmap]:
    return (
        open_memmap(folder / f"{split}.ids.npy", "w+", np.int32, (rows, len(raw.fields))),
        open_memmap(folder / f"{split}.dense.npy", "w+", np.float32, (rows, len(raw.dense_names))),
        open_memmap(folder / f"{split}.labels.npy", "w+", np.float32, (rows,)),
    )
