import pytest

from recsys_models.data import DataError, load_sessions
from tests.recsys_models.data.sessions import reference
from tests.recsys_models.data.sessions.memory import in_keys, values_of

DAY = 86_400_000
CLICKS = [  # session, milliseconds, item, category
    *((1, 5, 70, "0"), (1, 4, 80, "0"), (2, 2 * DAY, 70, "S"), (2, 2 * DAY + 1, 90, "3"), (2, 2 * DAY + 1, 80, "S")),
    *((3, 3 * DAY, 90, "2089037382"), (3, 3 * DAY + 9, 70, "0"), (4, 9 * DAY, 80, "12"), (4, 9 * DAY + 5, 60, "7")),
    *((5, 9 * DAY - 3, 90, "S"), (5, 9 * DAY - 2, 80, "S"), (5, 9 * DAY - 1, 60, "0"), (6, 9 * DAY, 70, "0")),
]
LOOSE = {"min_item_count": 1, "validation_share": 0.0}


def stamp(milliseconds):
    day, rest = divmod(milliseconds, DAY)
    seconds, thousandths = divmod(rest, 1000)
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"2014-04-{day + 1:02}T{clock}.{thousandths:03}Z"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "yoochoose" / "yoochoose-clicks.dat"
    path.parent.mkdir()
    path.write_text("".join(f"{s},{stamp(time)},{item},{category}\n" for s, time, item, category in CLICKS))
    return path


@pytest.mark.parametrize("options", [{}, {"fraction": 2}, {"fraction": 4}, {"keep_unseen": True}, {"test_days": 6}])
def test_clicks_are_split_by_time(path, tmp_path, cache, options):
    data = load_sessions("yoochoose", tmp_path, cache, **LOOSE, **options)
    sequences, ends = reference.group([(s, item, time / 1000) for s, time, item, _ in CLICKS])
    sequences, ends = reference.core(sequences, ends, 1, 2, False)
    rules = {"test_days": 1, "fraction": 1, "keep_unseen": False, **options}
    train, test = reference.last_days(sequences, ends, **rules)
    assert in_keys(data) == [train, [], test]
    assert not data.filters_seen


def test_the_category_is_that_of_the_last_click_before_the_test(path, tmp_path, cache):
    data = load_sessions("yoochoose", tmp_path, cache, keep_unseen=True, **LOOSE)
    # Item 90 is on offer in the test alone; item 60 is new there, and has the category of its first click.
    assert values_of(data, "category") == {70: "0", 80: "S", 90: "2089037382", 60: "0"}
    (category,) = data.catalogue.attributes
    assert (category.names.tolist(), category.counts.tolist()) == (["0", "2089037382", "S"], [3, 2, 2, 0])
    data = load_sessions("yoochoose", tmp_path, cache, protocol="leave_one_out", min_item_count=1)
    assert values_of(data, "category") == {70: "0", 80: "12", 90: "S", 60: "7"}


@pytest.mark.parametrize("step", [DAY, 0])  # clicks of different times, or all of one
def test_bug_leaving_one_out_the_category_is_that_of_the_last_click_in_training(tmp_path, cache, step):
    """Each user's last click on item 1 tests, and the one on item 4 validates; both are on offer there alone."""
    lines, items = [], ((1, "7"), (2, "7"), (3, "8"), (2, "9"), (4, "S"), (1, "S"))
    for user in range(4):
        for place, (item, category) in enumerate(items):
            lines.append(f"{user},{stamp(step * place + (user if step else 0))},{item},{category}\n")
    (tmp_path / "yoochoose-clicks.dat").write_text("".join(lines))
    options = {"protocol": "leave_one_out", "min_item_count": 1}
    data = load_sessions("yoochoose", tmp_path, cache, **options)
    assert in_keys(data)[2] == [([1, 2, 3, 2, 4], 1)] * 4
    # Item 4 has no click in training: its first one says what it is, and training does not know the value.
    assert values_of(data, "category") == {1: "7", 2: "9", 3: "8", 4: None}
    rare = load_sessions("yoochoose", tmp_path, cache, merge_repeats=True, **options | {"min_item_count": 8})
    assert in_keys(rare)[2] == [([1, 2, 2], 1)] * 4  # the second click on item 2 validates now
    assert values_of(rare, "category") == {1: "7", 2: "7"}


def test_leave_one_out_is_there_too(path, tmp_path, cache):
    data = load_sessions("yoochoose", tmp_path, cache, protocol="leave_one_out", min_item_count=1)
    assert data.filters_seen
    assert in_keys(data)[2] == [([70, 90], 80), ([90, 80], 60)]


def test_malformed_lines_are_left_out(path, tmp_path, cache):
    bad = (
        "7,2014-04-07 10:51:09,70,0\n7,2014-04-07T10:51:09.277Z,70\n7,2014-04-07T10:51:09.277Z,70,\nx,2014-04-07,1,0\n"
    )
    expected = in_keys(load_sessions("yoochoose", tmp_path, cache, **LOOSE))
    path.write_text(path.read_text() + bad)
    data = load_sessions("yoochoose", tmp_path, cache, max_malformed=0.5, **LOOSE)
    assert in_keys(data) == expected
    assert [(line.line, line.reason[:20]) for line in data.malformed] == [
        *((14, "column 2 (time) is '"), (15, "3 columns, expected "), (16, "column 4 (category) ")),
        (17, "column 1 (session) i"),
    ]


def test_wrong_files_say_what_was_expected(path, tmp_path, cache):
    path.write_text("session_id;timestamp\n1;2\n")
    with pytest.raises(DataError, match=r"This is not yoochoose-clicks\.dat of the RecSys Challenge 2015"):
        load_sessions("yoochoose", tmp_path, cache)
    path.rename(path.with_name("clicks.dat"))
    with pytest.raises(DataError, match=r"no such file: yoochoose-clicks\.dat"):
        load_sessions("yoochoose", tmp_path, cache)
