"""``reduced_dim``: the same, smaller dimension for every table; the simplest baseline, and a strong one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from embcomp.config import StrategyConfig, check_at_least, check_choice, register_strategy
from embcomp.mixed import MixedTables, Piece
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import stored_bytes
from embcomp.strategies._projected import PROJECTIONS, ProjectedConfig, ProjectedTables
from embcomp.strategies.full import FullConfig, FullTables

_SHARED_BYTES = 16


@dataclass(frozen=True)
class ReducedDimConfig(StrategyConfig):
    """Rows of ``dim`` values.

    Attributes:
        dim: d, 1 to D; None to let the budget choose.
        projection: ``"linear"``: one ``(d, D)`` matrix per table; ``"none"``: D − d zeros behind the row, which is the
            same model as one of a smaller dimension, and costs no bytes.
    """

    dim: int | None = None
    projection: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "dim", 1)
        check_choice(self, "projection", PROJECTIONS)


@register_strategy("reduced_dim", ReducedDimConfig)
class ReducedDimTables(MixedTables):
    """Every table at the same smaller dimension d, brought to D by a linear map per table or by zeros.

    A table that would not become smaller (few ids, so that its projection costs more than it saves) is kept at D. The
    budget chooses d; its steps are 1/D of the tables' bytes. Trained tables are fitted by a count-weighted SVD.
    Known as "smaller uniform dimension" (SU) in the literature, which often leaves it out.
    """

    knob = "dim"
    knob_is_fine = False
    can_be_streamed = True

    def pieces(self) -> list[Piece]:
        return [
            projected_piece(index, spec, rows, self.config, self.config.dim, self.config.projection)
            for index, (spec, rows) in enumerate(zip(self.specs, self.num_ids, strict=True))
        ]

    def _grown_config(self, specs: Sequence[TableSpec]) -> ReducedDimConfig:
        config: ReducedDimConfig = self.config
        return config

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: ReducedDimConfig, known: Knowledge) -> tuple[int, int]:
        return (1, specs[0].embedding_dim) if config.dim is None else (config.dim, config.dim)

    @classmethod
    def resize(
        cls, specs: Sequence[TableSpec], config: ReducedDimConfig, size: int, known: Knowledge
    ) -> ReducedDimConfig:
        return replace(config, dim=size)

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: ReducedDimConfig, known: Knowledge) -> ReducedDimConfig:
        return config if config.dim is not None else super().complete(specs, config, known)


def projected_piece(
    index: int, spec: TableSpec, rows: int, config: StrategyConfig, dim: int, projection: str, row_format: str = ""
) -> Piece:
    """A whole table at dimension ``dim``, or at D where that takes hardly more bytes.

    A table that is kept can begin at another byte of the packed codes, or share a group's scale, which is worth a few
    bytes; so narrowing has to save more than those, lest more dimensions take fewer bytes.
    """
    row_format = row_format or config.rows
    if dim < spec.embedding_dim:
        matrix = 4 * dim * spec.embedding_dim if projection == "linear" else 0
        narrow = stored_bytes(rows, dim, row_format) + matrix
        whole = min(stored_bytes(rows, spec.embedding_dim, row_format), 4 * rows * spec.embedding_dim)
        if narrow + _SHARED_BYTES <= whole:
            kept = ProjectedConfig(row_format, "error", config.seed, config.sparse, dim, projection)
            return Piece(index, 0, rows, ProjectedTables, kept)
    return full_piece(index, spec, rows, config, row_format)


def full_piece(index: int, spec: TableSpec, rows: int, config: StrategyConfig, row_format: str = "") -> Piece:
    """A whole table at dimension D, in a row format (the config's) or in float32, whichever takes fewer bytes."""
    row_format = row_format or config.rows
    if 4 * rows * spec.embedding_dim <= stored_bytes(rows, spec.embedding_dim, row_format):
        row_format = "float32"
    return Piece(index, 0, rows, FullTables, FullConfig(row_format, "error", config.seed, config.sparse))
