"""Fixtures of the data tests: temporary caches, the real data sets, and a slow reference of the encoding."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from recsys_models.data import ClickLog


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, tmp_path):
    """No test may read or fill the cache of whoever runs it."""
    monkeypatch.setenv("EMBCOMP_CACHE", str(tmp_path / "default-cache"))
    monkeypatch.delenv("EMBCOMP_DATA", raising=False)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


REAL_ROOT = os.environ.get("EMBCOMP_DATA")


@pytest.fixture(scope="session")
def real_root() -> Path:
    if not REAL_ROOT or not Path(REAL_ROOT).is_dir():
        pytest.skip("EMBCOMP_DATA names no folder of data sets")
    return Path(REAL_ROOT)


@pytest.fixture(scope="session")
def real_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("real-cache")


def _reference_field(column: Sequence, train: Sequence[bool], min_count: int) -> tuple[list, list[int], list[int]]:
    """Values in id order, counts with the last id, and the id of every row."""
    counts = Counter(value for value, used in zip(column, train, strict=True) if used)
    kept = sorted((v for v, n in counts.items() if n >= min_count), key=lambda value: (-counts[value], value))
    rare = sum(n for n in counts.values() if n < min_count)
    ids = [kept.index(value) if value in kept else len(kept) for value in column]
    return kept, [counts[value] for value in kept] + [rare], ids


@pytest.fixture
def check_encoded() -> Callable[..., None]:
    """Compare a data set with what follows from its raw rows and the split of each, in plain Python."""

    def check(
        data: ClickLog, names: Sequence[str], rows: Sequence[Sequence], labels: Sequence, codes, min_count: int = 1
    ) -> None:
        assert [field.name for field in data.fields] == list(names)
        train = [code == 0 for code in codes]
        ids = []
        for field, column in zip(data.fields, zip(*rows, strict=True), strict=True):
            values, counts, column_ids = _reference_field(column, train, min_count)
            assert field.values.tolist() == values, field.name
            assert field.counts.tolist() == counts, field.name
            assert field.counts.dtype == np.int64
            assert field.num_ids == len(counts)
            ids.append(column_ids)
        expected = np.array(ids).T
        for code, split in enumerate((data.train, data.validation, data.test)):
            where = np.flatnonzero(np.asarray(codes) == code)
            assert split.ids.tolist() == expected[where].tolist()
            assert split.labels.tolist() == [float(labels[i]) for i in where]
            assert (split.ids.dtype, split.labels.dtype, split.dense.dtype) == (np.int32, np.float32, np.float32)
            assert len(split.ids) == len(split.dense) == len(split) == len(where)

    return check
