"""Row formats: the text form of how rows are kept, such as ``"float32"``, ``"int8"``, ``"int2:column"``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from embcomp.errors import ConfigError

FLOAT_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
INTEGER_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2, "int1": 1}
GRANULARITIES = ("auto", "row", "column", "table", "group")
_HELP = (
    "write a kind (float32, float16, bfloat16, int8, int4, int3, int2, int1), then for integers optionally a scale "
    "granularity (row, column, table or group<N>), 'offset' and 'after': for example 'int8', 'int2:column', "
    "'int4:group64', 'int4:row:after'; for float16 and bfloat16 optionally 'pure'"
)


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a store are kept.

    Attributes:
        kind: ``float32``, ``float16``, ``bfloat16``, or ``int8`` … ``int1``.
        granularity: what shares a scale: ``row``, ``column`` (of one table), ``table``, ``group`` of consecutive rows,
            or ``auto``: ``row`` where its scale costs at most an eighth of the codes, else ``column``.
        group_rows: rows per group where ``granularity == "group"``, else 0.
        offset: whether scales that are learned come with a learned offset (``row`` scales always have one).
        aware: quantization-aware training (default), or plain float32 training and rounding at the end.
        pure: for float16 and bfloat16, train in that format too, without a float32 master copy.
    """

    kind: str = "float32"
    granularity: str = "auto"
    group_rows: int = 0
    offset: bool = False
    aware: bool = True
    pure: bool = False

    @classmethod
    def parse(cls, text: str | RowFormat) -> RowFormat:
        """Read the text form.

        Raises:
            ConfigError: if the text is not a row format; the message says how to write one.
        """
        if isinstance(text, RowFormat):
            return text
        if not isinstance(text, str):
            raise ConfigError(f"rows={text!r} is not a row format; {_HELP}")
        kind, *tokens = text.split(":")
        if kind not in FLOAT_BITS and kind not in INTEGER_BITS:
            raise ConfigError(f"rows={text!r} is not a row format; {_HELP}")
        values: dict[str, object] = {"kind": kind}
        for token in tokens:
            key, value = _read_token(token, kind, text)
            if key in values or (key == "group_rows" and "granularity" in values):
                raise ConfigError(f"rows={text!r} says {token!r} twice over; {_HELP}")
            values[key] = value
            if key == "group_rows":
                values["granularity"] = "group"
        return cls(**values)  # type: ignore[arg-type]

    @property
    def bits(self) -> int:
        """Bits per stored value, scales not counted."""
        return FLOAT_BITS.get(self.kind) or INTEGER_BITS[self.kind]

    @property
    def is_integer(self) -> bool:
        """Whether the values are integer codes with scales."""
        return self.kind in INTEGER_BITS

    def resolve(self, dim: int) -> RowFormat:
        """Replace ``auto`` by the granularity for rows of ``dim`` values: scales may cost an eighth of the codes."""
        if not self.is_integer or self.granularity != "auto":
            return self
        scale_bytes = 8 if self.bits == 8 else 4
        granularity = "row" if scale_bytes * 64 <= dim * self.bits else "column"
        return RowFormat(self.kind, granularity, 0, self.offset and granularity != "row", self.aware)

    def __str__(self) -> str:
        parts = [self.kind]
        if self.granularity != "auto":
            parts.append(f"group{self.group_rows}" if self.granularity == "group" else self.granularity)
        parts += ["offset"] * self.offset + ["after"] * (not self.aware) + ["pure"] * self.pure
        return ":".join(parts)


def _read_token(token: str, kind: str, text: str) -> tuple[str, object]:
    integer = kind in INTEGER_BITS
    if integer and token in ("row", "column", "table"):
        return "granularity", token
    if integer and (match := re.fullmatch(r"group([1-9]\d*)", token)):
        return "group_rows", int(match[1])
    if integer and token == "offset":
        return "offset", True
    if integer and token == "after":
        return "aware", False
    if kind in ("float16", "bfloat16") and token == "pure":
        return "pure", True
    raise ConfigError(f"rows={text!r}: {token!r} is not known for {kind}; {_HELP}")
