"""Lines and rows: delimited text of every shape."""

import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_models.data import DataError
from recsys_models.data.lines import Dialect, find_columns
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.rows import MISSING, read_rows

TAB = Dialect(b"\t", 3)


def read(path, dialect=TAB, block_bytes=1 << 20, log=None):
    return list(read_rows(path, dialect, log or MalformedLog(), "a table", block_bytes))


def texts(blocks, columns=3):
    cells = [[rows.text(column, "x", optional=True) for column in range(columns)] for rows in blocks]
    return [line for block in cells for line in zip(*(column.tolist() for column in block), strict=True)]


@pytest.mark.parametrize("block_bytes", [1, 2, 5, 7, 16, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "unended"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
def test_columns_do_not_depend_on_blocks_line_ends_or_byte_order_mark(tmp_path, block_bytes, end, last, mark):
    lines = [("a", "bb", ""), ("", "", "é"), ("long enough", "x", "y"), ("", "", "")]
    path = tmp_path / "t.tsv"
    path.write_bytes(mark + (end.join(map("\t".join, lines)) + end * last).encode())
    blocks = read(path, block_bytes=max(block_bytes, len(mark)))
    assert texts(blocks) == lines


def test_two_byte_separators_split_only_where_both_bytes_are(tmp_path):
    path = tmp_path / "movies.dat"
    path.write_bytes("1::Se7en: a film (1995)::Crime|Thriller\n2::Amélie (2001)::Comedy\n".encode("latin-1"))
    blocks = read(path, Dialect(b"::", 3, encoding="latin-1"))
    assert texts(blocks) == [("1", "Se7en: a film (1995)", "Crime|Thriller"), ("2", "Amélie (2001)", "Comedy")]


def test_line_numbers_count_headers_blank_lines_and_blocks(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"h\th\th\n1\t2\t3\n\n4\t5\tx\n" + b"7\t8\t9\n" * 50 + b"1\t2\n" + b"7\t8\t9\n")
    for block_bytes in (3, 10, 1000):
        log = MalformedLog()
        blocks = read(path, Dialect(b"\t", 3, header=True), block_bytes, log)
        kept = [rows.integers(2, "last")[rows.good].tolist() for rows in blocks]
        assert [value for block in kept for value in block] == [3] + [9] * 51
        log.sort()
        assert [(line.file, line.line) for line in log.kept] == [("t.tsv", 4), ("t.tsv", 55)]
        assert log.num_lines == {"t.tsv": 54}
        assert log.num_malformed == {"t.tsv": 2}


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(-(10**18) + 1, 10**18 - 1), st.none()), min_size=1))
def test_integers_parse_as_python_does(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "integers.tsv"
    path.write_text("".join(f"{'' if v is None else v}\t\t\n" for v in values))
    (rows,) = read(path)
    assert rows.integers(0, "x", optional=True).tolist() == [MISSING if v is None else v for v in values]
    assert rows.good.all()


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(0, 2**32 - 1), st.none()), min_size=1))
def test_hexadecimals_parse_as_python_does(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "hexadecimals.tsv"
    path.write_text("".join(f"\t{'' if v is None else f'{v:08x}'}\t\n" for v in values))
    (rows,) = read(path)
    assert rows.hexadecimals(1, "x", optional=True).tolist() == [MISSING if v is None else v for v in values]
    assert rows.good.all()


@pytest.mark.parametrize("text", ["", "-", "--1", "+1", "1-", "1.0", " 1", "0x1", "1e3", "١", "1" * 19, "-" + "1" * 19])
def test_what_is_no_integer_is_malformed(tmp_path, text):
    path = tmp_path / "t.tsv"
    path.write_text(f"7\t\t\n{text}\t\t\n8\t\t\n", encoding="utf-8")
    log = MalformedLog()
    (rows,) = read(path, log=log)
    assert rows.integers(0, "I9")[rows.good].tolist() == [7, 8]
    assert (log.kept[0].file, log.kept[0].line) == ("t.tsv", 2)
    assert "column 1 (I9)" in log.kept[0].reason
    assert "expected an integer" in log.kept[0].reason


@pytest.mark.parametrize("text", ["", "1234567", "123456789", "1234567g", "0x123456", "-1234567"])
def test_what_is_no_hexadecimal_is_malformed(tmp_path, text):
    path = tmp_path / "t.tsv"
    path.write_text(f"{text}\t\t\nDEADbeef\t\t\n")
    (rows,) = read(path)
    assert rows.hexadecimals(0, "C1")[rows.good].tolist() == [0xDEADBEEF]


@pytest.mark.parametrize("text", [b"", b"abc", b"nan", b"inf", b"1,5"])
def test_what_is_no_finite_number_is_malformed(tmp_path, text):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"3.5\t\t\n" + text + b"\t\t\n4\t\t\n")
    (rows,) = read(path)
    assert rows.numbers(0, "rating")[rows.good].tolist() == [3.5, 4.0]


def test_text_in_another_encoding_or_of_absurd_length_is_malformed(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"caf\xe9\t\t\n" + "café".encode() + b"\t\t\n" + b"x" * 5000 + b"\t\t\n")
    log = MalformedLog()
    (rows,) = read(path, log=log)
    assert rows.text(0, "name")[rows.good].tolist() == ["café"]
    assert [line.line for line in log.kept] == [3, 1]


def test_a_line_with_two_faults_counts_once(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("x\ty\tz\n1\t2\t3\n")
    log = MalformedLog()
    (rows,) = read(path, log=log)
    rows.integers(0, "a"), rows.integers(1, "b")
    assert log.total == 1


@pytest.mark.parametrize("content", [b"1\t2\t3\n4\t5", b"1\t2\t3\n4\t5\t"], ids=["columns", "value"])
@pytest.mark.parametrize("block_bytes", [4, 100])
def test_a_cut_off_file_is_an_error_and_not_a_malformed_line(tmp_path, content, block_bytes):
    path = tmp_path / "cut.tsv"
    path.write_bytes(content)

    def read_all():
        for rows in read(path, block_bytes=block_bytes):
            rows.integers(2, "last")

    with pytest.raises(DataError, match=r"cut\.tsv: the file ends in the middle of line 2.*cut off") as error:
        read_all()
    assert str(tmp_path) in str(error.value)


UNREADABLE = {
    "empty": (b"", "is empty"),
    "gzip": (gzip.compress(b"1\t2\t3\n"), "gzip data, line 1 .*unpack"),
    "zip": (b"PK\x03\x04abc", "zip data"),
    "binary": (b"1\t2\t3\n1\t2\t3\n\x00\x01\t\n", "line 3 holds a zero byte"),
    "utf-16": ("1\t2\t3\n".encode("utf-16-le"), "line 1 holds a zero byte"),
    "another format": (b"1,2,3\n" * 5, "line 1 has 1 columns, and so it is for 5 of the first 5.*expected 3"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_files_are_named_with_what_is_expected(tmp_path, case):
    content, message = UNREADABLE[case]
    path = tmp_path / "bad.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "a table" in str(error.value)


def test_missing_files_and_endless_lines_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"none\.tsv: no such file. Expected a table"):
        read(tmp_path / "none.tsv")
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path)
    path = tmp_path / "long.tsv"
    path.write_bytes(b"x" * 200_000)
    with pytest.raises(DataError, match=r"a line of over \d+ bytes"):
        read(path, block_bytes=1000)


def test_reading_is_streamed(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"1\t2\t3\n" * 1000)
    sizes = [len(rows) for rows in read(path, block_bytes=600)]
    assert sum(sizes) == 1000
    assert max(sizes) <= 101
    assert np.mean(sizes) >= 90


def test_lines_that_are_not_kept_are_never_looked_at(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("1\ta\tone\n2\tb\t7\n3\taa\ttwo\n4\tb\tx\n5\tb\t9\n")
    log = MalformedLog()
    (rows,) = read(path, log=log)
    assert rows.equals(1, b"b").tolist() == [False, True, False, True, True]
    assert not rows.equals(1, b"bbb").any()
    rows.keep(rows.equals(1, b"b"))
    assert rows.integers(0, "number").tolist() == [2, 4, 5]
    values = rows.integers(2, "value")
    assert values[rows.good].tolist() == [7, 9]
    assert [line.line for line in log.kept] == [4]
    assert (log.num_lines[path.name], log.num_malformed[path.name]) == (5, 1)


def test_columns_are_found_by_their_names_in_any_spelling(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("itemId;session_id:token;day\n1;2;3\n")
    wanted = [("session_id", "sessionId"), "itemId"]
    dialect, positions = find_columns(path, ";", wanted, "a table")
    assert (dialect.separator, dialect.columns, dialect.header, positions) == (b";", 3, True, [1, 0])
    with pytest.raises(DataError, match=r"t\.csv: line 1 lacks the column week or weekday, it has .*Expected a table"):
        find_columns(path, ";", [("week", "weekday")], "a table")
