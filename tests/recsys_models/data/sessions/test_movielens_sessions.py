"""Histories of MovieLens in all its formats."""

import pytest

from recsys_models.data import DataError, load_sessions
from recsys_models.data.readers.movielens_100k import _GENRES
from tests.recsys_models.data.sessions.memory import in_keys, values_of

FILMS = {
    10: ("Toy Story (1995)", ["Animation", "Comedy"]),
    20: ("Amélie (2001)", ["Comedy"]),
    30: ("Misérables, Les (1995)", ["Drama"]),
    40: ("unknown", ["unknown"]),
}
# User, film, stars, time: not in the order of time, and with a tie.
RATINGS = [
    (1, 30, 3, 900),
    (2, 10, 5, 50),
    (1, 10, 5, 100),
    (1, 20, 2, 100),
    (2, 20, 4, 60),
    (2, 40, 1, 55),
    (1, 40, 4, 5),
]
EXPECTED = [[[40, 10], [10]], [([40, 10], 20), ([10], 40)], [([40, 10, 20], 30), ([10, 40], 20)]]


def write_dat(folder):
    (folder / "ratings.dat").write_text("".join(f"{u}::{m}::{r}::{t}\n" for u, m, r, t in RATINGS))
    lines = [f"{m}::{title}::{'|'.join(genres)}\n" for m, (title, genres) in FILMS.items()]
    (folder / "movies.dat").write_text("".join(lines), encoding="latin-1")


def write_csv(folder):
    write_dat(folder)
    (folder / "ratings.dat").unlink()
    lines, seen = [], {1: 0, 2: 0}
    for user, film, stars, _ in sorted(RATINGS, key=lambda rating: rating[3]):
        lines.append(f"{user},{seen[user]},{film},{stars}\n")
        seen[user] += 1
    (folder / "sequences_original_ids.csv").write_text("user_id,pos,movie_id,rating\n" + "".join(lines[::-1]))


def write_original_100k(folder):
    (folder / "u.data").write_text("".join(f"{u}\t{m}\t{r}\t{t}\n" for u, m, r, t in RATINGS))
    flags = {m: "|".join(str(int(g in genres)) for g in _GENRES) for m, (_, genres) in FILMS.items()}
    lines = [f"{m}|{title}|01-Jan-1995||http://x/?{m}|{flags[m]}\n" for m, (title, _) in FILMS.items()]
    (folder / "u.item").write_text("".join(lines), encoding="latin-1")


def write_atomic(folder):
    lines = "".join(f"{u}\t{m}\t{r}.0\t{t}.0\n" for u, m, r, t in RATINGS)
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (folder / "ml-100k.inter").write_text(header + lines)
    years = {10: "1995", 20: "2001", 30: "1995", 40: ""}
    lines = [f"{m}\t{t.split(' (')[0]}\t{years[m]}\t{' '.join(g)}\n" for m, (t, g) in FILMS.items()]
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    (folder / "ml-100k.item").write_text(header + "".join(lines))


FORMATS = {
    "dat": ("movielens_1m", write_dat),
    "csv": ("movielens_1m", write_csv),
    "original": ("movielens_100k", write_original_100k),
    "atomic": ("movielens_100k", write_atomic),
}


@pytest.fixture(params=FORMATS)
def load(request, tmp_path, cache):
    name, write = FORMATS[request.param]
    write(tmp_path)

    def load(**options):
        return load_sessions(name, tmp_path, cache, **options)

    load.folder, load.format = tmp_path, request.param
    return load


def test_all_formats_give_the_same_histories(load):
    data = load()
    found = in_keys(data)
    if load.format == "csv":  # which has positions where others have ties
        assert sorted(found[0][0] + [found[1][0][1]]) == [10, 20, 40]
    else:
        assert found == EXPECTED
    assert data.filters_seen
    assert data.catalogue.counts.tolist() == sorted(data.catalogue.counts.tolist(), reverse=True)


def test_all_formats_give_the_same_attributes(load):
    data = load()
    assert [(a.name, a.is_bag) for a in data.catalogue.attributes] == [
        *(("genres", True), ("title", True), ("year", False), ("decade", False))
    ]
    known = {film for sequence in in_keys(data)[0] for film in sequence}
    for film, genres in values_of(data, "genres").items():
        expected = {g for g in FILMS[film][1] if any(g in FILMS[other][1] for other in known)}
        assert {g for g in genres if g} == expected
    assert set(values_of(data, "title")[10]) == {"toy", "story"}
    assert values_of(data, "year")[10] == "1995"
    assert values_of(data, "year")[40] is None
    assert values_of(data, "decade")[10] == "1990s"


@pytest.mark.parametrize("min_rating", [3, 2.5])
def test_low_ratings_can_be_left_out(load, min_rating):
    data = load(min_rating=min_rating)
    assert in_keys(data)[0][1] == [10, 20]
    assert sorted(in_keys(data)[0][0] + [target for _, target in in_keys(data)[1] + in_keys(data)[2]]) == [10, 30, 40]


def test_films_without_their_file_have_no_attributes(load):
    with_films = load()
    for name in ("movies.dat", "u.item", "ml-100k.item"):
        (load.folder / name).unlink(missing_ok=True)
    data = load()
    assert data.catalogue.attributes == ()
    assert in_keys(data) == in_keys(with_films)
    assert data.content_hash != with_films.content_hash


def test_positions_are_no_dates(tmp_path, cache):
    write_csv(tmp_path)
    with pytest.raises(DataError, match=r"have no time stamps, which protocol='last_days' needs"):
        load_sessions("movielens_1m", tmp_path, cache, protocol="last_days")


def test_malformed_lines_are_left_out_and_named(tmp_path, cache):
    write_dat(tmp_path)
    path = tmp_path / "ratings.dat"
    bad = "1::10::5\n1::x::5::100\n1::10::9::100\n1::10::5::noon\n1::10::5::nan\n"
    path.write_text(path.read_text() + bad)
    data = load_sessions("movielens_1m", tmp_path, cache, max_malformed=0.5)
    assert in_keys(data) == EXPECTED
    assert data.num_malformed == 5
    assert [str(line) for line in data.malformed] == [
        "ratings.dat:8: 3 columns, expected 4 separated by '::'",
        "ratings.dat:9: column 2 (item) is 'x', expected an integer of up to 18 digits",
        "ratings.dat:10: rating 9.0, expected 0 to 5",
        "ratings.dat:11: column 4 (time) is 'noon', expected a number",
        "ratings.dat:12: column 4 (time) is 'nan', expected a number",
    ]
    with pytest.raises(DataError, match=r"ratings\.dat: 5 of 12 lines .* 'max_malformed'"):
        load_sessions("movielens_1m", tmp_path, cache)


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        (
            "movielens_1m",
            "other.txt",
            "1",
            r"no such file: ratings\.dat or sequences_original_ids\.csv\. Expected.*UserID",
        ),
        ("movielens_1m", "ratings.dat", "1,2,3,4\n", r"This is not ratings\.dat of MovieLens-1M"),
        (
            "movielens_1m",
            "sequences_original_ids.csv",
            "user,movie\n",
            r"line 1 lacks the column user_id, .*Expected seq",
        ),
        ("movielens_100k", "other.txt", "1", r"no such file: u\.data or ml-100k\.inter\. Expected u\.data"),
        ("movielens_100k", "ml-100k.inter", "user_id:token\titem_id:token\n", "lacks the column rating"),
    ],
)
def test_wrong_files_say_what_was_expected(tmp_path, cache, name, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=message):
        load_sessions(name, tmp_path, cache)
