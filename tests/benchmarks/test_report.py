"""Reports, from results made by hand: fronts, noise, damaged files, the page in a browser."""

import dataclasses
import math
import shutil
import subprocess
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import bench
from benchmarks.errors import ResultError
from benchmarks.frames import cell_frame, choices, pareto_front, point_frame, read_results
from benchmarks.kept import kept_widths
from benchmarks.report import main
from benchmarks.results import metric_values
from embcomp import format_bytes
from tests.benchmarks.small import made_result, write_results

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture
def results():
    """Three seeds each: full .80; a at 10 % close to it within noise; b at 10 % below both; a at 1 %."""
    made = []
    for seed, noise in ((1, -0.001), (2, 0.0), (3, 0.001)):
        made += [
            made_result("full", None, seed, 0.800 + noise, 10_000),
            made_result("a", "10%", seed, 0.7995 + noise, 1000),
            made_result("b", "10%", seed, 0.750 + noise, 900),
            made_result("a", "1%", seed, 0.740 + noise, 100),
        ]
    made.append(made_result("b", "1%", 1, None, None, "infeasible", minimum_bytes=400))
    made.append(made_result("c<script>", "10%", 1, None, None, "failed"))
    return made


@pytest.mark.parametrize("higher", [True, False])
def test_the_front_is_that_of_brute_force(higher):
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 7, 40):
        for _ in range(50):
            cost, quality = rng.integers(1, 8, size).astype(float), rng.integers(0, 8, size).astype(float)
            gain = quality if higher else -quality
            beaten = [
                any(
                    c <= cost[i] and g >= gain[i] and (c < cost[i] or g > gain[i])
                    for c, g in zip(cost, gain, strict=True)
                )
                for i in range(size)
            ]
            assert pareto_front(cost, quality, higher).tolist() == [not b for b in beaten]


def test_points_are_means_over_seeds(results):
    points = point_frame(cell_frame(results)).set_index(["label", "bytes"])
    assert len(points) == 4
    row = points.loc["a", 1000]
    assert row.seeds == 3
    assert row.test_auc == pytest.approx(0.7995)
    assert row.test_auc_std == pytest.approx(0.001)
    assert row.share == pytest.approx(0.1)
    assert row.gap == pytest.approx(-0.0005)
    assert points.on_front.to_dict() == {("full", 10_000): True, ("a", 1000): True, ("b", 900): True, ("a", 100): True}


def test_one_seed_has_no_spread(results):
    points = point_frame(cell_frame([r for r in results if r.seed == 1]))
    assert points.test_auc_std.isna().all()
    assert all(choice.as_good is None for choice in choices(points))


def test_choices_are_the_best_that_fit_and_say_what_is_as_good(results):
    for seed in (1, 2, 3):
        results.append(made_result("d", "50%", seed, 0.7996 + 0.001 * (seed - 2), 5000))
    found = {choice.budget: choice for choice in choices(point_frame(cell_frame(results)))}
    assert list(found) == ["50%", "10%", "1%"]
    assert found["50%"].best["label"] == "d"
    assert found["50%"].as_good == [("a", 1000)]
    assert found["10%"].best["label"] == "a"
    assert found["10%"].as_good == []
    assert found["1%"].best["bytes"] == 100


def test_a_lower_metric_turns_the_front_around(results):
    points = point_frame(cell_frame(results), "test_log_loss")
    assert choices(points, "test_log_loss")[0].best["label"] == "a"
    assert points.on_front.all()


def test_series_that_share_a_label_are_told_apart(results):
    results.append(made_result("a", "10%", 1, 0.79, 1000, options={"num_hashes": 2}))
    labels = set(cell_frame(results).label)
    assert {"a (strategy.num_hashes=None)", "a (strategy.num_hashes=2)", "b"} <= labels


def test_a_label_given_by_hand_makes_one_curve_of_other_options_at_each_budget(results):
    def split(budget, size):
        made = made_result("hash", budget, 1, 0.7, 1000 * size, options={"num_rows": size})
        return dataclasses.replace(made, label="split", config={**made.config, "label": "split"})

    results += [split("50%", 4), split("5%", 2)]
    assert (cell_frame(results).label == "split").sum() == 2
    assert cell_frame([*results, split("5%", 9)]).label.str.startswith("split (").sum() == 3


def test_cells_that_failed_to_load_stand_with_the_others(results):
    lost = made_result("e", "10%", 1, None, None, "failed")
    lost.dataset.clear()
    assert cell_frame([*results, lost]).data_hash.unique().tolist() == ["abc"]


def test_ways_to_train_one_model_are_compared_by_steps_too(tmp_path, results, capsys):
    write_results(tmp_path, results)
    main(["--markdown", "-", "-o", str(tmp_path / "one.html"), str(tmp_path)])
    assert ": models" not in capsys.readouterr().out
    other = made_result("multi-task", None, 1, 0.81, 10_000)
    other.training["history"] = [{"step": step, "mrr@20": 0.1 * step} for step in (1, 2, 3, 4)]
    write_results(tmp_path, [other])
    main(["--markdown", "-", "-o", str(tmp_path / "two.html"), str(tmp_path)])
    text = capsys.readouterr().out
    assert ": models" in text
    assert "steps to 95 % of MRR" in text
    assert next(line for line in text.splitlines() if "| multi-task |" in line).endswith("| 4 | 1 |")


def test_damaged_files_are_named_and_left_out(tmp_path, results, capsys):
    write_results(tmp_path, results)
    (tmp_path / "made" / "torn.json").write_text('{"schema_version": 1, "ce')
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "cell.json").write_text("{}")
    found, skipped = read_results(tmp_path)
    assert len(found) == len(results)
    assert len(skipped) == 1
    main([str(tmp_path)])
    assert "torn.json" in capsys.readouterr().err
    assert "torn.json" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("folder", ["empty", "missing", "torn"])
def test_nothing_to_report_is_an_error(tmp_path, folder, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a.json").write_text("{")
    with pytest.raises(ResultError):
        read_results(tmp_path / folder)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / folder)])
    assert stopped.value.code == 2
    assert str(tmp_path / folder) in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_an_error(tmp_path, results, capsys):
    write_results(tmp_path, results)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main([str(tmp_path), "-o", str(tmp_path / "file" / "report.html")])
    assert "can't be written" in capsys.readouterr().err


def test_the_page_escapes_what_it_shows_and_loads_nothing(tmp_path, results):
    write_results(tmp_path, results)
    main([str(tmp_path), "-o", str(tmp_path / "out.html")])
    page = (tmp_path / "out.html").read_text()
    assert "c<script>" not in page
    assert "<b>it broke</b>" not in page
    assert "&lt;b&gt;it broke&lt;/b&gt;" in page
    own = page.replace(page[page.index("<script>") : page.index("</script>")], "", 1)  # without plotly.js itself
    assert "src=" not in own
    assert "http" not in own.replace("http://www.w3.org", "")
    assert page.count("plotly.js v") <= 2


def test_what_was_kept_is_drawn_by_field_and_tenth(tmp_path, results, capsys):
    widths = {"1": {"item<": [4.0, 2.0], "user": [1.0] * 10}, "2": {"item<": [3.0, 0.5], "user": [1.0] * 10}}
    told = [
        dataclasses.replace(result, tables={"mean_widths_by_decile": widths[str(result.seed)]})
        if result.label == "a" and result.seed < 3
        else result
        for result in results
    ]
    assert kept_widths([r for r in told if r.label == "a"]) == {
        budget: {"item<": [3.5, 1.25], "user": [1.0] * 10} for budget in ("10%", "1%")
    }
    write_results(tmp_path, told)
    main([str(tmp_path), "--pictures", str(tmp_path / "pictures")])
    (picture,) = (tmp_path / "pictures").iterdir()
    assert picture.name == "made-synthetic-fm-a.svg"
    root = ElementTree.fromstring(picture.read_text())
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [texts.count(text) for text in ("item<", "user", "10%", "1%", "3.5", "1.2", "1")] == [1, 1, 1, 1, 2, 2, 20]
    assert "a whole row has 5" in texts[-1]
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + 2 * 12
    page = (tmp_path / "report.html").read_text()
    assert page.count("What was kept") == 1
    assert "item&lt;" in page
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--pictures", str(tmp_path / "report.html")])
    assert "can't be written" in capsys.readouterr().err


def test_models_stand_side_by_side_with_the_parts_of_the_test(tmp_path, results, capsys):
    def told(result, model, shift):
        slices = {"unseen": {"cases": 7.0, "auc": 0.6 + shift + result.seed / 100}} if result.seed < 3 else {}
        steps = [{"step": 10 * n, "mrr@20": value} for n, value in ((1, 0.2), (2, None), (3, 0.381), (4, 0.4))]
        name = f"{result.cell}-{model}"
        return dataclasses.replace(result, cell=name, model=model, slices=slices, training={"history": steps})

    write_results(tmp_path, [told(r, model, shift) for r in results for model, shift in (("fm", 0.0), ("lr", 0.1))])
    main([str(tmp_path), "--markdown", "-"])
    lines = capsys.readouterr().out.splitlines()
    assert "| fm | full | 10,000 | 0.8000 ± 0.0010 | 0.2000 ± 0.0010 | 30 | 3 |" in lines
    assert [line for line in lines if line.startswith("| lr | full | 0")] == ["| lr | full | 0.7150 |"]
    assert "| model | strategy | unseen (7) |" in lines
    assert lines.count("| a | 10% | 0.6150 |") == lines.count("| a | 10% | 0.7150 |") == 1
    page = (tmp_path / "report.html").read_text()
    assert "unseen <small>7</small>" in page
    assert page.index("synthetic: models") < page.index('id="group0"')


def test_parts_are_shown_with_ties_at_random_too_where_those_decide(tmp_path, results, capsys):
    def ranked(result, shift):
        values = {"test_ndcg@10": 0.2, "test_mrr@20": 0.1, "test_ndcg@10_random_ties": 0.2}
        parts = {"unseen": 0.1, "seen ≥ 10": 0.3}
        slices = {
            name: {"cases": 7.0, "ndcg@10": value, "ndcg@10_random_ties": value + shift * (name == "unseen")}
            for name, value in parts.items()
        }
        metrics = metric_values(values) if result.status == "success" else {}
        return dataclasses.replace(result, metrics=metrics, slices=slices)

    for shift, tables in ((0.0, 1), (0.25, 2)):
        folder = tmp_path / str(shift)
        write_results(folder, [ranked(result, shift) for result in results])
        main([str(folder), "--markdown", "-"])
        lines = capsys.readouterr().out.splitlines()
        assert sum("by part of the test split" in line for line in lines) == tables
        assert "| a | 10% | 0.1000 | 0.3000 |" in lines
        assert ("| a | 10% | 0.3500 | 0.3000 |" in lines) == (tables == 2)
        page = (folder / "report.html").read_text()
        assert page.count("test NDCG@10, ties at random of parts") == tables - 1


def test_markdown_has_the_table(tmp_path, results, capsys):
    write_results(tmp_path, results)
    main([str(tmp_path), "--markdown", "-"])
    text = capsys.readouterr().out
    assert "| ★ | a | 10% | 1,000 | 10.00% |  | 0.7995 ± 0.0010 | -0.0005 | 0.2005 ± 0.0010 | 3 |" in text
    assert "b at 1% (≥ 400 B)" in text
    assert "Failed: synthetic-fm-c_script_" in text


def test_sizes_of_exported_files_stand_beside_the_bytes_served(tmp_path, results, capsys):
    def exported(result):
        size = result.sizes.served_bytes
        refused = {"file_bytes": None, "refused": "rows are <shared>"}
        return {"pt2": {"file_bytes": size + 20 * result.seed, "refused": None}, "fbgemm": refused}

    results = [
        dataclasses.replace(r, exports=exported(r)) if r.status == "success" and r.label == "a" else r for r in results
    ]
    write_results(tmp_path, results)
    main([str(tmp_path), "--markdown", "-"])
    text = capsys.readouterr().out
    assert "| sparsity | pt2 file | fbgemm file | test AUC |" in text
    assert "| a | 10% | 1,000 | 10.00% |  | 1,040 | refused |" in text
    assert "| b | 10% | 900 | 9.00% |  |  |  |" in text
    page = (tmp_path / "report.html").read_text()
    assert ">pt2 file</th>" in page
    assert 'title="rows are &lt;shared&gt;">refused</td>' in page
    write_results(tmp_path / "plain", [r for r in results if r.label != "a"])
    main([str(tmp_path / "plain")])
    assert "pt2 file" not in (tmp_path / "plain" / "report.html").read_text()


def test_ties_at_random_are_shown_where_they_are_another_value(tmp_path, results, capsys):
    def ranked(result, model, shift):
        values = {"test_ndcg@10": 0.2, "test_mrr@20": 0.1, "test_ndcg@10_random_ties": 0.2 + shift}
        values["test_mrr@20_random_ties"] = 0.1 + shift / 1000  # not seen at four digits
        metrics = metric_values(values) if result.status == "success" else {}
        return dataclasses.replace(result, cell=f"{result.cell}-{model}", model=model, metrics=metrics)

    write_results(tmp_path, [ranked(r, model, shift) for r in results for model, shift in (("a", 0.0), ("b", 0.03))])
    main([str(tmp_path), "--markdown", "-"])
    text = capsys.readouterr().out
    models, one, other = text.split("## ")[1:]
    assert "| test NDCG@10 | test NDCG@10, ties at random | test MRR@20 |" in models
    assert "ties at random" not in one
    assert "| test NDCG@10 | to float32 | test MRR@20 | test NDCG@10, ties at random | seeds |" in other
    assert "| 0.1000 ± 0.0000 | 0.2300 ± 0.0000 | 3 |" in other
    page = (tmp_path / "report.html").read_text()
    assert page.count('<th class="n">test NDCG@10, ties at random</th>') == 2
    assert page.count("Items that score alike count against the model") == 1


def test_what_composes_items_stands_beside_the_bytes_served(tmp_path, results, capsys):
    def composed(result, model, composing):
        sizes = dataclasses.replace(result.sizes, composing_bytes=composing)
        return dataclasses.replace(result, cell=f"{result.cell}-{model}", model=model, sizes=sizes)

    models = (("ids", 0), ("metadata", 2345), ("older", None))
    write_results(tmp_path, [composed(r, *model) for r in results for model in models])
    main([str(tmp_path), "--markdown", "-"])
    text = capsys.readouterr().out
    compared, ids, metadata, older = text.split("## ")[1:]
    assert "| model | strategy | bytes served | to compose items | test AUC |" in compared
    for model, told in (("ids", "0"), ("metadata", "2,345"), ("older", "")):
        assert f"| {model} | full | 10,000 | {told} | 0.8000" in compared
    assert "| a | 10% | 1,000 | 2,345 | 10.00% |" in metadata
    assert "to compose items" not in ids + older
    page = (tmp_path / "report.html").read_text()
    assert page.count(">to compose items</th>") == 2
    assert f">{format_bytes(2345)}</td>" in page
    assert page.count("served beside them") == 1


def test_groups_without_a_success_are_reported(tmp_path):
    write_results(tmp_path, [made_result("a", "10%", 1, None, None, "failed")])
    main([str(tmp_path)])
    assert "No cell of this group was successful" in (tmp_path / "report.html").read_text()


def test_undefined_quality_is_no_point():
    undefined = made_result("a", "10%", 1, math.nan, 1000)
    assert point_frame(cell_frame([undefined])).empty


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_works_in_a_browser(tmp_path, results):
    write_results(tmp_path, results)
    main([str(tmp_path)])
    page = tmp_path / "report.html"
    click = """<script>
      const errors = []; window.addEventListener("error", (event) => errors.push(event.message));
      window.addEventListener("load", () => {
        const heads = document.querySelectorAll("table.sortable th");
        heads[6].click(); heads[6].click();
        document.title = errors.length ? errors.join() : "worst first: " +
          document.querySelector("table.sortable tbody tr").cells[6].textContent.trim();
      });</script>"""
    page.write_text(page.read_text().replace("<style>", click + "<style>", 1))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>worst first: 0.7400 ± 0.0010</title>" in shown.stdout
    assert 'class="main-svg"' in shown.stdout  # the plot was drawn
    assert "CONSOLE" not in shown.stderr


@pytest.mark.slow
def test_make_bench_prints_a_table_and_a_report_and_is_quick_the_second_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EMBCOMP_CACHE", str(tmp_path / "cache"))
    small = ("strategy=full,hash", "budget=25%", "seed=1", "data.rows=2000", "data.vocabulary_scale=0.02")
    for _ in range(2):
        bench.main(["--results", str(tmp_path / "results"), *small])
        shown = capsys.readouterr()
        assert "best within 25%: " in shown.out
        assert f"report: {tmp_path / 'results' / 'embedded' / 'report.html'}" in shown.out
    assert "(2 from an earlier run)" in shown.out
