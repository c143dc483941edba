"""Catalogues of items that queries are scored against, by inner products: a table of a group, or a plain matrix.

Shapes: ``N`` queries, ``V`` items, ``D`` dimension, ``n`` items that are asked for.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from embcomp.errors import InputError
from embcomp.hooks import Repeat
from embcomp.range_scores import RangeScores, assemble, check_queries
from embcomp.storage import Ids
from embcomp.stretches import Stretch
from embcomp.tables import EmbeddingTables

_ROUNDING = 8
"""Scores that differ by so many units of rounding, of ``‖query‖ ‖vector‖``, count as equal in ranks."""


class ItemScorer(ABC):
    """A catalogue: the vector of every item, and scores ``⟨query, vector⟩ + bias``.

    A subclass writes `vectors`, `stretches` and `check_queries`.

    Attributes:
        num_items: V; items are numbered from 0.
        dim: D.
        device: where queries and ids are to be.
        bias: float ``(V,)``, added to the scores, or None. An item with ``-inf`` is never recommended.
        zero_id: the item whose vector is zero whatever `stretches` say, such as the padding of a table; or None.
    """

    num_items: int
    dim: int
    device: torch.device
    bias: Tensor | None
    zero_id: int | None = None

    @abstractmethod
    def vectors(self, ids: Tensor) -> Tensor:
        """Vectors of items: int64 ``(...)`` to float ``(..., D)``."""

    @abstractmethod
    def stretches(self, queries: Tensor) -> list[Stretch]:
        """Say how items are scored by queries ``(N, D)``: stretches from item 0 to V."""

    @abstractmethod
    def check_queries(self, queries: Tensor) -> Tensor:
        """Return queries ``(..., D)`` in the dtype that items are scored in.

        Raises:
            InputError: if they have the wrong dtype, device or last dimension.
        """

    @property
    def gradient_rows(self) -> int:
        """Rows of D values that a dense gradient of few items has: so many are best taken at once."""
        return 0

    def repeatable(self) -> Repeat | None:
        """See `EmbeddingTables.repeatable`."""
        return contextlib.nullcontext

    def scores(self, queries: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Score consecutive items at once: queries ``(..., D)`` to float ``(..., stop - start)``.

        Raises:
            InputError: if queries are wrong, or ``0 <= start <= stop <= V`` is not so.
        """
        stop = self.num_items if stop is None else stop
        if not 0 <= start <= stop <= self.num_items:
            raise InputError(f"scores of items {start} to {stop}: there are items 0 to {self.num_items}")
        flat = self.check_queries(queries).reshape(-1, self.dim)
        found = self.scoring(flat)(range(start, stop)) if stop > start else flat[:, :0]
        return found.view(*queries.shape[:-1], stop - start)

    def every_score(self, queries: Tensor, chunk: int | None = None) -> Tensor:
        """Score all items, in no more memory than the result and a chunk: queries ``(..., D)`` to float ``(..., V)``.

        Args:
            queries: to score.
            chunk: items that are scored at once; None for as many as are fast.

        Raises:
            InputError: if queries are wrong.
        """
        flat = self.check_queries(queries).reshape(-1, self.dim)
        scores = assemble(self.scoring(flat, chunk), flat, self.num_items, chunk, self.gradient_rows, self.repeatable)
        return scores.view(*queries.shape[:-1], self.num_items)

    def scoring(self, queries: Tensor, chunk: int | None = None) -> RangeScores:
        """What scores any items by queries ``(N, D)`` that are checked; see `RangeScores`."""
        stretches, least = self.stretches(queries), self.gradient_rows
        return RangeScores(stretches, self.zero_id, self.bias, least, chunk, repeatable=self.repeatable)

    def score_pairs(self, queries: Tensor, ids: Tensor) -> Tensor:
        """Score some items for each query: ``(N, D)`` and int64 ``(N, n)`` to float ``(N, n)``."""
        scores = (self.vectors(ids) @ queries.unsqueeze(-1)).squeeze(-1)
        return scores if self.bias is None else scores + self.bias[ids]

    def rounding(self, queries: Tensor, ids: Tensor) -> Tensor:
        """What the score of an item for each query may be off by: ``(N, D)`` and int64 ``(N,)`` to float ``(N,)``."""
        size = queries.norm(dim=1) * self.vectors(ids).norm(dim=1)
        if self.bias is not None:
            size = size + self.bias[ids].abs()
        return torch.where(size.isfinite(), size, 0.0) * (_ROUNDING * torch.finfo(queries.dtype).eps)

    def _check_bias(self) -> None:
        if self.bias is None:
            return
        if not self.bias.is_floating_point() or self.bias.shape != (self.num_items,):
            raise InputError(
                f"bias of {self.bias.dtype} {tuple(self.bias.shape)}: {self.num_items} items need a float tensor "
                f"({self.num_items},)"
            )


class TableScorer(ItemScorer):
    """A table of a group as a catalogue: its ids are the items, whatever the strategy and the row format.

    A padding id is an item like others, with a zero vector, as in a softmax that is tied to a plain table. To leave it
    out, give it a bias of ``-inf``, or exclude it.

    Args:
        tables: the group.
        table: index or name.
        bias: float ``(V,)``, or None; the caller's to train and to save.

    Raises:
        InputError: if there is no such table, or the bias does not fit.
    """

    def __init__(self, tables: EmbeddingTables, table: int | str = 0, bias: Tensor | None = None) -> None:
        self.tables, self.index, self.bias = tables, tables.index_of(table), bias
        spec = tables.specs[self.index]
        self.num_items, self.dim, self.zero_id = spec.num_embeddings, spec.embedding_dim, spec.padding_idx
        self._check_bias()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the tables are now."""
        return self.tables.get_buffer("_sizes").device

    @property
    def gradient_rows(self) -> int:
        """Values that are trained, in rows of D."""
        return self.tables.gradient_rows

    def repeatable(self) -> Repeat | None:
        """That of the tables."""
        return self.tables.repeatable()

    def vectors(self, ids: Tensor) -> Tensor:
        """Look items up, uncounted: int64 ``(...)`` to float32 ``(..., D)``."""
        with self.tables.uncounted():
            found: Tensor = self.tables(ids, self.index)
        return found

    def stretches(self, queries: Tensor) -> list[Stretch]:
        """Score items as the strategy does."""
        return self.tables.stretches(self.index, queries)

    def check_queries(self, queries: Tensor) -> Tensor:
        """Return queries as float32; see `EmbeddingTables.check_queries`."""
        return self.tables.check_queries(queries)


class MatrixScorer(ItemScorer):
    """A matrix as a catalogue, such as vectors that are computed from items' metadata, once per evaluation.

    Args:
        matrix: float ``(V, D)``; items are scored in float32, or float64 where the matrix is.
        bias: float ``(V,)``, or None.

    Raises:
        InputError: if the matrix is none, or the bias does not fit.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None = None) -> None:
        if not isinstance(matrix, Tensor) or not matrix.is_floating_point() or matrix.dim() != 2 or not matrix.numel():
            got = f"{matrix.dtype} {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
            raise InputError(f"a matrix of items must be a float tensor (V, D) with items, not {got}")
        self.matrix, self.bias = matrix, bias
        self.num_items, self.dim = matrix.shape
        self.dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        self._check_bias()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the matrix is."""
        return self.matrix.device

    @property
    def gradient_rows(self) -> int:
        """All: the gradient of a slice is as large as the matrix."""
        return self.num_items if self.matrix.requires_grad else 0

    def vectors(self, ids: Tensor) -> Tensor:
        """Rows of the matrix: int64 ``(...)`` to float32 (or float64) ``(..., D)``."""
        return F.embedding(ids, self.matrix).to(self.dtype)

    def stretches(self, queries: Tensor) -> list[Stretch]:
        """One for all items."""
        return [Stretch(range(self.num_items), queries, self._rows)]

    def _rows(self, ids: Ids) -> Tensor:
        rows = self.matrix[ids.start : ids.stop] if isinstance(ids, range) else self.matrix[ids]
        return rows.to(self.dtype)

    def check_queries(self, queries: Tensor) -> Tensor:
        """Return queries in the dtype of the scores; see `embcomp.range_scores.check_queries`."""
        return check_queries(queries, self.dim, self.device, "a matrix of items", self.dtype)


class FirstItemsScorer(ItemScorer):
    """The first items of another catalogue, as if it had no others.

    Args:
        scorer: the other catalogue.
        num_items: how many of its items.

    Raises:
        InputError: if it has not so many, or the number is below 1.
    """

    def __init__(self, scorer: ItemScorer, num_items: int) -> None:
        if not 1 <= num_items <= scorer.num_items:
            raise InputError(f"the first {num_items} items of a catalogue of {scorer.num_items}: give 1 to all of them")
        self.scorer, self.num_items, self.dim, self.zero_id = scorer, num_items, scorer.dim, scorer.zero_id

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the items are now."""
        return self.scorer.device

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """That of the first items."""
        return None if self.scorer.bias is None else self.scorer.bias[: self.num_items]

    @property
    def gradient_rows(self) -> int:
        """Those of the other catalogue, whose gradients are as large however few items are scored."""
        return self.scorer.gradient_rows

    def repeatable(self) -> Repeat | None:
        """That of the other catalogue."""
        return self.scorer.repeatable()

    def vectors(self, ids: Tensor) -> Tensor:
        """Vectors of items: int64 ``(...)`` to float ``(..., D)``."""
        return self.scorer.vectors(ids)

    def stretches(self, queries: Tensor) -> list[Stretch]:
        """Those of the other catalogue, up to the last item."""
        found = [stretch.moved(0, self.num_items) for stretch in self.scorer.stretches(queries)]
        return [stretch for stretch in found if stretch.ids]

    def check_queries(self, queries: Tensor) -> Tensor:
        """Return queries as the other catalogue does."""
        return self.scorer.check_queries(queries)
