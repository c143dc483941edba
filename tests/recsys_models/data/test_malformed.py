import logging

import pytest

from recsys_models.data import DataError, load_dataset

GOOD = "2\t52\t13\t1\t4\t2009\n2\t52\t15\t1\t4\t2009\n3\t51\t18\t1\t4\t2009\n"


def write(folder, bad: int, good: int = 100):
    header = "userID\tartistID\ttagID\tday\tmonth\tyear\n"
    (folder / "user_taggedartists.dat").write_text(header + GOOD * good + "2\t52\n" * bad)
    return folder


def test_only_the_first_are_kept_but_all_are_counted(tmp_path, cache):
    data = load_dataset("lastfm_tags", write(tmp_path, 50), cache, max_malformed=0.2)
    assert data.num_malformed == 50
    assert [line.line for line in data.malformed] == list(range(302, 322))
    assert data.malformed[0].reason == r"2 columns, expected 6 separated by '\t'"


@pytest.mark.parametrize(("bad", "fails"), [(3, False), (4, True)])
def test_more_than_one_percent_is_an_error(tmp_path, cache, bad, fails):
    write(tmp_path, bad)  # of 300 good lines
    if not fails:
        assert load_dataset("lastfm_tags", tmp_path, cache).num_malformed == bad
        return
    with pytest.raises(
        DataError, match=r"4 of 304 lines \(1\.32%\) are malformed, more than the allowed 1\.00%"
    ) as error:
        load_dataset("lastfm_tags", tmp_path, cache)
    assert "user_taggedartists.dat:302: 2 columns" in str(error.value)
    assert "'max_malformed'" in str(error.value)
    assert not list(cache.glob("lastfm*/"))


def test_the_limit_holds_for_cached_data_too(tmp_path, cache):
    write(tmp_path, 10)
    loose = load_dataset("lastfm_tags", tmp_path, cache, max_malformed=0.5)
    with pytest.raises(DataError, match=r"more than the allowed 1\.00%"):
        load_dataset("lastfm_tags", tmp_path, cache)
    assert load_dataset("lastfm_tags", tmp_path, cache, max_malformed=0.1).content_hash == loose.content_hash


def test_one_warning_per_load(tmp_path, cache, caplog):
    write(tmp_path, 3)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_dataset("lastfm_tags", tmp_path, cache)
        (record,) = caplog.records
        assert "3 malformed lines were left out" in record.getMessage()
        assert "user_taggedartists.dat:302" in record.getMessage()


def test_clean_data_give_no_warning(tmp_path, cache, caplog):
    data = load_dataset("lastfm_tags", write(tmp_path, 0), cache)
    assert not caplog.records
    assert (data.malformed, data.num_malformed) == ((), 0)
