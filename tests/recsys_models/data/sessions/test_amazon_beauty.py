import json

import pytest

from recsys_models.data import DataError, load_sessions, metadata_twin_rate
from tests.recsys_models.data.sessions.memory import in_keys, values_of

LINES = ["1 10 20 30 40\n", "7 20 10\n", "3 10 30 20 \n"]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "sequences.txt").write_text("".join(LINES))
    attributes = {"10": [5, 6], "20": [6], "40": [9], "99": [1], "30": [6, 5]}
    (tmp_path / "item_attributes.json").write_text(json.dumps(attributes))
    return tmp_path


def test_lines_are_histories(root, cache):
    data = load_sessions("amazon_beauty", root, cache)
    assert in_keys(data) == [
        [[10, 20], [20, 10], [10]],
        [([10, 20], 30), ([10], 30)],
        [([10, 20, 30], 40), ([10, 30], 20)],
    ]
    assert data.filters_seen


def test_attributes_are_bags(root, cache):
    data = load_sessions("amazon_beauty", root, cache)
    assert values_of(data, "attribute") == {10: [6, 5], 20: [6], 30: [6, 5], 40: [None]}
    assert data.catalogue.attribute("attribute").counts.tolist() == [5, 3, 0]
    group = data.catalogue.twin_groups()
    assert [int((group == own).sum()) for own in group] == [2, 1, 2, 1]
    assert metadata_twin_rate(data) == 0.0
    assert metadata_twin_rate(data, "validation") == 1.0
    assert metadata_twin_rate(data, "train") == 3 / 5
    assert metadata_twin_rate(data, "train", attributes=()) == 1.0
    with pytest.raises(DataError, match="option split is 'dev', must be one of 'train', 'validation', 'test'"):
        metadata_twin_rate(data, "dev")
    (root / "item_attributes.json").unlink()
    plain = load_sessions("amazon_beauty", root, cache)
    assert plain.catalogue.attributes == ()
    assert metadata_twin_rate(plain) == 1.0


def test_malformed_lines_and_items_are_left_out(root, cache):
    expected = in_keys(load_sessions("amazon_beauty", root, cache))
    (root / "sequences.txt").write_text("".join([*LINES, "4\n", "4 x 10\n", "\n", "4 1.5 2\n"]))
    (root / "item_attributes.json").write_text('{"10": [5], "x": [1], "20": 6, "30": ["6"], "40": []}')
    data = load_sessions("amazon_beauty", root, cache, max_malformed=0.6)
    assert in_keys(data) == expected
    assert [str(line) for line in data.malformed] == [
        "sequences.txt:4: '4', expected a user and at least one item, all integers",
        "sequences.txt:5: '4 x 10', expected a user and at least one item, all integers",
        "sequences.txt:7: '4 1.5 2', expected a user and at least one item, all integers",
        "item_attributes.json:2: record 2 is the item 'x', expected an integer of up to 18 digits",
        "item_attributes.json:3: record 3 is 6, expected a list of at least 0 integers",
        "item_attributes.json:4: record 4 is ['6'], which has '6', expected integers of up to 64 bits",
    ]
    assert values_of(data, "attribute") == {10: [5], 20: [], 30: [], 40: []}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("sequences.txt", "user,item\n1,2\n", "This is not sequences.txt: lines 'user item item ...'"),
        ("item_attributes.json", "[1]", r"the file holds \[1\]. Expected item_attributes.json: an object of lists"),
        ("item_attributes.json", "{'1': [2]}", "no JSON"),
    ],
)
def test_wrong_files_say_what_was_expected(root, cache, file, text, message):
    (root / file).write_text(text)
    with pytest.raises(DataError, match=message):
        load_sessions("amazon_beauty", root, cache)


def test_a_missing_file_says_what_was_expected(tmp_path, cache):
    with pytest.raises(DataError, match=r"no such file: sequences\.txt\. Expected sequences\.txt: lines 'user item"):
        load_sessions("amazon_beauty", tmp_path, cache)
