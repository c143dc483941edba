"""The table of floors, as a person asks for it."""

import pytest

from benchmarks.floors import main


def test_floors_are_printed_as_markdown(tmp_path, capsys):
    main(["data=sessions/synthetic_sessions", "data.sessions=500", "data.items=80", f"data_cache={tmp_path}"])
    head, _, popularity, knn, _, about, _, parts, _, *by_part = capsys.readouterr().out.splitlines()
    titles, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in (head, popularity, knn))
    at_random = ", ties at random"
    assert [title for title in titles if at_random not in title] == [
        *("model", "bytes", "test NDCG@10", "test HR@10", "test MRR@20", "test HR@20"),
    ]
    found = {row[0]: dict(zip(titles[2:], map(float, row[2:]), strict=True)) for row in rows}
    assert list(found) == ["popularity", "item_knn"]
    assert found["item_knn"]["test NDCG@10"] > found["popularity"]["test NDCG@10"] > 0
    assert found["popularity"]["test NDCG@10" + at_random] > found["popularity"]["test NDCG@10"]
    assert about == "test NDCG@10 by part of the test split, and its cases:"
    assert parts.startswith("| model | unseen (")
    assert "| length ≤ 2 (" in parts
    assert [line[2:12] for line in by_part[:2]] == ["popularity", "item_knn |"]
    assert by_part[3] == "test NDCG@10, ties at random by part of the test split, and its cases:"
    assert [line[2:12] for line in by_part[7:9]] == ["popularity", "item_knn |"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=sessions/synthetic"], "did you mean"),
        (["data=sessions/yoochoose", "data_root=/nowhere"], "/nowhere"),
        (["data=sessions/synthetic_sessions", "data.x=1"], "data.x"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, f"data_cache={tmp_path}"])
    assert message in capsys.readouterr().err
