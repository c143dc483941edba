import re

import pytest

from recsys_models.data import DataError, load_dataset

MAP = 'field,index,value\nuser,0,anna\nuser,1,bob\nitem,2,chess\nitem,3,mail\nweather,4,sunny\nweather,5,"rain, wind"\n'
TRAIN = "1 0:1 2:1 4:1\n-1 1:1 3:1 4:1\n-1 1:1 2:1 5:1\n"
VALIDATION = "-1 0:1 3:1 4:1\r\n"
TEST = "1 4:1 1:1 2:1\r\n0 0:1 2:1 5:1\r\n"
SKIES = ["sunny", "rain, wind"]
CODES = [0, 0, 0, 1, 2, 2]
LABELS = [1, 0, 0, 0, 1, 0]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data" / "frappe"
    folder.mkdir(parents=True)
    for name, text in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        (folder / f"{name}.libfm").write_bytes(text.encode())
    (folder / "feature_map.csv").write_text(MAP)
    return folder.parent


def test_with_a_map_fields_and_values_come_from_it_whatever_the_order(root, cache):
    data = load_dataset("frappe", root, cache)
    assert [field.name for field in data.fields] == ["user", "item", "weather"]
    assert [field.values.tolist() for field in data.fields] == [["bob", "anna"], ["chess", "mail"], SKIES]
    assert [field.counts.tolist() for field in data.fields] == [[2, 1, 0]] * 3
    assert data.train.ids.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert data.validation.ids.tolist() == [[1, 1, 0]]
    assert data.test.ids.tolist() == [[0, 0, 0], [1, 0, 1]]
    labels = [split.labels.tolist() for split in (data.train, data.validation, data.test)]
    assert labels == [LABELS[:3], LABELS[3:4], LABELS[4:]]
    assert data.train.dense.shape == (3, 0)


def test_without_a_map_fields_go_by_position(root, cache, check_encoded):
    (root / "frappe" / "feature_map.csv").unlink()
    (root / "frappe" / "test.libfm").write_text("1 1:1 2:1 4:1\n0 0:1 2:1 5:1\n")
    data = load_dataset("frappe", root, cache)
    rows = [(0, 2, 4), (1, 3, 4), (1, 2, 5), (0, 3, 4), (1, 2, 4), (0, 2, 5)]
    check_encoded(data, ["field_0", "field_1", "field_2"], rows, LABELS, CODES)


def test_ten_fields_without_a_map_have_frappes_names(root, cache):
    line = "1 " + " ".join(f"{i}:1" for i in range(10)) + "\n"
    folder = root / "frappe"
    (folder / "feature_map.csv").unlink()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.libfm").write_text(line)
    names = [field.name for field in load_dataset("frappe", root, cache).fields]
    assert names[:3] == ["user", "item", "daytime"]
    assert names[-1] == "city"


def test_vocabulary_comes_from_the_training_file_alone(root, cache):
    data = load_dataset("frappe", root, cache)
    assert all(field.counts.sum() == 3 for field in data.fields)
    (root / "frappe" / "train.libfm").write_text("1 0:1 2:1 4:1\n")
    data = load_dataset("frappe", root, cache)
    assert [field.num_ids for field in data.fields] == [2, 2, 2]
    assert data.test.ids.tolist() == [[1, 0, 0], [0, 0, 1]]


MALFORMED = {
    "2 0:1 2:1 4:1": "label 2, expected 1 or -1",
    "1 0:1 2:2 4:1": "value after an index 2, expected 1",
    "1 0:1 9:1 4:1": r"indices \[0, 9, 4\] are not one of each field \(user, item, weather\)",
    "1 0:1 1:1 4:1": "are not one of each field",
    "1 0:1 2:1": "5 columns, expected 7 separated by ' ' and ':'",
    "1 0:1 2 1:4 1": "7 columns?|expected 'index:1' pairs",
    "1 a:1 2:1 4:1": r"column 2 \(index\) is 'a', expected an integer",
}


@pytest.mark.parametrize("line", MALFORMED)
def test_malformed_lines_are_left_out_with_the_reason(root, cache, line):
    (root / "frappe" / "train.libfm").write_text(TRAIN + line + "\n" + TRAIN)
    data = load_dataset("frappe", root, cache, max_malformed=0.5)
    assert data.num_malformed == 1
    assert (data.malformed[0].file, data.malformed[0].line) == ("train.libfm", 4)
    assert re.search(MALFORMED[line], data.malformed[0].reason)
    assert len(data.train) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "index,field,value\n",
            "line 1 is 'index,field,value'. Expected feature_map.csv: the header field,index,value",
        ),
        ("field,index,value\nuser,0,a\nuser,0,b\n", "line 3 is 'user,0,b', expected .* index not used before"),
        ("field,index,value\nuser,x,a\n", "line 2 is 'user,x,a'"),
        ("field,index,value\nuser,0\n", "line 2 is 'user,0'"),
        ("field,index,value\nuser,٣,a\n", "line 2 is 'user,٣,a'"),
        ("field,index,value\n", "no line after the header"),
    ],
)
def test_a_wrong_map_is_an_error(root, cache, content, message):
    (root / "frappe" / "feature_map.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        load_dataset("frappe", root, cache)


def test_a_missing_split_is_an_error(root, cache):
    (root / "frappe" / "validation.libfm").unlink()
    with pytest.raises(DataError, match=r"validation\.libfm: no such file"):
        load_dataset("frappe", root, cache)
