import numpy as np
import pytest

from recsys_models.data import DataError, load_dataset
from recsys_models.data.splits import random_split

USERS = {1: ("F", 1, 10, "48067"), 2: ("M", 56, 16, "70072-123"), 3: ("M", 25, 15, "02138")}
MOVIES = {1: ("Toy Story (1995)", "Animation|Comedy"), 5: ("Amélie: Le Film (2001)", "Comedy"), 9: ("Undated", "Drama")}
RATINGS = [(user, movie, (3 * user + movie + i) % 5 + 1) for i in range(4) for user in USERS for movie in MOVIES]
FIELDS = ["user", "movie", "gender", "age", "occupation", "zip"]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data" / "ml-1m"
    folder.mkdir(parents=True)
    users = [f"{user}::{'::'.join(map(str, USERS[user]))}\n" for user in (3, 1, 2)]
    (folder / "users.dat").write_text("".join(users))
    movies = [f"{movie}::{title}::{genres}\n" for movie, (title, genres) in MOVIES.items()]
    (folder / "movies.dat").write_text("".join(movies), encoding="latin-1")
    (folder / "ratings.dat").write_text("".join(f"{u}::{m}::{r}::97830{i:04}\n" for i, (u, m, r) in enumerate(RATINGS)))
    return folder.parent


def expected(rule: str):
    kept = [(u, m, r) for u, m, r in RATINGS if rule != "drop_3" or r != 3]
    return [(u, m, *USERS[u]) for u, m, _ in kept], [int(r >= (3 if rule == ">=3" else 4)) for *_, r in kept]


@pytest.mark.parametrize("rule", ["drop_3", ">=3", ">=4"])
@pytest.mark.parametrize("seed", [2021, 5])
def test_rows_labels_and_split(root, cache, check_encoded, rule, seed):
    data = load_dataset("movielens_1m", root, cache, label_rule=rule, split_seed=seed)
    rows, labels = expected(rule)
    check_encoded(data, FIELDS, rows, labels, random_split(len(rows), seed))


def test_ratings_without_time_give_the_same_rows(root, cache):
    with_time = load_dataset("movielens_1m", root, cache)
    folder = root / "ml-1m"
    (folder / "ratings.dat").unlink()
    (folder / "ratings_no_time.csv").write_text(
        "user_id,movie_id,rating\n" + "".join(f"{u},{m},{r}\n" for u, m, r in RATINGS)
    )
    without = load_dataset("movielens_1m", root, cache)
    assert without.content_hash != with_time.content_hash
    for split in ("train", "validation", "test"):
        assert np.array_equal(getattr(without, split).ids, getattr(with_time, split).ids)
        assert np.array_equal(getattr(without, split).labels, getattr(with_time, split).labels)


def test_item_features_add_genres_and_year(root, cache, check_encoded):
    data = load_dataset("movielens_1m", root, cache, item_features=True)
    rows, labels = expected("drop_3")
    years = {1: "1995", 5: "2001", 9: ""}
    rows = [(*row, MOVIES[row[1]][1], years[row[1]]) for row in rows]
    check_encoded(data, [*FIELDS, "genres", "year"], rows, labels, random_split(len(rows), 2021))


def test_ratings_of_unknown_users_and_off_the_scale_are_malformed(root, cache):
    path = root / "ml-1m" / "ratings.dat"
    path.write_text("7::1::5::1\n1::1::6::1\n1::1::0::1\n1::1::x::1\n" + path.read_text())
    data = load_dataset("movielens_1m", root, cache, max_malformed=0.2)
    reasons = {line.line: line.reason for line in data.malformed}
    assert reasons[1] == "user 7, expected one in users.dat"
    assert reasons[2] == "rating 6.0, expected 1 to 5"
    assert reasons[3] == "rating 0.0, expected 1 to 5"
    assert reasons[4] == "column 3 (rating) is 'x', expected a number"
    assert len(data.train) + len(data.validation) + len(data.test) == len(expected("drop_3")[0])


def test_a_user_given_twice_is_malformed(root, cache):
    path = root / "ml-1m" / "users.dat"
    path.write_text(path.read_text() + "1::M::25::1::00000\n")
    data = load_dataset("movielens_1m", root, cache, max_malformed=0.3)
    assert [str(line) for line in data.malformed] == ["users.dat:4: key 1, expected one that was not there before"]
    assert set(data.fields[2].values.tolist()) == {"F", "M"}


def test_the_csv_needs_its_header(root, cache):
    (root / "ml-1m" / "ratings.dat").unlink()
    (root / "ml-1m" / "ratings_no_time.csv").write_text("user,movie,rating\n1,1,5\n")
    with pytest.raises(DataError, match=r"line 1 is 'user,movie,rating'. Expected .*user_id,movie_id,rating"):
        load_dataset("movielens_1m", root, cache)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ratings.dat", r"neither ratings.dat nor ratings_no_time.csv is there.*unpack ml-1m\.zip"),
        ("users.dat", r"users\.dat: no such file"),
    ],
)
def test_missing_files_are_named(root, cache, name, message):
    (root / "ml-1m" / name).unlink()
    with pytest.raises(DataError, match=message):
        load_dataset("movielens_1m", root, cache)


def test_dropping_every_rating_is_an_error(root, cache):
    (root / "ml-1m" / "ratings.dat").write_text("1::1::3::1\n" * 20)
    with pytest.raises(DataError, match="no usable rows"):
        load_dataset("movielens_1m", root, cache)
