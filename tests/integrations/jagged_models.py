"""Models with TorchRec's collections, batches for them, and how their outputs are compared."""

import copy

import torch
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)

import embcomp

SIZES = {"t1": 50, "t2": 40, "t3": 30}


def bags(is_weighted=False, dims=(4, 4, 6), poolings=("SUM", "MEAN", "SUM")):
    """Feature a in two tables, two features in t2, and t3 of another dimension."""
    features = {"t1": ["a"], "t2": ["b", "a"], "t3": ["c"]}
    torch.manual_seed(0)
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(
                name=name,
                embedding_dim=dim,
                num_embeddings=SIZES[name],
                feature_names=features[name],
                pooling=PoolingType[pooling],
            )
            for name, dim, pooling in zip(SIZES, dims, poolings, strict=True)
        ],
        is_weighted=is_weighted,
    )


def sequences(need_indices=False):
    features = {"t1": ["a"], "t2": ["b", "a"], "t3": ["c"]}
    torch.manual_seed(0)
    return EmbeddingCollection(
        [
            EmbeddingConfig(name=name, embedding_dim=4, num_embeddings=SIZES[name], feature_names=features[name])
            for name in SIZES
        ],
        need_indices=need_indices,
    )


def batch(keys=("a", "b", "c"), size=5, longest=3, weighted=False, seed=0, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (len(keys) * size,), generator=generator)
    number = int(lengths.sum())
    values = torch.randint(0, 30, (number,), generator=generator).to(dtype)
    weights = torch.rand(number, generator=generator) if weighted else None
    return KeyedJaggedTensor(list(keys), values, weights, lengths=lengths)


def compressed(model, config="full", **options):
    return embcomp.compress_(copy.deepcopy(model), config, init="trained", verbose=False, **options).model


def assert_same(found, wanted, rtol=1e-6, atol=1e-6):
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key, own in wanted.items():
            torch.testing.assert_close(found[key].values(), own.values(), rtol=rtol, atol=atol)
            assert torch.equal(found[key].lengths(), own.lengths())
            assert torch.equal(found[key].offsets(), own.offsets())
            one, other = found[key].weights_or_none(), own.weights_or_none()
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    else:
        assert found.keys() == wanted.keys()
        assert found.length_per_key() == wanted.length_per_key()
        assert found.values().dtype == wanted.values().dtype
        torch.testing.assert_close(found.values(), wanted.values(), rtol=rtol, atol=atol)


MODELS = {
    "bags": bags,
    "weighted bags": lambda: bags(True, poolings=("SUM", "SUM", "SUM")),
    "sequences": sequences,
    "sequences with indices": lambda: sequences(True),
}


class Net(nn.Module):
    """Logits of dense values and of what a collection finds."""

    def __init__(self, collection, width):
        super().__init__()
        self.sparse, self.out = collection, nn.Linear(width + 2, 1)

    def forward(self, dense, features):
        found = self.sparse(features)
        if isinstance(found, dict):
            pooled = [
                torch.segment_reduce(jagged.values(), "sum", lengths=jagged.lengths()) for jagged in found.values()
            ]
            return self.out(torch.cat([dense, *pooled], dim=1))
        return self.out(torch.cat([dense, found.values()], dim=1))
