import numpy as np
import pytest

from recsys_models.data import DataError, load_dataset
from recsys_models.data.readers.avazu import COLUMNS, HEXADECIMAL
from recsys_models.data.splits import random_split, temporal_split

HEADER = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,"
    "device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)
# 21 October 2014 was a Tuesday.
HOURS = ["14102100", "14102113", "14102523", "14102607", "14102700"]
CLOCK = {
    "14102100": (0, 1, 0),
    "14102113": (13, 1, 0),
    "14102523": (23, 5, 1),
    "14102607": (7, 6, 1),
    "14102700": (0, 0, 0),
}
ROWS = 30


def value(row: int, column: int) -> int:
    return -1 if COLUMNS[column] == "C20" and row % 2 else (row * (column + 3)) % 7 + (1 << 31) * (row % 3 == 0)


def line(row: int) -> str:
    cells = [f"{value(row, i):08x}" if name in HEXADECIMAL else str(value(row, i)) for i, name in enumerate(COLUMNS)]
    return ",".join([f"1000009418151094273{row}", str(int(row % 6 == 0)), HOURS[row % 5], *cells])


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data" / "avazu"
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text("\n".join([HEADER, *map(line, range(ROWS))]) + "\n")
    return folder.parent


@pytest.mark.parametrize("weekday", [False, True])
@pytest.mark.parametrize("is_weekend", [False, True])
@pytest.mark.parametrize("split", ["random", "temporal"])
def test_rows_and_clock(root, cache, check_encoded, weekday, is_weekend, split):
    data = load_dataset("avazu", root, cache, weekday=weekday, is_weekend=is_weekend, split=split)
    rows = []
    for row in range(ROWS):
        hour, day, weekend = CLOCK[HOURS[row % 5]]
        rows.append([hour, *[day] * weekday, *[weekend] * is_weekend, *(value(row, i) for i in range(len(COLUMNS)))])
    names = ["hour", *["weekday"] * weekday, *["is_weekend"] * is_weekend, *COLUMNS]
    codes = random_split(ROWS, 2021) if split == "random" else temporal_split(ROWS)
    check_encoded(data, names, rows, [int(row % 6 == 0) for row in range(ROWS)], codes)
    assert len(data.fields) == 22 + weekday + is_weekend


def test_columns_go_by_name(root, cache):
    first = load_dataset("avazu", root, cache)
    path = root / "avazu" / "train.csv"
    moved = [",".join(reversed(text.split(","))) for text in path.read_text().splitlines()]
    path.write_text("\n".join(moved))
    assert np.array_equal(load_dataset("avazu", root, cache).train.ids, first.train.ids)


@pytest.mark.parametrize("stamp", ["14102124", "14133100", "14022900", "0", "-1", "2014102100"])
def test_impossible_times_are_malformed(root, cache, stamp):
    path = root / "avazu" / "train.csv"
    path.write_text(path.read_text() + line(1).replace(HOURS[1], stamp) + "\n")
    data = load_dataset("avazu", root, cache, max_malformed=0.1)
    assert data.malformed[0].reason == f"hour {stamp}, expected a time YYMMDDHH"
    assert data.malformed[0].line == ROWS + 2


def test_the_header_is_needed(root, cache):
    path = root / "avazu" / "train.csv"
    path.write_text("\n".join(map(line, range(ROWS))))
    with pytest.raises(DataError, match=r"line 1 is '10000094.*Expected train.csv of Avazu.*header id,click,hour,C1"):
        load_dataset("avazu", root, cache)


def test_no_file_is_an_error(root, cache):
    (root / "avazu" / "train.csv").unlink()
    with pytest.raises(DataError, match=r"there must be train\.csv .* found: none"):
        load_dataset("avazu", root, cache)
