"""TorchRec's quantized collection on exported rows, behind the tables' own policy for unseen ids.

FBGEMM's kernels look up row 0 for ids outside a table, and log a line. So ids are brought into range before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embcomp.errors import ExportError, InputError, UnseenIdError, did_you_mean
from embcomp.hashing import hash_seed, hash_to_range
from embcomp.integrations.export.fbgemm_file import QuantizedTable, has_row_for_unseen
from embcomp.integrations.versions import torchrec_error, warn_of_versions

try:
    from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
    from torchrec.quant.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
    from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

    from embcomp.integrations.torchrec import checked
except (ImportError, OSError) as error:
    raise torchrec_error(error) from error
warn_of_versions()

_POOLINGS, _NO_POOLING = ("sum", "mean"), "none"
_ROW_ALIGNMENT = 16
"""Of FBGEMM's CUDA kernels; TorchRec's default everywhere, where rows of 20 bytes then take 32."""


class QuantizedTables(nn.Module):
    """Called like TorchRec's collections: ``KeyedJaggedTensor`` to ``KeyedTensor``, bags of ids to pooled vectors.

    Without pooling, to a dict of ``JaggedTensor``, with the vectors of all ids.

    Args:
        tables: what is in the collection.
        state: the tensors of `embcomp.integrations.export.export_fbgemm`.
        unseen: the policy for ids outside ``[0, V)``.
        seed: of hashes of such ids.
        features: table name -> names of its features, or None.
        pooling: ``"sum"`` or ``"mean"``, of all tables or of each; or ``"none"``.
        is_weighted: whether bags have weights.
        device: of the rows.

    Attributes:
        collection: TorchRec's quantized ``EmbeddingBagCollection``, or ``EmbeddingCollection`` without pooling, for
            callers whose ids are in range.
    """

    _sizes: Tensor
    _seeds: Tensor

    def __init__(
        self,
        tables: Sequence[QuantizedTable],
        state: Mapping[str, Tensor],
        unseen: str,
        seed: int,
        features: Mapping[str, Sequence[str]] | None,
        pooling: str | Mapping[str, str],
        is_weighted: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.unseen, self.names = unseen, [table.name for table in tables]
        _check(self.names, features)
        named = {name: list((features or {}).get(name, [name])) for name in self.names}
        self._owner = {feature: index for index, own in enumerate(named.values()) for feature in own}
        weights = {_inner_name(name): _weights(name, state) for name in self.names}
        alignment = 1 if device.type == "cpu" else _ROW_ALIGNMENT
        self.is_weighted = is_weighted
        self.collection: EmbeddingBagCollection | EmbeddingCollection
        if pooling == _NO_POOLING:
            if is_weighted:
                raise ExportError("is_weighted=True needs pooling: weights are of what is summed")
            rows = [EmbeddingConfig(**_options(table, named[table.name], unseen)) for table in tables]
            self.collection = EmbeddingCollection(
                rows, device, table_name_to_quantized_weights=weights, row_alignment=alignment
            )
        else:
            bags = [
                EmbeddingBagConfig(**_options(table, named[table.name], unseen), pooling=kind)
                for table, kind in zip(tables, _poolings(tables, pooling), strict=True)
            ]
            self.collection = EmbeddingBagCollection(
                bags, is_weighted, device, table_name_to_quantized_weights=weights, row_alignment=alignment
            )
        sizes = torch.tensor([table.num_embeddings for table in tables], device=device)
        seeds = torch.tensor([hash_seed(seed, name, "unseen") for name in self.names], device=device)
        self.register_buffer("_sizes", sizes, persistent=False)
        self.register_buffer("_seeds", seeds, persistent=False)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor | dict[str, JaggedTensor]:
        """Look up and pool.

        Args:
            features: of ids, int64 or int32; with a float weight per id if the collection is weighted. Keys may come in
                any order, and there may be more of them.

        Returns:
            float32 ``(B, D)`` per feature; without pooling ``(N_f, D)``, with the feature's lengths.

        Raises:
            InputError: if a feature or weights are missing, a feature is there twice, features have bags in different
                numbers, ids are no integers, or lengths or weights do not go with the ids.
            UnseenIdError: if ``unseen="error"`` and an id is outside its table.
        """
        features = checked(features, list(self._owner), self.is_weighted)
        self._check_kernels(features)
        keys = [key for key in features.keys() if key in self._owner]  # noqa: SIM118
        chosen = features if keys == list(features.keys()) else features.permute([*map(features.keys().index, keys)])
        lengths = torch.tensor(chosen.length_per_key(), device=self._sizes.device)
        owner = torch.tensor([self._owner[key] for key in keys], device=lengths.device).repeat_interleave(lengths)
        values = self._in_range(chosen.values().long(), owner)
        mapped = KeyedJaggedTensor(keys, values, weights=chosen.weights_or_none(), lengths=chosen.lengths())
        found: KeyedTensor | dict[str, JaggedTensor] = self.collection(mapped)
        return found

    def _check_kernels(self, features: KeyedJaggedTensor) -> None:
        """What else the kernels need: they take what they are given."""
        ids, weights = features.values(), features.weights_or_none()
        if ids.dtype not in (torch.int64, torch.int32):
            raise InputError(f"ids of tables {', '.join(self.names)} must be int64, not {ids.dtype}: call ids.long()")
        if (total := sum(features.length_per_key())) != ids.numel():  # on a GPU too, where `checked` does not look
            raise InputError(f"the KeyedJaggedTensor has {ids.numel()} values, and lengths that add up to {total}")
        if features.variable_stride_per_key():
            raise InputError(
                f"the KeyedJaggedTensor has {features.stride_per_key()} bags of features {features.keys()}: FBGEMM's "
                "kernels want as many of each"
            )
        if self.is_weighted and weights is not None and not weights.is_floating_point():
            raise InputError(f"the KeyedJaggedTensor has {weights.dtype} weights: give floats")

    def _in_range(self, ids: Tensor, owner: Tensor) -> Tensor:
        """Ids ``(N,)`` of tables ``(N,)``, those that are unseen brought to where their vectors are."""
        sizes = self._sizes[owner]
        unseen = (ids < 0) | (ids >= sizes)
        if self.unseen == "hash":
            return torch.where(unseen, hash_to_range(ids, self._seeds[owner], sizes), ids)
        if self.unseen != "error":
            return torch.where(unseen, sizes, ids)  # the row behind the table's
        if unseen.any():
            place = int(unseen.nonzero()[0])
            raise UnseenIdError(
                f"id {int(ids[place])} is outside table {self.names[int(owner[place])]!r}, which has ids in "
                f"[0, {int(sizes[place])}); fix the ids, or set unseen='zero', 'oov_row' or 'hash' in the config"
            )
        return ids


def _check(names: Sequence[str], features: Mapping[str, Sequence[str]] | None) -> None:
    for name in features or {}:
        if name not in names:
            raise ExportError(f"features: no table {name!r}; {did_you_mean(name, names)}")
    owners: dict[str, str] = {}
    for name in names:
        for feature in (features or {}).get(name, [name]):
            if owners.setdefault(feature, name) != name:
                raise ExportError(
                    f"features: {feature!r} looks tables {owners[feature]!r} and {name!r} up, and here a feature has "
                    "one table: give the KeyedJaggedTensor its ids under a second name"
                )


def _poolings(tables: Sequence[QuantizedTable], pooling: str | Mapping[str, str]) -> list[PoolingType]:
    """Of every table, as TorchRec calls it."""
    names = [table.name for table in tables]
    given = dict.fromkeys(names, pooling) if isinstance(pooling, str) else dict(pooling)
    for name in (*names, *given):
        if name not in names or name not in given:
            problem = "says nothing of table" if name in names else "has no table"
            raise ExportError(f"pooling {problem} {name!r}; {did_you_mean(name, names)}")
    for table in tables:
        if (kind := given[table.name]) not in _POOLINGS:
            raise ExportError(f"pooling of table {table.name!r}: {kind!r}; {did_you_mean(str(kind), _POOLINGS)}")
        if kind == "mean" and table.padding_idx is not None:
            raise ExportError(
                f"pooling='mean': FBGEMM would count the padding of table {table.name!r}; use 'sum', and divide by "
                "lengths"
            )
    return [PoolingType[given[name].upper()] for name in names]


def _options(table: QuantizedTable, features: list[str], unseen: str) -> dict[str, Any]:
    """Of TorchRec's configs."""
    return {
        "name": _inner_name(table.name),
        "embedding_dim": table.embedding_dim,
        "num_embeddings": table.num_embeddings + has_row_for_unseen(unseen),
        "feature_names": features,
        "data_type": DataType[table.data_type],
    }


def _inner_name(name: str) -> str:
    """What the collection calls a table; its tables are modules, in whose names there can be no dots."""
    return name.replace(".", "/")


def _weights(name: str, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Bytes of rows, and of their scales and biases, as FBGEMM takes them."""
    if (rows := state.get(f"{name}.rows")) is not None:
        return rows.view(torch.uint8), None
    return state[f"{name}.codes"], state[f"{name}.scale_bias"].view(torch.uint8)
