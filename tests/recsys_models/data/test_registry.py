import pytest

from embcomp import EmbcompError
from recsys_models.data import DataError, list_datasets, load_dataset
from recsys_models.data.registry import READERS

FILES = [name for name, reader in READERS.items() if reader.folder]


def test_names():
    assert list_datasets() == [
        *("avazu", "criteo", "frappe", "lastfm_tags", "movielens_100k", "movielens_1m", "synthetic"),
        "synthetic_criteo",
    ]


def test_an_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(DataError, match=r"unknown data set 'movielens', must be one of avazu, criteo, .*synthetic"):
        load_dataset("movielens", tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_an_unknown_option_lists_the_known(name, tmp_path):
    message = rf"{name}: unknown option colour; the options are split_seed, max_malformed, min_count"
    with pytest.raises(DataError, match=message):
        load_dataset(name, tmp_path, colour=1)


WRONG = [
    ("frappe", {"min_count": 0}, "min_count is 0, must be at least 1"),
    ("frappe", {"min_count": 1.5}, "min_count is 1.5, must be of type int"),
    ("frappe", {"min_count": True}, "min_count is True, must be of type int"),
    ("frappe", {"split_seed": -1}, "split_seed is -1, must be at least 0"),
    ("frappe", {"max_malformed": 2.0}, r"max_malformed is 2.0, must be a share in \[0, 1\]"),
    ("movielens_1m", {"label_rule": "drop3"}, "label_rule is 'drop3', must be one of 'drop_3', '>=3', '>=4'"),
    ("movielens_100k", {"age": "years"}, "age is 'years', must be one of 'bucket', 'raw'"),
    ("movielens_100k", {"item_features": "no"}, "item_features is 'no', must be of type bool"),
    ("lastfm_tags", {"negatives": 0}, "negatives is 0, must be at least 1"),
    ("criteo", {"numeric": "raw"}, "numeric is 'raw', must be one of 'log', 'buckets'"),
    ("criteo", {"split": "days"}, "split is 'days', must be one of 'temporal', 'random'"),
    ("avazu", {"weekday": 1}, "weekday is 1, must be of type bool"),
    ("synthetic", {"rows": 5}, "rows is 5, must be at least 10"),
    ("synthetic", {"skew": "steep"}, "skew is 'steep', must be 'measured', 'criteo', 'ip'"),
    ("synthetic", {"skew": "nan"}, "skew is 'nan'"),
    ("synthetic", {"click_rate": 1.0}, "click_rate is 1.0"),
    ("synthetic", {"vocabularies": "avazu"}, "vocabularies is 'avazu', must be one of 'default', 'criteo'"),
    ("synthetic", {"vocabulary_scale": -1}, "vocabulary_scale is -1"),
    ("synthetic_criteo", {"rows": 9}, "rows is 9, must be at least 10"),
    ("synthetic_criteo", {"rows": 1e6}, "rows is 1000000.0, must be of type int"),
    ("synthetic_criteo", {"seed": -1}, "seed is -1, must be at least 0"),
    ("synthetic_criteo", {"numeric": "raw"}, "numeric is 'raw', must be one of 'log', 'buckets'"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_a_wrong_value_is_named_with_what_is_allowed(name, options, message, tmp_path):
    with pytest.raises(DataError, match=f"{name}: option {message}"):
        load_dataset(name, tmp_path, **options)


@pytest.mark.parametrize("name", FILES)
def test_without_a_root_the_error_says_how_to_give_one(name):
    with pytest.raises(DataError, match=rf"{name}: .*root.*EMBCOMP_DATA.*{READERS[name].folder}/"):
        load_dataset(name)


@pytest.mark.parametrize("name", FILES)
def test_a_root_that_is_no_folder_or_an_empty_one_is_an_error(name, tmp_path):
    with pytest.raises(DataError, match="nowhere is no folder"):
        load_dataset(name, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no such file|must be train|neither .* is there"):
        load_dataset(name, tmp_path)


def test_root_may_come_from_the_environment_or_be_the_folder_itself(tmp_path, monkeypatch):
    folder = tmp_path / "frappe"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.libfm").write_text("1 0:1 2:1\n")
    hashes = {load_dataset("frappe", folder).content_hash, load_dataset("frappe", str(tmp_path)).content_hash}
    monkeypatch.setenv("EMBCOMP_DATA", str(tmp_path))
    assert {load_dataset("frappe").content_hash} == hashes


def test_the_error_is_a_value_error():
    assert issubclass(DataError, ValueError)
    assert issubclass(DataError, EmbcompError)
