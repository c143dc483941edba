"""``low_rank``: each table as a thin matrix times a small one, with ranks chosen per table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embcomp.config import StrategyConfig, check_at_least, register_strategy
from embcomp.errors import ConfigError
from embcomp.mixed import MixedTables, Piece
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import stored_bytes
from embcomp.strategies._projected import gram
from embcomp.strategies.reduced_dim import projected_piece


@dataclass(frozen=True)
class LowRankConfig(StrategyConfig):
    """Ranks of the tables.

    Attributes:
        rank: one rank for every table; None to choose them one by one.
        ranks: table name -> rank, 1 to D; None to let the budget choose.
    """

    rank: int | None = None
    ranks: dict[str, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "rank", 1)
        if self.rank is not None and self.ranks is not None:
            raise ConfigError("LowRankConfig: give rank= for all tables or ranks= for each, not both")
        for name, rank in (self.ranks or {}).items():
            if rank < 1:
                raise ConfigError(f"LowRankConfig(ranks={{{name!r}: {rank}}}): a rank is at least 1")


@register_strategy("low_rank", LowRankConfig)
class LowRankTables(MixedTables):
    """Table ``E ≈ U W`` with ``U (V, r)``, ``W (r, D)``, from scratch or by truncated SVD of trained tables.

    The budget buys ranks one at a time, for the table where the next one removes the most error per byte. With trained
    tables that error is the next squared singular value, each id weighted by its count; from scratch the prior is a
    spectrum that falls like 1/j, the same for every table, since every example looks up every table once. A table
    whose factors would take as many bytes as its rows is kept whole.
    """

    knob = "ranks"
    knob_is_fine = False
    can_be_streamed = True

    def pieces(self) -> list[Piece]:
        ranks = self.config.ranks or {}
        return [
            projected_piece(index, spec, rows, self.config, self._rank(spec, ranks), "linear")
            for index, (spec, rows) in enumerate(zip(self.specs, self.num_ids, strict=True))
        ]

    def _rank(self, spec: TableSpec, ranks: dict[str, int]) -> int:
        if spec.name not in ranks:
            raise ConfigError(
                f"LowRankConfig: no rank for table {spec.name!r}; ranks= has {', '.join(ranks) or 'none'}"
            )
        return ranks[spec.name]

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: LowRankConfig, known: Knowledge) -> tuple[int, int]:
        dim = specs[0].embedding_dim
        if config.ranks is not None:
            return 0, 0
        return (config.rank, config.rank) if config.rank else (len(specs), len(specs) * dim)

    @classmethod
    def resize(cls, specs: Sequence[TableSpec], config: LowRankConfig, size: int, known: Knowledge) -> LowRankConfig:
        if config.ranks is not None:
            return config
        if config.rank is not None:
            return replace(config, rank=None, ranks=dict.fromkeys((spec.name for spec in specs), size))
        ranks = dict.fromkeys((spec.name for spec in specs), 1)
        for name in cls._purchases(specs, config, known)[: size - len(specs)]:
            ranks[name] += 1
        return replace(config, ranks=ranks)

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: LowRankConfig, known: Knowledge) -> LowRankConfig:
        if config.ranks is None and config.rank is None:
            return super().complete(specs, config, known)
        return cls.resize(specs, config, config.rank or 0, known)

    @classmethod
    def _purchases(cls, specs: Sequence[TableSpec], config: LowRankConfig, known: Knowledge) -> list[str]:
        """Table names in the order in which they are given another rank, the most error per byte first."""
        offers = []
        for spec in specs:
            price = stored_bytes(spec.num_embeddings, 1, "float32") + 4 * spec.embedding_dim
            for rank, value in enumerate(spectrum(spec, known)[1:].tolist(), start=2):
                offers.append((-value / price, rank, spec.name))
        return [name for _, _, name in sorted(offers)]


def spectrum(spec: TableSpec, known: Knowledge) -> Tensor:
    """Squared singular values of a trained table, counts as weights, or the prior 1/j²; falling, float64 ``(D,)``."""
    if spec.name not in known.weights:
        return torch.arange(1, spec.embedding_dim + 1, dtype=torch.float64) ** -2
    key = ("spectrum", spec.name)
    if key not in known.derived:
        weight = known.weights[spec.name]
        count = known.counts.get(spec.name, torch.ones(1).expand(len(weight))).to(weight.device, torch.float32)
        known.derived[key] = torch.linalg.eigvalsh(gram(weight, count)).flip(0).clamp_min(0)
    return known.derived[key]
