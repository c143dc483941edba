import pytest

from recsys_models.data import DataError, load_sessions
from tests.recsys_models.data.sessions.memory import in_keys

LINES = ["5 30\n", "5 10\n", "1 10\n", "5 20\n", "1 20\n"]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "sasrec" / "beauty.txt"
    path.parent.mkdir()
    path.write_text("".join(LINES))
    return path


def test_lines_are_in_the_order_of_time(path, tmp_path, cache):
    data = load_sessions("sasrec_text", tmp_path, cache)
    assert in_keys(data) == [[[30], [10, 20]], [([30], 10)], [([30, 10], 20)]]
    assert (data.filters_seen, data.catalogue.attributes) == (True, ())
    assert data.catalogue.values.tolist() == [10, 20, 30]
    assert data.catalogue.counts.tolist() == [1, 1, 1]


def test_the_file_can_be_named(path, tmp_path, cache):
    (path.parent / "other.txt").write_text("1 1\n1 2\n1 3\n")
    assert in_keys(load_sessions("sasrec_text", tmp_path, cache, file="other.txt"))[0] == [[1]]
    assert in_keys(load_sessions("sasrec_text", tmp_path / "sasrec", cache, file="other.txt"))[0] == [[1]]
    with pytest.raises(DataError, match=r"there must be one \.txt file, found: beauty\.txt, other\.txt.*option file"):
        load_sessions("sasrec_text", tmp_path, cache)
    with pytest.raises(DataError, match=r"no such file: third\.txt\. Expected a text file of lines 'user item'"):
        load_sessions("sasrec_text", tmp_path, cache, file="third.txt")


@pytest.mark.parametrize("line", ["7\n", "7 x\n", "7 1 2\n", "7  1\n", "7\t1\n", "7 1.5\n"])
def test_malformed_lines_are_left_out(path, tmp_path, cache, line):
    path.write_text("".join([*LINES[:2], line, *LINES[2:]]))
    data = load_sessions("sasrec_text", tmp_path, cache, max_malformed=0.5)
    assert in_keys(data) == [[[30], [10, 20]], [([30], 10)], [([30, 10], 20)]]
    assert [(found.line, found.file) for found in data.malformed] == [(3, "beauty.txt")]


def test_another_format_is_an_error(path, tmp_path, cache):
    path.write_text("5,30\n5,10\n")
    with pytest.raises(
        DataError, match=r"beauty\.txt: line 1 has 1 columns.*This is not a text file of lines 'user item'"
    ):
        load_sessions("sasrec_text", tmp_path, cache)


def test_a_file_that_was_cut_off_is_an_error(path, tmp_path, cache):
    path.write_text("".join(LINES) + "1")
    with pytest.raises(DataError, match="the file ends in the middle of line 6"):
        load_sessions("sasrec_text", tmp_path, cache)


@pytest.mark.parametrize("text", ["5 1\n5 1\n5 1\n", "5 1\n6 1\n6 1\n6 1\n6 1\n"])
def test_a_catalogue_of_one_item_loads(path, tmp_path, cache, text):
    path.write_text(text)
    data = load_sessions("sasrec_text", tmp_path, cache)
    assert (data.catalogue.num_items, data.catalogue.num_seen, data.catalogue.twin_groups().tolist()) == (1, 1, [0])
    assert [batch.targets.tolist() for batch in data.test.batches(4, 2)] == [[0]]


def test_items_that_training_lacks_come_last_and_can_be_asked_for(path, tmp_path, cache):
    path.write_text("1 9\n1 3\n1 2\n2 9\n2 8\n2 3\n3 5\n")
    data = load_sessions("sasrec_text", tmp_path, cache)
    assert data.catalogue.values.tolist() == [9, 5, 2, 3, 8]
    assert data.catalogue.counts.tolist() == [2, 1, 0, 0, 0]
    assert (data.catalogue.num_items, data.catalogue.num_seen) == (5, 2)
    assert data.test.targets.tolist() == [2, 3]
    assert data.statistics["cold_test_targets"] == 1.0


@pytest.mark.parametrize("text", ["1 1\n1 2\n", "1 1\n2 1\n"])
def test_too_short_histories_leave_nothing_to_test_on(path, tmp_path, cache, text):
    path.write_text(text)
    with pytest.raises(DataError, match="sasrec_text: the files hold nothing to test on"):
        load_sessions("sasrec_text", tmp_path, cache)


def test_filters_that_leave_nothing_are_an_error(path, tmp_path, cache):
    with pytest.raises(DataError, match="sasrec_text: the files hold nothing to train on"):
        load_sessions("sasrec_text", tmp_path, cache, min_item_count=9)
