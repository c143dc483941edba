"""What tables cost in bytes: to serve, and to train with a named optimizer. No byte hides: every part is listed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from embcomp.errors import ConfigError, did_you_mean

SHARED = "*"
"""The table name under which parts stand that all tables of a group share."""

OPTIMIZER_STATE = {
    "sgd": lambda values, rows: 0,
    "momentum": lambda values, rows: 4 * values,
    "adagrad": lambda values, rows: 4 * values,
    "rowwise_adagrad": lambda values, rows: 4 * rows,
    "adam": lambda values, rows: 8 * values,
}
"""Optimizer name -> bytes of its state, given the number of parameter values and the number of rows they lie in."""


@dataclass(frozen=True)
class MemoryPart:
    """One thing that takes memory.

    Attributes:
        table: the table it belongs to, or `SHARED`.
        name: what it is: ``rows``, ``projection``, ``remap``, …
        serve_bytes: bytes in the serving form, equal to those in the saved file.
        train_values: number of trained values.
        train_rows: number of rows that they lie in.
        train_bytes: bytes of the trained parameters and of buffers kept while training.
        sparse: whether gradients are row-sparse, so that they cost bytes per batch, not per row.
    """

    table: str
    name: str
    serve_bytes: int
    train_values: int
    train_rows: int
    train_bytes: int
    sparse: bool = False


@dataclass(frozen=True)
class MemoryReport:
    """The bytes of a group of tables, part by part.

    Attributes:
        parts: every part.
        full_bytes: what the same tables take as plain float32 rows.
    """

    parts: tuple[MemoryPart, ...]
    full_bytes: int

    @property
    def serve_bytes(self) -> int:
        """Bytes of the serving form."""
        return sum(part.serve_bytes for part in self.parts)

    @property
    def ratio(self) -> float:
        """Serve bytes as a share of the float32 tables' bytes."""
        return self.serve_bytes / max(self.full_bytes, 1)

    def train_bytes(self, optimizer: str = "adam") -> int:
        """Bytes while training: parameters, dense gradients, and the state of ``optimizer``.

        Row-sparse gradients are not counted: they take bytes per id of the batch.

        Raises:
            ConfigError: if the optimizer is not one of `OPTIMIZER_STATE`.
        """
        if optimizer not in OPTIMIZER_STATE:
            raise ConfigError(f"optimizer {optimizer!r} is unknown; {did_you_mean(optimizer, OPTIMIZER_STATE)}")
        state = OPTIMIZER_STATE[optimizer]
        return sum(
            part.train_bytes
            + (0 if part.sparse else 4 * part.train_values)
            + (state(part.train_values, part.train_rows) if part.train_values else 0)
            for part in self.parts
        )

    def by_table(self) -> dict[str, int]:
        """Serve bytes of each table; parts shared by all stand under `SHARED`."""
        totals: dict[str, int] = {}
        for part in self.parts:
            totals[part.table] = totals.get(part.table, 0) + part.serve_bytes
        return totals

    def to_rows(self) -> list[dict[str, str | int]]:
        """One dict per part, ready for ``pandas.DataFrame``."""
        return [
            {"table": p.table, "part": p.name, "serve_bytes": p.serve_bytes, "train_bytes": p.train_bytes}
            for p in self.parts
        ]

    def __add__(self, other: MemoryReport) -> MemoryReport:
        return MemoryReport(self.parts + other.parts, self.full_bytes + other.full_bytes)

    def __str__(self) -> str:
        lines = [f"{'table':<24}{'part':<16}{'serve':>14}{'train':>14}"]
        for part in self.parts:
            lines.append(
                f"{_short(part.table, 23):<24}{part.name:<16}"
                f"{format_bytes(part.serve_bytes):>14}{format_bytes(part.train_bytes):>14}"
            )
        lines.append(
            f"serve {format_bytes(self.serve_bytes)} = {self.ratio:.2%} of {format_bytes(self.full_bytes)} as float32; "
            f"train with Adam {format_bytes(self.train_bytes('adam'))}"
        )
        return "\n".join(lines)


def sum_reports(reports: Iterable[MemoryReport]) -> MemoryReport:
    """Join the reports of several groups."""
    total = MemoryReport((), 0)
    for report in reports:
        total = total + report
    return total


def format_bytes(count: float) -> str:
    """Write a number of bytes for people: ``"1.50 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
