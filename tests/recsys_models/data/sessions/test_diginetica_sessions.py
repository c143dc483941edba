import json

import pytest

from recsys_models.data import DataError, load_sessions
from tests.recsys_models.data.sessions import reference
from tests.recsys_models.data.sessions.memory import in_keys

TRAIN = [[1, 2], [3, 4, 5], [2, 2, 1], [6, 7], [8, 1], [1, 2], [1, 3], [2, 3], [4, 1], [5, 1]]
TEST = [[3, 2, 1], [3, 2], [1, 1, 1, 1], [9, 1]]


def as_cases(sessions):
    """Prefixes from the longest down, as the preprocessing of SR-GNN writes them, and their targets."""
    cases = [(s[:i], s[i]) for s in sessions for i in range(len(s) - 1, 0, -1)]
    return [prefix for prefix, _ in cases], [target for _, target in cases]


@pytest.fixture
def load(tmp_path, cache):
    def load(train=TRAIN, test=None, **options):
        (tmp_path / "sessions_train.json").write_text(json.dumps(train))
        (tmp_path / "sessions_test.json").write_text(json.dumps(test or as_cases(TEST)))
        return load_sessions("diginetica_sessions", tmp_path, cache, **options)

    load.folder = tmp_path
    return load


def test_sessions_and_cases_are_as_they_come(load):
    data = load(validation_share=0.0)
    train, validation, test = in_keys(data)
    assert (train, validation) == (TRAIN, [])
    assert test == list(zip(*as_cases(TEST), strict=True))
    assert not data.filters_seen


def test_cases_of_a_session_share_its_items(load):
    data = load()
    assert [part.tolist() for part in data.test.sequences] == [
        [data.catalogue.values.tolist().index(item) for item in session] for session in TEST
    ]
    assert data.statistics["test_sequences"] == len(TEST)


@pytest.mark.parametrize(
    "cases",
    [
        ([[1], [1, 2]], [2, 3]),  # from the shortest up
        ([[1, 2], [1]], [3, 4]),  # what is no target of the same session
        ([[1, 2], [2]], [3, 2]),
        ([[1, 2], [1, 2]], [3, 3]),
    ],
)
def test_other_cases_are_as_they_come_too(load, cases):
    assert in_keys(load(test=cases))[2] == list(zip(*cases, strict=True))


def test_a_share_of_the_training_sessions_validates_with_all_prefixes(load):
    sessions = [[i, i + 1, i + 3] for i in range(1, 11)]
    train, validation, _ = in_keys(load(train=sessions, validation_share=0.3))
    held = [session for session in sessions if session not in train]
    assert train == [session for session in sessions if session in train]
    assert (len(held), validation) == (3, reference.prefixes(held))
    assert in_keys(load(train=sessions, validation_share=0.3, split_seed=1))[1] != validation
    assert len(in_keys(load(train=sessions))[0]) == 9


def test_items_of_validation_sessions_alone_stay_in_the_catalogue(load):
    data = load(train=[[10 * i, 10 * i + 1] for i in range(1, 11)])
    assert data.catalogue.num_seen == 18
    assert data.catalogue.num_items == 20 + 3 + 1  # of the test cases: 1, 2, 3, 9
    assert data.catalogue.counts[18:].tolist() == [0] * 6


def test_malformed_records_are_left_out_and_named(load):
    wrong = [[], 5, [1, "2"], [1, 2.5], [True], [1, 10**30], None]
    data = load(train=TRAIN + wrong, test=([[1], [], 3, [1], ["x"]], [2, 2, 2, None, 2]), max_malformed=0.9)
    assert (len(data.train), len(data.test)) == (9, 1)
    assert [(line.file, line.line) for line in data.malformed] == [
        *(("sessions_train.json", 11 + i) for i in range(7)),
        *(("sessions_test.json", 2 + i) for i in range(4)),
    ]
    assert [line.reason for line in data.malformed][:3] == [
        "record 11 is [], expected a list of at least 1 integers",
        "record 12 is 5, expected a list of at least 1 integers",
        "record 13 is [1, '2'], which has '2', expected integers of up to 64 bits",
    ]
    with pytest.raises(DataError, match=r"sessions_train\.json: 7 of 17 lines"):
        load(train=TRAIN + wrong)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "sessions_train.json",
            '{"1": [2]}',
            "the file holds {'1': .*Expected sessions_train.json: a list of sessions",
        ),
        ("sessions_train.json", "[[1, 2], [3,", "line 1, column 13: no JSON .*Expected sessions_train.json.*cut off"),
        ("sessions_train.json", "1 2\n3 4\n", "line 1, column 3: no JSON"),
        ("sessions_train.json", "", "is empty"),
        ("sessions_test.json", "[[1, 2]]", r"Expected sessions_test.json: \[prefixes, targets\]"),
        ("sessions_test.json", "[[[1, 2]], [3, 4]]", "1 prefixes and 2 targets. Expected sessions_test.json"),
        ("sessions_test.json", "[1, 2]", r"the file holds \[1, 2\]"),
    ],
)
def test_wrong_files_say_what_was_expected(load, cache, file, text, message):
    load()
    (load.folder / file).write_text(text)
    with pytest.raises(DataError, match=message):
        load_sessions("diginetica_sessions", load.folder, cache)


@pytest.mark.parametrize("missing", ["sessions_train.json", "sessions_test.json"])
def test_a_missing_file_says_what_was_expected(load, cache, missing):
    load()
    (load.folder / missing).unlink()
    with pytest.raises(DataError, match=f"no such file: {missing}. Expected {missing}: "):
        load_sessions("diginetica_sessions", load.folder, cache)


def test_bytes_that_are_no_text_are_an_error(load, cache):
    load()
    (load.folder / "sessions_train.json").write_bytes(b"\xff\xfe[[1,2]]")
    with pytest.raises(DataError, match="this is no text"):
        load_sessions("diginetica_sessions", load.folder, cache)
