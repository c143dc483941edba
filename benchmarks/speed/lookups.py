"""Lookups: one id per table, no gradients, against one stacked table and FBGEMM's quantized rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed import fbgemm
from benchmarks.speed.contest import NOT_INSTALLED, Contestant, Row, Versus, rows_of, take_turns
from benchmarks.speed.setting import Setting
from embcomp import EmbeddingTables, build_tables, make_config
from embcomp.storage import RowFormat, stored_bytes

STACKED = "F.embedding, one stacked table"
SLACK = {"full": 1.1, "hash": 1.5, "int8": 1.0, "int4": 1.3, "FBGEMM": 0.5}
"""Largest ratios wanted: of strategies and integer rows to one stacked table, of integer rows to FBGEMM's."""
FORMATS = ("int8:row", "int8:column", "int4:row", "int4:column")
_INDEX_BYTES = 8


def measure_lookups(setting: Setting) -> Iterator[Row]:
    """Measure all lookups, for every dimension and order of ids."""
    for dim in setting.dims:
        for order in setting.orders:
            yield from _contest(setting, dim, order)


@torch.no_grad()
def _contest(setting: Setting, dim: int, order: str) -> list[Row]:
    batches = setting.draw(order)
    full = build_tables(setting.specs(dim), "full").finalize_()
    contestants = [
        *_stacked(setting, full, batches),
        _ours("full", full, batches, SLACK["full"]),
        *_hashed(setting, dim, batches),
        *_integer_rows(setting, dim, batches),
        *_fbgemm(setting, dim, batches),
    ]
    seconds = take_turns(contestants, setting.rounds)
    return rows_of("lookup", f"D={dim}, ids {order}", contestants, seconds, per_second=1e9 / setting.ids_per_batch)


def _stacked(setting: Setting, full: EmbeddingTables, batches: Sequence[Tensor]) -> list[Contestant]:
    weight = next(full.parameters())
    rows = [setting.stacked(ids) for ids in batches]
    tables = weight.split(setting.rows)

    def one_by_one(turn: int) -> Tensor:
        columns = batches[turn % len(batches)].unbind(1)
        return torch.stack([F.embedding(ids, table) for ids, table in zip(columns, tables, strict=True)], dim=1)

    size = _moved(full.embedding_dim)
    return [
        Contestant(STACKED, lambda turn: F.embedding(rows[turn % len(rows)], weight), bytes_per_id=size),
        Contestant("F.embedding per table, stacked", one_by_one, (Versus((STACKED,)),), size),
    ]


def _ours(
    name: str, tables: EmbeddingTables, batches: Sequence[Tensor], limit: float | None, size: float | None = None
) -> Contestant:
    size = _moved(tables.embedding_dim) if size is None else size
    return Contestant(name, _looking_up(tables, batches), (Versus((STACKED,), limit),), size)


def _hashed(setting: Setting, dim: int, batches: Sequence[Tensor]) -> list[Contestant]:
    specs = setting.specs(dim)
    wanted = {
        "hash, 10 %": (make_config("hash"), SLACK["hash"]),
        "unified, 10 %, one lookup": (make_config("unified", lookups=1), SLACK["hash"]),
        "unified, 10 %, lookups by its rule": (make_config("unified"), None),
    }
    return [
        _ours(name, build_tables(specs, config, "10%").finalize_(), batches, limit)
        for name, (config, limit) in wanted.items()
    ]


def _integer_rows(setting: Setting, dim: int, batches: Sequence[Tensor]) -> Iterator[Contestant]:
    for rows in FORMATS:
        kind = rows.partition(":")[0]
        is_default = str(RowFormat.parse(kind).resolve(dim)) == rows
        # Scales per column are only judged where they are what one gets without asking.
        judged = is_default or rows.endswith(":row")
        versus = (
            Versus((STACKED,), SLACK[kind] if judged else None),
            Versus(("full",)),
            Versus((_fbgemm_name(kind),), SLACK["FBGEMM"] if judged else None),
        )
        tables = build_tables(setting.specs(dim), make_config("full", rows=rows)).finalize_()
        name = f"full, rows={rows}" + " (the default)" * is_default
        size = _INDEX_BYTES + stored_bytes(setting.rows, dim, rows) / setting.rows + 4 * dim
        yield Contestant(name, _looking_up(tables, batches), versus, size)


def _fbgemm(setting: Setting, dim: int, batches: Sequence[Tensor]) -> Iterator[Contestant]:
    for kind, bits in (("int8", 8), ("int4", 4)):
        run = fbgemm.lookup(setting, dim, kind.upper(), batches)
        size = _INDEX_BYTES + dim * bits / 8 + 4 + 4 * dim  # two float16 per row
        yield Contestant(_fbgemm_name(kind), run, (Versus((STACKED,)),), size, "" if run else NOT_INSTALLED)


def _looking_up(tables: EmbeddingTables, batches: Sequence[Tensor]) -> Callable[[int], object]:
    return lambda turn: tables(batches[turn % len(batches)])


def _moved(dim: int) -> float:
    """Bytes of an id, of its float32 row and of its vector."""
    return _INDEX_BYTES + 4 * dim + 4 * dim


def _fbgemm_name(kind: str) -> str:
    return f"FBGEMM IntNBit, {kind}"
