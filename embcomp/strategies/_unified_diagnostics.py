"""What happens in the pool of ``unified``: who collides with whom, how rows are used, how readers tell them apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embcomp.errors import InputError
from embcomp.hashing import hash_ids
from embcomp.tables import CHUNK

if TYPE_CHECKING:
    from embcomp.strategies.unified import UnifiedTables


@dataclass(frozen=True)
class CollisionRates:
    """Shares in [0, 1].

    Attributes:
        same_table: lookups whose row another lookup of the same table uses too: harmful, as no reader tells them apart.
        cross_table: lookups whose row another table uses too: what the next layer can tell apart.
        any_table: lookups whose row is not their own.
        twins: ids that share every row with another id of the same table.
    """

    same_table: float
    cross_table: float
    any_table: float
    twins: float


@dataclass(frozen=True)
class UnifiedDiagnostics:
    """The state of a pool.

    Attributes:
        overall: rates over all ids of all tables.
        overall_weighted: the same, weighted by counts; equal to ``overall`` where no counts were given.
        by_table: table name -> rates over its ids.
        by_table_weighted: table name -> rates weighted by counts.
        occupancy: int64; element k is the number of pool rows that exactly k lookups use.
        mean_row_norm: mean Euclidean norm of the pool's rows; it grows with collisions under log loss. NaN where no
            table is hashed.
    """

    overall: CollisionRates
    overall_weighted: CollisionRates
    by_table: dict[str, CollisionRates]
    by_table_weighted: dict[str, CollisionRates]
    occupancy: Tensor
    mean_row_norm: float


@torch.no_grad()
def diagnose(tables: UnifiedTables, counts: Mapping[str, Tensor]) -> UnifiedDiagnostics:
    """Measure the pool over all ids of all tables; `UnifiedTables.diagnostics` is the public way in."""
    everyone = _uses(tables, 0)
    for index in range(1, tables.num_tables):
        everyone += _uses(tables, index)
    plain, weighted = [], []
    for index, (name, num_ids) in enumerate(zip(tables.names, tables.num_ids, strict=True)):
        flags = _flags(tables, index, everyone)
        count = counts.get(name, torch.ones(num_ids)).to(flags.device, torch.float64)
        count = torch.cat([count, count.new_zeros(num_ids - len(count))])
        plain.append(torch.cat([flags.sum(1), flags.new_tensor([num_ids])]))
        weighted.append(torch.cat([flags @ count, count.sum()[None]]))
    pool = everyone[: tables.config.pool_rows or 0]
    return UnifiedDiagnostics(
        _rates(torch.stack(plain).sum(0)),
        _rates(torch.stack(weighted).sum(0)),
        dict(zip(tables.names, map(_rates, plain), strict=True)),
        dict(zip(tables.names, map(_rates, weighted), strict=True)),
        torch.bincount(pool),
        _mean_norm(tables, len(pool)),
    )


def first_layer_overlap(weight: Tensor, readers: Tensor) -> Tensor:
    """Overlap of a first layer's blocks; `UnifiedTables.first_layer_overlap` is the public way in.

    What table s leaves in a shared row lies in the row space of its block A_s, and table t reads it through A_t, so
    ``A_t A_sᵀ`` is what one sees of the other; models learn to make it small (arXiv 2305.12102).

    Raises:
        InputError: if the weight does not have D columns for every table.
    """
    if weight.dim() != 2 or weight.shape[1] != readers.numel():
        raise InputError(
            f"a first layer's weight of shape {tuple(weight.shape)} does not read {readers.shape[0]} tables of "
            f"{readers.shape[1]} values each: it needs {readers.numel()} columns"
        )
    blocks = weight.detach().double().unflatten(1, readers.shape).transpose(0, 1) * readers.double().unsqueeze(1)
    grams = (blocks.transpose(1, 2) @ blocks).flatten(1)  # ‖A_t A_sᵀ‖² = ⟨A_tᵀA_t, A_sᵀA_s⟩, without an (O, O) matrix
    norms = blocks.flatten(1).norm(dim=1)
    overlaps = (grams @ grams.T).clamp_min(0.0).sqrt()
    return (overlaps / (norms.unsqueeze(1) * norms).clamp_min(torch.finfo(torch.float64).tiny)).to(weight.dtype)


def _rows_of_all(tables: UnifiedTables, index: int) -> Iterator[Tensor]:
    """Rows that a table's ids use, chunk by chunk, ``(≤ CHUNK, L_t)``."""
    for ids in torch.arange(tables.num_ids[index], device=tables._sizes.device).split(CHUNK):
        yield tables.rows_of(ids, index)[:, : tables.num_lookups[index]]


def _uses(tables: UnifiedTables, index: int) -> Tensor:
    total = torch.zeros(tables.rows.num_rows, dtype=torch.int64, device=tables._sizes.device)
    for rows in _rows_of_all(tables, index):
        flat = rows.flatten()
        total.index_add_(0, flat, torch.ones_like(flat))
    return total


def _flags(tables: UnifiedTables, index: int, everyone: Tensor) -> Tensor:
    """Rates of each id of a table, in the order of `CollisionRates`: float64 ``(4, V)``."""
    own = _uses(tables, index)
    shares, keys = [], []
    for rows in _rows_of_all(tables, index):
        same, cross = own[rows] > 1, everyone[rows] > own[rows]
        shares.append(torch.stack([flag.double().mean(1) for flag in (same, cross, same | cross)]))
        key = rows[:, 0]
        for lookup in range(1, rows.shape[1]):
            key = hash_ids(key, 0) ^ rows[:, lookup]  # 64 bits stand for all rows of an id
        keys.append(key)
    _, position, times = torch.unique(torch.cat(keys), return_inverse=True, return_counts=True)
    return torch.cat([torch.cat(shares, 1), (times[position] > 1).double().unsqueeze(0)])


def _rates(sums: Tensor) -> CollisionRates:
    *totals, mass = sums.tolist()
    return CollisionRates(*(total / mass if mass else 0.0 for total in totals))


def _mean_norm(tables: UnifiedTables, num_rows: int) -> float:
    total = 0.0
    for rows in torch.arange(num_rows, device=tables._sizes.device).split(CHUNK):
        total += float(tables.rows(rows, 0).norm(dim=1).sum())
    return total / num_rows if num_rows else float("nan")
