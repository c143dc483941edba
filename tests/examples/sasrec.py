"""SASRec: causal self-attention over a session, with the softmax tied to the item table."""

import torch
from torch import nn


class SASRec(nn.Module):
    def __init__(self, items=400, length=20, dim=16, blocks=2, heads=2):
        super().__init__()
        self.item_emb = nn.Embedding(items + 1, dim, padding_idx=0)
        self.pos_emb = nn.Embedding(length, dim)
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        self.head = nn.Linear(dim, items + 1)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)
        self.item_emb.weight.data[0, :] = 0
        self.head.weight = self.item_emb.weight

    def encode(self, seqs):
        positions = torch.arange(seqs.shape[1], device=self.item_emb.weight.device)
        hidden = self.item_emb(seqs) * self.item_emb.embedding_dim**0.5 + self.pos_emb(positions)
        hidden = hidden * (seqs != 0).unsqueeze(-1)
        mask = nn.Transformer.generate_square_subsequent_mask(seqs.shape[1], device=hidden.device)
        return self.blocks(hidden, mask=mask, is_causal=True)

    def forward(self, seqs):
        """Scores of all items after every position."""
        return self.head(self.encode(seqs))

    def sampled(self, seqs, positive, negative):
        hidden = self.encode(seqs)
        return (hidden * self.item_emb(positive)).sum(-1), (hidden * self.item_emb(negative)).sum(-1)

    def predict(self, seqs, candidates=None):
        last = self.encode(seqs)[:, -1]
        if candidates is None:
            return last @ self.item_emb.weight.t()
        return (self.item_emb(candidates) @ last.unsqueeze(-1)).squeeze(-1)
