"""How items become vectors: by their id, by what is known of them, or by both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embcomp import EmbeddingTables
from embcomp.errors import ConfigError, InputError, UnseenIdError
from embcomp.hooks import Repeat
from embcomp.range_scores import check_queries
from embcomp.scoring import ItemScorer, MatrixScorer, TableScorer
from embcomp.storage import Ids
from embcomp.stretches import Stretch
from recsys_models.data import Attribute

ITEM = "item"
"""Name of the table of items."""
OUTPUT = "item_output"
"""Name of the table of a free head."""
POOLINGS = ("mean", "idf")
CHUNK = 8192
"""Items that are composed at once where all are."""
_LEAST_WORTH = 1e-6
"""Weight by IDF of a value that all items have, or none of training has."""


class Items(nn.Module, ABC):
    """Vectors of items, and their scores.

    Args:
        dim: D.
        num_items: V.
    """

    def __init__(self, dim: int, num_items: int) -> None:
        super().__init__()
        self.dim, self.num_items = dim, num_items

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:
        """Vectors float32 ``(..., D)`` of items int64 ``(...)``."""

    @abstractmethod
    def scorer(self) -> ItemScorer:
        """What scores the whole catalogue; where there are no gradients, with vectors as they are now."""

    @property
    @abstractmethod
    def groups(self) -> tuple[EmbeddingTables, ...]:
        """The groups of tables that vectors come from, which belong to the model and not to this module."""

    @property
    def composing_bytes(self) -> int:
        """Bytes that serving needs beside the tables to make vectors of items; none where they are looked up."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))


class ItemTable(Items):
    """A table with a row per item, or its compressed form.

    Args:
        tables: with the table ``name``.
        name: of the table.
    """

    def __init__(self, tables: EmbeddingTables, name: str = ITEM) -> None:
        super().__init__(tables.embedding_dim, tables.specs[tables.index_of(name)].num_embeddings)
        self.name = name
        self._tables = (tables,)  # in a tuple: the model owns them

    def forward(self, ids: Tensor) -> Tensor:
        """Look the vectors up."""
        vectors: Tensor = self._tables[0](ids, self.name)
        return vectors

    def note_(self, ids: Tensor) -> None:
        """Count items int64 ``(...)`` as if they were looked up."""
        self._tables[0].note_(ids, self.name)

    def scorer(self) -> TableScorer:
        """Scores of the table's rows."""
        return TableScorer(self._tables[0], self.name)

    @property
    def groups(self) -> tuple[EmbeddingTables, ...]:
        """The group that the table is of."""
        return self._tables


class MetadataItems(Items):
    """Items by their attributes alone, or with a vector of their own added: no row per item, or few.

    An attribute's values are pooled, the attributes' vectors concatenated, projected to D and normalized, as in M2TRec
    (arXiv 2209.11824); a linear map that is the identity at first then allows for other lengths. All attributes of all
    items asked for are one lookup; items asked for several times are composed once. An item without any value of an
    attribute has zeros there. Items outside ``[0, V)`` follow the tables' policy: with ``unseen="error"`` they raise,
    else they are items without any value, to which the residual adds what the policy says.

    Args:
        tables: a table per attribute, of width D.
        attributes: of all items; at least one.
        residual: where the table ``"item"`` is whose rows are added, which may be ``tables`` or another group, with a
            strategy and a budget of its own; None to add nothing.
        bag_pooling: of bags: ``"mean"``, or ``"idf"``, weighted by the logarithm of how few items of training have the
            value. Values that none of them has weigh next to nothing beside others.
        num_seen: items of training, which are the first ones; None for all.

    Raises:
        ConfigError: if ``bag_pooling`` is neither, or the residual has another width.
        InputError: if an attribute, or the residual, has no table.
    """

    _values: Tensor
    _offsets: Tensor
    _weights: Tensor | None
    _owners: Tensor
    _is_bag: Tensor

    def __init__(
        self,
        tables: EmbeddingTables,
        attributes: Sequence[Attribute],
        residual: EmbeddingTables | None = None,
        bag_pooling: str = "mean",
        num_seen: int | None = None,
    ) -> None:
        if bag_pooling not in POOLINGS:
            raise ConfigError(f"bag_pooling={bag_pooling!r} must be one of {', '.join(map(repr, POOLINGS))}")
        super().__init__(tables.embedding_dim, len(attributes[0].offsets) - 1)
        self._tables = (tables,)
        if residual is not None and residual.embedding_dim != self.dim:
            raise ConfigError(
                f"rows of items have {residual.embedding_dim} dimensions, and attributes {self.dim}: they are added"
            )
        self.num_attributes = len(attributes)
        self.residual = None if residual is None else ItemTable(residual)
        self.projection = nn.Linear(self.num_attributes * self.dim, self.dim)
        self.norm = nn.LayerNorm(self.dim)
        self.out = nn.Linear(self.dim, self.dim)
        nn.init.eye_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        values, offsets, weights = _cells(attributes, bag_pooling, self.num_items if num_seen is None else num_seen)
        self.register_buffer("_values", values, persistent=False)
        self.register_buffer("_offsets", offsets, persistent=False)
        self.register_buffer("_weights", weights, persistent=False)
        owners = [tables.index_of(attribute.name) for attribute in attributes]
        self.register_buffer("_owners", torch.tensor(owners), persistent=False)
        self.register_buffer("_is_bag", torch.tensor([a.is_bag for a in attributes]), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Compose the vectors of the distinct items, and hand them out.

        Raises:
            InputError: if ids are not integers.
            UnseenIdError: if an item is outside ``[0, V)``, and the tables' policy is to say so.
        """
        if ids.dtype not in (torch.int64, torch.int32):
            raise InputError(f"items must be an int64 tensor, not {ids.dtype}: call ids.long()")
        distinct, place = ids.long().unique(return_inverse=True)
        return self._compose(distinct)[place]

    def scorer(self) -> ItemScorer:
        """What composes items chunk by chunk, or has done so once and for all where there are no gradients."""
        if torch.is_grad_enabled():
            return ComposedScorer(self)
        every = torch.arange(self.num_items, device=self.device)
        return MatrixScorer(torch.cat([self._compose(ids) for ids in every.split(CHUNK)]))

    @property
    def device(self) -> torch.device:
        """Where the items are."""
        return self._offsets.device

    @property
    def tables(self) -> EmbeddingTables:
        """The tables of the attributes, which belong to the model."""
        return self._tables[0]

    @property
    def groups(self) -> tuple[EmbeddingTables, ...]:
        """The groups that items are composed of, one or two."""
        residual = () if self.residual is None else self.residual.groups
        return tuple(dict.fromkeys((*self._tables, *residual)))

    @property
    def lookups_per_item(self) -> int:
        """Rows of D floats that it takes to compose an item: of each attribute, or of each of its values if more."""
        return max(self.num_attributes, -(-len(self._values) // max(self.num_items, 1)))

    def view(self, ids: Tensor, kept: Tensor, dropout: float) -> Tensor:
        """Vectors of items of which only a part is seen, uncounted.

        Args:
            ids: int64 ``(n,)``.
            kept: bool ``(n, A)``, attributes that are seen.
            dropout: share of values that are lost of attributes with several.

        Returns:
            float32 ``(n, D)``, without a residual.
        """
        with self.tables.uncounted():
            pooled = self._pooled(ids, dropout)
        return self._of(pooled * kept[..., None])

    def _compose(self, ids: Tensor) -> Tensor:
        """Vectors of items int64 ``(n,)``: float32 ``(n, D)``."""
        vectors = self._of(self._pooled(self._known(ids)))
        return vectors if self.residual is None else vectors + self.residual(ids)

    def _known(self, ids: Tensor) -> Tensor:
        """Bring items int64 ``(n,)`` into ``[0, V]`` by the tables' policy, V being the item without any value."""
        if not ids.numel():
            return ids
        low, high = torch.aminmax(ids)
        if low >= 0 and high < self.num_items:
            return ids
        unseen = (ids < 0) | (ids >= self.num_items)
        if self.tables.config.unseen != "error":
            return ids.masked_fill(unseen, self.num_items)
        raise UnseenIdError(
            f"item {int(ids[unseen][0])} is outside the catalogue, which has items in [0, {self.num_items}); fix the "
            "items, or set unseen='zero', 'oov_row' or 'hash' in the config of the tables"
        )

    def _of(self, pooled: Tensor) -> Tensor:
        """Attributes float32 ``(n, A, D)`` to items ``(n, D)``."""
        vectors: Tensor = self.out(self.norm(self.projection(pooled.flatten(1))))
        return vectors

    def _pooled(self, ids: Tensor, dropout: float = 0.0) -> Tensor:
        """The attributes of items int64 ``(n,)`` in ``[0, V]``: float32 ``(n, A, D)``."""
        cells = (ids[:, None] * self.num_attributes + torch.arange(self.num_attributes, device=ids.device)).flatten()
        start = self._offsets[cells].long()
        length = self._offsets[cells + 1] - start
        bounds = torch.cat([length.new_zeros(1), length.cumsum(0)])
        cell = torch.repeat_interleave(length)
        flat = (start - bounds[:-1])[cell] + torch.arange(len(cell), device=ids.device)
        weights = (1 / length)[cell] if self._weights is None else self._weights[flat]
        if dropout:
            weights = torch.where(self._is_bag.repeat(len(ids))[cell], F.dropout(weights, dropout), weights)
        pooled = self._tables[0].bag(
            self._values[flat].long(),
            bounds,
            self._owners.repeat(len(ids))[cell],
            per_sample_weights=weights,
            include_last_offset=True,
        )
        return pooled.view(len(ids), self.num_attributes, self.dim)


class ComposedScorer(ItemScorer):
    """Items that are composed when they are scored, and again in the backward pass where they are many.

    Args:
        items: of metadata.
    """

    bias = None

    def __init__(self, items: MetadataItems) -> None:
        self.items, self.num_items, self.dim = items, items.num_items, items.dim

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the items are now."""
        return self.items.device

    @property
    def gradient_rows(self) -> int:
        """Items that are best composed at once: what they are composed of is as large as gradients of the tables."""
        if self.repeatable() is None:
            return self.num_items
        return sum(tables.gradient_rows for tables in self.items.groups) // self.items.lookups_per_item

    def repeatable(self) -> Repeat | None:
        """That of all tables; see `EmbeddingTables.repeatable`."""
        found = [tables.repeatable() for tables in self.items.groups]
        repeats = [repeat for repeat in found if repeat is not None]
        return partial(_all_of, repeats) if len(repeats) == len(found) else None

    def vectors(self, ids: Tensor) -> Tensor:
        """Compose items, uncounted: int64 ``(...)`` to float32 ``(..., D)``."""
        with self._uncounted():
            found: Tensor = self.items(ids)
        return found

    def stretches(self, queries: Tensor) -> list[Stretch]:
        """One for all items."""
        return [Stretch(range(self.num_items), queries, self._range)]

    def check_queries(self, queries: Tensor) -> Tensor:
        """Return queries as float32; see `embcomp.range_scores.check_queries`."""
        return check_queries(queries, self.dim, self.device, "items of metadata")

    def _range(self, ids: Ids) -> Tensor:
        numbers = torch.arange(ids.start, ids.stop, device=self.device) if isinstance(ids, range) else ids
        with self._uncounted():
            return self.items._compose(numbers)

    def _uncounted(self) -> AbstractContextManager[None]:
        return _all_of([tables.uncounted for tables in self.items.groups])


@contextmanager
def _all_of(contexts: Iterable[Callable[[], AbstractContextManager[Any]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        yield


def _cells(attributes: Sequence[Attribute], bag_pooling: str, num_seen: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The values of all attributes, item by item, in the smallest integers that hold them.

    Returns:
        values ``(n,)`` and where each cell of an item and an attribute begins, ``(A (V + 1) + 1,)``, int16 or int32,
        or int64 for offsets of very many; float32 weights ``(n,)``, None where all values of a cell weigh the same.
        One more item, behind the last, has no value of any attribute.
    """
    number = len(attributes)
    lengths = torch.stack([torch.tensor(a.lengths) for a in attributes], dim=1)
    ends = lengths.flatten().cumsum(0)
    offsets, total = torch.cat([ends.new_zeros(1), ends, ends[-1].repeat(number)]), int(ends[-1])
    values = torch.empty(total, dtype=_smallest(max(a.num_values for a in attributes)))
    weights = torch.empty(total) if bag_pooling == "idf" else None
    for column, attribute in enumerate(attributes):
        own = torch.tensor(attribute.values, dtype=torch.int64)
        item = torch.repeat_interleave(lengths[:, column])
        within = torch.arange(len(own)) - torch.tensor(attribute.offsets)[item]
        place = offsets[item * number + column] + within
        values[place] = own.to(values.dtype)
        if weights is not None:
            worth = torch.ones(len(own))
            if attribute.is_bag:
                having = torch.bincount(own[item < num_seen], minlength=attribute.num_values)
                worth = torch.where(having > 0, num_seen / having, 1.0).log().clamp_min(_LEAST_WORTH)[own]
            share = torch.zeros(len(lengths)).index_add_(0, item, worth)
            weights[place] = worth / share[item]
    return values, offsets.to(_smallest(total + 1)), weights


def _smallest(count: int) -> torch.dtype:
    """The smallest of these dtypes for numbers below ``count``."""
    return next(dtype for dtype in (torch.int16, torch.int32, torch.int64) if count - 1 <= torch.iinfo(dtype).max)
