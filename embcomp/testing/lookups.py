"""Checks of what a lookup returns: shapes, tables, bags, seeds, ids, initial spread."""

from __future__ import annotations

import torch
from torch import Tensor

from embcomp.config import make_config
from embcomp.memory import format_bytes
from embcomp.storage import RowFormat
from embcomp.tables import EmbeddingTables
from embcomp.testing._cases import (
    Strategy,
    build,
    dims_of,
    every_id,
    every_vector,
    make_specs,
    planned,
    require,
    require_close,
    require_same,
    train_step,
)


def check_shapes(strategy: Strategy) -> None:
    """Ids of shape ``()``, ``(B,)``, ``(B, T)``, ``(B, L)``, ``(B, L, T)``, empty ones too, give float32 ``(…, D)``."""
    for dim in dims_of(strategy):
        tables = build(strategy, dim)
        of_one_table: list[tuple[tuple[int, ...], int | str]] = [
            ((), 0),
            ((5,), "flag"),
            ((5, 3), 2),
            ((0,), 1),
            ((5, 0), 3),
        ]
        for shape, table in of_one_table:
            _require_shape(tables, torch.zeros(shape, dtype=torch.long), table)
        by_columns: list[tuple[int, ...]] = [(4,), (5, 4), (5, 3, 4), (0, 4)]
        for shape in by_columns:
            _require_shape(tables, torch.ones(shape, dtype=torch.int32), None)


def _require_shape(tables: EmbeddingTables, ids: Tensor, table: int | str | None) -> None:
    vectors = tables(ids, table)
    what = f"ids {tuple(ids.shape)} {ids.dtype}, table={table!r}, D={tables.embedding_dim}"
    require(vectors.shape == (*ids.shape, tables.embedding_dim), f"{what}: vectors of shape {tuple(vectors.shape)}")
    require(vectors.dtype == torch.float32, f"{what}: vectors are {vectors.dtype}, not float32")
    require(vectors.isfinite().all(), f"{what}: vectors are not finite")


def check_tiny_tables(strategy: Strategy) -> None:
    """One table alone, one id alone, a table of one id beside a large one: all can be planned, built and looked up."""
    for dim in {6, min(dims_of(strategy))}:
        for sizes in ({"one": 1}, {"few": 3}, {"user": 300}, {"one": 1, "user": 300}):
            tables = planned(strategy, make_specs(dim, sizes)).build()
            last = torch.tensor([spec.num_embeddings - 1 for spec in tables.specs])
            require(tables(last.expand(4, -1)).shape == (4, len(sizes), dim), f"tables {sizes}, D={dim}: wrong shape")
            require(len(sizes) > 1 or tables(last).shape == (1, dim), f"tables {sizes}: ids (B,) without table=")


def check_table_argument(strategy: Strategy) -> None:
    """A table given by index, by name, as a tensor, or by the columns of the ids: the same vectors."""
    tables = build(strategy)
    ids = every_id(tables)
    wanted, index = tables(ids), torch.arange(tables.num_tables)
    require_close(tables(ids, index), wanted, "table=arange(T) against table=None")
    require_close(tables(ids.flatten(), index.repeat(len(ids))), wanted.flatten(0, 1), "table of shape (N,)")
    require_close(tables(ids.T, index[:, None]), wanted.transpose(0, 1), "table of shape (T, 1)")
    for number, name in enumerate(tables.names):
        require_close(tables(ids[:, number], number), wanted[:, number], f"table={number}")
        require_close(tables(ids[:, number], name), wanted[:, number], f"table={name!r}")
        require_close(tables(ids[:, number], index[number]), wanted[:, number], f"table=tensor({number})")
        require_close(tables(ids[3, number], number), wanted[3, number], f"one id of shape (), table={number}")


def check_bags(strategy: Strategy) -> None:
    """Bags agree with a loop over bags: compose first, pool second; padding counts for nothing, empty bags are zero."""
    tables = build(strategy)
    generator = torch.Generator().manual_seed(0)
    offsets, bags = torch.tensor([0, 0, 3, 7, 7, 8]), [(0, 0), (0, 3), (3, 7), (7, 7), (7, 8), (8, 12)]
    weights = torch.rand(12, generator=generator)
    for name in ("user", "item"):
        ids = torch.randint(0, 50, (12,), generator=generator)
        ids[[4, 7]] = 0
        for mode in ("sum", "mean", "max"):
            wanted = torch.stack([_pool(tables, ids[a:b], name, mode) for a, b in bags])
            require_close(tables.bag(ids, offsets, name, mode=mode), wanted, f"bag {mode} of {name}")
            ended = torch.cat([offsets, torch.tensor([12])])
            got = tables.bag(ids, ended, name, mode=mode, include_last_offset=True)
            require_close(got, wanted, f"bag {mode} of {name} with include_last_offset")
            rows = torch.stack([_pool(tables, row, name, mode) for row in ids.view(3, 4)])
            require_close(tables.bag(ids.view(3, 4), None, name, mode=mode), rows, f"bag {mode} of {name}, ids (B, L)")
            single = torch.stack([_pool(tables, row, name, mode) for row in ids[:, None]])
            require_close(tables.bag(ids[:, None], None, name, mode=mode), single, f"bag {mode} of {name}, an id each")
        wanted = torch.stack([_pool(tables, ids[a:b], name, "sum", weights[a:b]) for a, b in bags])
        require_close(tables.bag(ids, offsets, name, weights), wanted, f"weighted bag of {name}")
        none = tables.bag(ids[:0], torch.zeros(3, dtype=torch.long), name)
        require_same(none, torch.zeros(3, 6), f"three empty bags of {name}")


def _pool(tables: EmbeddingTables, ids: Tensor, name: str, mode: str, weights: Tensor | None = None) -> Tensor:
    padding = tables.specs[tables.index_of(name)].padding_idx
    kept = [i for i in range(len(ids)) if int(ids[i]) != padding]
    vectors = [tables(ids[i], name) * (1.0 if weights is None else weights[i]) for i in kept]
    if not vectors:
        return torch.zeros(tables.embedding_dim)
    stacked = torch.stack(vectors)
    return {"sum": stacked.sum(0), "mean": stacked.mean(0), "max": stacked.amax(0)}[mode]


def check_whole_tables(strategy: Strategy) -> None:
    """`materialize` and `scores` agree with lookups."""
    tables = build(strategy)
    queries = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    for index, spec in enumerate(tables.specs):
        ids = torch.arange(spec.num_embeddings)
        dense = tables.materialize(spec.name)
        require_close(dense, tables(ids, index), f"materialize({spec.name!r})")
        require_close(tables.materialize(index, ids[1:2]), dense[1:2], f"materialize({index}, ids)")
        require_close(tables.scores(spec.name, queries), queries @ dense.T, f"scores({spec.name!r})", 1e-4)


def check_seeds(strategy: Strategy) -> None:
    """The same seed gives the same vectors, whatever the global generator did; another seed gives others."""
    torch.manual_seed(1)
    first = every_vector(build(strategy))
    torch.manual_seed(2)
    require_same(every_vector(build(strategy)), first, "two groups of one seed")
    other = every_vector(build(strategy, seed=make_config(strategy).seed + 1))
    require((other != first).any(), "another seed gives the same vectors")


def check_ids_differ(strategy: Strategy) -> None:
    """At the largest size ids keep vectors of their own, up to a hash's collisions, and tables do not alias.

    Vectors are counted after a training step, as some strategies start with equal ones.
    """
    if RowFormat.parse(make_config(strategy).rows).bits < 8:
        return
    tables = train_step(build(strategy, 16, share=1.0))
    for name, spec in zip(tables.names, tables.specs, strict=True):
        distinct = len(torch.unique(tables.materialize(name).detach(), dim=0))
        require(
            distinct >= 0.5 * spec.num_embeddings,
            f"table {name!r} at its largest size has {distinct} different vectors for {spec.num_embeddings} ids",
        )
    ones = tables(torch.ones(tables.num_tables, dtype=torch.long)).detach()
    require(len(torch.unique(ones, dim=0)) == tables.num_tables, "the same id in different tables has the same vector")


def check_initial_spread(strategy: Strategy) -> None:
    """Vectors that training begins with have mean 0 and the standard deviation of the specs.

    To 15 %, and 40 % below four bits.
    """
    deviation = 0.05
    specs = make_specs(16, {"user": 3000, "item": 1500}, padded=(), init_std=deviation)
    drawn = []
    for seed in range(4):
        tables = planned(strategy, specs, 0.5, seed=seed).build().eval()
        tables.enter_phase_(tables.phases()[0])
        drawn.append(torch.unique(every_vector(tables), dim=0))
    spread, mean = torch.cat(drawn).std().item(), torch.cat(drawn).mean().item()
    tolerance = 0.15 if RowFormat.parse(make_config(strategy).rows).bits >= 4 else 0.4
    found = f"initial vectors have mean {mean:.4f} and std {spread:.4f}, the specs say 0 and {deviation}"
    require(abs(spread / deviation - 1) < tolerance, found)
    require(abs(mean) < 0.15 * deviation, found)


def check_repr(strategy: Strategy) -> None:
    """The repr says how many bytes the tables take to serve."""
    tables = build(strategy)
    shown = format_bytes(tables.memory().serve_bytes)
    require(shown in repr(tables), f"repr does not show {shown!r}: {tables!r}")
    require(shown in repr(tables.finalize()), f"repr of the finalized form does not show {shown!r}")
