"""A model on compressed tables, trained by one process or by several."""

import torch
from torch import nn

import embcomp
from embcomp.integrations import sharding
from embcomp.storage.base import MatrixRows
from embcomp.training import RowwiseAdagrad

SIZES = {"user": 300, "item": 50, "genre": 7}
BATCH, STEPS, RATE = 32, 50, 0.1
CASES = {
    "full": {},
    "hash": {"budget": "40%"},
    "compositional": {"budget": "40%"},
    "unified": {"budget": "40%"},
    "low_rank": {"budget": "60%"},
    "quantize": {"budget": "60%"},
    "reduced_dim": {"budget": "60%"},
    "frequency_cut": {"budget": "60%"},
    "full, int4": {"budget": None, "rows": "int4:column"},
    "full, int8 after": {"budget": None, "rows": "int8:row:after"},
}


class Model(nn.Module):
    def __init__(self, tables):
        super().__init__()
        self.tables = tables
        self.out = nn.Linear(3 * tables.embedding_dim, 1)

    def forward(self, ids):
        return self.out(self.tables(ids).flatten(1)).squeeze(1)


def model_of(case, dim=8):
    options = dict(CASES[case])
    budget = options.pop("budget", None)
    torch.manual_seed(0)
    specs = [embcomp.TableSpec(name, size, dim, init_std=0.5) for name, size in SIZES.items()]
    return Model(embcomp.build_tables(specs, embcomp.make_config(case.split(",")[0], **options), budget))


def batches(steps=STEPS):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.stack([torch.randint(0, size, (BATCH,), generator=generator) for size in SIZES.values()], dim=1)
        yield ids, (ids.sum(1) % 2).float()


def losses_of(model, optimizers, part, steps=STEPS):
    found = []
    for ids, labels in batches(steps):
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids[part]), labels[part])
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        found.append(loss.item())
    return found


def optimizers_of(model, parameters, name):
    """One for rows that are among the parameters, SGD for the others."""
    known = {id(p) for p in parameters}
    stores = [m for m in model.modules() if isinstance(m, MatrixRows) and m.elsewhere is None]
    rows = [store.weight for store in stores if id(store.weight) in known]
    rest = [p for p in parameters if not any(p is row for row in rows)]
    kind = RowwiseAdagrad if name == "rowwise_adagrad" else torch.optim.SGD
    return [torch.optim.SGD(rest, lr=RATE), *([kind(rows, lr=RATE)] if rows else [])]


def alone(case, optimizer, dim=8):
    model = model_of(case, dim)
    return losses_of(model, optimizers_of(model, list(model.parameters()), optimizer), slice(None))


def train(rank, world_size, plans):
    found = []
    part = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    for case, optimizer, kind, dim in plans:
        options = {"eps": 1e-10} if optimizer == "rowwise_adagrad" else {}
        model = sharding.distribute(model_of(case, dim), optimizer, RATE, kind, **options)
        found.append(losses_of(model, optimizers_of(model, list(sharding.dense_parameters(model)), optimizer), part))
    return found
