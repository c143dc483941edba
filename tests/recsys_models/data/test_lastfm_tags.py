from collections import defaultdict

import numpy as np
import pytest

from recsys_models.data import DataError, load_dataset
from recsys_models.data.splits import random_split

TAGS = [(2, 52, 13), (2, 52, 15), (2, 63, 13), (4, 52, 18), (4, 52, 13), (7, 90, 21), (7, 52, 15), (7, 52, 13)]
HEADER = "userID\tartistID\ttagID\tday\tmonth\tyear\n"


def write(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    text = HEADER + "".join("\t".join(map(str, row)) + "\t1\t4\t2009\r\n" for row in rows)
    (folder / "user_taggedartists.dat").write_bytes(text.encode())


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "data" / "hetrec-lastfm", TAGS)
    return tmp_path / "data"


def raw_rows(data, rows: int, seed: int = 2021):
    """Rows in the order of the source, None for values outside the vocabulary."""
    out: list = [None] * rows
    codes = random_split(rows, seed)
    for code, split in enumerate((data.train, data.validation, data.test)):
        for where, ids, label in zip(np.flatnonzero(codes == code), split.ids, split.labels, strict=True):
            values = [f.values[i] if i < f.unknown_id else None for f, i in zip(data.fields, ids, strict=True)]
            out[where] = (*values, label)
    return out


@pytest.mark.parametrize("negatives", [1, 2, 5])
def test_every_assignment_is_followed_by_its_negatives(root, cache, negatives):
    data = load_dataset("lastfm_tags", root, cache, negatives=negatives)
    assert [field.name for field in data.fields] == ["user", "artist", "tag"]
    rows = raw_rows(data, len(TAGS) * (1 + negatives))
    given = defaultdict(set)
    for user, artist, tag in TAGS:
        given[user, artist].add(tag)
    for i, (user, artist, tag) in enumerate(TAGS):
        positive, *drawn = rows[i * (1 + negatives) : (i + 1) * (1 + negatives)]
        assert positive[3] == 1
        assert all(a in (b, None) for a, b in zip(positive, (user, artist, tag), strict=False))
        for other in drawn:
            assert other[3] == 0
            assert other[0] in (user, None)
            assert other[1] in (artist, None)
            assert other[2] not in given[user, artist]


def test_negatives_are_uniform_over_tags_and_follow_their_seed(tmp_path, cache):
    rows = [(user, 1, tag) for user in range(300) for tag in ((user % 10), (user + 1) % 10)]
    write(tmp_path, rows)
    data = load_dataset("lastfm_tags", tmp_path, cache, negatives=10)
    tag, label = data.train.ids[:, 2], data.train.labels
    counts = np.bincount(tag[label == 0], minlength=10)[:10]
    assert np.all(np.abs(counts / counts.sum() - 0.1) < 0.02)
    again = load_dataset("lastfm_tags", tmp_path, cache.with_name("other"), negatives=10)
    assert np.array_equal(again.train.ids, data.train.ids)
    other = load_dataset("lastfm_tags", tmp_path, cache, negatives=10, negative_seed=1)
    assert not np.array_equal(other.train.ids, data.train.ids)


def test_a_pair_with_every_tag_leaves_no_negative(tmp_path, cache):
    write(tmp_path, [(1, 1, 5), (1, 1, 6), (2, 1, 5)])
    with pytest.raises(DataError, match="one user gave one artist all 2 tags"):
        load_dataset("lastfm_tags", tmp_path, cache)


def test_only_a_header_is_an_error(tmp_path, cache):
    write(tmp_path, [])
    with pytest.raises(DataError, match="no usable line"):
        load_dataset("lastfm_tags", tmp_path, cache)


def test_malformed_lines_and_a_wrong_header(root, cache):
    path = root / "hetrec-lastfm" / "user_taggedartists.dat"
    path.write_text(path.read_text() + "2\t52\tmetal\t1\t4\t2009\n")
    data = load_dataset("lastfm_tags", root, cache, max_malformed=0.2)
    assert [str(x) for x in data.malformed] == [
        "user_taggedartists.dat:10: column 3 (tagID) is 'metal', expected an integer of up to 18 digits"
    ]
    path.write_text("userID\tartistID\tweight\n2\t51\t13883\n")
    with pytest.raises(DataError, match=r"line 1 is 'userID artistID weight'. Expected user_taggedartists.dat"):
        load_dataset("lastfm_tags", root, cache)
