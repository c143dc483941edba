import math
import re

import numpy as np
import pytest

from recsys_models.data import DataError, load_dataset
from recsys_models.data.readers.criteo import CATEGORIES, INTEGERS, bucket, log_feature
from recsys_models.data.rows import MISSING
from recsys_models.data.splits import random_split, temporal_split

ROWS = 28


def cell_integer(row: int, column: int) -> int | None:
    """Integers with gaps, and negative ones where Criteo has them."""
    if (row + column) % 5 == 0:
        return None
    return (-3, -1, 0, 1, 2, 3, 50, 65535)[(row * 3 + column) % 8]


def cell_category(row: int, column: int) -> int | None:
    return None if (row * 7 + column) % 6 == 0 else (0x68FD1E64, 0, 0xFFFFFFFF, row % 9)[(row + column) % 4]


def line(row: int) -> str:
    integers = [cell_integer(row, column) for column in range(13)]
    categories = [cell_category(row, column) for column in range(26)]
    cells = ["" if v is None else str(v) for v in integers] + ["" if v is None else f"{v:08x}" for v in categories]
    return "\t".join([str(row % 2), *cells])


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data" / "criteo"
    folder.mkdir(parents=True)
    (folder / "sample.tsv").write_text("".join(line(row) + "\n" for row in range(ROWS)))
    return folder.parent


def missing(value: int | None) -> int:
    return MISSING if value is None else value


CATEGORY_ROWS = [[missing(cell_category(row, column)) for column in range(26)] for row in range(ROWS)]
LABELS = [row % 2 for row in range(ROWS)]


def reference_log(value: int | None, column: int) -> float:
    if value is None:
        return 0.0
    return math.log(max(value, -3) + 4) if column == 1 else math.log(max(value, 0) + 1)


def reference_bucket(value: int | None) -> int:
    if value is None:
        return MISSING
    return math.floor(math.log(value) ** 2) if value > 2 else int(value)


@pytest.mark.parametrize("min_count", [1, 3])
@pytest.mark.parametrize("split", ["temporal", "random"])
def test_categories_labels_and_dense_features(root, cache, check_encoded, min_count, split):
    data = load_dataset("criteo", root, cache, min_count=min_count, split=split)
    codes = temporal_split(ROWS, 1 / 14, 1 / 14) if split == "temporal" else random_split(ROWS, 2021)
    check_encoded(data, CATEGORIES, CATEGORY_ROWS, LABELS, codes, min_count)
    assert data.dense_names == INTEGERS
    dense = [[reference_log(cell_integer(row, column), column) for column in range(13)] for row in range(ROWS)]
    for code, part in enumerate((data.train, data.validation, data.test)):
        assert np.array_equal(part.dense, np.array(dense, np.float32)[np.asarray(codes) == code])


def test_temporal_split_trains_on_six_of_seven_days(root, cache):
    data = load_dataset("criteo", root, cache)
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 2, 2)


def test_buckets_make_integers_fields(root, cache, check_encoded):
    data = load_dataset("criteo", root, cache, numeric="buckets")
    rows = [[reference_bucket(cell_integer(row, c)) for c in range(13)] + CATEGORY_ROWS[row] for row in range(ROWS)]
    check_encoded(data, INTEGERS + CATEGORIES, rows, LABELS, temporal_split(ROWS, 1 / 14, 1 / 14))
    assert data.dense_names == ()
    assert data.train.dense.shape == (24, 0)


def test_transforms_of_numbers():
    values = np.array([MISSING, -5, -3, -1, 0, 1, 2, 3, 10, 10**17])
    with np.errstate(all="raise"):
        assert log_feature(values, "I1").tolist()[:5] == [0, 0, 0, 0, 0]
        assert log_feature(values, "I2")[:4].tolist() == [0, 0, 0, np.float32(math.log(3))]
        assert bucket(values).tolist() == [MISSING, -5, -3, -1, 0, 1, 2, 1, 5, math.floor(math.log(10**17) ** 2)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda cells: cells[:-1], r"39 columns, expected 40 separated by '\\t'"),
        (lambda cells: ["2", *cells[1:]], "label 2, expected 0 or 1"),
        (lambda cells: [*cells[:1], "1.5", *cells[2:]], r"column 2 \(I1\) is '1.5', expected an integer"),
        (lambda cells: [*cells[:39], "68fd1e6"], r"column 40 \(C26\) is '68fd1e6', expected 8 hexadecimal digits or n"),
        (lambda cells: [*cells[:39], "caf\u00e9\u00e9\u00e9"], r"column 40 \(C26\)"),
    ],
)
def test_malformed_lines_are_left_out(root, cache, change, reason):
    path = root / "criteo" / "sample.tsv"
    bad = "\t".join(change(line(3).split("\t"))) + "\n"
    path.write_text(
        "".join(line(row) + "\n" for row in range(5)) + bad + "".join(line(r) + "\n" for r in range(5, ROWS))
    )
    data = load_dataset("criteo", root, cache, max_malformed=0.1)
    (found,) = data.malformed
    assert (found.file, found.line, data.num_malformed) == ("sample.tsv", 6, 1)
    assert re.search(reason, found.reason)
    clean = load_dataset("criteo", write_clean(root), cache)
    assert np.array_equal(data.train.ids, clean.train.ids)
    assert np.array_equal(data.train.dense, clean.train.dense)


def write_clean(root):
    (root / "criteo" / "sample.tsv").write_text("".join(line(row) + "\n" for row in range(ROWS)))
    return root


def test_the_file_without_labels_is_refused_with_the_reason(root, cache):
    (root / "criteo" / "sample.tsv").write_text("".join(line(row)[2:] + "\n" for row in range(ROWS)))
    with pytest.raises(DataError, match=r"line 1 has 39 columns.*test.txt has no labels"):
        load_dataset("criteo", root, cache)


def test_which_file_is_read(root, cache):
    folder = root / "criteo"
    (folder / "readme.txt").write_text("about")
    first = load_dataset("criteo", root, cache)
    (folder / "other.txt").write_text(line(0))
    with pytest.raises(DataError, match=r"train.txt or one other .* found: other.txt, sample.tsv"):
        load_dataset("criteo", root, cache)
    (folder / "sample.tsv").rename(folder / "train.txt")
    assert load_dataset("criteo", root, cache).content_hash == first.content_hash
    (folder / "train.txt").unlink()
    (folder / "other.txt").unlink()
    with pytest.raises(DataError, match="found: none"):
        load_dataset("criteo", root, cache)
