import numpy as np
import pytest

from recsys_models.data import DataError, load_dataset
from recsys_models.data.readers.movielens_100k import _GENRES
from recsys_models.data.splits import random_split

USERS = {1: (24, "M", "technician", "85711"), 2: (17, "F", "other", "T8H1N"), 3: (56, "M", "writer", "32067")}
ITEMS = {
    1: ("Toy Story (1995)", ["Animation", "Comedy"]),
    2: ("Amélie (2001)", ["Comedy"]),
    3: ("unknown", ["unknown"]),
}
RATINGS = [(user, item, (3 * user + item + i) % 5 + 1) for i in range(4) for user in USERS for item in ITEMS]
FIELDS = ["user", "item", "age", "gender", "occupation", "zip"]
BUCKETS = {24: 18, 17: 1, 56: 56}


def write_original(folder):
    (folder / "u.data").write_text("".join(f"{u}\t{i}\t{r}\t88125{n:04}\n" for n, (u, i, r) in enumerate(RATINGS)))
    (folder / "u.user").write_text("".join(f"{u}|{'|'.join(map(str, a))}\n" for u, a in USERS.items()))
    flags = {item: "|".join(str(int(g in genres)) for g in _GENRES) for item, (_, genres) in ITEMS.items()}
    lines = [f"{i}|{title}|01-Jan-1995||http://x/?{i}|{flags[i]}\n" for i, (title, _) in ITEMS.items()]
    (folder / "u.item").write_text("".join(lines), encoding="latin-1")


def write_atomic(folder):
    lines = "".join(f"{i}\t{u}\t{r}.0\t88125{n:04}\n" for n, (u, i, r) in enumerate(RATINGS))
    (folder / "ml-100k.inter").write_text("item_id:token\tuser_id:token\trating:float\ttimestamp:float\n" + lines)
    header = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    users = "".join(f"{u}\t" + "\t".join(map(str, a)) + "\n" for u, a in USERS.items())
    (folder / "ml-100k.user").write_text(header + users)
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    years = {1: "1995", 2: "2001", 3: ""}
    items = "".join(f"{i}\t{t.split(' (')[0]}\t{years[i]}\t{' '.join(g)}\n" for i, (t, g) in ITEMS.items())
    (folder / "ml-100k.item").write_text(header + items, encoding="utf-8")


FORMATS = {"original": write_original, "atomic": write_atomic}


@pytest.fixture(params=FORMATS)
def root(request, tmp_path):
    folder = tmp_path / "data" / "ml-100k"
    folder.mkdir(parents=True)
    FORMATS[request.param](folder)
    return folder.parent


@pytest.mark.parametrize("age", ["bucket", "raw"])
@pytest.mark.parametrize("item_features", [False, True])
def test_both_formats_give_the_same_rows(root, cache, check_encoded, age, item_features):
    data = load_dataset("movielens_100k", root, cache, age=age, item_features=item_features)
    rows, labels = [], []
    for user, item, rating in RATINGS:
        if rating != 3:
            years, *rest = USERS[user]
            films = (" ".join(ITEMS[item][1]), {1: "1995", 2: "2001", 3: ""}[item]) if item_features else ()
            rows.append((user, item, BUCKETS[years] if age == "bucket" else years, *rest, *films))
            labels.append(int(rating > 3))
    names = FIELDS + (["genres", "year"] if item_features else [])
    check_encoded(data, names, rows, labels, random_split(len(rows), 2021))


@pytest.mark.parametrize(
    ("years", "bucket"), [(7, 1), (17, 1), (18, 18), (24, 18), (25, 25), (49, 45), (50, 50), (73, 56)]
)
def test_age_groups_are_those_of_movielens_1m(tmp_path, cache, years, bucket):
    write_original(tmp_path)
    (tmp_path / "u.user").write_text("".join(f"{user}|{years}|F|other|1\n" for user in USERS))
    data = load_dataset("movielens_100k", tmp_path, cache)
    assert data.fields[2].values.tolist() == [bucket]


def test_a_header_that_lacks_a_column_is_an_error(tmp_path, cache):
    write_atomic(tmp_path)
    path = tmp_path / "ml-100k.inter"
    path.write_text(path.read_text().replace("rating:float", "stars:float"))
    with pytest.raises(DataError, match=r"ml-100k\.inter: line 1 lacks the column rating"):
        load_dataset("movielens_100k", tmp_path, cache)


def test_no_files_are_an_error(tmp_path, cache):
    with pytest.raises(DataError, match=r"neither u\.data nor ml-100k\.inter is there"):
        load_dataset("movielens_100k", tmp_path, cache)


def test_thresholds_keep_all_ratings(root, cache):
    data = load_dataset("movielens_100k", root, cache, label_rule=">=3")
    labels = np.concatenate([data.train.labels, data.validation.labels, data.test.labels])
    assert len(labels) == len(RATINGS)
    assert labels.sum() == sum(rating >= 3 for *_, rating in RATINGS)
