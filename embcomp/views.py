"""Look-alikes of ``nn.Embedding``, ``nn.EmbeddingBag`` and a tied ``nn.Linear`` over tables of a group.

Views own no parameters: the group does, which is registered once, elsewhere in the model, or in one view of it
(``owns=True``). So a state dict has no duplicates, and however many views a group has, it is moved, trained and saved
once. (``nn.DataParallel`` copies modules by their registered children and would leave the group behind;
``DistributedDataParallel`` does not.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from embcomp.constants import keeping_constants
from embcomp.errors import InputError
from embcomp.tables import EmbeddingTables

_ABOUT = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "is_sparse", "itemsize", "nbytes")),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device),
}
"""Questions about a tensor that need none of its values."""


class LazyWeight(Tensor):
    """Dense rows of a view ``(V, D)``, composed anew by every operation that reads values, differentiably.

    Asking for shape, dtype or device composes nothing. Writing raises `InputError`: no dense rows exist to write to.

    Args:
        view: whose rows they are.
        grad: whether gradients flow into the tables.
    """

    _view: TableView

    @staticmethod
    def __new__(cls: type[LazyWeight], view: TableView, grad: bool) -> LazyWeight:  # noqa: D102
        shape = (view.num_embeddings, view.embedding_dim)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=view.dtype, device=view.device, requires_grad=grad)

    def __init__(self, view: TableView, grad: bool) -> None:
        self._view = view

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        target = next((value for value in (kwargs.get("out"), *args, *kwargs.values()) if value is not None), None)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ABOUT:
                return func(*args, **kwargs)
            if isinstance(target, LazyWeight):
                if _writes(func) or kwargs.get("out") is target:
                    _refuse_write(target._view)
                if func in (Tensor.detach, Tensor.data.__get__):  # type: ignore[attr-defined]
                    return LazyWeight(target._view, False)
                if func is Tensor.is_leaf.__get__:  # type: ignore[attr-defined]
                    return False  # so that optimizers refuse it, instead of training nothing
            args, kwargs = tree_map(_composed, (tuple(args), kwargs))
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(_composed, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


class TableView(nn.Module):
    """One table of a group, or several in a row that the model addresses as one by offset ids.

    Args:
        tables: the group.
        names: names of the tables; ids of the second begin where those of the first end, and so on.
        dtype: of the vectors; follows ``.to(dtype)`` as a plain table's would.
        padding_idx: as the model sees it.
        table: name of the whole; needed where there are several names.
        owns: whether the group is registered here, as ``group``: for one view of a group that is not in the model
            otherwise, where nothing would train, move or save it.
    """

    max_norm = None
    norm_type = 2.0
    scale_grad_by_freq = False

    def __init__(
        self,
        tables: EmbeddingTables,
        names: Sequence[str],
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
        table: str | None = None,
        owns: bool = False,
    ) -> None:
        super().__init__()
        self._group = (tables,)  # the tuple keeps nn.Module from registering the group a second time
        if owns:
            self.add_module("group", tables)
        self.table = names[0] if table is None else table
        self.names = tuple(names)
        self._columns = [tables.index_of(name) for name in names]
        sizes = [tables.specs[column].num_embeddings for column in self._columns]
        self.num_embeddings = sum(sizes)
        self.embedding_dim = tables.embedding_dim
        self.padding_idx = padding_idx
        self.sparse = tables.config.sparse
        device = tables.get_buffer("_sizes").device
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)
        if len(sizes) > 1:
            starts = [sum(sizes[:index]) for index in range(len(sizes))]
            for name, values in (("_starts", starts), ("_owners", self._columns)):
                self.register_buffer(name, torch.tensor(values, device="cpu"), persistent=False)
        self.to(device)

    def resize_(self) -> None:
        """See how many ids the table has by now; for views of a single one."""
        self.num_embeddings = self.tables.specs[self._columns[0]].num_embeddings

    @property
    def tables(self) -> EmbeddingTables:
        """The group that owns the parameters."""
        return self._group[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""
        return self.get_buffer("_like").dtype

    @property
    def device(self) -> torch.device:
        """The device of the tables."""
        return self.get_buffer("_like").device

    @property
    def weight(self) -> Tensor:
        """Dense rows ``(V, D)``, to read: composed when something is computed with them, differentiable.

        Every use composes the whole table: to look ids up call the view, to score a vocabulary call `scores`. They
        can't be written: writing raises `InputError`.
        """
        if torch.compiler.is_compiling():
            return self.dense()
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.tables.parameters())
        return LazyWeight(self, trained)

    def _apply(self, fn: Any, recurse: bool = True) -> TableView:
        with keeping_constants(self):
            super()._apply(fn, recurse)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            _refuse_write(self)
        super().__setattr__(name, value)

    def dense(self) -> Tensor:
        """All rows ``(V, D)``, composed chunk by chunk."""
        rows = [self.tables.materialize(column) for column in self._columns]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(self.dtype)

    def scores(self, queries: Tensor) -> Tensor:
        """Inner products with every row: ``queries @ weight.T`` without the dense weight at once.

        Args:
            queries: float ``(..., D)``.

        Returns:
            float ``(..., V)``, in the view's dtype.
        """
        parts = [self.tables.scores(column, queries.to(torch.float32)) for column in self._columns]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(self.dtype)

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor | int]:
        """Split the model's ids ``(...)`` into ids of a table and which table, as `EmbeddingTables` takes them."""
        if len(self._columns) == 1:
            return ids, self._columns[0]
        starts = self.get_buffer("_starts")
        field = torch.bucketize(ids, starts[1:], right=True)
        return ids - starts[field], self.get_buffer("_owners")[field]

    def extra_repr(self) -> str:  # noqa: D102
        fields = f", fields={len(self.names)}" if len(self.names) > 1 else ""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        group = type(self.tables).__name__
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, table={self.table!r}{fields}, in={group}"


class EmbeddingView(TableView):
    """Looks like ``nn.Embedding``: ids ``(...)`` to vectors ``(..., D)``. The padding row is always zero."""

    def forward(self, input: Tensor) -> Tensor:
        """Look up vectors: int64 (or int32) ``(...)`` to float ``(..., D)``."""
        return self.tables(*self.locate(input)).to(self.dtype)


class EmbeddingBagView(TableView):
    """Looks like ``nn.EmbeddingBag``.

    Args:
        tables: the group.
        names: see `TableView`.
        mode: ``sum``, ``mean`` or ``max``.
        include_last_offset: whether offsets end with the number of ids.
        options: see `TableView`.
    """

    def __init__(
        self,
        tables: EmbeddingTables,
        names: Sequence[str],
        mode: str = "mean",
        include_last_offset: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(tables, names, **options)
        self.mode = mode
        self.include_last_offset = include_last_offset

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look up and pool.

        Args:
            input: int64 ``(B, L)``, or ``(N,)`` with offsets.
            offsets: int64 ``(B,)``, or ``(B + 1,)`` with ``include_last_offset``.
            per_sample_weights: float of the shape of ``input``; only with ``mode="sum"``.

        Returns:
            float ``(B, D)``.
        """
        ids, table = self.locate(input)
        pooled = self.tables.bag(ids, offsets, table, per_sample_weights, self.mode, self.include_last_offset)
        return pooled.to(self.dtype)


class TiedLinear(TableView):
    """Looks like the ``nn.Linear`` whose weight was an embedding's: scores of the whole vocabulary.

    Args:
        tables: the group.
        names: see `TableView`.
        bias: the layer's bias ``(V,)``, or None.
        options: see `TableView`.
    """

    def __init__(
        self, tables: EmbeddingTables, names: Sequence[str], bias: nn.Parameter | None = None, **options: Any
    ) -> None:
        super().__init__(tables, names, **options)
        self.in_features, self.out_features = self.embedding_dim, self.num_embeddings
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def resize_(self) -> None:
        """See how many ids the table has by now."""
        super().resize_()
        self.out_features = self.num_embeddings

    def forward(self, input: Tensor) -> Tensor:
        """Score: float ``(..., D)`` to ``(..., V)``."""
        scores = self.scores(input)
        return scores if self.bias is None else scores + self.bias


def _composed(value: Any) -> Any:
    if not isinstance(value, LazyWeight):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        grad = value.requires_grad
    with torch.set_grad_enabled(torch.is_grad_enabled() and grad):
        return value._view.dense()


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))


def _refuse_write(view: TableView) -> NoReturn:
    raise InputError(
        f"the weight of table {view.table!r} can't be written: its rows are composed of compressed parts. Set weights "
        "before compress_(..., init='trained'), or fit them with load_dense_({name: weight}) of the group (view.tables)"
    )
