"""DeepFM with one ``nn.Embedding`` per feature in an ``nn.ModuleDict``: the layout of feature-map CTR libraries."""

import torch
from torch import nn

FEATURES = {
    "user": {"type": "categorical", "vocab_size": 300},
    "item": {"type": "categorical", "vocab_size": 500, "padding_idx": 0},
    "country": {"type": "categorical", "vocab_size": 7},
    "history": {"type": "sequence", "share_embedding": "item"},
    "price": {"type": "numeric"},
}


class FeatureEmbeddingDict(nn.Module):
    def __init__(self, features, dim):
        super().__init__()
        self.features = features
        self.embedding_layers = nn.ModuleDict()
        for name, spec in features.items():
            if "share_embedding" in spec:
                self.embedding_layers[name] = self.embedding_layers[spec["share_embedding"]]
            elif spec["type"] == "numeric":
                self.embedding_layers[name] = nn.Linear(1, dim, bias=False)
            else:
                layer = nn.Embedding(spec["vocab_size"], dim, padding_idx=spec.get("padding_idx"))
                nn.init.normal_(layer.weight[1:, :], std=1e-2)
                self.embedding_layers[name] = layer

    def forward(self, inputs):
        found = []
        for name, spec in self.features.items():
            layer, values = self.embedding_layers[name], inputs[name]
            if spec["type"] == "numeric":
                found.append(layer(values.float().view(-1, 1)))
            elif spec["type"] == "sequence":
                mask = (values != 0).unsqueeze(-1)
                found.append((layer(values.long()) * mask).sum(1) / mask.sum(1).clamp(min=1))
            else:
                found.append(layer(values.long()))
        return torch.stack(found, dim=1)


class DeepFM(nn.Module):
    def __init__(self, features=FEATURES, dim=8, hidden=32):
        super().__init__()
        self.embedding = FeatureEmbeddingDict(features, dim)
        self.first_order = FeatureEmbeddingDict(features, 1)
        self.mlp = nn.Sequential(nn.Linear(len(features) * dim, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, inputs):
        vectors = self.embedding(inputs)
        linear = self.first_order(inputs).sum(1)
        pairs = 0.5 * (vectors.sum(1).pow(2) - vectors.pow(2).sum(1)).sum(-1, keepdim=True)
        return (linear + pairs + self.mlp(vectors.flatten(1))).squeeze(-1)
