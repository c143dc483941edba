"""What checkpoints are of: a model with tables of every kind, and tables alone; their files, and what they hold."""

import json
from pathlib import Path

import torch
from torch import nn

import embcomp
from embcomp import _checkpoint
from embcomp._checkpoint import CONFIG
from embcomp.storage import RowStore

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.tensor([1, 5, 0, 19])


class Model(nn.Module):
    def __init__(self, items=300, hidden=5):
        super().__init__()
        torch.manual_seed(0)
        self.user = nn.Embedding(200, 8, padding_idx=0)
        self.item = nn.Embedding(items, 8)
        self.wide = nn.EmbeddingBag(100, 1, mode="sum")
        self.fused = nn.Embedding(30, 8)
        self.hidden = nn.Linear(8, hidden)
        self.out = nn.Linear(8, items)
        self.out.weight = self.item.weight
        self.again = self.hidden
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, ids):
        vectors = self.user(ids) + self.item(ids) + self.fused(ids) + self.wide(ids[:, None])
        return self.out(vectors).sum(1, keepdim=True) + self.again(vectors)


class Tied(nn.Module):
    """A weight and a buffer that several modules share, beside a table."""

    def __init__(self):
        super().__init__()
        self.item = nn.Embedding(200, 8)
        self.register_buffer("scratch", torch.ones(8), persistent=False)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        for layer in (self.a, self.b):
            layer.register_buffer("mean", self.scratch)


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


FUSED = {"fused": {"a": 10, "b": 20}}


def compressed(strategy="hash", budget="50%", **options):
    model = Model(**options)
    return embcomp.compress_(model, strategy, budget, fused=FUSED, verbose=False)


def of_rows(rows, is_rounding):
    """A compressed model, trained as far as its spans are of odd sizes."""
    torch.manual_seed(1)
    model = compressed(embcomp.HashConfig(rows=rows)).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + 0.1 * torch.rand_like(parameter))
    return set_rounding_(model, is_rounding)


def set_rounding_(model, enabled):
    for group in model.embcomp_tables:
        group.set_rounding_(enabled)
    return model


def unrounded(model):
    return [name for name, module in model.named_modules() if isinstance(module, RowStore) and module.is_unrounded]


def tables(strategy="hash", budget="50%", *sizes):
    return embcomp.build_tables(
        [embcomp.TableSpec(f"t{i}", n, 8) for i, n in enumerate(sizes or (500, 3))], strategy, budget
    )


def weights_file(folder):
    (file,) = folder.glob("model-*.safetensors")
    return file


def edit(folder, **changes):
    file = folder / CONFIG
    file.write_text(json.dumps(_checkpoint.sealed(json.loads(file.read_text()) | changes)))


def same(one, other):
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)
