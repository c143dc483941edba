"""Checks of strategies inside TorchRec's collections; without TorchRec there is nothing to check."""

from __future__ import annotations

import importlib.util

import torch

from embcomp.config import make_config
from embcomp.swap import compress_
from embcomp.testing._cases import SIZES, Strategy, make_specs, planned, require, require_close

_FEATURES = {"user": ["visitor", "author"], "flag": ["flag"], "item": ["item"], "genre": ["genre", "item"]}
_POOLED = {"user": "sum", "flag": "mean", "item": "sum", "genre": "sum"}
_KEYS = ["visitor", "author", "flag", "item@item", "genre", "item@genre"]


def check_collections(strategy: Strategy) -> None:
    """`compress_` leaves TorchRec's collections with the keys they had, and the vectors that the tables give."""
    if importlib.util.find_spec("torchrec") is None:
        return
    import torchrec

    plan = planned(strategy, make_specs(padded=()))
    asked = plan.budget_bytes
    config, budget = (plan.config, None) if asked is None else (make_config(strategy), f"{asked}B")
    lengths = torch.tensor([1, 0, 2, 1, 1, 1, 0, 3, 0, 1, 0, 0, 2, 1, 0])
    values = torch.randint(0, 2, (int(lengths.sum()),), generator=torch.Generator().manual_seed(0))
    features = torchrec.KeyedJaggedTensor(["item", "flag", "visitor", "genre", "author"], values, lengths=lengths)
    own = features.to_dict()

    bags = torchrec.EmbeddingBagCollection(
        [
            torchrec.EmbeddingBagConfig(
                name=name,
                embedding_dim=6,
                num_embeddings=size,
                feature_names=_FEATURES[name],
                pooling=torchrec.PoolingType[_POOLED[name].upper()],
            )
            for name, size in SIZES.items()
        ]
    )
    handle = compress_(bags, config, budget, verbose=False)
    (tables,) = handle.tables
    pooled = handle.model(features)
    require(pooled.keys() == _KEYS, f"keys {pooled.keys()}, and {_KEYS} before compress_")
    for key, vectors in pooled.to_dict().items():
        feature, table = _place_of(key)
        ids, offsets = own[feature].values(), own[feature].offsets()
        wanted = tables.bag(ids, offsets, f"embedding_bags.{table}", mode=_POOLED[table], include_last_offset=True)
        require_close(vectors, wanted, f"pooled {key!r}")
    pooled.values().sum().backward()
    require(any(p.grad is not None for p in handle.parameters()), "no gradient came through the collection")

    sequences = torchrec.EmbeddingCollection(
        [
            torchrec.EmbeddingConfig(name=name, embedding_dim=6, num_embeddings=size, feature_names=_FEATURES[name])
            for name, size in SIZES.items()
        ]
    )
    handle = compress_(sequences, config, budget, verbose=False)
    found = handle.model(features)
    require(list(found) == _KEYS, f"keys {list(found)}, and {_KEYS} before compress_")
    for key, jagged in found.items():
        feature, table = _place_of(key)
        wanted = handle.tables[0](own[feature].values(), f"embeddings.{table}")
        require_close(jagged.values(), wanted, f"vectors of {key!r}")


def _place_of(key: str) -> tuple[str, str]:
    """The feature and the table of a key."""
    feature, _, table = key.partition("@")
    return feature, table or next(name for name, features in _FEATURES.items() if feature in features)
