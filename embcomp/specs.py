"""What tables are, before they are built: their specs, and what is known of the data that they will see."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from embcomp.errors import SpecError, did_you_mean
from embcomp.memory import SHARED
from embcomp.row_source import RowSource

LARGEST = 2**63 - 1
"""Of the numbers that int64 holds."""
LARGEST_WEIGHT = 1e12
"""Of trained values: strategies add up squares, weighted by counts, in float32."""


@dataclass(frozen=True)
class TableSpec:
    """A logical embedding table, as the model sees it.

    Attributes:
        name: stable name; hash seeds are derived from it.
        num_embeddings: V, ids are in ``[0, V)``.
        embedding_dim: D.
        padding_idx: an id whose vector is always zero and never trained, or None.
        init_std: standard deviation that the plain table's initial entries have; every strategy matches it.

    Raises:
        SpecError: if a size is not positive or beyond int64, or ``padding_idx`` is outside ``[0, V)``.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None = None
    init_std: float = 0.01

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or self.name == SHARED:
            raise SpecError(f"table name {self.name!r}: give a non-empty string other than {SHARED!r}")
        for what in ("num_embeddings", "embedding_dim"):
            value = self._whole(what)
            if value is None or not 1 <= value <= LARGEST:
                raise SpecError(
                    f"table {self.name!r}: {what}={getattr(self, what)!r} must be an int of at least 1, and at most "
                    f"{LARGEST}, as ids are int64"
                )
        if self.padding_idx is not None:
            padding = self._whole("padding_idx")
            if padding is None or not 0 <= padding < self.num_embeddings:
                raise SpecError(
                    f"table {self.name!r}: padding_idx={self.padding_idx!r} is not an int in [0, {self.num_embeddings})"
                )
        std: Any = self.init_std
        if not isinstance(std, Real) or not 0 <= float(std) < math.inf:
            raise SpecError(f"table {self.name!r}: init_std={self.init_std!r} must be a finite number of at least 0")

    def _whole(self, what: str) -> int | None:
        """A field as a plain int (NumPy's become ones), or None if it is none."""
        value = as_int(getattr(self, what))
        if value is not None:
            object.__setattr__(self, what, value)
        return value

    @property
    def full_bytes(self) -> int:
        """Bytes of the plain float32 table."""
        return 4 * self.num_embeddings * self.embedding_dim


@dataclass(frozen=True)
class Knowledge:
    """What is known of the data when tables are planned: both may be empty, and plans are then made from sizes alone.

    Attributes:
        counts: table name -> int64 ``(V,)``, how often each id occurs in the training data.
        weights: table name -> ``(V, D)``, trained tables that are to be compressed.
    """

    counts: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, RowSource] = field(default_factory=dict)
    derived: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What strategies worked out of the above and need again at every size that the solver tries."""

    @classmethod
    def of(
        cls,
        specs: Sequence[TableSpec],
        counts: Mapping[str, Any] | None = None,
        weights: Mapping[str, Any] | None = None,
    ) -> Knowledge:
        """Check counts and weights against the specs and turn them into tensors.

        Raises:
            SpecError: for a table that does not exist, a wrong length or shape, or negative or non-finite counts.
        """
        by_name = {spec.name: spec for spec in specs}
        return cls(_checked_counts(by_name, counts or {}), _checked_weights(by_name, weights or {}))


def check_group(specs: Sequence[TableSpec]) -> tuple[TableSpec, ...]:
    """Check that tables make a group: at least one, different names, one dimension.

    Raises:
        SpecError: if they do not.
    """
    specs = tuple(specs)
    if not specs:
        raise SpecError("a group needs at least one TableSpec")
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SpecError(f"table names must differ; twice there: {', '.join(twice)}")
    dims = sorted({spec.embedding_dim for spec in specs})
    if len(dims) > 1:
        raise SpecError(f"tables of one group share embedding_dim; these have {dims}: make one group per dimension")
    return specs


_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""Dtypes that torch can do little with; as float64 they are exact up to 2⁵³."""


def _checked_counts(by_name: Mapping[str, TableSpec], counts: Mapping[str, Any]) -> dict[str, Tensor]:
    checked = {}
    for name, values in counts.items():
        spec = _spec_of(by_name, name, "counts")
        count = torch.as_tensor(values)
        if count.shape != (spec.num_embeddings,):
            raise SpecError(
                f"counts of table {name!r} have shape {tuple(count.shape)}, its ids need ({spec.num_embeddings},)"
            )
        if count.is_complex():
            raise SpecError(f"counts of table {name!r} are {count.dtype}: they must be real numbers")
        exact = count.double()  # unsigned ones can't be compared
        if not torch.isfinite(exact).all() or (exact < 0).any():
            raise SpecError(f"counts of table {name!r} must be finite and at least 0")
        if count.dtype in _UNSIGNED:
            count = exact
        checked[name] = count
    return checked


def _checked_weights(by_name: Mapping[str, TableSpec], weights: Mapping[str, Any]) -> dict[str, RowSource]:
    checked = {}
    for name, values in weights.items():
        spec = _spec_of(by_name, name, "weights")
        weight = values if isinstance(values, RowSource) else torch.as_tensor(values)
        if weight.shape != (spec.num_embeddings, spec.embedding_dim):
            raise SpecError(
                f"weights of table {name!r} have shape {tuple(weight.shape)}, "
                f"not ({spec.num_embeddings}, {spec.embedding_dim})"
            )
        source = RowSource.of(weight)
        for rows in source.chunks():
            part = source[rows]
            wrong = ~(part.abs() <= LARGEST_WEIGHT)
            if bool(wrong.any()):
                what = f"all at most {LARGEST_WEIGHT:g}" if bool(part.isfinite().all()) else "all finite"
                first = rows.start + int(wrong.any(1).nonzero()[0])
                raise SpecError(f"weights of table {name!r} are not {what}: the first row that is not so is {first}")
        checked[name] = source
    return checked


def _spec_of(by_name: Mapping[str, TableSpec], name: str, what: str) -> TableSpec:
    if name not in by_name:
        raise SpecError(f"{what} for table {name!r}, which does not exist; {did_you_mean(name, by_name)}")
    return by_name[name]


def as_int(value: Any) -> int | None:
    """An int of Python or NumPy as a plain int; None for anything else, bools included."""
    return int(value) if not isinstance(value, bool) and isinstance(value, Integral) else None
