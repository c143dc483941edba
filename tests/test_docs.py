"""What is written about the code is true: generated pages, code in Markdown files, commands, and links."""

import contextlib
import io
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import embcomp
from embcomp import docs
from embcomp.facts import rows_read, smallest_bytes

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "strategies"
FILES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DEAR = {"check_compile", "check_export", "check_huge_tables", "check_ids_differ"}


def blocks(name: str, *languages: str) -> list[tuple[str, str]]:
    """Fenced blocks of a file: language and text."""
    found = BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))
    return [(language, text) for language, text in found if language in languages]


def anchors(path: Path) -> set[str]:
    """What links can point to in a Markdown file: its headings, as GitHub names them."""
    prose = BLOCK.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- generated pages ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return docs.make_pages()


def test_committed_pages_are_what_the_code_says(pages):
    committed = {path.name: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    different = {name for name in committed.keys() | pages.keys() if committed.get(name) != pages.get(name)}
    assert not different, f"run `make docs`, which writes docs/strategies from the code, for: {sorted(different)}"


def test_every_strategy_has_a_page_with_its_docstring_and_all_its_options(pages):
    for name in embcomp.list_strategies():
        entry, text = embcomp.get_strategy(name), pages[f"{name}.md"]
        assert entry.tables_class.__doc__.split("\n")[0].replace("``", "`") in text
        for option in entry.config_class.__dataclass_fields__:
            assert f"| `{option}` |" in text
        assert f"]({name}.md)" in pages["README.md"]


def test_figures_are_those_of_a_plan(pages):
    budget = smallest_bytes(docs.REFERENCE, embcomp.make_config("reduced_dim"))
    smallest = embcomp.plan(docs.REFERENCE, "reduced_dim", f"{budget}B")
    assert smallest.config.dim == 1
    assert embcomp.format_bytes(smallest.report.serve_bytes) in pages["reduced_dim.md"]
    assert rows_read(embcomp.plan(docs.REFERENCE, embcomp.HashConfig(num_hashes=3), "10%")) == 3


def test_bug_rows_read_do_not_depend_on_the_order_of_tables():
    """They were those of the first table."""
    specs = [embcomp.TableSpec("flag", 2, 16), embcomp.TableSpec("user", 1_000_000, 16)]
    for tables in (specs, specs[::-1]):
        assert rows_read(embcomp.plan(tables, "compositional", "10%")) == 2


def test_pages_of_strategies_that_are_gone_are_removed_and_others_kept(tmp_path):
    (tmp_path / "gone.md").write_text(f"# gone\n\n{docs.MARK}\n")
    (tmp_path / "notes.md").write_text("# notes\n")
    docs.main([str(tmp_path)])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "notes.md", *(f"{name}.md" for name in embcomp.list_strategies())}


def test_attributes_are_read_from_a_docstring():
    class Documented:
        """Something.

        Attributes:
            one: first line
                and second: with a colon.
            two: ``"x"``: y.

        Raises:
            ValueError: never.
        """

    assert docs.attributes(Documented) == {"one": "first line and second: with a colon.", "two": '``"x"``: y.'}
    assert docs.markdown("``a`` (arXiv 1234.56789)") == "`a` ([arXiv 1234.56789](https://arxiv.org/abs/1234.56789))"


# ---- code in Markdown -----------------------------------------------------------------------------------------------


def test_code_of_the_readme_runs_and_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, printed = {"__name__": "readme"}, io.StringIO()
    for language, text in blocks("README.md", "python", "text"):
        if language == "python":
            with contextlib.redirect_stdout(printed):
                exec(compile(text, "README.md", "exec"), namespace)
        else:
            assert printed.getvalue() == text
            printed = io.StringIO()
    assert printed.getvalue() == ""


def test_the_strategy_of_contributing_keeps_the_contract(tmp_path):
    code, own_test, check = (text for _, text in blocks("CONTRIBUTING.md", "python"))
    (tmp_path / "neighbours.py").write_text(code)
    (tmp_path / "test_neighbours.py").write_text(f"import neighbours\n{own_test}")
    (tmp_path / "checked.py").write_text(f"import neighbours\n{check.replace(')', f', skip={DEAR})', 1)}")
    for command in (["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_neighbours.py"], ["checked.py"]):
        result = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_the_yaml_of_contributing_has_every_option():
    yaml = pytest.importorskip("yaml")
    ((_, text),) = blocks("CONTRIBUTING.md", "yaml")
    options = yaml.safe_load(text)["strategy"]
    assert options.pop("name") == "neighbours"
    common = embcomp.config_to_dict(embcomp.FullConfig())
    assert options == {"num_rows": None} | {name: common[name] for name in ("rows", "unseen", "seed", "sparse")}


# ---- commands and links ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(path):
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    code = re.findall(r"`([^`\n]+)`", path.read_text()) + [t for _, t in blocks(path.relative_to(ROOT), "sh")]
    for line in "\n".join(code).splitlines():
        for target in re.findall(r"^make ([a-z]+)", line):
            assert target in targets, line
        for script in re.findall(r"^(embcomp-[a-z]+)", line):
            assert script in scripts, line


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", path.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(linked), f"{linked.name} has no heading {anchor!r}"
