import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_models.data import DataError, load_sessions
from recsys_models.data.sessions.readers.retailrocket import cut_sessions
from tests.recsys_models.data.sessions.memory import in_keys, values_of

MINUTE = 60_000
START = 1433221332117
EVENTS = [  # minutes, visitor, event, item, transaction
    *((40, 9, "view", 5, ""), (0, 7, "view", 1, ""), (10, 7, "view", 2, ""), (10, 7, "addtocart", 2, "")),
    *((41, 7, "view", 3, ""), (20, 9, "view", 1, ""), (71, 7, "view", 1, ""), (72, 7, "transaction", 1, "4000")),
    *((20000, 8, "view", 1, ""), (20001, 8, "view", 2, ""), (20002, 8, "view", 3, "")),
]
LOOSE = {"min_item_count": 1, "validation_share": 0.0}


def write(folder, events=EVENTS):
    lines = [f"{START + int(minutes * MINUTE)},{v},{event},{item},{t}\n" for minutes, v, event, item, t in events]
    (folder / "events.csv").write_text("timestamp,visitorid,event,itemid,transactionid\n" + "".join(lines))


@pytest.fixture
def root(tmp_path):
    write(tmp_path)
    return tmp_path


def test_a_long_break_begins_a_session(root, cache):
    train, _, test = in_keys(load_sessions("retailrocket", root, cache, **LOOSE))
    # Visitor 7 comes back after 31 minutes, and then after exactly 30.
    assert train == [[1, 2], [1, 5], [3, 1]]
    assert test == [([1], 2), ([1, 2], 3)]
    assert in_keys(load_sessions("retailrocket", root, cache, max_gap_minutes=31, **LOOSE))[0] == [[1, 5], [1, 2, 3, 1]]
    assert in_keys(load_sessions("retailrocket", root, cache, max_gap_minutes=0, **LOOSE))[0] == [[1, 5], [1, 2, 3, 1]]


def test_kinds_of_events_are_chosen(root, cache):
    def train(kinds):
        return in_keys(load_sessions("retailrocket", root, cache, kinds=kinds, **LOOSE))[0]

    assert train("view,addtocart")[0] == [1, 2, 2]
    assert train("view,addtocart,transaction")[2] == [3, 1, 1]
    with pytest.raises(DataError, match="option kinds is 'views', must be of view, addtocart, transaction, separated"):
        train("views")


@settings(deadline=None, max_examples=100)
@given(
    events=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=30),
    max_gap=st.integers(0, 6),
)
def test_sessions_are_cut_as_plain_python_cuts_them(events, max_gap):
    found = cut_sessions(*(np.array([event[i] for event in events], np.int64) for i in (0, 1)), max_gap)
    expected, last, current = {}, {}, {}
    for position in sorted(range(len(events)), key=lambda i: events[i][1]):
        visitor, time = events[position]
        if visitor not in last or (max_gap and time - last[visitor] > max_gap):
            current[visitor] = object()
        last[visitor] = time
        expected[position] = current[visitor]
    pairs = {(expected[i], number) for i, number in enumerate(found.tolist())}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def write_properties(root):
    header = "timestamp,itemid,property,value\n"
    first = "300,1,categoryid,11\n100,2,categoryid,12\n100,3,790,n277.200 1116713\n100,1,available,1\n"
    (root / "item_properties_part1.csv").write_text(header + first)
    second = "200,1,categoryid,12\n100,3,categoryid,10\n100,9,categoryid,13\n100,4,888," + "1 " * 2000 + "\n"
    (root / "item_properties_part2.csv").write_text(header + second)
    (root / "category_tree.csv").write_text("categoryid,parentid\n11,10\n12,10\n10,\n13,12\n")


def test_what_is_told_of_items_in_the_test_period_is_not_known(root, cache):
    write_properties(root)
    late = START + 20001 * MINUTE
    with (root / "item_properties_part1.csv").open("a") as file:
        file.write(
            f"{late},1,categoryid,13\n{late + 1},5,categoryid,10\n{late},5,categoryid,11\n{late},3,categoryid,12\n"
        )
    data = load_sessions("retailrocket", root, cache, **LOOSE)
    assert values_of(data, "category") == {1: 11, 2: 12, 3: 10, 5: 11}
    assert values_of(data, "parent") == {1: 10, 2: 10, 3: None, 5: 10}


def test_bug_leaving_one_out_an_item_has_the_category_it_had_at_its_last_event_in_training(root, cache):
    write_properties(root)
    moments = {20_000: "1,categoryid,12", 20_001: "1,categoryid,13", 10: "2,categoryid,11", 11: "2,categoryid,13"}
    later = {20_003: "5,categoryid,11", 20_004: "5,categoryid,10", 42: "3,categoryid,12", 1: "99,categoryid,10"}
    with (root / "item_properties_part1.csv").open("a") as file:
        file.writelines(f"{START + minutes * MINUTE},{line}\n" for minutes, line in {**moments, **later}.items())
    data = load_sessions("retailrocket", root, cache, protocol="leave_one_out", min_item_count=1)
    # Training has items 1, 2, 3 and 5 until the minutes 20000, 10, 41 and 40; item 5 is told of later alone.
    assert values_of(data, "category") == {1: 12, 2: 11, 3: 10, 5: 11}
    assert values_of(data, "parent") == {1: 10, 2: 10, 3: None, 5: 10}


def test_categories_are_the_latest_of_both_files(root, cache):
    write_properties(root)
    data = load_sessions("retailrocket", root, cache, **LOOSE)
    assert values_of(data, "category") == {1: 11, 2: 12, 3: 10, 5: None}
    assert values_of(data, "parent") == {1: 10, 2: 10, 3: None, 5: None}
    assert data.num_malformed == 0  # what other properties hold is never looked at
    (root / "category_tree.csv").unlink()
    assert [a.name for a in load_sessions("retailrocket", root, cache, **LOOSE).catalogue.attributes] == ["category"]
    (root / "item_properties_part1.csv").unlink()
    assert values_of(load_sessions("retailrocket", root, cache, **LOOSE), "category")[1] == 12
    (root / "item_properties_part2.csv").unlink()
    assert load_sessions("retailrocket", root, cache, **LOOSE).catalogue.attributes == ()


def test_malformed_lines_are_left_out(root, cache):
    expected = in_keys(load_sessions("retailrocket", root, cache, **LOOSE))
    write(root, [*EVENTS, (5, "x", "view", 1, ""), (5, 7, "look", 1, ""), (5, 7, "view", "", "")])
    write_properties(root)
    with (root / "item_properties_part1.csv").open("a") as file:
        file.write("100,2,categoryid,n12\n")
    data = load_sessions("retailrocket", root, cache, max_malformed=0.5, **LOOSE)
    assert in_keys(data) == expected
    assert [str(line) for line in data.malformed] == [
        "events.csv:13: column 2 (visitor) is 'x', expected an integer of up to 18 digits",
        "events.csv:14: event look, expected one of view, addtocart, transaction",
        "events.csv:15: column 4 (item) is '', expected an integer of up to 18 digits",
        "item_properties_part1.csv:6: column 4 (category) is 'n12', expected an integer of up to 18 digits",
    ]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("events.csv", "lacks the column timestamp, .*Expected events.csv of Retailrocket"),
        ("item_properties_part2.csv", "lacks the column timestamp, .*Expected item_properties_part1.csv or"),
        ("category_tree.csv", "lacks the column categoryid, .*Expected category_tree.csv"),
    ],
)
def test_wrong_files_say_what_was_expected(root, cache, file, message):
    write_properties(root)
    (root / file).write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=message):
        load_sessions("retailrocket", root, cache)


def test_a_missing_file_says_what_was_expected(tmp_path, cache):
    with pytest.raises(
        DataError, match=r"no such file: events\.csv\. Expected events\.csv of Retailrocket: the header"
    ):
        load_sessions("retailrocket", tmp_path, cache)
