"""Protocols against a slow reference, and the choices that each of them makes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_models.data import DataError
from tests.recsys_models.data.sessions import reference
from tests.recsys_models.data.sessions.memory import split

DAY = 86_400
EVENTS = st.lists(
    st.tuples(st.integers(-3, 9), st.integers(-4, 8), st.integers(0, 12).map(lambda half: half * DAY // 2)),
    min_size=1,
    max_size=80,
)
FILTERS = {"min_item_count": st.integers(1, 3), "min_length": st.integers(1, 3), "iterate": st.booleans()}


def prepared(events, days, merge_repeats, **filters):
    sequences, ends = reference.group(events, days)
    if merge_repeats:
        sequences = [reference.merge(sequence) for sequence in sequences]
    return reference.core(sequences, ends, **filters)


@settings(deadline=None, max_examples=200)
@given(events=EVENTS, merge_repeats=st.booleans(), filters=st.fixed_dictionaries(FILTERS))
def test_leave_one_out_is_what_plain_python_gives(events, merge_repeats, filters):
    sequences, _ = prepared(events, None, merge_repeats, **filters)
    assert split(events, merge_repeats=merge_repeats, **filters) == list(reference.leave_one_out(sequences))


@settings(deadline=None, max_examples=300)
@given(
    events=EVENTS,
    dated=st.booleans(),
    merge_repeats=st.booleans(),
    filters=st.fixed_dictionaries(FILTERS),
    options=st.fixed_dictionaries(
        {"test_days": st.integers(1, 4), "fraction": st.integers(1, 4), "keep_unseen": st.booleans()}
    ),
)
def test_last_days_is_what_plain_python_gives(events, dated, merge_repeats, filters, options):
    days = [time // DAY * DAY for *_, time in events] if dated else None
    given = {"protocol": "last_days", "merge_repeats": merge_repeats, "validation_share": 0.0, **filters, **options}
    sequences, ends = prepared(events, days, merge_repeats, **filters)
    train, test = reference.last_days(sequences, ends, **options) if sequences else ([], [])
    if train:
        assert split(events, days, **given) == [train, [], test]
    else:
        with pytest.raises(DataError, match="to train on"):
            split(events, days, **given)


def test_events_are_sorted_by_time_and_ties_keep_the_order_of_the_source():
    events = [(7, 1, 30), (7, 2, 10), (3, 9, 0), (7, 3, 20), (7, 4, 10), (7, 5, 30)]
    (train, validation, test) = split(events)
    assert train == [[2, 4, 3], [9]]
    assert validation == [([2, 4, 3], 1)]
    assert test == [([2, 4, 3, 1], 5)]


def test_sequences_of_one_and_two_items_only_train():
    events = [(1, 5, 0), (2, 5, 0), (2, 6, 1), (3, 5, 0), (3, 6, 1), (3, 7, 2)]
    assert split(events) == [[[5], [5, 6], [5]], [([5], 6)], [([5, 6], 7)]]


def test_merged_repeats_are_runs_within_a_session():
    events = [(1, 5, 0), (1, 5, 1), (1, 6, 2), (1, 5, 3), (2, 5, 0), (2, 5, 1)]
    assert split(events, merge_repeats=True)[0] == [[5], [5]]
    assert split(events, merge_repeats=True)[2] == [([5, 6], 5)]
    assert split(events)[2] == [([5, 5, 6], 5)]


def test_repeats_are_merged_before_items_are_counted():
    events = [(1, 5, 0), (1, 5, 1), (1, 6, 2), (1, 7, 3), (2, 6, 0), (2, 7, 1), (2, 6, 2)]
    options = {"min_item_count": 2}
    assert split(events, merge_repeats=True, **options)[0] == [[6, 7], [6]]
    assert split(events, **options)[0] == [[5, 5], [6]]


def test_one_pass_of_filters_may_leave_rare_items_and_iterating_does_not():
    # Item 1 has three events, of which one is lost with its session, once item 9 is.
    events = [
        (s, item, t) for s, row in enumerate([[1, 9], [1, 2, 2, 2], [1, 2, 3, 3, 3]]) for t, item in enumerate(row)
    ]
    options = {"min_item_count": 3, "min_length": 2}
    assert split(events, **options)[0][0][:2] == [1, 2]
    once, cored = (sum(map(len, split(events, iterate=i, **options)[0])) for i in (False, True))
    assert once > cored
    assert all(1 not in sequence for sequence in split(events, iterate=True, **options)[0])


def sessions_of_days(days, item=1):
    """A session of two clicks on each of the given days."""
    return [(day, item, day * DAY + second) for day in days for second in (0, 1)]


def test_the_day_between_training_and_test_is_in_neither():
    events = sessions_of_days(range(10))
    days = [time // DAY * DAY for *_, time in events]
    train, _, test = split(events, days, protocol="last_days", test_days=3, validation_share=0.0)
    assert (len(train), len(test)) == (6, 3)
    # Where ends are times, that is one second.
    train, _, test = split(events, protocol="last_days", test_days=3, validation_share=0.0)
    assert (len(train), len(test)) == (6, 3)
    later = [(session, item, time + (session == 6)) for session, item, time in events]
    assert len(split(later, protocol="last_days", test_days=3, validation_share=0.0)[2]) == 4


def test_the_day_of_a_session_is_that_of_its_last_line():
    events = [*sessions_of_days(range(5)), (9, 1, 20), (9, 1, 10)]
    days = [time // DAY * DAY for *_, time in events[:-2]]
    train, _, test = split(events, [*days, 4 * DAY, 0], protocol="last_days", validation_share=0.0)
    assert (len(train), len(test)) == (4, 1)
    train, _, test = split(events, [*days, 0, 4 * DAY], protocol="last_days", validation_share=0.0)
    assert (len(train), len(test)) == (3, 2)


def test_unseen_items_leave_the_test_and_short_sessions_with_them_unless_they_are_kept():
    old = sessions_of_days(range(4))
    new = [(8, 1, 9 * DAY), (8, 7, 9 * DAY + 1), (9, 1, 9 * DAY), (9, 7, 9 * DAY + 1), (9, 1, 9 * DAY + 2)]
    options = {"protocol": "last_days", "validation_share": 0.0}
    assert split(old + new, **options)[2] == [([1], 1)]
    assert split(old + new, keep_unseen=True, **options)[2] == [([1], 7), ([1], 7), ([1, 7], 1)]


def test_a_fraction_may_begin_within_a_session_whose_short_prefixes_it_takes():
    rows = [[1, 2, 3, 4, 5], [1, 2, 3]]
    events = [(s, item, s * DAY + t) for s, row in enumerate(rows) for t, item in enumerate(row)]
    events += [(9, 1, 9 * DAY), (9, 1, 9 * DAY + 1)]
    options = {"protocol": "last_days", "validation_share": 0.0}
    assert split(events, fraction=2, **options)[0] == [[1, 2], [1, 2, 3]]  # 3 of 6 prefixes
    assert split(events, fraction=3, **options)[0] == [[1, 2, 3]]
    assert split(events, fraction=6, **options)[0] == [[1, 2]]
    # The test is that of all training sessions, whatever the fraction.
    assert split([*events, (9, 5, 9 * DAY + 2)], fraction=6, **options)[2] == [([1], 1), ([1, 1], 5)]


def test_validation_sessions_are_drawn_under_the_seed_in_exact_shares():
    events = [(s, s, t) for s, _, t in sessions_of_days([*range(50), 99])]

    def drawn(**options):
        return split(events, protocol="last_days", keep_unseen=True, **options)

    train, validation, test = drawn()
    assert (len(train), len(validation), len(test)) == (45, 5, 1)
    assert train == sorted(train)
    assert sorted([s[0] for s in train] + [target for _, target in validation]) == list(range(50))
    assert drawn() == [train, validation, test]
    assert drawn(split_seed=1)[1] != validation
    assert len(drawn(validation_share=0.001)[1]) == 1
    assert len(drawn(validation_share=0.5)[1]) == 25
    assert drawn(validation_share=0.0)[1] == []
    assert drawn(split_seed=1)[2] == test


def test_nothing_left_to_train_on_is_an_error_with_the_way_out():
    events = [(1, 1, 0), (1, 1, 1), (2, 1, 9 * DAY), (2, 1, 9 * DAY + 1)]
    with pytest.raises(DataError, match=r"memory: 1 training sequences, of which 1 would .*option validation_share"):
        split(events, protocol="last_days")
    cover = r"no session is left to train on: .*test_days=9.*cover all 2 sessions.*Lower these options, or use protocol"
    for share in (0.0, 0.1):
        with pytest.raises(DataError, match=cover) as raised:
            split(events, protocol="last_days", test_days=9, validation_share=share)
        assert "validation_share" not in str(raised.value)
        with pytest.raises(DataError, match=r"no sequences to train on\. Check the file and the options"):
            split(events, protocol="last_days", min_length=3, validation_share=share)


def test_times_may_be_fractions_of_seconds():
    events = [(1, 5, 0.25), (1, 6, 0.125), (1, 7, 0.5)]
    assert split(events)[2] == [([6, 5], 7)]
    assert np.array_equal(split([(1, i, -i / 8) for i in range(3)])[2][0][0], [2, 1])
