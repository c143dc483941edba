"""TorchRec's collections on compressed tables: one lookup per group, whatever the number of features.

Shapes: ``F`` features, ``B`` batch, ``N`` ids of all bags together, ``D`` dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from embcomp.constants import keeping_constants
from embcomp.errors import InputError, UnseenIdError
from embcomp.integrations.versions import torchrec_error, warn_of_versions
from embcomp.sites import GROUPS, has_hooks, put
from embcomp.tables import EmbeddingTables
from embcomp.views import EmbeddingBagView, EmbeddingView, TableView

try:
    from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, EmbeddingConfig
    from torchrec.modules.embedding_modules import (
        EmbeddingBagCollection,
        EmbeddingBagCollectionInterface,
        EmbeddingCollection,
        EmbeddingCollectionInterface,
        get_embedding_names_by_table,
    )
    from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
    from torchrec.sparse.tensor_dict import maybe_td_to_kjt
except (ImportError, OSError) as error:
    raise torchrec_error(error) from error
warn_of_versions()

COLLECTIONS = (EmbeddingBagCollection, EmbeddingCollection)
Config = TypeVar("Config", bound=BaseEmbeddingConfig)


@dataclass(frozen=True)
class _Slot:
    """A feature in one of its tables: a key of the output.

    Attributes:
        place: among the keys.
        feature: its name.
        key: what the output calls it.
        view: of its table.
    """

    place: int
    feature: str
    key: str
    view: TableView


class _Lookup(nn.Module):
    """One lookup in one group, for all features of its tables."""

    columns: Tensor
    is_mean: Tensor

    def __init__(self, slots: Sequence[_Slot]) -> None:
        super().__init__()
        self.features = [slot.feature for slot in slots]
        self.places = [slot.place for slot in slots]
        modes = [getattr(slot.view, "mode", "") for slot in slots]
        self.mode: str = modes[0] if len(set(modes)) == 1 else "sum"  # of which means are made afterwards
        self.is_mixed = len(set(modes)) > 1
        self._view = (slots[0].view,)  # the tuple keeps nn.Module from registering what the model owns
        self.owners = [self.tables.index_of(slot.view.names[0]) for slot in slots]
        self.only_column = self.owners[0] if len(set(self.owners)) == 1 else None
        self.register_buffer("columns", torch.tensor(self.owners, device="cpu"), persistent=False)
        self.register_buffer(
            "is_mean", torch.tensor([mode == "mean" for mode in modes], device="cpu"), persistent=False
        )
        self.to(slots[0].view.device)

    @property
    def tables(self) -> EmbeddingTables:
        """The group."""
        return self._view[0].tables

    def _apply(self, fn: Any, recurse: bool = True) -> _Lookup:
        with keeping_constants(self):
            super()._apply(fn, recurse)
        return self

    def own(self, features: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, Tensor | None]:
        """The lookup's features, in its order, and their weights."""
        keys, weights = list(features.keys()), features.weights_or_none()
        if keys == self.features:
            return features, weights
        order = [keys.index(name) for name in self.features]
        own = features.permute(order)
        if weights is None or not weights.requires_grad:
            return own, own.weights_or_none()
        # FBGEMM's gradient of permuted weights is right where each feature comes once, and writes anywhere elsewhere.
        parts = weights.split(features.length_per_key())
        return own, torch.cat([parts[place] for place in order])

    def averaged(self, pooled: Tensor, lengths: Tensor, strides: Sequence[int]) -> Tensor:
        """Sums ``(ΣB, D)``, and means where the table has means.

        Args:
            pooled: sums.
            lengths: of the bags ``(ΣB,)``.
            strides: bags of each feature.
        """
        if not self.is_mixed:
            return pooled
        bags = self.is_mean.repeat_interleave(torch.tensor(strides, device=pooled.device), output_size=len(lengths))
        return pooled / torch.where(bags, lengths.clamp_min(1), 1).unsqueeze(1)

    def look_up(self, own: KeyedJaggedTensor, found: Callable[..., Tensor]) -> Tensor:
        """Call what looks ids up, with the table that each is of; one that it refuses is placed within its feature."""
        try:
            return found(own.values(), table=self.column_of(own))
        except UnseenIdError:
            ids = own.values().split(own.length_per_key())
            for feature, its_ids, owner in zip(self.features, ids, self.owners, strict=True):
                try:
                    with torch.no_grad():
                        self.tables.note_(its_ids, owner)
                except UnseenIdError as error:
                    raise UnseenIdError(f"feature {feature!r}: {error}") from None
            raise

    def column_of(self, features: KeyedJaggedTensor) -> Tensor | int:
        """Which table of the group each id is of: int64 ``(N,)``."""
        if self.only_column is not None:
            return self.only_column
        repeats = torch.tensor(features.length_per_key(), device=self.columns.device)
        return torch.repeat_interleave(self.columns, repeats, output_size=features.values().numel())

    def rounds(self, features: KeyedJaggedTensor) -> Iterator[tuple[dict[int, int], Tensor, Tensor]]:
        """For graphs, which fail on sizes that hang on lengths: all ids of the batch, of other features as ids 0.

        Yields:
            place among the keys of the output -> which feature of the batch it is of, ids ``(N,)``, and which table of
            the group each is of, int64 ``(N,)``: once, and again for features that are in several tables.
        """
        keys, ids = list(features.keys()), features.values()
        repeats = features.lengths().view(len(keys), -1).sum(1)
        waiting = list(range(len(self.features)))
        while waiting:
            now = {keys.index(self.features[slot]): slot for slot in reversed(waiting)}
            waiting = [slot for slot in waiting if slot not in now.values()]
            owners = [self.owners[now[key]] if key in now else -1 for key in range(len(keys))]
            column = torch.tensor(owners, device=ids.device).repeat_interleave(repeats, output_size=ids.numel())
            answered = {self.places[slot]: key for key, slot in now.items()}
            yield answered, torch.where(column < 0, 0, ids), column.clamp_min(0)


class _Compressed(nn.Module):
    """What both collections have in common.

    Args:
        configs: of the tables.
        views: table -> its view, in the order of the configs.
        is_weighted: whether ids have weights.
    """

    def __init__(
        self, configs: Sequence[BaseEmbeddingConfig], views: Sequence[TableView], is_weighted: bool = False
    ) -> None:
        super().__init__()
        names = get_embedding_names_by_table(list(configs))
        slots: list[_Slot] = []
        for config, keys, view in zip(configs, names, views, strict=True):
            for feature, key in zip(config.feature_names, keys, strict=True):
                slots.append(_Slot(len(slots), feature, key, view))
        groups: dict[tuple[int, str], list[_Slot]] = {}
        for slot in slots:
            groups.setdefault((id(slot.view.tables), _kind_of(slot.view, is_weighted)), []).append(slot)
        self.keys = [slot.key for slot in slots]
        self.feature_names = list(dict.fromkeys(slot.feature for slot in slots))
        self.lookups = nn.ModuleList(_Lookup(own) for own in groups.values())

    @property
    def device(self) -> torch.device:
        """The device of the tables."""
        return self._lookups()[0].columns.device

    def _lookups(self) -> list[_Lookup]:
        return [lookup for lookup in self.lookups if isinstance(lookup, _Lookup)]


def _kind_of(view: TableView, is_weighted: bool) -> str:
    """Features of one kind are pooled together: sums and means, unless means skip ids or have weights to refuse."""
    mode: str = getattr(view, "mode", "")
    has_padding = any(spec.padding_idx is not None for spec in view.tables.specs)
    return mode if is_weighted or has_padding or mode not in ("sum", "mean") else "sum or mean"


def _grown(configs: Sequence[Config], views: Sequence[nn.Module]) -> list[Config]:
    """Configs with as many ids as their tables have by now."""
    return [replace(config, num_embeddings=view.num_embeddings) for config, view in zip(configs, views, strict=True)]


def checked(features: KeyedJaggedTensor, wanted: Sequence[str], weighted: bool) -> KeyedJaggedTensor:
    """Check that a ``KeyedJaggedTensor`` has the features of a collection, and is one whole.

    Args:
        features: of ids; a ``TensorDict`` is turned into one.
        wanted: names of the collection's features.
        weighted: whether it needs weights.

    Raises:
        InputError: if it is none, a feature or the weights are missing, a feature is there twice, or numbers of
            lengths, offsets, values and weights do not go together. What lengths add up to is looked at on the CPU,
            and in graphs, where it is a ``RuntimeError``.
    """
    if isinstance(features, Proxy):
        raise InputError(
            "torch.fx can't trace a compressed collection: trace around it, by torchrec.fx.Tracer(leaf_modules=["
            "'CompressedEmbeddingBagCollection', 'CompressedEmbeddingCollection']), or export the model (torch.export)"
        )
    kjt: KeyedJaggedTensor = maybe_td_to_kjt(features, None)
    if not isinstance(kjt, KeyedJaggedTensor):
        raise InputError(f"the collection looks up a KeyedJaggedTensor, not a {type(kjt).__name__}")
    known = kjt.keys()
    if missing := [name for name in wanted if name not in known]:
        raise InputError(
            f"the KeyedJaggedTensor lacks features {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, known)) or 'none'}, and this collection looks {', '.join(wanted)} up"
        )
    if weighted and kjt.weights_or_none() is None:
        raise InputError(
            "the collection is weighted (is_weighted=True), and the KeyedJaggedTensor has no weights: give "
            "weights=, one float per value"
        )
    weights, number = kjt.weights_or_none(), kjt.values().numel()
    if weights is not None and weights.numel() != number:
        raise InputError(
            f"the KeyedJaggedTensor has {number} values and {weights.numel()} weights: give one float per value"
        )
    if len(set(known)) < len(known):
        raise InputError(f"the KeyedJaggedTensor has a feature twice: {', '.join(map(repr, known))}")
    _check_lengths(kjt)
    return kjt


def _check_lengths(kjt: KeyedJaggedTensor) -> None:
    """Check lengths and offsets: FBGEMM and torch read and write beyond the ends of tensors where they are wrong."""
    given, offsets = kjt.lengths_or_none(), kjt.offsets_or_none()
    if given is None and offsets is None:
        raise InputError("the KeyedJaggedTensor has neither lengths nor offsets: give one of them")
    lengths, number, keys = kjt.lengths(), kjt.values().numel(), len(kjt.keys())
    if kjt.variable_stride_per_key():
        strides, wanted = kjt.stride_per_key(), sum(kjt.stride_per_key())
        if wanted != lengths.numel():
            raise InputError(
                f"the KeyedJaggedTensor has {lengths.numel()} lengths, and strides {strides} that add up to {wanted}"
            )
    elif lengths.numel() % keys:
        raise InputError(
            f"the KeyedJaggedTensor has {lengths.numel()} lengths for {keys} features: give as many of each"
        )
    elif kjt.stride() * keys != lengths.numel():
        raise InputError(
            f"the KeyedJaggedTensor has {lengths.numel()} lengths, and stride={kjt.stride()} for {keys} features: "
            "leave stride out"
        )
    if torch.compiler.is_compiling():
        is_right = (lengths >= 0).all() & (lengths.sum() == number)
        torch._assert_async(is_right, "lengths of a KeyedJaggedTensor must not be negative, and add up to its values")
    elif kjt.values().device.type == "cpu":
        total = int(lengths.sum())
        if total != number:
            raise InputError(f"the KeyedJaggedTensor has {number} values, and lengths that add up to {total}")
        if lengths.numel() and int(lengths.min()) < 0:
            raise InputError("the KeyedJaggedTensor has a negative length")
        if given is not None and offsets is not None and not _bounds(offsets, given):
            raise InputError("the KeyedJaggedTensor has lengths and offsets that do not go together: give one of them")


def _bounds(offsets: Tensor, lengths: Tensor) -> bool:
    """Whether offsets are those of lengths."""
    return offsets.numel() == lengths.numel() + 1 and not bool(offsets[0]) and bool((offsets.diff() == lengths).all())


class CompressedEmbeddingBagCollection(_Compressed, EmbeddingBagCollectionInterface):
    """Looks like the ``EmbeddingBagCollection`` that it was: the same keys in the same order, float32.

    Args:
        collection: whose tables are views of groups.
    """

    def __init__(self, collection: EmbeddingBagCollection) -> None:
        tables, is_weighted = list(collection.embedding_bags.values()), collection.is_weighted()
        super().__init__(collection.embedding_bag_configs(), tables, is_weighted)
        self.embedding_bags = collection.embedding_bags
        self._configs, self._is_weighted = collection.embedding_bag_configs(), is_weighted
        self._lengths = [config.embedding_dim for config in self._configs for _ in config.feature_names]
        self._means = [
            view.mode == "mean"
            for config, view in zip(self._configs, tables, strict=True)
            for _ in config.feature_names
        ]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool, once per group.

        Args:
            features: of ids, int64 or int32; with weights if the collection is weighted. Keys may come in any order,
                and there may be more of them.

        Raises:
            InputError: if a feature or the weights are missing, a feature is there twice, or numbers of lengths, values
                and weights do not go together.
            UnseenIdError: if an id is outside its table, and the tables' policy is to say so.
        """
        features = checked(features, self.feature_names, self._is_weighted)
        exporting = torch.compiler.is_exporting() and not features.variable_stride_per_key()
        pieces = self._traced(features) if exporting else self._pooled(features)
        return KeyedTensor(self.keys, self._lengths, torch.cat(pieces, dim=1))

    def _pooled(self, features: KeyedJaggedTensor) -> list[Tensor]:
        pieces: list[Tensor] = [torch.empty(0)] * len(self.keys)
        for lookup in self._lookups():
            own, weights = lookup.own(features)
            bag = partial(
                lookup.tables.bag,
                offsets=own.offsets(),
                per_sample_weights=weights if self._is_weighted else None,
                mode=lookup.mode,
                include_last_offset=True,
            )
            pooled = lookup.look_up(own, bag)
            rows = lookup.averaged(pooled, own.lengths(), own.stride_per_key()).split(own.stride_per_key())
            for place, name, part in zip(lookup.places, lookup.features, rows, strict=True):
                index = _inverse(features, name)
                pieces[place] = part if index is None else part.index_select(0, index)
        return pieces

    def _traced(self, features: KeyedJaggedTensor) -> list[Tensor]:
        pieces: list[Tensor] = [torch.empty(0)] * len(self.keys)
        weights = features.weights() if self._is_weighted else None
        bounds = nn.functional.pad(features.lengths().cumsum(0), (1, 0))  # without FBGEMM, which may not be there
        sizes = features.lengths().clamp_min(1).view(len(features.keys()), -1, 1)
        for lookup in self._lookups():
            for places, ids, column in lookup.rounds(features):
                pooled = lookup.tables.bag(ids, bounds, column, weights, lookup.mode, True)
                rows = pooled.view(len(features.keys()), -1, pooled.shape[1])
                for place, key in places.items():
                    pieces[place] = rows[key] / sizes[key] if lookup.is_mixed and self._means[place] else rows[key]
        return pieces

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The configs of the tables, as they were, with the numbers of ids that they have now."""
        return _grown(self._configs, list(self.embedding_bags.values()))

    def is_weighted(self) -> bool:
        """Whether ids have weights."""
        return self._is_weighted


class CompressedEmbeddingCollection(_Compressed, EmbeddingCollectionInterface):
    """Looks like the ``EmbeddingCollection`` that it was: a vector for every id, float32.

    Args:
        collection: whose tables are views of groups.
    """

    def __init__(self, collection: EmbeddingCollection) -> None:
        super().__init__(collection.embedding_configs(), list(collection.embeddings.values()))
        self.embeddings = collection.embeddings
        self._configs, self._need_indices = collection.embedding_configs(), collection.need_indices()
        self._dim, self._names = collection.embedding_dim(), collection.embedding_names_by_table()

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Look up, once per group.

        Args:
            features: of ids, int64 or int32. Keys may come in any order, and there may be more of them.

        Returns:
            Key -> vectors ``(N_f, D)`` with the lengths of the feature, and its ids as weights if they are needed.

        Raises:
            InputError: if a feature is missing, or lengths do not add up to the values.
            UnseenIdError: if an id is outside its table, and the tables' policy is to say so.
        """
        features = checked(features, self.feature_names, weighted=False)
        exporting = torch.compiler.is_exporting() and not features.variable_stride_per_key()
        found = self._traced(features) if exporting else self._found(features)
        return {key: found[place] for place, key in enumerate(self.keys)}

    def _found(self, features: KeyedJaggedTensor) -> dict[int, JaggedTensor]:
        found: dict[int, JaggedTensor] = {}
        for lookup in self._lookups():
            own, _ = lookup.own(features)
            vectors = lookup.look_up(own, lookup.tables).split(own.length_per_key())
            ids = own.values().split(own.length_per_key())
            lengths = own.lengths().split(own.stride_per_key())
            for place, rows, its_ids, its_lengths in zip(lookup.places, vectors, ids, lengths, strict=True):
                found[place] = JaggedTensor(rows, its_ids if self._need_indices else None, its_lengths)
        return found

    def _traced(self, features: KeyedJaggedTensor) -> dict[int, JaggedTensor]:
        found: dict[int, JaggedTensor] = {}
        sizes, lengths = features.length_per_key(), features.lengths().view(len(features.keys()), -1)
        own_ids = features.values().split(sizes)
        for lookup in self._lookups():
            for places, ids, column in lookup.rounds(features):
                vectors = lookup.tables(ids, column).split(sizes)
                for place, key in places.items():
                    its_ids = own_ids[key] if self._need_indices else None
                    found[place] = JaggedTensor(vectors[key], its_ids, lengths[key])
        return found

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The configs of the tables, as they were, with the numbers of ids that they have now."""
        return _grown(self._configs, list(self.embeddings.values()))

    def need_indices(self) -> bool:
        """Whether ids are returned along."""
        return self._need_indices

    def embedding_dim(self) -> int:
        """D."""
        return self._dim

    def embedding_names_by_table(self) -> list[list[str]]:
        """Keys of the output, table by table."""
        return self._names


def fuse(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Replace the collections in a model, all of whose tables are views; see `fuse_collections`."""
    notes: list[str] = []
    replaced: dict[int, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, COLLECTIONS):
            continue
        if id(module) not in replaced:
            if why := _unfit(module):
                if any(isinstance(table, TableView) for table in _tables_of(module)):
                    notes.append(f"  {path or type(module).__name__}: looks features up one by one, since {why}")
                continue
            replaced[id(module)] = _compressed(module)
            if not path:
                notes.append(f"  the model itself was the {type(module).__name__}: go on with handle.model")
        model = put(model, path, replaced[id(module)])
    return model, notes


def _unfit(collection: Any) -> str:
    """Why the features of a collection can't be looked up at once; empty if they can."""
    plain = EmbeddingBagCollection if isinstance(collection, EmbeddingBagCollection) else EmbeddingCollection
    tables = _tables_of(collection)
    if type(collection).forward is not plain.forward:
        return f"{type(collection).__name__} has a forward of its own"
    if has_hooks(collection):
        return "it has hooks, which would be lost: register them after compress_"
    if not all(isinstance(table, EmbeddingBagView | EmbeddingView) and len(table.names) == 1 for table in tables):
        return "not all of its tables are compressed, each as one"
    return ""


def _compressed(collection: Any) -> nn.Module:
    bags = isinstance(collection, EmbeddingBagCollection)
    made = CompressedEmbeddingBagCollection(collection) if bags else CompressedEmbeddingCollection(collection)
    if hasattr(collection, GROUPS):  # it is the model itself
        made.add_module(GROUPS, getattr(collection, GROUPS))
    made.training = collection.training
    return made


def _tables_of(collection: Any) -> list[nn.Module]:
    kept = collection.embedding_bags if isinstance(collection, EmbeddingBagCollection) else collection.embeddings
    return list(kept.values())


def _inverse(features: KeyedJaggedTensor, name: str) -> Tensor | None:
    """For batches without duplicates: which row of a feature each sample has, int64 ``(B,)``."""
    inverse = features.inverse_indices_or_none()
    return None if inverse is None else inverse[1][inverse[0].index(name)]
