"""Several candidates of a search in one lookup: a part of the strategies that search for their form."""

from __future__ import annotations

import torch
from torch import Tensor

from embcomp.errors import InputError


def first_block(ids: Tensor, table: Tensor | int | None, number: int) -> tuple[Tensor, Tensor | int | None]:
    """The first of ``number`` copies that ids ``(P·B, …)`` are made of, and the tables that belong to it.

    Raises:
        InputError: if there are not as many copies.
    """
    if number == 1:
        return ids, table
    size = ids.shape[0] // number if ids.dim() else 0
    if not ids.dim() or ids.shape[0] % number or bool((ids.unflatten(0, (number, size)) != ids[:size]).any()):
        raise InputError(
            f"{number} candidates are shown: ids of shape {tuple(ids.shape)} are not as many copies of the same ones; "
            f"look {number} copies of a batch up, or, in a model that looks up whole tables too, leave evaluate_many "
            "out of search_"
        )
    if isinstance(table, Tensor) and table.dim() == ids.dim() and len(table) == len(ids):
        table = table[:size]
    return ids[:size], table


def owners(ids: Tensor, table: Tensor | int | None, num_tables: int) -> Tensor:
    """The table of each id: int64 like ``ids``."""
    if table is None:
        return torch.arange(num_tables, device=ids.device).expand(ids.shape)
    return torch.as_tensor(table, device=ids.device).expand(ids.shape)
