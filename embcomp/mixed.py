"""Tables cut into pieces, each kept in its own way: what most strategies are made of.

A piece is a range of ids of one table. Pieces that are kept alike share one module, hence one fused lookup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from embcomp.config import StrategyConfig
from embcomp.errors import ConfigError
from embcomp.memory import MemoryReport
from embcomp.specs import TableSpec
from embcomp.tables import EmbeddingTables


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
    _piece_tables: Tensor
    _order: Tensor

    def __init__(
        self, specs: Sequence[TableSpec], config: StrategyConfig, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(specs, config)
        pieces = sorted(self.pieces(), key=lambda piece: (piece.table, piece.start))
        if len({(piece.table, piece.kind) for piece in pieces}) < len(pieces):
            raise ConfigError(f"{type(self).__name__}.pieces: two pieces of one table are kept alike; make them one")
        by_part = [[p for p in pieces if p.kind == kind] for kind in dict.fromkeys(piece.kind for piece in pieces)]
        self.parts = nn.ModuleList(self._build(own) for own in by_part)  # type: ignore[assignment]
        self._by_part = [[(p.table, p.start, p.stop) for p in own] for own in by_part]
        whole = [[p.stop - p.start == self.num_ids[p.table] for p in own] for own in by_part]
        self._is_cut = [not all(flags) for flags in whole]
        owners = [p.table for own in by_part for p in own]
        self._owners = owners
        self.constant("_piece_tables", owners)
        self.constant("_order", sorted(range(len(owners)), key=owners.__getitem__))
        for index, own in enumerate(by_part):
            self.constant(f"_columns_{index}", [p.table for p in own])
            self.constant(f"_starts_{index}", [p.start for p in own])
            self.constant(f"_stops_{index}", [p.stop for p in own])
            local = {p.table: number for number, p in enumerate(own)}
            self.constant(f"_local_{index}", [local.get(table, -1) for table in range(self.num_tables)])

    def pieces(self) -> list[Piece]:
        """Cut the tables, by the config alone; every id in exactly one piece, at most one piece of a kind per table."""
        raise NotImplementedError

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        if table is None:
            return self._lookup_columns(ids)
        if isinstance(table, int):
            found = [(i, own) for i, own in enumerate(self._by_part) if any(t == table for t, _, _ in own)]
            if len(found) == 1:
                index, own = found[0]
                return self.parts[index].lookup(ids, next(n for n, (t, _, _) in enumerate(own) if t == table))
            table = torch.full((1,) * min(ids.dim(), 1), table, device=ids.device)
        return self._lookup_anywhere(ids, table)

    def reset_parameters(self) -> None:
        for part in self.parts:
            part.reset_parameters()

    def fit(self, weights: Sequence[Tensor], counts: Sequence[Tensor]) -> None:
        for part, own in zip(self.parts, self._by_part, strict=True):
            part.fit(
                [weights[table][start:stop] for table, start, stop in own],
                [counts[table][start:stop] for table, start, stop in own],
            )

    def _build(self, own: Sequence[Piece]) -> EmbeddingTables:
        specs = []
        for piece in own:
            spec, rows = self.specs[piece.table], piece.stop - piece.start
            whole = rows == self.num_ids[piece.table]
            name = spec.name if whole else f"{spec.name}[{piece.start}:{piece.stop}]"
            specs.append(TableSpec(name, rows, spec.embedding_dim, None, spec.init_std))
        return own[0].tables_class(specs, replace(own[0].config, unseen="error"))

    def _lookup_columns(self, ids: Tensor) -> Tensor:
        found = []
        for index, part in enumerate(self.parts):
            columns = getattr(self, f"_columns_{index}")
            own = ids if len(self.parts) == 1 else ids.index_select(-1, columns)
            found.append(self._lookup_cut(index, part, own, None) if self._is_cut[index] else part.lookup(own, None))
        if len(found) == 1 and self._owners == sorted(self._owners):
            return found[0]
        vectors = torch.cat(found, dim=-2)
        if len(self._owners) == self.num_tables:
            return vectors.index_select(-2, self._order)
        out = vectors.new_zeros(*ids.shape, self.embedding_dim)
        return out.index_add(-2, self._piece_tables, vectors)

    def _lookup_anywhere(self, ids: Tensor, table: Tensor) -> Tensor:
        out = None
        for index, part in enumerate(self.parts):
            local = getattr(self, f"_local_{index}")[table]
            vectors = self._lookup_cut(index, part, ids, local)
            out = vectors if out is None else out + vectors
        assert out is not None
        return out

    def _lookup_cut(self, index: int, part: EmbeddingTables, ids: Tensor, local: Tensor | None) -> Tensor:
        """Look ids up in one part; zeros for ids that lie in other pieces."""
        starts, stops = getattr(self, f"_starts_{index}"), getattr(self, f"_stops_{index}")
        if local is not None:
            elsewhere, local = local < 0, local.clamp_min(0)
            starts, stops = starts[local], stops[local]
        outside = (ids < starts) | (ids >= stops)
        if local is not None:
            outside = outside | elsewhere
        vectors = part.lookup((ids - starts).masked_fill(outside, 0), local)
        return vectors.masked_fill(outside.unsqueeze(-1), 0.0)

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
