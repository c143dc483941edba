"""Small groups of tables, ids and assertions that the checks share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from embcomp.budget import Plan, measure, plan
from embcomp.config import StrategyConfig, StrategyEntry, config_from_dict, config_to_json, make_config, strategy_of
from embcomp.errors import BudgetError, ConfigError, SpecError
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import RowFormat
from embcomp.tables import EmbeddingTables

Strategy = str | StrategyConfig
"""A registered strategy's name, or its config."""

SIZES = {"user": 300, "flag": 2, "item": 50, "genre": 7}
"""Table name -> V of the usual group; ``item`` has padding."""

UNSEEN_IDS = (-1, -(2**63), 2**31, 2**62, 2**63 - 1)
"""Ids outside every table: negative, next to the limits of int32, and huge."""


def require(condition: object, message: str) -> None:
    """Raise `AssertionError` with a message; unlike ``assert`` it is there under ``python -O`` too."""
    if not condition:
        raise AssertionError(message)


def require_same(got: Tensor, wanted: Tensor, what: str) -> None:
    """Require bit-equal tensors."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def require_close(got: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Require tensors that are equal but for rounding; vectors of the checks have entries of about 1."""
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def require_finalized(got: Tensor, wanted: Tensor, strategy: Strategy) -> None:
    """Require the finalized form's vectors to be those of evaluation, to the tolerance that the row format states."""
    row_format = RowFormat.parse(make_config(strategy).rows)
    if row_format.aware:
        require_close(got, wanted, "finalized vectors")
        return
    off, size = (got - wanted).norm().item(), wanted.norm().item()
    allowed = 4 * 2.0**-row_format.bits * size
    require(off <= allowed, f"vectors of norm {size:.3f} are off by {off:.3f} when rounded to {row_format.bits} bits")


def require_error(error: type[Exception], call: Callable[[], object], what: str, *words: str) -> Exception:
    """Require that a call raises, and that the message holds some words."""
    try:
        call()
    except error as raised:
        missing = [word for word in words if word not in str(raised)]
        require(not missing, f"{what}: the error does not name {missing}: {raised}")
        return raised
    raise AssertionError(f"{what}: no {error.__name__}")


def make_specs(
    dim: int = 6, sizes: Mapping[str, int] | None = None, padded: Sequence[str] = ("item",), init_std: float = 1.0
) -> tuple[TableSpec, ...]:
    """A group of tables; those named in ``padded`` have ``padding_idx=0``."""
    return tuple(
        TableSpec(name, size, dim, 0 if name in padded else None, init_std) for name, size in (sizes or SIZES).items()
    )


def make_counts(specs: Sequence[TableSpec]) -> dict[str, Tensor]:
    """Zipf-like counts, int64 ``(V,)`` for each table, of ids that are *not* ordered by frequency; some are zero."""
    counts = {}
    for index, spec in enumerate(specs):
        generator = torch.Generator().manual_seed(index)
        order = torch.randperm(spec.num_embeddings, generator=generator)
        counts[spec.name] = (1000 / (1 + order.double()) ** 1.2).long()
    return counts


def make_weights(specs: Sequence[TableSpec]) -> dict[str, Tensor]:
    """Trained-looking tables, float32 ``(V, D)``: a falling spectrum, with zeros where there is padding."""
    weights = {}
    for index, spec in enumerate(specs):
        generator = torch.Generator().manual_seed(100 + index)
        rows = torch.randn(spec.num_embeddings, spec.embedding_dim, generator=generator)
        axes = torch.linalg.qr(torch.randn(spec.embedding_dim, spec.embedding_dim, generator=generator))[0]
        weight = rows * 0.8 ** torch.arange(spec.embedding_dim) @ axes
        if spec.padding_idx is not None:
            weight[spec.padding_idx] = 0.0
        weights[spec.name] = weight
    return weights


def planned(
    strategy: Strategy, specs: Sequence[TableSpec], share: float = 0.4, with_counts: bool = False, **options: Any
) -> Plan:
    """A plan whose budget lies at ``share`` between the strategy's smallest and its largest serve bytes.

    Where even the smallest form takes more than the float32 tables, no budget can ask for it: it is planned without.
    """
    specs, config = tuple(specs), make_config(strategy, **options)
    counts = make_counts(specs) if with_counts else {}
    smallest, largest = byte_range(config, specs, with_counts)
    if smallest > sum(spec.full_bytes for spec in specs):
        tables_class, known = strategy_of(config).tables_class, Knowledge.of(specs, counts)
        config = tables_class.resize(specs, config, tables_class.size_range(specs, config, known)[0], known)
        return Plan(specs, config, None, measure(specs, config), known.counts)
    return plan(specs, config, f"{smallest + int(share * (largest - smallest))}B", counts)


def byte_range(config: StrategyConfig, specs: Sequence[TableSpec], with_counts: bool = False) -> tuple[int, int]:
    """Serve bytes of the strategy's smallest and largest form within 100 %."""
    return _byte_range(config_to_json(config), strategy_of(config), tuple(specs), with_counts)


@lru_cache(maxsize=4096)
def _byte_range(text: str, entry: StrategyEntry, specs: tuple[TableSpec, ...], with_counts: bool) -> tuple[int, int]:
    config = config_from_dict(json.loads(text))
    counts = make_counts(specs) if with_counts else {}
    try:
        smallest = plan(specs, config, "1B", counts).report.serve_bytes
    except BudgetError as error:
        require(error.minimum_bytes, f"BudgetError without minimum_bytes: {error}")
        smallest = error.minimum_bytes or 0
    if smallest > sum(spec.full_bytes for spec in specs):
        return smallest, smallest
    return smallest, plan(specs, config, "100%", counts).report.serve_bytes


def build(strategy: Strategy, dim: int = 6, share: float = 0.4, **options: Any) -> EmbeddingTables:
    """The usual group, planned and built."""
    return planned(strategy, make_specs(dim), share, **options).build()


def dims_of(strategy: Strategy) -> list[int]:
    """Those of D = 1, 2, 6, 16 that the strategy can do: 6 and 16 it must, the others it may refuse by an error."""
    dims = [6, 16]
    for dim in (1, 2):
        try:
            planned(strategy, make_specs(dim))
        except (ConfigError, SpecError):
            continue
        dims.append(dim)
    return sorted(dims)


def every_id(tables: EmbeddingTables) -> Tensor:
    """Int64 ``(max V, T)``: column t runs through the ids of table t, over and over."""
    longest = torch.arange(max(spec.num_embeddings for spec in tables.specs))
    return torch.stack([longest % spec.num_embeddings for spec in tables.specs], dim=1)


def every_vector(tables: EmbeddingTables) -> Tensor:
    """All vectors of all tables, float32 ``(sum V, D)``, without gradients."""
    with torch.no_grad():
        return torch.cat([tables.materialize(name) for name in tables.names])


def backward(tables: EmbeddingTables) -> None:
    """Gradients of a loss in which every id has a part, and the strategy's penalty."""
    vectors = tables(every_id(tables))
    pull = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(7))
    ((vectors * pull).sum() + tables.penalty()).backward()


def train_step(tables: EmbeddingTables, learning_rate: float = 0.01) -> EmbeddingTables:
    """One step of SGD, so that the weights are no longer the initial ones."""
    optimizer = torch.optim.SGD([p for p in tables.parameters() if p.requires_grad], lr=learning_rate)
    backward(tables)
    optimizer.step()
    optimizer.zero_grad()
    return tables


def clone_state(tables: EmbeddingTables) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, those that are in no file included."""
    return {name: t.detach().clone() for name, t in (*tables.named_parameters(), *tables.named_buffers())}
