"""Ids on their way into a group of tables: their checks, and what becomes of those that a table does not have.

Shapes: ``T`` tables of the group, ``V`` ids of a table, ``...`` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from embcomp.config import StrategyConfig
from embcomp.errors import InputError, UnseenIdError, did_you_mean
from embcomp.hashing import check_range, hash_seed, hash_to_range
from embcomp.hooks import TableHooks
from embcomp.specs import TableSpec, as_int, check_group


class IncomingIds(TableHooks):
    """The part of `embcomp.EmbeddingTables` that ids pass before a strategy sees them.

    Args:
        specs: the tables; all of one ``embedding_dim``, with different names.
        config: the strategy's config, whose ``unseen`` says what ids outside ``[0, V)`` are.

    Raises:
        SpecError: if the specs do not make a group.
    """

    takes_any_id: ClassVar[bool] = False
    """Whether `lookup` takes every int64 id, so that ``unseen="hash"`` needs no detour."""

    _sizes: Tensor
    _pads: Tensor
    _unseen_seeds: Tensor

    def __init__(self, specs: Sequence[TableSpec], config: StrategyConfig) -> None:
        super().__init__()
        self.specs = check_group(specs)
        self.config: Any = config
        self.num_tables = len(self.specs)
        self.names = tuple(spec.name for spec in self.specs)
        oov = 1 if config.unseen == "oov_row" else 0
        self.num_ids = tuple(spec.num_embeddings + oov for spec in self.specs)
        self._smallest = min(spec.num_embeddings for spec in self.specs)
        self._has_padding = any(spec.padding_idx is not None for spec in self.specs)
        self.constant("_sizes", [spec.num_embeddings for spec in self.specs])
        self.constant("_pads", [-1 if spec.padding_idx is None else spec.padding_idx for spec in self.specs])
        self.constant("_unseen_seeds", [hash_seed(config.seed, name, "unseen") for name in self.names])
        if config.unseen == "hash" and not self.takes_any_id:
            for spec in self.specs:
                check_range(spec.name, spec.num_embeddings)

    def index_of(self, table: int | str) -> int:
        """The index of a table given by name or index.

        Raises:
            InputError: if there is no such table.
        """
        if isinstance(table, str):
            if table not in self.names:
                raise InputError(f"no table {table!r} in this group; {did_you_mean(table, self.names)}")
            return self.names.index(table)
        index = as_int(table)
        if index is None:
            raise InputError(f"table={table!r} is neither an index, nor a name, nor an int64 tensor")
        if not 0 <= index < self.num_tables:
            raise InputError(f"table {index} is outside [0, {self.num_tables}); tables: {', '.join(self.names)}")
        return index

    def pick(self, constants: Tensor, table: Tensor | int | None) -> Tensor:
        """Per-table constants ``(T, ...)`` for the tables of a lookup; None stands for all of them, in order."""
        return constants if table is None else constants[table]

    def constant(self, name: str, values: Sequence[int] | Sequence[float] | Tensor) -> None:
        """Register a small per-table constant that is derived from the config: on every device, in no file."""
        tensor = values if isinstance(values, Tensor) else torch.tensor(values, device="cpu")
        self.register_buffer(name, tensor, persistent=False)

    def _checked(self, ids: Tensor, table: Tensor | int | str | None) -> tuple[Tensor, Tensor | int | None]:
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise InputError(f"ids of tables {self._some_names()} must be an int64 tensor, not {got}: call ids.long()")
        if ids.device != self._sizes.device:
            raise InputError(
                f"ids are on {ids.device}, tables {self._some_names()} on {self._sizes.device}: move one of them"
            )
        ids = ids.long()
        if isinstance(table, Tensor):
            self._check_numbers(table, ids)
            if table.dim() == 0 and ids.dim():
                table = table.reshape(1)  # compilers take an index of shape () for a number, which they can't know
            return ids, table.long()
        if table is not None:
            return ids, self.index_of(table)
        if self.num_tables == 1:
            return ids, 0
        if ids.dim() == 0 or ids.shape[-1] != self.num_tables:
            raise InputError(
                f"ids of shape {tuple(ids.shape)} without table= need one column for each of the {self.num_tables} "
                f"tables {self._some_names()}; say table= for ids of one table"
            )
        return ids, None

    def _check_numbers(self, table: Tensor, ids: Tensor) -> None:
        """Check which table each id is of; that there is such a one on the CPU alone, as it would stall a GPU."""
        if table.dtype not in (torch.int64, torch.int32):
            raise InputError(f"table must be an int64 tensor, not {table.dtype}")
        if table.device != ids.device:
            raise InputError(f"table is on {table.device}, ids are on {ids.device}: move one of them")
        if not _broadcasts_to(table.shape, ids.shape):
            raise InputError(
                f"table of shape {tuple(table.shape)} does not broadcast to ids of shape {tuple(ids.shape)}"
            )
        has_values = type(table) is Tensor and not torch.compiler.is_compiling()  # in somebody's trace there are none
        if has_values and table.device.type == "cpu" and table.numel():
            low, high = torch.aminmax(table)
            if low < 0 or high >= self.num_tables:
                raise InputError(
                    f"table has {int(low if low < 0 else high)}, outside [0, {self.num_tables}); tables: "
                    f"{self._some_names()}"
                )

    def _apply_unseen(self, ids: Tensor, table: Tensor | int | None) -> tuple[Tensor, Tensor | None]:
        """Bring ids into range by the policy; also say which vectors must be zero (None: no vector)."""
        policy = self.config.unseen
        blank = None
        if policy == "error":
            self._raise_if_unseen(ids, table)
        elif not (policy == "hash" and self.takes_any_id):
            sizes = self.pick(self._sizes, table)
            unseen = (ids < 0) | (ids >= sizes)
            if policy == "zero":
                ids, blank = ids.masked_fill(unseen, 0), unseen
            elif policy == "oov_row":
                ids = torch.where(unseen, sizes, ids)
            else:
                ids = torch.where(unseen, hash_to_range(ids, self.pick(self._unseen_seeds, table), sizes), ids)
        if self._has_padding:
            padding = self._is_padding(ids, table)
            if policy == "hash" and not self.takes_any_id:
                padding = padding & ~unseen
            blank = padding if blank is None else blank | padding
        return ids, blank

    def _raise_if_unseen(self, ids: Tensor, table: Tensor | int | None) -> None:
        if ids.is_meta or ids.numel() == 0:
            return
        if torch.compiler.is_compiling():
            sizes = self.pick(self._sizes, table)
            inside = ((ids >= 0) & (ids < sizes)).all()
            torch._assert_async(inside, f"an id is outside its table (tables {self._some_names()}, unseen='error')")
            return
        low, high = torch.aminmax(ids)
        if low >= 0 and high < self._smallest:
            return
        sizes = self.pick(self._sizes, table)
        if low >= 0 and (ids - sizes).max() < 0:
            return
        ids, sizes = torch.broadcast_tensors(ids, sizes)
        where = ((ids < 0) | (ids >= sizes)).nonzero()[0].tolist()
        index = tuple(where)
        owner = table if table is not None else torch.arange(self.num_tables, device=ids.device)
        owner = int(torch.broadcast_to(torch.as_tensor(owner, device=ids.device), ids.shape)[index])
        raise UnseenIdError(
            f"id {int(ids[index])} at position {where} is outside table {self.names[owner]!r}, which has ids in "
            f"[0, {int(sizes[index])}); fix the ids, or set unseen='zero', 'oov_row' or 'hash' in the config"
        )

    def _bag_padding(self, ids: Tensor, table: Tensor | int | str | None) -> Tensor | None:
        if not self._has_padding:
            return None
        return self._is_padding(*self._checked(ids, table))

    def _is_padding(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        pads = self.pick(self._pads, table)
        return (ids == pads) & (pads >= 0)  # -1 says that a table has no padding, and is an unseen id as well


def _broadcasts_to(shape: Sequence[int], target: Sequence[int]) -> bool:
    ends = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (wanted, 1) for size, wanted in ends)
