"""``quantize``: every id keeps its own row of the full dimension, in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from embcomp.config import StrategyConfig, check_choice, register_strategy
from embcomp.errors import ConfigError
from embcomp.mixed import MixedTables, Piece
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import RowFormat
from embcomp.strategies.reduced_dim import full_piece

BITS = (1, 2, 3, 4, 8, 16, 32)


@dataclass(frozen=True)
class QuantizeConfig(StrategyConfig):
    """Rows in ``bits`` bits; ``rows`` stays ``"float32"``, since this strategy chooses the row format itself.

    Attributes:
        bits: 1, 2, 3, 4, 8, 16 or 32; None to let the budget choose.
        granularity: what shares a scale: ``"row"``, ``"column"``, ``"table"``, ``"group<N>"`` rows, or ``"auto"``:
            per row where that costs at most an eighth of the codes, else per column.
        offset: learned offsets beside learned scales.
        aware: quantization-aware training with learned steps; False rounds trained float32 rows at the end.
        half: which 16-bit format, ``"float16"`` or ``"bfloat16"``.
    """

    bits: int | None = None
    granularity: str = "auto"
    offset: bool = False
    aware: bool = True
    half: str = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is not None and self.bits not in BITS:
            raise ConfigError(f"QuantizeConfig(bits={self.bits!r}): allowed are {', '.join(map(str, BITS))}")
        if self.rows != "float32":
            raise ConfigError(f"QuantizeConfig(rows={self.rows!r}): this strategy chooses the rows itself; set bits=")
        check_choice(self, "half", ("float16", "bfloat16"))
        RowFormat.parse(self._integer_format(8))

    def row_format(self) -> str:
        """The row format of the chosen number of bits."""
        if self.bits is None or self.bits == 32:
            return "float32"
        return self.half if self.bits == 16 else self._integer_format(self.bits)

    def _integer_format(self, bits: int) -> str:
        scale = "" if self.granularity == "auto" else f":{self.granularity}"
        return f"int{bits}{scale}" + ":offset" * self.offset + ":after" * (not self.aware)


@register_strategy("quantize", QuantizeConfig)
class QuantizeTables(MixedTables):
    """Rows of 16, 8, 4, 3, 2 or 1 bits, truly packed, scales counted.

    By default quantization-aware with learned steps: LSQ ("Learned Step Size Quantization", arXiv 1902.08153), on the
    rows of a batch only; with ``aware=False`` plain float32 training, rounded at the end with scales that minimise the
    squared error. A table is kept in float32 where its scales would cost more than its rows save. The budget chooses
    the bits, of which there are seven steps.
    """

    knob = "bits"
    knob_is_fine = False
    can_be_streamed = True

    def pieces(self) -> list[Piece]:
        row_format = self.config.row_format()
        return [
            full_piece(index, spec, rows, self.config, row_format)
            for index, (spec, rows) in enumerate(zip(self.specs, self.num_ids, strict=True))
        ]

    def _grown_config(self, specs: Sequence[TableSpec]) -> QuantizeConfig:
        config: QuantizeConfig = self.config
        return config

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: QuantizeConfig, known: Knowledge) -> tuple[int, int]:
        if config.bits is not None:
            return BITS.index(config.bits), BITS.index(config.bits)
        return 0, len(BITS) - 1

    @classmethod
    def resize(cls, specs: Sequence[TableSpec], config: QuantizeConfig, size: int, known: Knowledge) -> QuantizeConfig:
        return replace(config, bits=BITS[size])

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: QuantizeConfig, known: Knowledge) -> QuantizeConfig:
        return config if config.bits is not None else super().complete(specs, config, known)
