"""What the commands find out, as JSON values, and the same as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from embcomp._checkpoint import CONFIG, get, read_checkpoint
from embcomp._restore import saved_groups
from embcomp.budget import Plan
from embcomp.cli.sources import read_specs
from embcomp.cli.weights import matrices
from embcomp.config import config_to_dict, get_strategy, list_strategies, make_config
from embcomp.errors import BudgetError, SpecError
from embcomp.facts import can_be_sharded, can_grow, row_formats, rows_read, serves_own_rows
from embcomp.memory import format_bytes, sum_reports
from embcomp.planning import plan_groups
from embcomp.reporting import format_rows, table_rows
from embcomp.sites import find_groups
from embcomp.specs import TableSpec

Found = dict[str, Any]
OPTIMIZERS = ("adam", "rowwise_adagrad")
_COLUMNS = """\
finely: any budget is met to within a row or so. rows=: formats of stored rows. any id: ids need no vocabulary.
front: one training gives all sizes (pareto). sharded: in several processes (distribute). streamed: embcomp compress
takes tables larger than memory. grows: resize_ keeps what was trained. fbgemm: exported to FBGEMM's kernels; to pt2,
aoti and onnx all are."""
_OF_PLANS = ("serve_bytes", "rows_read", "train_bytes", "bytes_per_rank")


def strategies() -> Found:
    """What every strategy can do."""
    rows = []
    for name in list_strategies():
        tables = get_strategy(name).tables_class
        rows.append(
            {
                "strategy": name,
                "budget_turns": tables.knob,
                "finely": tables.knob_is_fine,
                "rows": row_formats(name),
                "any_id": tables.takes_any_id,
                "front": "pareto" in vars(tables),
                "sharded": can_be_sharded(name),
                "streamed": tables.can_be_streamed,
                "grows": can_grow(name),
                "fbgemm": serves_own_rows(name),
            }
        )
    return {"strategies": rows}


def strategies_text(found: Found) -> str:
    """Of `strategies`."""
    head = ["strategy", "the budget turns", "finely", "rows=", "any id", *list(found["strategies"][0])[5:]]
    lines = [[text if isinstance(text, str) else _yes(text) for text in row.values()] for row in found["strategies"]]
    return f"{_aligned([head, *lines])}\n\n{_COLUMNS}"


def plan_tables(
    source: Path,
    budgets: Sequence[str],
    names: Sequence[str],
    dim: int | None,
    processes: int | None = None,
    patterns: Sequence[str] = (),
) -> Found:
    """Plan the tables of a file with several strategies side by side; nothing is allocated.

    Args:
        source: see `embcomp.cli.sources`.
        budgets: asked for.
        names: of strategies; none for all.
        dim: D of tables of which the file does not say it.
        processes: that the rows are to be trained in; None where they are not sharded.
        patterns: which matrices of a file of weights are tables.
    """
    specs = read_specs(source, dim, patterns)
    groups: dict[int, list[TableSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.embedding_dim, []).append(spec)
    rows = [_planned(name, list(groups.values()), budgets, processes) for name in names or list_strategies()]
    return {
        "source": str(source),
        "tables": [
            {"table": spec.name, "num_embeddings": spec.num_embeddings, "embedding_dim": spec.embedding_dim}
            for spec in specs
        ],
        "float32_bytes": sum(spec.full_bytes for spec in specs),
        "processes": processes,
        "strategies": rows,
    }


def plan_text(found: Found) -> str:
    """Of `plan_tables`."""
    full = found["float32_bytes"]
    head = ["strategy", "smallest", "budget", "to serve", "of float32", "rows read", "train: Adam", "row-wise Adagrad"]
    if found["processes"] is not None:
        head.append(f"weights in each of {found['processes']}")
    lines: list[Sequence[str]] = [head]
    for row in found["strategies"]:
        for number, own in enumerate(row["budgets"]):
            names = (row["strategy"], format_bytes(row["smallest_bytes"])) if number == 0 else ("", "")
            if own["serve_bytes"] is None:
                lines.append([*names, own["budget"], "too small", *[""] * (len(head) - 4)])
                continue
            train = [format_bytes(own["train_bytes"][name]) for name in OPTIMIZERS]
            share = f"{own['serve_bytes'] / full:.2%}"
            read = "/".join(map(str, own["rows_read"]))
            ranks = [] if found["processes"] is None else [_span(own["bytes_per_rank"])]
            lines.append([*names, own["budget"], format_bytes(own["serve_bytes"]), share, read, *train, *ranks])
    number = len(found["tables"])
    return f"{number} tables of {found['source']}, {format_bytes(full)} as float32\n\n{_aligned(lines)}"


def inspect(path: Path) -> Found:
    """Say what is in a checkpoint, whose weights are read and checked, or in a file of weights."""
    if path.is_file():
        found = {name: {"rows": rows, "dim": dim} for name, (rows, dim) in matrices(path).items()}
        return {
            "path": str(path),
            "matrices": found,
            "float32_bytes": sum(4 * m["rows"] * m["dim"] for m in found.values()),
        }
    if not (path / CONFIG).is_file():
        what = f"has no {CONFIG}, so it is no checkpoint" if path.exists() else "does not exist"
        raise SpecError(f"{path} {what}: give a folder that save_pretrained has written, or a file of weights")
    checkpoint = read_checkpoint(path)
    saved = saved_groups(checkpoint)
    groups = [group.empty for group in saved]
    report = sum_reports(group.memory() for group in groups)
    own = {name for name in checkpoint.tensors if any(group.owns(name) for group in saved)}
    return {
        "path": str(path),
        "embcomp_version": get(checkpoint.content, "embcomp_version", str, checkpoint.config_file),
        "format_version": get(checkpoint.content, "format_version", int, checkpoint.config_file),
        "form": "serving" if all(group.is_final for group in groups) else "training",
        "serve_bytes": report.serve_bytes,
        "float32_bytes": report.full_bytes,
        "configs": [_told(config_to_dict(group.config)) for group in groups],
        "tables": table_rows(groups),
        "other_tensors": len(checkpoint.tensors) - len(own),
        "other_bytes": sum(tensor.nbytes for name, tensor in checkpoint.tensors.items() if name not in own),
        "training_bytes": sum(tensor.nbytes for tensor in checkpoint.training_tensors.values()),
    }


def inspect_text(found: Found) -> str:
    """Of `inspect`."""
    if "matrices" in found:
        rows = [(name, f"{m['rows']:,}", str(m["dim"])) for name, m in found["matrices"].items()]
        size = format_bytes(found["float32_bytes"])
        return (
            f"{found['path']}: {len(rows)} matrices, {size} as float32\n\n{_aligned([('name', 'rows', 'dim'), *rows])}"
        )
    full, serve = found["float32_bytes"], found["serve_bytes"]
    lines = [
        f"{found['path']}: written by embcomp {found['embcomp_version']}, format {found['format_version']}, in its "
        f"{found['form']} form; all bytes are as they were written",
        f"{format_bytes(full)} of tables, {format_bytes(serve)} to serve ({serve / full:.2%})",
        "",
        format_rows(found["tables"]),
        "",
        *(", ".join(f"{name}={value!r}" for name, value in config.items()) for config in found["configs"]),
    ]
    if found["other_tensors"]:
        lines.append(f"and {found['other_tensors']} other tensors, {format_bytes(found['other_bytes'])}")
    if found["training_bytes"]:
        lines.append(f"and state of training, {format_bytes(found['training_bytes'])}")
    return "\n".join(lines)


# ---- inside ---------------------------------------------------------------------------------------------------------


def _planned(name: str, groups: Sequence[Sequence[TableSpec]], budgets: Sequence[str], processes: int | None) -> Found:
    config = make_config(name)
    wanted = [(specs, config) for specs in groups]
    try:
        smallest = sum(plan.report.serve_bytes for plan in plan_groups(wanted, "1B"))
    except BudgetError as error:
        if error.minimum_bytes is None:
            raise
        smallest = error.minimum_bytes
    found: list[Found] = []
    for budget in budgets:
        try:
            plans = plan_groups(wanted, budget)
            ranks = None if processes is None else _bytes_per_rank(plans, processes)
            found.append(_at_budget(budget, plans) | {"bytes_per_rank": ranks})
        except BudgetError as error:
            if error.minimum_bytes is None:
                raise
            found.append({"budget": budget} | dict.fromkeys(_OF_PLANS))
    return {"strategy": name, "smallest_bytes": smallest, "budgets": found}


def _at_budget(budget: str, plans: Sequence[Plan]) -> Found:
    reports = [plan.report for plan in plans]
    return {
        "budget": budget,
        "serve_bytes": sum(report.serve_bytes for report in reports),
        "rows_read": [rows_read(plan) for plan in plans],
        "train_bytes": {name: sum(report.train_bytes(name) for report in reports) for name in OPTIMIZERS},
    }


def _bytes_per_rank(plans: Sequence[Plan], processes: int) -> list[int] | None:
    """Bytes of weights in each process, by TorchRec's planner; None if rows of the strategy can't be sharded."""
    from embcomp.integrations.sharding import plan_sharding

    groups = nn.ModuleList(plan.build("meta") for plan in plans)
    if not all(tables.can_be_sharded for tables in find_groups(groups).values()):
        return None
    return plan_sharding(groups, processes).bytes_per_rank


def _span(ranks: Sequence[int] | None) -> str:
    """Of bytes per rank, the least and the most."""
    if ranks is None:
        return "can't be sharded"
    least, most = format_bytes(min(ranks)), format_bytes(max(ranks))
    return least if least == most else f"{least} to {most}"


def _told(config: Mapping[str, Any]) -> Found:
    """The strategy's name and what of its config is not the default."""
    name = str(config["strategy"])
    plain = config_to_dict(make_config(name))
    return {"strategy": name} | {key: value for key, value in config.items() if value != plain.get(key)}


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
