"""DeepFM with one fused table for all fields, addressed by offsets: the layout of compact FM libraries."""

import numpy as np
import torch
from torch import nn

FIELD_DIMS = [120, 7, 1, 400, 33]


class FeaturesEmbedding(nn.Module):
    def __init__(self, field_dims, dim):
        super().__init__()
        self.embedding = nn.Embedding(sum(field_dims), dim)
        self.offsets = np.array((0, *np.cumsum(field_dims)[:-1]), dtype=np.int64)
        nn.init.xavier_uniform_(self.embedding.weight.data)

    def forward(self, x):
        x = x + x.new_tensor(self.offsets).unsqueeze(0)
        return self.embedding(x)


class FeaturesLinear(nn.Module):
    def __init__(self, field_dims):
        super().__init__()
        self.fc = nn.Embedding(sum(field_dims), 1)
        self.bias = nn.Parameter(torch.zeros((1,)))
        self.offsets = np.array((0, *np.cumsum(field_dims)[:-1]), dtype=np.int64)

    def forward(self, x):
        x = x + x.new_tensor(self.offsets).unsqueeze(0)
        return torch.sum(self.fc(x), dim=1) + self.bias


class FusedDeepFM(nn.Module):
    def __init__(self, field_dims=FIELD_DIMS, dim=16, hidden=32):
        super().__init__()
        self.linear = FeaturesLinear(field_dims)
        self.embedding = FeaturesEmbedding(field_dims, dim)
        self.mlp = nn.Sequential(nn.Linear(len(field_dims) * dim, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, x):
        vectors = self.embedding(x)
        pairs = 0.5 * (vectors.sum(1) ** 2 - (vectors**2).sum(1)).sum(1, keepdim=True)
        return torch.sigmoid((self.linear(x) + pairs + self.mlp(vectors.flatten(1))).squeeze(1))
