import warnings

import pytest

from recsys_models.data import DataError, load_sessions
from tests.recsys_models.data.sessions import reference
from tests.recsys_models.data.sessions.memory import in_keys, values_of

HEADERS = {
    "original": "sessionId;userId;itemId;timeframe;eventdate",
    "later": "session_id;user_id;item_id;timeframe;eventdate",
}
SECONDS = 86_400
CLICKS = [  # session, item, milliseconds, day of May 2016
    *((1, 7, 500, 1), (1, 8, 100, 1), (1, 9, 300, 1), (2, 7, 0, 2), (2, 9, 1, 2), (3, 9, 0, 3)),
    *(
        (4, 8, 9, 3),
        (4, 7, 8, 3),
        (4, 9, 7, 3),
        (5, 8, 0, 20),
        (5, 7, 1, 20),
        (5, 6, 2, 20),
        (6, 9, 0, 19),
        (6, 8, 0, 19),
    ),
]
LOOSE = {"min_item_count": 1, "validation_share": 0.0}


def write(folder, header="original", clicks=CLICKS, name="train-item-views.csv", user="NA"):
    lines = [f"{s};{user};{item};{time};2016-05-{day:02}\n" for s, item, time, day in clicks]
    (folder / name).write_text(HEADERS[header] + "\n" + "".join(lines))


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("user", ["NA", "", "17"])
def test_views_are_ordered_by_time_frame_and_split_by_day(tmp_path, cache, header, user):
    write(tmp_path, header, user=user)
    data = load_sessions("diginetica", tmp_path, cache, **LOOSE)
    sequences, ends = reference.group(
        [(s, item, time) for s, item, time, _ in CLICKS], [day * SECONDS for *_, day in CLICKS]
    )
    sequences, ends = reference.core(sequences, ends, 1, 2, False)
    train, test = reference.last_days(sequences, ends, 7, 1, False)
    assert in_keys(data) == [train, [], test]
    assert train == [[8, 9, 7], [7, 9], [9, 7, 8]]
    assert not data.filters_seen


def test_by_default_items_of_fewer_than_five_views_are_left_out(tmp_path, cache):
    clicks = [(s, item, t, s % 28 + 1) for s in range(60) for t, item in enumerate((7, 8, 9 if s < 4 else 7))]
    write(tmp_path, clicks=clicks)
    assert set(load_sessions("diginetica", tmp_path, cache).catalogue.values.tolist()) == {7, 8}
    assert len(load_sessions("diginetica", tmp_path, cache, min_item_count=4).catalogue.values) == 3


def test_categories_and_products_become_attributes(tmp_path, cache):
    write(tmp_path)
    (tmp_path / "product-categories.csv").write_text("itemId;categoryId\n7;100\n8;100\n9;300\n777;5\n")
    (tmp_path / "products.csv").write_text(
        "itemId;pricelog2;product.name.tokens\n7;8;4,11,4\n8;7.9;11\n9;8;\n6;3;5\n777;1;99\n"
    )
    data = load_sessions("diginetica", tmp_path, cache, keep_unseen=True, **LOOSE)
    assert [(a.name, a.is_bag) for a in data.catalogue.attributes] == [
        *(("category", False), ("price", False), ("name", True))
    ]
    assert values_of(data, "category") == {7: 100, 9: 300, 8: 100, 6: None}
    assert values_of(data, "price") == {7: 8, 9: 8, 8: 7, 6: None}
    # Words of item 6, which only the test has, are unknown.
    assert values_of(data, "name") == {7: [11, 4], 9: [], 8: [11], 6: [None]}
    assert data.catalogue.counts.tolist() == [3, 3, 2, 0]
    assert data.catalogue.attribute("price").counts.tolist() == [6, 2, 0]


def test_another_file_can_be_named(tmp_path, cache):
    write(tmp_path, "later", name="train-item-views.sample.csv")
    found = load_sessions("diginetica", tmp_path, cache, file="train-item-views.sample.csv", **LOOSE)
    assert len(found.train) == 3
    with pytest.raises(DataError, match=r"no such file: train-item-views\.csv\. Expected .*session_id;.*option file"):
        load_sessions("diginetica", tmp_path, cache)


def test_malformed_lines_are_left_out_in_all_files(tmp_path, cache):
    write(tmp_path)
    with (tmp_path / "train-item-views.csv").open("a") as file:
        file.write("9;NA;7;1\nx;NA;7;1;2016-05-01\n9;NA;7;1.5;2016-05-01\n9;NA;7;1;2016-02-30\n")
    (tmp_path / "products.csv").write_text(
        "itemId;pricelog2;product.name.tokens\n7;8;4,x\n8;cheap;11\n9;8;1,\n6;3;5\n7;1;2\n"
    )
    data = load_sessions("diginetica", tmp_path, cache, max_malformed=0.7, **LOOSE)
    assert len(data.train) == 3
    assert [str(line) for line in data.malformed] == [
        "train-item-views.csv:16: 4 columns, expected 5 separated by ';'",
        "train-item-views.csv:17: column 1 (session) is 'x', expected an integer of up to 18 digits",
        "train-item-views.csv:18: column 4 (timeframe) is '1.5', expected an integer of up to 18 digits",
        "train-item-views.csv:19: column 5 (eventdate) is '2016-02-30', expected a time such as "
        "2014-04-07T10:51:09.277Z",
        "products.csv:2: product.name.tokens 4,x, expected integers separated by commas",
        "products.csv:3: column 2 (pricelog2) is 'cheap', expected a number",
        "products.csv:4: product.name.tokens 1,, expected integers separated by commas",
    ]
    assert values_of(data, "price") == {7: 1, 9: None, 8: None}


@pytest.mark.parametrize("price", ["1e300", "-1e300", "1025", "nan", "inf"])
def test_prices_that_are_no_logarithms_are_malformed(tmp_path, cache, price):
    write(tmp_path)
    (tmp_path / "products.csv").write_text(f"itemId;pricelog2;product.name.tokens\n7;8;4\n8;{price};11\n9;-5;1\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_sessions("diginetica", tmp_path, cache, max_malformed=0.5, **LOOSE)
    assert [(line.file, line.line) for line in data.malformed] == [("products.csv", 3)]
    assert "pricelog2" in data.malformed[0].reason
    assert values_of(data, "price") == {7: 8, 9: -5, 8: None}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train-item-views.csv", "a,b\n1,2\n", "lacks the column session_id or sessionId, .*Expected train-item-views"),
        ("product-categories.csv", "item;category\n", "lacks the column itemId, .*Expected product-categories.csv"),
        ("products.csv", "itemId;price\n", "lacks the column pricelog2, .*Expected products.csv"),
        ("products.csv", "", "the file is empty"),
    ],
)
def test_wrong_files_say_what_was_expected(tmp_path, cache, file, text, message):
    write(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=message):
        load_sessions("diginetica", tmp_path, cache)
