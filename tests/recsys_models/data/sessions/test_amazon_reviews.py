import json

import pytest

from recsys_models.data import DataError, load_sessions
from recsys_models.data.sessions.readers.amazon_reviews import Product, parse_product
from recsys_models.data.sessions.records import RecordError
from tests.recsys_models.data.sessions.memory import in_keys, values_of

REVIEWS = [  # user, product, stars, time
    *(("U1", "B3", 5.0, 30), ("U2", "B1", 4.0, 5), ("U1", "B1", 1.0, 10), ("U1", "B2", 5.0, 20), ("U2", "B2", 5.0, 5)),
    *(("U2", "B9", 3.0, 5), ("U3", "B1", 5.0, 1)),
]
PRODUCTS = [
    {
        "asin": "B1",
        "title": "Mild Soap",
        "brand": "Acme",
        "price": 4.5,
        "categories": [["Beauty", "Bath", "Soap"], ["X"]],
    },
    {"asin": "B2", "title": "Soap's Dish", "brand": " ", "price": 0.0, "categories": [["Beauty", "Bath"]]},
    {"asin": "B3", "price": "$1,299.00 - $2", "category": ["Beauty", "Hair"], "brand": "Acme", "title": ["no", "text"]},
    {"asin": "B7", "title": "Never reviewed"},
]


def write_reviews(folder, reviews=REVIEWS, name="reviews_Beauty_5.json"):
    folder.mkdir(exist_ok=True)
    keys = ("reviewerID", "asin", "overall", "unixReviewTime")
    lines = [json.dumps({**dict(zip(keys, review, strict=True)), "reviewText": "Good — ☺"}) for review in reviews]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def root(tmp_path):
    write_reviews(tmp_path / "amazon-reviews")
    return tmp_path


@pytest.mark.parametrize("name", ["reviews_Beauty.json", "reviews_Beauty_5.json", "Beauty.json", "Beauty_5.json"])
def test_reviews_are_histories(tmp_path, cache, name):
    write_reviews(tmp_path, name=name)
    data = load_sessions("amazon_reviews", tmp_path, cache)
    assert in_keys(data) == [
        [["B1"], ["B1"], ["B1"]],
        [(["B1"], "B2"), (["B1"], "B2")],
        [(["B1", "B2"], "B3"), (["B1", "B2"], "B9")],
    ]
    assert data.catalogue.values.tolist() == ["B1", "B2", "B3", "B9"]
    assert data.filters_seen


def test_another_category_and_low_ratings(root, cache):
    write_reviews(root / "amazon-reviews", [("U1", f"T{i}", 5, i) for i in range(4)], "reviews_Toys_and_Games_5.json")
    assert in_keys(load_sessions("amazon_reviews", root, cache, category="Toys_and_Games"))[2] == [
        (["T0", "T1", "T2"], "T3")
    ]
    assert in_keys(load_sessions("amazon_reviews", root, cache, min_rating=3))[0] == [["B2", "B3"], ["B1"], ["B1"]]


WRITERS = {"json": json.dumps, "python": repr}


@pytest.mark.parametrize("write", WRITERS)
def test_products_become_attributes_in_both_spellings(root, cache, write):
    lines = "".join(WRITERS[write](product) + "\n" for product in PRODUCTS)
    (root / "amazon-reviews" / "meta_Beauty.json").write_text(lines)
    data = load_sessions("amazon_reviews", root, cache, min_item_count=1, protocol="leave_one_out")
    assert [(a.name, a.is_bag) for a in data.catalogue.attributes] == [
        *(("category_1", False), ("category_2", False), ("category_3", False), ("brand", False), ("price", False)),
        ("title", True),
    ]
    # Training has product B1 alone, so that other values are unknown.
    assert values_of(data, "category_1") == {"B1": "Beauty", "B2": "Beauty", "B3": "Beauty", "B9": None}
    assert values_of(data, "category_2") == {"B1": "Beauty > Bath", "B2": "Beauty > Bath", "B3": None, "B9": None}
    assert values_of(data, "category_3") == {"B1": "Beauty > Bath > Soap", "B2": None, "B3": None, "B9": None}
    assert values_of(data, "brand") == {"B1": "Acme", "B2": None, "B3": "Acme", "B9": None}
    assert values_of(data, "price") == {"B1": 2, "B2": None, "B3": None, "B9": None}
    assert values_of(data, "title") == {"B1": ["mild", "soap"], "B2": [None], "B3": [], "B9": []}
    assert len(load_sessions("amazon_reviews", root, cache, levels=1).catalogue.attributes) == 4


@pytest.mark.parametrize(
    ("line", "product"),
    [
        (json.dumps(PRODUCTS[2]), Product("B3", ("Beauty", "Hair"), "Acme", 1299.0, "")),
        ("{'asin': 'B1', 'title': \"It's\"}", Product("B1", (), "", 0.0, "It's")),
        ('{"asin": "B1", "price": ".a-box{color:#111}", "categories": []}', Product("B1", (), "", 0.0, "")),
        ('{"asin": "B1", "price": null, "brand": null, "category": [[]]}', Product("B1", (), "", 0.0, "")),
        ('{"asin": "B1", "price": "$ 3.75"}', Product("B1", (), "", 3.75, "")),
        ('{"asin": "B1", "price": "$.99", "title": "A &amp; B"}', Product("B1", (), "", 0.99, "A & B")),
    ],
)
def test_lines_of_products(line, product):
    found = parse_product(line)
    assert [getattr(found, name) for name in Product.__annotations__] == [
        getattr(product, name) for name in Product.__annotations__
    ]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[1]",
        "{'asin': 3}",
        "{'title': 'x'}",
        "{'asin': ''}",
        "__import__('os').getcwd()",
        "{'asin': open('x')}",
        "{",
    ],
)
def test_lines_that_are_no_products_are_never_run(line):
    with pytest.raises(RecordError, match="expected"):
        parse_product(line)


def test_malformed_lines_are_left_out(root, cache):
    path = root / "amazon-reviews" / "reviews_Beauty_5.json"
    expected = in_keys(load_sessions("amazon_reviews", root, cache))
    bad = [
        *('{"reviewerID": "U1"', "[]", '{"asin": "B1", "overall": 5, "unixReviewTime": 3}', "{'asin': 'B1'}"),
        '{"reviewerID": "U1", "asin": "B1", "overall": "5", "unixReviewTime": 3}',
        '{"reviewerID": "U1", "asin": "B1", "overall": 5, "unixReviewTime": "09 13, 2009"}',
    ]
    path.write_bytes(path.read_bytes() + "\n".join(bad).encode() + b'\n{"reviewerID": "\xff"}\n\n')
    data = load_sessions("amazon_reviews", root, cache, max_malformed=0.5)
    assert in_keys(data) == expected
    assert data.num_malformed == 7
    assert [line.line for line in data.malformed] == list(range(8, 15))
    reasons = [line.reason for line in data.malformed]
    assert reasons[0].startswith("'{\"reviewerID\": \"U1\"', expected an object of JSON (Expecting ',' delimiter")
    assert reasons[1:3] == ["[], expected an object", "reviewerID is None, expected a text"]
    assert reasons[4:6] == [
        *(
            "overall is '5', expected a number of at least 0",
            "unixReviewTime is '09 13, 2009', expected a number of seconds",
        )
    ]
    assert reasons[6] == 'b\'{"reviewerID": "\\xff"}\\n\', expected text in UTF-8'


@pytest.mark.parametrize("stars", ["NaN", "Infinity", "-1", "-0.5", "1e400", "1" * 400, "true"])
def test_ratings_that_are_none_are_counted_as_malformed(root, cache, stars):
    expected = in_keys(load_sessions("amazon_reviews", root, cache))
    with (root / "amazon-reviews" / "reviews_Beauty_5.json").open("a") as file:
        file.write(f'{{"reviewerID": "U1", "asin": "B1", "overall": {stars}, "unixReviewTime": 3}}\n')
    data = load_sessions("amazon_reviews", root, cache, max_malformed=0.5)
    assert in_keys(data) == expected
    assert data.num_malformed == 1
    assert data.malformed[0].reason.endswith("expected a number of at least 0")


@pytest.mark.parametrize("least", [float("nan"), float("inf"), -1.0])
def test_a_least_rating_is_a_number(root, cache, least):
    with pytest.raises(DataError, match=f"option min_rating is {least}, must be at least 0"):
        load_sessions("amazon_reviews", root, cache, min_rating=least)


def test_a_price_beyond_all_numbers_is_unknown():
    assert parse_product(f'{{"asin": "B1", "price": "${"9" * 400}"}}').price == 0.0


def test_a_file_that_was_cut_off_is_an_error_and_one_without_the_last_line_end_is_none(root, cache):
    path = root / "amazon-reviews" / "reviews_Beauty_5.json"
    whole = path.read_text().rstrip("\n")
    path.write_text(whole)
    assert len(load_sessions("amazon_reviews", root, cache).train) == 3
    path.write_text(whole[:-20])
    with pytest.raises(DataError, match=r"ends in the middle of line 7: .*It was cut off.*Expected reviews of Amazon"):
        load_sessions("amazon_reviews", root, cache)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("reviews_Beauty_5.json", "1 2\n3 4\n", r"2 of the first 2 lines are malformed. This is not reviews of Amazon"),
        ("reviews_Beauty_5.json", '{"asin": "B1"}\n' * 3, "reviewerID|overall is None, expected a number"),
        ("meta_Beauty.json", "asin,title\nB1,Soap\n", "This is not products of Amazon"),
        ("meta_Beauty.json", "", "is empty"),
        ("reviews_Beauty_5.json", "\x1f\x8b", "is gzip data.*unpack it first"),
    ],
)
def test_wrong_files_say_what_was_expected(root, cache, file, text, message):
    (root / "amazon-reviews" / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        load_sessions("amazon_reviews", root, cache)


def test_a_missing_file_names_the_option(tmp_path, cache):
    with pytest.raises(
        DataError, match=r"no such file: reviews_Books_5\.json or reviews_Books\.json or .*the option category names"
    ):
        load_sessions("amazon_reviews", tmp_path, cache, category="Books")


def test_bug_items_that_nobody_has_reviewed_can_be_kept(root, cache):
    lines = "".join(json.dumps(product) + "\n" for product in PRODUCTS)
    (root / "amazon-reviews" / "meta_Beauty.json").write_text(lines)
    plain = load_sessions("amazon_reviews", root, cache)
    whole = load_sessions("amazon_reviews", root, cache, all_items=True)
    assert plain.catalogue.values.tolist() == ["B1", "B2", "B3", "B9"]
    assert whole.catalogue.values.tolist() == ["B1", "B2", "B3", "B7", "B9"]
    assert (whole.catalogue.counts.tolist(), whole.catalogue.num_seen) == ([3, 0, 0, 0, 0], 1)
    assert in_keys(whole) == in_keys(plain)
    assert whole.content_hash != plain.content_hash
    assert values_of(whole, "title") == {**values_of(plain, "title"), "B7": [None]}
    # What is left out for having few events is described all the same.
    write_reviews(root / "amazon-reviews", [*REVIEWS, ("U3", "B2", 5.0, 2), ("U3", "B1", 5.0, 3)])
    rare = load_sessions("amazon_reviews", root, cache, all_items=True, min_item_count=2)
    assert sorted(rare.catalogue.values.tolist()) == ["B1", "B2", "B3", "B7"]
    assert rare.catalogue.values.tolist()[rare.catalogue.num_seen :] == ["B3", "B7"]


def test_all_items_are_asked_for_where_no_file_describes_any(root, cache):
    with pytest.raises(
        DataError, match="option all_items is True, but no file that is there says anything about items"
    ):
        load_sessions("amazon_reviews", root, cache, all_items=True)
