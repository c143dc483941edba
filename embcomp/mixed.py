"""Tables cut into pieces, each kept in its own way: what most strategies are made of.

A piece is a range of ids of one table. Pieces that are kept alike share one module, hence one fused lookup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from embcomp.config import StrategyConfig
from embcomp.errors import ConfigError
from embcomp.memory import MemoryReport
from embcomp.row_source import RowSource
from embcomp.specs import TableSpec
from embcomp.storage import RowStore
from embcomp.stretches import Stretch
from embcomp.tables import EmbeddingTables

_NOWHERE = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Piece:
    """Ids ``[start, stop)`` of a table, and how they are kept.

    Attributes:
        table: index of the table.
        start: first id.
        stop: one past the last id (an OOV row counts as an id).
        tables_class: the `EmbeddingTables` subclass that keeps them.
        config: its complete config.
    """

    table: int
    start: int
    stop: int
    tables_class: type[EmbeddingTables]
    config: StrategyConfig

    @property
    def kind(self) -> tuple[type[EmbeddingTables], str]:
        """What is equal for pieces that share a module; configs may hold dicts, which can't be hashed."""
        return self.tables_class, repr(self.config)


class MixedTables(EmbeddingTables):
    """A group whose tables are cut into pieces; subclasses say how by `pieces`.

    The unseen policy and padding are settled here, before the pieces, so that parts see only ids of their own.
    """

    parts: Sequence[EmbeddingTables]
    _columns: Tensor
    _order: Tensor
    _bounds: Tensor
    _part_of: Tensor
    _local_of: Tensor
    _start_of: Tensor

    def __init__(
        self, specs: Sequence[TableSpec], config: StrategyConfig, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(specs, config)
        pieces = sorted(self.pieces(), key=lambda piece: (piece.table, piece.start))
        if len({(piece.table, piece.kind) for piece in pieces}) < len(pieces):
            raise ConfigError(f"{type(self).__name__}.pieces: two pieces of one table are kept alike; make them one")
        by_part = [[p for p in pieces if p.kind == kind] for kind in dict.fromkeys(piece.kind for piece in pieces)]
        self.parts = nn.ModuleList(self._build(own) for own in by_part)  # type: ignore[assignment]
        self.can_be_sharded = all(part.can_be_sharded for part in self.parts)
        self._by_part = [[(p.table, p.start, p.stop) for p in own] for own in by_part]
        self._is_cut = len(pieces) > self.num_tables
        owners = [table for own in self._by_part for table, _, _ in own]
        self._in_order = owners == sorted(owners)
        self.constant("_columns", range(self.num_tables))
        self.constant("_order", sorted(range(len(owners)), key=owners.__getitem__))
        for index, own in enumerate(self._by_part):
            self.constant(f"_own_{index}", [table for table, _, _ in own])
        self._keep_places(pieces)

    def _keep_places(self, pieces: Sequence[Piece]) -> None:
        """Constants ``(T, most pieces of a table)``: where pieces stop, and part, number within it and first id."""
        by_table = [[piece for piece in pieces if piece.table == table] for table in range(self.num_tables)]
        most = max(map(len, by_table))
        place = {own: (index, n) for index, part in enumerate(self._by_part) for n, own in enumerate(part)}
        rows: dict[str, list[list[int]]] = {"_bounds": [], "_part_of": [], "_local_of": [], "_start_of": []}
        for own in by_table:
            spare = [0] * (most - len(own))
            found = [place[p.table, p.start, p.stop] for p in own]
            rows["_bounds"].append([*(p.stop for p in own[:-1]), *(_NOWHERE for _ in range(most - len(own) + 1))])
            rows["_part_of"].append([part for part, _ in found] + spare)
            rows["_local_of"].append([local for _, local in found] + spare)
            rows["_start_of"].append([p.start for p in own] + spare)
        for name, values in rows.items():
            self.constant(name, torch.tensor(values, dtype=torch.int64, device="cpu"))

    def pieces(self) -> list[Piece]:
        """Cut the tables, by the config alone; every id in exactly one piece, at most one piece of a kind per table."""
        raise NotImplementedError

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        if isinstance(table, int):
            if (whole := self.part_of(table)) is not None:
                return whole[0].lookup(ids, whole[1])
            table = torch.full((1,) * min(ids.dim(), 1), table, device=ids.device)
        if table is None and not self._is_cut:
            return self._lookup_columns(ids)
        part, local, start = self._places(ids, self._columns if table is None else table)
        if is_eager(ids):
            return self._lookup_chosen(ids - start, part, local)
        return self._lookup_masked(ids - start, part, local, by_column=table is None)

    def part_of(self, table: int) -> tuple[EmbeddingTables, int] | None:
        """The part that keeps a table, and the table's index there; None where several parts do."""
        found = [
            (part, number)
            for part, own in zip(self.parts, self._by_part, strict=True)
            for number, (owner, _, _) in enumerate(own)
            if owner == table
        ]
        return found[0] if len(found) == 1 else None

    def stored_rows(self, ids: Tensor, table: Tensor | int | None) -> tuple[RowStore, Tensor] | None:
        if len(self.parts) > 1 or self._is_cut or not self._in_order:
            return None
        return self.parts[0].stored_rows(ids, table)

    def stretches(self, index: int, queries: Tensor) -> list[Stretch]:
        found, stop = [], self.specs[index].num_embeddings
        for part, own in zip(self.parts, self._by_part, strict=True):
            for number, (owner, start, _) in enumerate(own):
                if owner == index:
                    found += [stretch.moved(start, stop) for stretch in part.stretches(number, queries)]
        return sorted((stretch for stretch in found if stretch.ids), key=lambda stretch: stretch.ids.start)

    def widths_of(self, table: int | str) -> Tensor | None:
        index, found = self.index_of(table), []
        for part, own in zip(self.parts, self._by_part, strict=True):
            for number, (owner, start, _) in enumerate(own):
                if owner == index:
                    found.append((start, part.widths_of(number)))
        widths = [own for _, own in sorted(found, key=lambda piece: piece[0]) if own is not None]
        return torch.cat(widths)[: self.specs[index].num_embeddings] if len(widths) == len(found) else None

    def reset_parameters(self) -> None:
        for part in self.parts:
            part.reset_parameters()

    def fit(self, weights: Sequence[Any], counts: Sequence[Tensor]) -> None:
        for part, own in zip(self.parts, self._by_part, strict=True):
            part.fit_rows(
                [RowSource.of(weights[table]).part(start, stop) for table, start, stop in own],
                [counts[table][start:stop] for table, start, stop in own],
            )

    def take_rows_(self, old: EmbeddingTables) -> None:
        assert isinstance(old, MixedTables)
        for index, (spec, ids) in enumerate(zip(self.specs, self.num_ids, strict=True)):
            (part, number), (other, own) = self._home(index), old._home(index)
            if type(part) is not type(other) or part.config != other.config:
                raise self.no_growth(f"keeps {spec.name!r} in another way with {spec.num_embeddings} ids than before")
            part.take_table_(number, other, own, ids - spec.num_embeddings)

    def _home(self, table: int) -> tuple[EmbeddingTables, int]:
        """As `part_of`, for tables that grow."""
        if (whole := self.part_of(table)) is None:
            raise self.no_growth(f"cuts {self.names[table]!r} into pieces")
        return whole

    def _build(self, own: Sequence[Piece]) -> EmbeddingTables:
        specs = []
        for piece in own:
            spec, rows = self.specs[piece.table], piece.stop - piece.start
            whole = rows == self.num_ids[piece.table]
            name = spec.name if whole else f"{spec.name}[{piece.start}:{piece.stop}]"
            specs.append(TableSpec(name, rows, spec.embedding_dim, None, spec.init_std))
        return own[0].tables_class(specs, replace(own[0].config, unseen="error"))

    def _places(self, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The part that each id lies in, the number of its piece there, and the piece's first id: int64 ``(...)``."""
        piece = (ids.unsqueeze(-1) >= self._bounds[table]).sum(-1)
        return self._part_of[table, piece], self._local_of[table, piece], self._start_of[table, piece]

    def _lookup_columns(self, ids: Tensor) -> Tensor:
        """One column per table, none of which is cut."""
        if len(self.parts) == 1:
            return self.parts[0].lookup(ids, None)
        own = [ids.index_select(-1, tables) for tables in self._own()]
        vectors = torch.cat([part.lookup(rows, None) for part, rows in zip(self.parts, own, strict=True)], dim=-2)
        return vectors if self._in_order else vectors.index_select(-2, self._order)

    def _lookup_chosen(self, ids: Tensor, part: Tensor, local: Tensor) -> Tensor:
        """Look every id up in its own part alone."""
        flat, owner, local = ids.reshape(-1), part.reshape(-1), local.reshape(-1)
        places: list[Tensor] = []
        found: list[Tensor] = []
        for index, module in enumerate(self.parts):
            place = (owner == index).nonzero().squeeze(1)
            # Without gradients what nobody asked for is left out; with them, every part gets one, if zero.
            if len(place) or torch.is_grad_enabled() or self.is_sharded or not found:
                places.append(place)
                table = local.index_select(0, place) if module.num_tables > 1 else 0
                found.append(module.lookup(flat.index_select(0, place), table))
        order = torch.cat(places)
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=ids.device))
        return torch.cat(found).index_select(0, back).view(*ids.shape, self.embedding_dim)

    def _lookup_masked(self, ids: Tensor, part: Tensor, local: Tensor, by_column: bool) -> Tensor:
        """The same in shapes that don't depend on ids: every part is asked for all, and gives zeros for others' ids."""
        out = torch.zeros(*ids.shape, self.embedding_dim, device=ids.device)
        for index, (module, own) in enumerate(zip(self.parts, self._own(), strict=True)):
            if by_column:
                elsewhere = part.index_select(-1, own) != index
                rows, table = ids.index_select(-1, own), None
            else:
                elsewhere = part != index
                rows, table = ids, 0 if module.num_tables == 1 else local.masked_fill(elsewhere, 0)
            vectors = module.lookup(rows.masked_fill(elsewhere, 0), table).masked_fill(elsewhere.unsqueeze(-1), 0.0)
            out = out.index_add(-2, own, vectors) if by_column else out + vectors
        return out

    def _own(self) -> list[Tensor]:
        """Tables of each part, int64."""
        return [getattr(self, f"_own_{index}") for index in range(len(self.parts))]

    def penalty(self) -> Tensor:
        total = super().penalty()
        for part in self.parts:
            total = total + part.penalty()
        return total

    def memory(self) -> MemoryReport:
        """Count every byte; what belongs to a piece stands under its table, with the piece's ids in the part's name."""
        parts = []
        for module, own in zip(self.parts, self._by_part, strict=True):
            pieces = dict(zip(module.names, own, strict=True))
            for part in module.memory().parts:
                if part.table in pieces and part.table not in self.names:
                    table, start, stop = pieces[part.table]
                    part = replace(part, table=self.names[table], name=f"{part.name}[{start}:{stop}]")
                parts.append(part)
        return MemoryReport(tuple(parts), sum(spec.full_bytes for spec in self.specs))


def is_eager(index: Tensor) -> bool:
    """Whether shapes may depend on an index: not while a compiler, an exporter or a CUDA graph looks."""
    if index.is_meta or type(index) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not (index.is_cuda and torch.cuda.is_current_stream_capturing())
