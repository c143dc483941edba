"""Small ``dynamic`` tables, streams of raw ids for them, a step of training, and who has which slot."""

import torch

from embcomp import DynamicConfig, TableSpec, build_tables
from embcomp.strategies._dynamic_map import EMPTY
from embcomp.training import reset_rows_

SLOTS = {"user": 12, "item": 5}
EXTREMES = (-(2**63), 2**63 - 1, 2**63 - 2, -1, 0)


def make_tables(slots=None, dim=4, fallback=2, sizes=None, init_std=1.0, **options):
    slots = slots or SLOTS
    specs = [TableSpec(name, (sizes or {}).get(name, 100), dim, init_std=init_std) for name in slots]
    options = {"unseen": "hash", "interval": 4, **options}
    return build_tables(specs, DynamicConfig(num_slots=slots, num_fallback=dict.fromkeys(slots, fallback), **options))


def stream(steps, seed=0, batch=9, tables=2):
    """Raw 64-bit ids whose frequent ones drift, some of them extreme: int64 ``(B, T)`` each."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rank = torch.rand(batch, tables, generator=generator).pow(3).mul(30).long()
        ids = (rank + step // 3) * 7_046_029_254_386_353 - 2**62
        ids[0] = EXTREMES[step % len(EXTREMES)]
        yield ids


def train(tables, ids, *optimizers):
    tables(ids).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    tables.step_()
    reset_rows_([tables], *optimizers)


def slots_of(tables, table):
    places = tables.residents.map
    start, stop = places.starts[table], places.starts[table] + places.num_slots[table]
    rows = torch.stack([places.ids, places.slots, places.counts, places.last])[:, start:stop].T
    return {value: rest for value, *rest in rows.tolist() if value != EMPTY}
