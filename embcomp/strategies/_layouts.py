"""Layouts: consecutive ranges of each table's ids, each with a width of its own, and what they take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from embcomp.errors import ConfigError
from embcomp.specs import TableSpec
from embcomp.storage.ragged import ragged_bytes
from embcomp.strategies._cut_rows import CutConfig, resolved_format
from embcomp.strategies._prefix_projection import fold

_PART = re.compile(r"(\d+)<(\d+)")


class Part(NamedTuple):
    """Ids of a table up to ``stop``, and the width of their rows."""

    stop: int
    width: int


def parse_layout(name: str, text: str) -> list[Part]:
    """Read ``"100<16 6040<4"``.

    Raises:
        ConfigError: if it can't be read.
    """
    matches = [_PART.fullmatch(word) for word in text.split()]
    parts = [Part(int(match[1]), int(match[2])) for match in matches if match]
    if not parts or None in matches or any(a.stop >= b.stop for a, b in pairwise(parts)):
        raise ConfigError(f"layout of table {name!r}: {text!r}: write 'stop<width', with rising stops")
    return parts


def layout_bytes(layout: Sequence[Sequence[Part]], specs: Sequence[TableSpec], config: CutConfig) -> int:
    """Serve bytes of a layout."""
    return sum(map(sum, table_bytes(layout, specs, config)))


def table_bytes(
    layout: Sequence[Sequence[Part]], specs: Sequence[TableSpec], config: CutConfig
) -> tuple[list[int], list[int]]:
    """Serve bytes of each table's rows, and of its matrix."""
    segments, _, owner = segments_of(layout)
    widths, matrices = served_form(layout, specs, config)
    dim = specs[0].embedding_dim
    sizes = ragged_bytes(segments, dim, resolved_format(specs, config), widths, owner)
    rows = [sum(s for s, own in zip(sizes, owner, strict=True) if own == table) for table in range(len(layout))]
    return rows, [4 * width * dim for width in matrices]


def served_form(
    layout: Sequence[Sequence[Part]], specs: Sequence[TableSpec], config: CutConfig
) -> tuple[list[int], list[int]]:
    """Widths of all parts as they are stored, and rows of each table's matrix."""
    segments, widths, owner = segments_of(layout)
    if not config.is_projected:
        return widths, [0] * len(layout)
    return fold(segments, widths, owner, specs[0].embedding_dim, resolved_format(specs, config))


def segments_of(layout: Sequence[Sequence[Part]]) -> tuple[list[int], list[int], list[int]]:
    """Rows, widths and tables of all parts, one behind another."""
    rows = [part.stop - first for own in layout for first, part in zip([0, *(p.stop for p in own)], own, strict=False)]
    widths = [part.width for own in layout for part in own]
    return rows, widths, [table for table, own in enumerate(layout) for _ in own]


def split_part(layout: list[list[Part]], table: int, tier: int, stop: int, width: int) -> list[list[Part]]:
    """The same layout, with a part's ids below ``stop`` at another width."""
    part = layout[table][tier]
    parts = [Part(stop, width), *([part] if stop < part.stop else [])]
    return [*layout[:table], [*layout[table][:tier], *parts, *layout[table][tier + 1 :]], *layout[table + 1 :]]


def oov_part(spec: TableSpec, config: CutConfig) -> list[Part]:
    """The row of unseen ids, which keeps its full width."""
    return [Part(spec.num_embeddings + 1, spec.embedding_dim)] if config.unseen == "oov_row" else []


def padded(rows: Sequence[Sequence[int]], length: int, value: int = 0) -> list[list[int]]:
    """Bring rows to one length."""
    return [[*row, *(value for _ in range(length - len(row)))] for row in rows]
