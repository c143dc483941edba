from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_models.data.lines import Dialect
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.rows import read_rows


def parse(path, texts):
    """The times of a column, None for a malformed one."""
    path.write_text("".join(f"{i}\t{text}\n" for i, text in enumerate(texts)))
    (rows,) = read_rows(path, Dialect(b"\t", 2), MalformedLog(), "times")
    values = rows.times(1, "time")
    return [value if good else None for value, good in zip(values.tolist(), rows.good.tolist(), strict=True)]


MOMENTS = st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31))


@settings(deadline=None, max_examples=50)
@given(moments=st.lists(MOMENTS, min_size=1, max_size=20), zone=st.sampled_from(["", "Z"]))
def test_times_are_those_of_the_standard_library(tmp_path_factory, moments, zone):
    path = tmp_path_factory.mktemp("times") / "times.tsv"
    moments = [moment.replace(microsecond=moment.microsecond // 1000 * 1000, tzinfo=UTC) for moment in moments]
    exact = [
        f"{moment:%Y}".zfill(4) + f"{moment:-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03}" for moment in moments
    ]
    assert parse(path, [text + zone for text in exact]) == pytest.approx([m.timestamp() for m in moments], abs=1e-4)
    seconds = [moment.replace(microsecond=0).timestamp() for moment in moments]
    assert parse(path, [text[:19] + zone for text in exact]) == seconds
    days = [moment.replace(hour=0, minute=0, second=0, microsecond=0).timestamp() for moment in moments]
    assert parse(path, [text[:10] for text in exact]) == days


@pytest.mark.parametrize(
    "text",
    [
        *("2014-02-29", "2014-13-01", "2014-00-10", "2014-04-00", "2014-04-31", "2014-4-07", "14-04-07", "2014/04/07"),
        *("2014-04-07Z", "2014-04-07T24:00:00", "2014-04-07T10:60:00", "2014-04-07T10:51:60", "2014-04-07 10:51:09"),
        *("2014-04-07T10:51", "2014-04-07T10:51:09.2", "2014-04-07T10:51:09.277+02", "2014-04-07T10:51:09.277ZZ"),
        *("2014-04-0x", "", "Z", "NA", "1396867869", "2014-04-07T10:51:09.277123456Z"),
    ],
)
def test_what_is_no_time_is_malformed_and_does_not_harm_its_neighbours(tmp_path, text):
    day = 16167 * 86400.0
    assert parse(tmp_path / "t.tsv", ["2014-04-07", text, "2014-04-07T00:00:00.000Z"]) == [day, None, day]


def test_the_message_shows_what_is_wanted(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("1\tyesterday\n2\t2014-04-07\n")
    log = MalformedLog()
    (rows,) = read_rows(path, Dialect(b"\t", 2), log, "times")
    rows.times(1, "time")
    assert str(log.kept[0]) == (
        "t.tsv:1: column 2 (time) is 'yesterday', expected a time such as 2014-04-07T10:51:09.277Z"
    )
