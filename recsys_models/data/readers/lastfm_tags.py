"""Tags of HetRec-2011 Last.fm: which tag a user gave an artist, with random tags as negatives."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.lines import Dialect, read_header
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.reader import Chunk, RawLog, Reader, check_at_least
from recsys_models.data.rows import read_rows

_COLUMNS = ["userID", "artistID", "tagID", "day", "month", "year"]
_EXPECTED = f"user_taggedartists.dat of HetRec-2011: tab-separated, with the header {' '.join(_COLUMNS)}"


@dataclass(frozen=True, kw_only=True)
class LastfmTags(Reader):
    """Reads ``user_taggedartists.dat``. Fields: user, artist, tag.

    Every assignment of a tag is a row of label 1, followed by ``negatives`` rows of label 0 with the same user and
    artist and a tag drawn uniformly from all tags, never one that the user gave that artist.

    Args:
        negatives: rows of label 0 per row of label 1.
        negative_seed: seed of the tags drawn.
    """

    name: ClassVar[str] = "lastfm_tags"
    folder: ClassVar[str] = "hetrec-lastfm"

    negatives: int = 2
    negative_seed: int = 2021

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_at_least(self.name, "negatives", self.negatives, 1)
        check_at_least(self.name, "negative_seed", self.negative_seed, 0)

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the file of tag assignments."""
        return {"tags": folder / "user_taggedartists.dat"}

    def open(self, files: Mapping[str, Path], log: MalformedLog) -> RawLog:
        """Start reading."""
        return RawLog(("user", "artist", "tag"), self._chunks(files["tags"], log))

    def _chunks(self, path: Path, log: MalformedLog) -> Iterator[Chunk]:
        positives = _read(path, log)
        values = np.repeat(positives, 1 + self.negatives, axis=0)
        labels = np.zeros(len(values), np.float32)
        labels[:: 1 + self.negatives] = 1
        values[labels == 0, 2] = _draw_tags(path, positives, self.negatives, self.negative_seed)
        yield Chunk(values, labels)


def _read(path: Path, log: MalformedLog) -> np.ndarray:
    header = read_header(path, "\t", _EXPECTED)
    if header != _COLUMNS:
        raise DataError(f"{path}: line 1 is {' '.join(header)[:200]!r}. Expected {_EXPECTED}")
    parts = [np.empty((0, 3), np.int64)]
    for rows in read_rows(path, Dialect(b"\t", len(_COLUMNS), header=True), log, _EXPECTED):
        values = np.column_stack([rows.integers(column, name) for column, name in enumerate(_COLUMNS)])
        parts.append(values[rows.good, :3])
    return np.concatenate(parts)


def _draw_tags(path: Path, positives: np.ndarray, negatives: int, seed: int) -> np.ndarray:
    """Draw ``negatives`` tags per positive, int64 ``(n * negatives,)``, redrawing those the user gave the artist."""
    tags, tag = np.unique(positives[:, 2], return_inverse=True)
    pair = np.unique(positives[:, :2], axis=0, return_inverse=True)[1].ravel()
    given = np.unique(pair * len(tags) + tag)
    most = np.bincount(given // len(tags)).max(initial=0) if len(tags) else 0
    if most == len(tags):
        raise DataError(
            f"{path}: {'no usable line' if not most else f'one user gave one artist all {most} tags'}, so no other tag "
            "can be drawn as a negative. Check that the file is whole"
        )
    generator = np.random.default_rng(seed)
    pair = np.repeat(pair, negatives)
    drawn = generator.integers(len(tags), size=len(pair))
    while len(again := np.flatnonzero(np.isin(pair * len(tags) + drawn, given))):
        drawn[again] = generator.integers(len(tags), size=len(again))
    return tags[drawn]
