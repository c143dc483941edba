"""Checks of the scores of whole tables: the same as by dense rows, with the same gradients, in memory for a chunk."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from embcomp.storage import QuantizedRows
from embcomp.tables import EmbeddingTables
from embcomp.testing._cases import (
    Strategy,
    build,
    make_specs,
    planned,
    require,
    require_close,
    require_same,
    train_step,
)
from embcomp.testing.training import LargestTensor

NUM_QUERIES = (3, 300)
"""Few queries and many, for the two ways of scoring: by stored rows and by composed vectors."""


def check_scores(strategy: Strategy) -> None:
    """`scores` are inner products with `materialize`, gradients too, in all forms; no tensor is larger than they are.

    Gradients of learned scales are compared but for a factor: they follow LSQ's rule for the rows of a lookup.
    """
    tables = train_step(build(strategy))
    for number in NUM_QUERIES:
        queries = torch.randn(number, 6, generator=torch.Generator().manual_seed(number))
        for form, name in ((tables.train(), "training"), (tables.eval(), "evaluation"), (tables.finalize(), "served")):
            for chunk in (None, 64):
                _require_scores(form, queries, chunk, f"{name} form, {number} queries, chunk={chunk}")
        _require_gradients(tables.train(), queries)
    _require_little_memory(strategy)


def _require_scores(tables: EmbeddingTables, queries: Tensor, chunk: int | None, what: str) -> None:
    with torch.no_grad():
        for spec in tables.specs:
            got = tables.scores(spec.name, queries, chunk)
            wanted = queries @ tables.materialize(spec.name).transpose(0, 1)
            require_close(got, wanted, f"scores({spec.name!r}), {what}", 1e-4)
            if spec.padding_idx is not None:
                padding = got[:, spec.padding_idx]
                require_same(padding, torch.zeros_like(padding), f"scores of padding in {spec.name!r}, {what}")


def _require_gradients(tables: EmbeddingTables, queries: Tensor) -> None:
    """Gradients of queries and parameters, by `scores` and by `materialize`."""
    queries = queries.clone().requires_grad_()
    learned = {name: p for name, p in tables.named_parameters() if p.requires_grad}
    scales = {id(p) for m in tables.modules() if isinstance(m, QuantizedRows) for p in (m.span, m.offset)}
    for spec in tables.specs:
        pull = torch.randn(len(queries), spec.num_embeddings, generator=torch.Generator().manual_seed(1))
        ways = (
            partial(tables.scores, spec.name, queries),
            lambda name=spec.name: queries @ tables.materialize(name).transpose(0, 1),
        )
        one, other = (
            torch.autograd.grad((way() * pull).sum(), [queries, *learned.values()], materialize_grads=True)
            for way in ways
        )
        what = f"{len(queries)} queries, scores({spec.name!r}): gradient of"
        require_close(one[0], other[0], f"{what} the queries", 1e-3)
        for (name, parameter), got, wanted in zip(learned.items(), one[1:], other[1:], strict=True):
            got, wanted = got.to_dense(), wanted.to_dense()
            if id(parameter) in scales:
                got, wanted = (gradient / gradient.norm().clamp_min(1e-12) for gradient in (got, wanted))
            scale = wanted.abs().max().clamp_min(1.0)
            require_close(got / scale, wanted / scale, f"{what} {name}", 1e-3)


def _require_little_memory(strategy: Strategy) -> None:
    num_ids = 20_000
    tables = planned(strategy, make_specs(16, {"user": num_ids, "flag": 2}), share=0.5).build().finalize_()
    queries = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), (largest := LargestTensor()):
        size = tables.scores("user", queries, chunk=500).nbytes
    require(largest.size <= size, f"scores of {size} B make a tensor of {largest.size} B, by {largest.by}")
