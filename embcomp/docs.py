"""The pages of docs/strategies, written from the code: ``python -m embcomp.docs [FOLDER]``.

Each registered strategy gets a page: what the docstrings of its two classes say, its options, and what it does with a
reference set of tables, which are planned on ``meta`` as the pages are written. A README compares all strategies.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from embcomp.budget import Plan, plan
from embcomp.config import StrategyConfig, StrategyEntry, get_strategy, list_strategies
from embcomp.errors import BudgetError, ConfigError
from embcomp.facts import row_formats, rows_read, smallest_bytes
from embcomp.memory import format_bytes
from embcomp.specs import TableSpec

REFERENCE = tuple(
    TableSpec(name, size, 16)
    for name, size in (("user", 10**7), ("item", 10**6), ("tag", 10**5), ("city", 1000), ("device", 10))
)
"""The tables of all figures: a few large ones and some small, as click data have them."""
BUDGETS = ("50%", "10%", "1%", "0.1%")
MARK = "<!-- Written by `make docs` from the code: change the docstrings, not this page. -->"

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_SECTION = re.compile(r"^(?:Args|Attributes|Returns|Raises|Example|Note):\n", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}(\w+): ", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pages; the command line."""
    parser = argparse.ArgumentParser(prog="python -m embcomp.docs", description="Write a page per strategy.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs/strategies"), help="default: %(default)s")
    folder = parser.parse_args(arguments).folder
    write_pages(folder)
    print(f"{folder}: {len(list_strategies())} strategies")


def write_pages(folder: Path) -> None:
    """Write all pages, and remove those of strategies that are gone; pages of other origin stay."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = make_pages()
    for path in folder.glob("*.md"):
        if path.name not in pages and MARK in path.read_text(encoding="utf-8"):
            path.unlink()
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")


def make_pages() -> dict[str, str]:
    """All pages: file name -> text."""
    entries = [get_strategy(name) for name in list_strategies()]
    return {"README.md": overview(entries)} | {f"{entry.name}.md": page(entry) for entry in entries}


def overview(entries: Sequence[StrategyEntry]) -> str:
    """The README: all strategies in one table."""
    full = sum(spec.full_bytes for spec in REFERENCE)
    sizes = ", ".join(f"{spec.num_embeddings:,}" for spec in REFERENCE)
    head = ("strategy", "what it does", "the budget turns", "finely", "`rows=`", "any id", "smallest budget")
    return _join(
        "# Strategies",
        MARK,
        f"The figures are of {len(REFERENCE)} tables of dimension 16 with {sizes} ids, {format_bytes(full)} as "
        "float32. They are planned with default options, and without counts, as these pages are written.",
        _table([*head, "rows read", "papers"], [_overview_row(entry) for entry in entries]),
        "**The budget turns** this size; *finely* means that steps are small enough to use 98 % of any budget. "
        "**`rows=`** are the kinds of [row formats](../../README.md#row-formats) that the strategy takes. It is "
        "`float32` alone where the strategy chooses the number format itself, or stores no rows. **Any id**: every "
        '64-bit id is hashed as it is; with `unseen="hash"` the others first bring ids they do not know into their '
        "range. **Rows read**: how many stored rows a lookup of one id reads at most, whatever its table, with a "
        "budget of 10 %, or the smallest budget where that is larger.",
    )


def page(entry: StrategyEntry) -> str:
    """The page of one strategy."""
    config = entry.config_class()
    own, common = _split_fields(entry.config_class)
    parts = [
        f"# {entry.name}",
        MARK,
        markdown(_description(entry.tables_class)),
        f"What the budget turns: {entry.tables_class.knob}.",
        f"## Options of `{entry.config_class.__name__}`",
        markdown(_description(entry.config_class)),
        _options(own, config) if own else "",
        "Common to all strategies:",
        _options(common, config),
        "## In figures",
        "The reference tables of [the overview](README.md), planned with default options.",
        _figures(entry),
        _sources(entry),
    ]
    return _join(*parts)


def markdown(text: str) -> str:
    """Turn docstring text into Markdown: inline code, and links to papers."""
    text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def attributes(cls: type) -> dict[str, str]:
    """What the ``Attributes:`` section of a class docstring says: name -> text in one line."""
    found = re.search(r"^Attributes:\n((?: {4}.*\n?|\n)+)", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE)
    if found is None:
        return {}
    _, *pairs = _ENTRY.split(found[1])
    return {name: " ".join(text.split()) for name, text in zip(pairs[::2], pairs[1::2], strict=True)}


# ---- inside ---------------------------------------------------------------------------------------------------------


def _overview_row(entry: StrategyEntry) -> list[str]:
    tables, full = entry.tables_class, sum(spec.full_bytes for spec in REFERENCE)
    smallest, at_ten = smallest_bytes(REFERENCE, entry.config_class()), _planned(entry, "10%") or _planned(entry, None)
    return [
        f"[`{entry.name}`]({entry.name}.md)",
        markdown(_description(tables).split("\n\n")[0].replace("\n", " ")),
        tables.knob,
        "yes" if tables.knob_is_fine else "no",
        row_formats(entry.name),
        "yes" if tables.takes_any_id else "no",
        f"{format_bytes(smallest)} ({_percent(smallest, full)})",
        "" if at_ten is None else str(rows_read(at_ten)),
        _papers(entry) or "none",
    ]


def _figures(entry: StrategyEntry) -> str:
    full = sum(spec.full_bytes for spec in REFERENCE)
    rows = []
    for budget in BUDGETS:
        planned = _planned(entry, budget)
        if planned is None:
            rows.append([budget, "too small", "", "", ""])
            continue
        serve = planned.report.serve_bytes
        train = [format_bytes(planned.report.train_bytes(name)) for name in ("adam", "rowwise_adagrad")]
        rows.append([budget, f"{format_bytes(serve)} ({_percent(serve, full)})", *train, str(rows_read(planned))])
    smallest = smallest_bytes(REFERENCE, entry.config_class())
    head = ("budget", "to serve", "to train with Adam", "with row-wise Adagrad", "rows read per id")
    return _join(_table(head, rows), f"Smallest budget: {format_bytes(smallest)}, {_percent(smallest, full)}.")


@cache
def _planned(entry: StrategyEntry, budget: str | None) -> Plan | None:
    """The plan for the reference tables, with the smallest budget if None; None where it can't be met."""
    try:
        return plan(REFERENCE, entry.config_class(), budget or f"{smallest_bytes(REFERENCE, entry.config_class())}B")
    except BudgetError:
        return None


def _split_fields(config_class: type[StrategyConfig]) -> tuple[dict[str, str], dict[str, str]]:
    """Texts of a config's own options, and of those that all configs have."""
    common = attributes(StrategyConfig)
    between = [parent for parent in config_class.__mro__ if issubclass(parent, StrategyConfig)]
    own = {
        name: text
        for parent in reversed(between)
        if parent is not StrategyConfig
        for name, text in attributes(parent).items()
    }
    names = [field.name for field in dataclasses.fields(config_class)]
    missing = [name for name in names if name not in common and name not in own]
    if missing:
        raise ConfigError(f"{config_class.__name__}: its docstring says nothing of {', '.join(missing)}")
    return {name: own[name] for name in names if name in own}, {k: v for k, v in common.items() if k not in own}


def _options(texts: dict[str, str], config: StrategyConfig) -> str:
    types = {field.name: str(field.type) for field in dataclasses.fields(config)}
    rows = [[f"`{name}`", f"`{types[name]}`", f"`{getattr(config, name)!r}`", markdown(texts[name])] for name in texts]
    return _table(("option", "type", "default", "meaning"), rows)


def _description(cls: type) -> str:
    """A class docstring up to its first section."""
    return _SECTION.split(inspect.cleandoc(cls.__doc__ or ""), maxsplit=1)[0].strip()


def _papers(entry: StrategyEntry) -> str:
    numbers = dict.fromkeys(_ARXIV.findall(_description(entry.tables_class)))
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in numbers)


def _sources(entry: StrategyEntry) -> str:
    module = entry.tables_class.__module__
    if not module.startswith("embcomp."):
        return f"Code: `{module}`."
    files = (
        f"{module.replace('.', '/')}.py",
        f"configs/strategy/{entry.name}.yaml",
        f"tests/strategies/test_{entry.name}.py",
    )
    return "Code: " + ", ".join(f"[{file}](../../{file})" for file in files) + "."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return "under 0.001 %" if share < 0.001 else f"{share:.3g} %"


def _join(*blocks: str) -> str:
    return "\n\n".join(block.strip() for block in blocks if block.strip()) + "\n"


if __name__ == "__main__":
    main()
