"""What is exported: a lookup in a group of tables, or a whole model, with example inputs.

Shapes: ``B`` batch, ``N`` ids, ``T`` tables of the group, ``D`` dimension.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from embcomp.config import strategy_of
from embcomp.errors import ExportError
from embcomp.memory import sum_reports
from embcomp.sites import find_groups
from embcomp.swap import Compression, groups_of
from embcomp.tables import EmbeddingTables

_EXAMPLES = 5
"""Ids of an example: neither none nor one, which exporters would take for constants."""
_POOLED = ("sum", "mean")
_Module = TypeVar("_Module", bound=nn.Module)


class Lookup(nn.Module):
    """Vectors of ids: those of one table, int64 ``(N,)`` to ``(N, D)``, or of all, ``(B, T)`` to ``(B, T, D)``."""

    def __init__(self, tables: EmbeddingTables, table: int | None) -> None:
        super().__init__()
        self.tables, self.table = tables, table

    def forward(self, ids: Tensor) -> Tensor:
        """Look up vectors."""
        vectors: Tensor = self.tables(ids, self.table)
        return vectors


class BagLookup(nn.Module):
    """Pooled vectors of bags of one table: ids int64 ``(N,)`` and offsets int64 ``(B,)`` to ``(B, D)``.

    As `EmbeddingTables.bag`, but in operations whose graphs hold for any N and B.
    """

    def __init__(self, tables: EmbeddingTables, table: int, mode: str) -> None:
        super().__init__()
        self.tables, self.table, self.mode = tables, table, mode
        self.padding_idx = tables.specs[table].padding_idx

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Look up and pool; offsets are where bags begin, the first at 0."""
        bounds = torch.cat([offsets, torch.full((1,), ids.shape[0], device=ids.device)])
        ordered = (bounds[0] == 0) & (bounds[1:] >= bounds[:-1]).all()
        torch._assert_async(ordered, "offsets must begin with 0, never fall, and end within the ids")
        vectors = self.tables(ids, self.table)
        starts = torch.zeros(ids.shape[0] + 1, dtype=torch.int64, device=ids.device)
        bag = starts.index_add(0, offsets, torch.ones_like(offsets)).cumsum(0)[:-1] - 1
        pooled = vectors.new_zeros(offsets.shape[0], self.tables.embedding_dim).index_add(0, bag, vectors)
        if self.mode == "sum":
            return pooled
        counted = torch.ones_like(ids) if self.padding_idx is None else (ids != self.padding_idx).long()
        number = torch.zeros_like(offsets).index_add(0, bag, counted)
        return pooled / number.clamp_min(1).unsqueeze(-1)


@dataclass(frozen=True)
class Subject:
    """What is exported, and how it is called.

    Attributes:
        module: that is called.
        example: its arguments.
        dynamic_shapes: which of their dimensions may change, as `torch.export.export` takes them.
        inputs: names, where they are known: of lookups.
        outputs: likewise.
    """

    module: nn.Module
    example: tuple[Any, ...]
    dynamic_shapes: Any
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def groups(self) -> list[EmbeddingTables]:
        """Groups of tables in the module."""
        return list(find_groups(self.module).values())

    @property
    def serve_bytes(self) -> int:
        """Of all groups."""
        return sum_reports(tables.memory() for tables in self.groups).serve_bytes

    @property
    def unseen(self) -> str:
        """The policies of all groups."""
        return ", ".join(dict.fromkeys(tables.config.unseen for tables in self.groups))

    @property
    def strategies(self) -> str:
        """Of all groups, for messages."""
        names = (f"{strategy_of(tables.config).name!r} (rows={tables.config.rows!r})" for tables in self.groups)
        return ", ".join(dict.fromkeys(names))


def make_subject(
    model: nn.Module | Compression,
    table: str | int | None,
    bag: str | None,
    example: Sequence[Any] | None,
    dynamic_shapes: Any,
) -> Subject:
    """Check what is to be exported; the arguments are those of the export functions.

    Raises:
        ExportError: if it is not finalized, has no values, lacks an example, or is asked for in a way that it has not.
        InputError: if the group has no such table.
        NoMatchingTableError: if the model has no compressed tables.
    """
    model = model.model if isinstance(model, Compression) else model
    if not isinstance(model, nn.Module):
        raise ExportError(f"only tables, models and what compress_ returned are exported, not a {type(model).__name__}")
    check_final(groups_of(model))
    if isinstance(model, EmbeddingTables) and example is None:
        return _lookup_of(model, table, bag)
    if table is not None or bag is not None:
        raise ExportError("table= and bag= choose a lookup in a group of tables; a whole model is exported as it is")
    if example is None:
        raise ExportError(
            f"{type(model).__name__} is a whole model: give example=, a tuple of arguments that it can be called with; "
            "or export a group of tables by itself, such as handle.tables[0]"
        )
    if not isinstance(example, tuple | list):
        raise ExportError(f"example must be a tuple of the model's arguments, not a {type(example).__name__}")
    given: tuple[Any, ...] = tree_map(_as_made, tuple(example), is_leaf=is_keyed)
    if dynamic_shapes is None:
        dynamic_shapes = _first_dimensions(given)
    return Subject(twin_of(model).eval(), given, dynamic_shapes)


def twin_of(module: _Module) -> _Module:
    """Copy a module, but for its tensors, which both have then."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, tensors)


def check_final(groups: Sequence[EmbeddingTables]) -> None:
    """Check that tables can be exported.

    Raises:
        ExportError: if they are not finalized, or on ``meta``.
    """
    for tables in groups:
        names = ", ".join(repr(name) for name in tables.names[:3])
        if not tables.is_final:
            raise ExportError(
                f"tables {names} are in their training form, which does not serve: call finalize_() first"
            )
        if any(tensor.is_meta for tensor in (*tables.parameters(), *tables.buffers())):
            raise ExportError(f"tables {names} are on 'meta', without values: load weights, then export")


def check_on_cpu(subject: Subject, kind: str) -> None:
    """Raise `ExportError` unless everything is on the CPU."""
    for name, tensor in (*subject.module.named_parameters(), *subject.module.named_buffers()):
        if tensor.device.type != "cpu":
            raise ExportError(f"{kind} files are made on the CPU, and {name} is on {tensor.device}: call .cpu() first")


def is_keyed(value: Any) -> bool:
    """Whether it is a ``KeyedJaggedTensor``, of which there is none before TorchRec is imported."""
    known = sys.modules.get("torchrec.sparse.jagged_tensor")
    return known is not None and isinstance(value, known.KeyedJaggedTensor)


def _lookup_of(tables: EmbeddingTables, table: str | int | None, bag: str | None) -> Subject:
    index, tables = None if table is None else tables.index_of(table), twin_of(tables)
    device = tables.get_buffer("_sizes").device
    batch = {0: torch.export.Dim("batch", min=0)}
    if bag is None:
        index = 0 if tables.num_tables == 1 else index
        shape = (_EXAMPLES,) if index is not None else (_EXAMPLES, tables.num_tables)
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        return Subject(Lookup(tables, index).eval(), (ids,), (batch,), ("ids",), ("vectors",))
    if bag not in _POOLED:
        raise ExportError(f"bag={bag!r}: exported lookups pool by 'sum' or 'mean'; a whole model exports what it has")
    if index is None and tables.num_tables > 1:
        raise ExportError(f"bags are of one table: give table=, one of {', '.join(tables.names)}")
    ids = torch.zeros(_EXAMPLES + 2, dtype=torch.int64, device=device)
    offsets = torch.arange(_EXAMPLES, device=device)
    shapes = ({0: torch.export.Dim("ids", min=0)}, {0: torch.export.Dim("bags", min=0)})
    return Subject(BagLookup(tables, index or 0, bag).eval(), (ids, offsets), shapes, ("ids", "offsets"), ("vectors",))


def _first_dimensions(example: tuple[Any, ...]) -> torch.export.ShapesCollection:
    """The first dimension of every tensor may change, of those in a ``KeyedJaggedTensor`` too."""
    shapes = torch.export.ShapesCollection()
    for value in tree_leaves(example):
        if isinstance(value, Tensor) and value.dim():
            shapes[value] = {0: torch.export.Dim.DYNAMIC}
    return shapes


def _as_made(value: Any) -> Any:
    """Without the offsets that a ``KeyedJaggedTensor`` keeps once it is looked up: files would want them of all."""
    if not is_keyed(value) or value.variable_stride_per_key() or value.lengths_or_none() is None:
        return value
    return type(value)(value.keys(), value.values(), value.weights_or_none(), lengths=value.lengths())
