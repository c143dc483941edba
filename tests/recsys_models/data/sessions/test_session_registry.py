import re
from pathlib import Path

import pytest

from recsys_models.data import DataError, list_datasets, list_session_datasets, load_sessions
from recsys_models.data.sessions.registry import SESSION_READERS, make_session_reader

FILES = [name for name, reader in SESSION_READERS.items() if reader.folder]


def test_names():
    assert list_session_datasets() == [
        *("amazon_beauty", "amazon_reviews", "diginetica", "diginetica_sessions", "movielens_100k", "movielens_1m"),
        *("retailrocket", "sasrec_text", "synthetic_sessions", "yoochoose"),
    ]
    assert "movielens_1m" in list_datasets()  # of clicks, under the same name


def test_the_page_of_data_sets_lists_each_with_its_folder():
    text = (Path(__file__).resolve().parents[4] / "docs" / "sessions.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| (?:`([\w-]+)`|none) \|", text, re.MULTILINE)
    assert sorted(listed) == sorted((name, reader.folder) for name, reader in SESSION_READERS.items())


def test_an_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(DataError, match=r"unknown data set 'beauty', must be one of amazon_beauty, .*yoochoose"):
        load_sessions("beauty", tmp_path)


@pytest.mark.parametrize("name", SESSION_READERS)
def test_an_unknown_option_lists_the_known(name, tmp_path):
    with pytest.raises(DataError, match=rf"{name}: unknown option colour; the options are split_seed, max_malformed"):
        load_sessions(name, tmp_path, colour=1)


WRONG = [
    ("movielens_1m", {"protocol": "last_day"}, "protocol is 'last_day', must be one of 'leave_one_out', 'last_days'"),
    ("movielens_1m", {"min_item_count": 0}, "min_item_count is 0, must be at least 1"),
    ("movielens_1m", {"min_length": 0}, "min_length is 0, must be at least 1"),
    ("movielens_1m", {"iterate": 1}, "iterate is 1, must be of type bool"),
    ("movielens_1m", {"min_rating": -1}, "min_rating is -1, must be at least 0.0"),
    ("movielens_1m", {"split_seed": -1}, "split_seed is -1, must be at least 0"),
    ("movielens_1m", {"max_malformed": 2.0}, r"max_malformed is 2.0, must be a share in \[0, 1\]"),
    ("sasrec_text", {"file": 3}, "file is 3, must be of type str"),
    ("sasrec_text", {"merge_repeats": "no"}, "merge_repeats is 'no', must be of type bool"),
    ("diginetica", {"test_days": 0}, "test_days is 0, must be at least 1"),
    ("diginetica", {"validation_share": 1.0}, r"validation_share is 1.0, must be a share in \[0, 1\)"),
    ("diginetica_sessions", {"validation_share": -0.1}, r"validation_share is -0.1, must be a share in \[0, 1\)"),
    ("yoochoose", {"fraction": 0}, "fraction is 0, must be at least 1"),
    ("yoochoose", {"fraction": 0.25}, "fraction is 0.25, must be of type int"),
    ("retailrocket", {"max_gap_minutes": -1}, "max_gap_minutes is -1, must be at least 0"),
    ("retailrocket", {"kinds": ""}, "kinds is '', must be of view, addtocart, transaction"),
    ("amazon_reviews", {"levels": -1}, "levels is -1, must be at least 0"),
    ("synthetic_sessions", {"sessions": 5}, "sessions is 5, must be at least 10"),
    ("synthetic_sessions", {"items": 0}, "items is 0, must be at least 1"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_a_wrong_value_is_named_with_what_is_allowed(name, options, message, tmp_path):
    with pytest.raises(DataError, match=f"{name}: option {message}"):
        load_sessions(name, tmp_path, **options)


@pytest.mark.parametrize("name", FILES)
def test_without_a_root_the_error_says_how_to_give_one(name):
    with pytest.raises(DataError, match=rf"{name}: .*root.*EMBCOMP_DATA.*{SESSION_READERS[name].folder}/"):
        load_sessions(name)


@pytest.mark.parametrize("name", FILES)
def test_a_root_that_is_no_folder_or_an_empty_one_is_an_error(name, tmp_path):
    with pytest.raises(DataError, match="nowhere is no folder"):
        load_sessions(name, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no such file: .*Expected|there must be one \.txt file"):
        load_sessions(name, tmp_path)


def test_published_protocols_are_the_defaults():
    for name, days in (("diginetica", 7), ("yoochoose", 1)):
        reader = make_session_reader(name)
        assert (reader.protocol, reader.test_days) == ("last_days", days)
        assert (reader.min_length, reader.min_item_count, reader.iterate, reader.keep_unseen) == (2, 5, False, False)
    for name in ("movielens_1m", "movielens_100k", "amazon_reviews"):
        reader = make_session_reader(name)
        assert (reader.protocol, reader.min_length, reader.min_item_count) == ("leave_one_out", 1, 1)
