"""The text form of row formats."""

import pytest

from embcomp import ConfigError, FullConfig
from embcomp.storage import RowFormat

WRITTEN = {
    "float32": RowFormat(),
    "float16": RowFormat("float16"),
    "bfloat16:pure": RowFormat("bfloat16", pure=True),
    "int8": RowFormat("int8"),
    "int8:row": RowFormat("int8", "row"),
    "int2:column": RowFormat("int2", "column"),
    "int1:table:after": RowFormat("int1", "table", aware=False),
    "int4:group64": RowFormat("int4", "group", 64),
    "int3:column:offset": RowFormat("int3", "column", offset=True),
    "int4:group1:offset:after": RowFormat("int4", "group", 1, offset=True, aware=False),
}


@pytest.mark.parametrize(("text", "row_format"), WRITTEN.items())
def test_reads_and_writes(text, row_format):
    assert RowFormat.parse(text) == row_format
    assert str(row_format) == text
    assert RowFormat.parse(row_format) is row_format


def test_order_of_tokens_is_free():
    assert RowFormat.parse("int4:after:offset:group64") == RowFormat.parse("int4:group64:offset:after")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "int5",
        "int",
        "int16",
        "float",
        "float8",
        "Int8",
        " int8",
        "int8 ",
        "fp16",
        "8",
        ":row",
        "int8/row",
        None,
        8,
        8.0,
        [],
    ],
)
def test_no_format(text):
    with pytest.raises(ConfigError, match=r"is not a row format; write a kind \(float32, .*int1\)"):
        RowFormat.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "float32:row",
        "float32:pure",
        "float16:after",
        "int8:pure",
        "int8:",
        "int8:rows",
        "int8:group",
        "int8:group0",
        "int8:group-1",
        "int8:group064",
        "int8:group6.4",
        "int8:float16",
    ],
)
def test_token_not_known(text):
    token = text.partition(":")[2]
    with pytest.raises(ConfigError, match=rf"{token!r} is not known for {text.partition(':')[0]}; write"):
        RowFormat.parse(text)


@pytest.mark.parametrize(
    "text",
    ["int8:row:row", "int8:row:column", "int4:group2:group4", "int4:row:group2", "int4:group2:row", "int8:after:after"],
)
def test_said_twice(text):
    with pytest.raises(ConfigError, match="twice over"):
        RowFormat.parse(text)


def test_configs_refuse_what_is_no_format():
    with pytest.raises(ConfigError, match=r"'int4:rwo'.*'rwo' is not known for int4"):
        FullConfig(rows="int4:rwo")


def test_bits():
    kinds = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4, "int3": 3, "int2": 2, "int1": 1}
    assert {kind: RowFormat.parse(kind).bits for kind in kinds} == kinds
    assert [kind for kind in kinds if RowFormat.parse(kind).is_integer] == ["int8", "int4", "int3", "int2", "int1"]


@pytest.mark.parametrize(
    ("text", "dim", "granularity"),
    [
        ("int8", 63, "column"),
        ("int8", 64, "row"),
        ("int4", 63, "column"),
        ("int4", 64, "row"),
        ("int2", 127, "column"),
        ("int2", 128, "row"),
        ("int1", 256, "row"),
        ("int1", 16, "column"),
        ("int8", 1, "column"),
    ],
)
def test_auto_takes_row_scales_where_they_cost_at_most_an_eighth(text, dim, granularity):
    resolved = RowFormat.parse(text).resolve(dim)
    assert resolved.granularity == granularity
    scale_bytes = 8 if resolved.bits == 8 else 4
    assert (8 * scale_bytes <= dim * resolved.bits / 8) == (granularity == "row")


def test_resolving_keeps_what_is_said():
    for text in ("int4:table", "int4:group8:offset", "float16:pure", "float32"):
        assert RowFormat.parse(text).resolve(64) == RowFormat.parse(text)
    assert RowFormat.parse("int4:offset:after").resolve(4) == RowFormat("int4", "column", offset=True, aware=False)
    assert RowFormat.parse("int4:offset").resolve(64) == RowFormat("int4", "row")
