"""Sessions small enough for tests, in which the next item follows from the last one."""

import dataclasses

import numpy as np
import torch

from embcomp import build_tables
from recsys_models.data import Attribute, Cases, Catalogue, Sequences, SessionLog
from recsys_models.session import MetadataItems, build_session_model, session_specs, table_counts

NUM_ITEMS = 30
NAMES = ("sasrec", "bert4rec", "gru4rec", "narm", "sr_gnn", "m2trec")
SESSIONS = [[3, 4, 3, 5], [7], [1, 2, 3, 4, 5, 6, 7], [9, 9, 9]]


def sequences(*sessions):
    """Sessions given as lists of items."""
    offsets = np.cumsum([0, *map(len, sessions)]).astype(np.int64)
    return Sequences(np.concatenate([np.asarray(s, np.int32) for s in sessions]), offsets)


def attribute(name, *values, num_values=None, is_bag=True):
    """An attribute given as lists of values, item by item."""
    offsets = np.cumsum([0, *map(len, values)]).astype(np.int64)
    flat = np.concatenate([np.asarray(own, np.int32) for own in values]) if offsets[-1] else np.empty(0, np.int32)
    number = num_values or int(flat.max(initial=0)) + 2
    return Attribute(name, number, flat, offsets, np.bincount(flat, minlength=number), None, is_bag)


def attributes(num_items=NUM_ITEMS, seed=0):
    """A kind of six, and words, of which some items have none."""
    rng = np.random.default_rng(seed)
    kinds = [[item % 6] for item in range(num_items)]
    words = [np.sort(rng.choice(12, rng.integers(0, 4), replace=False)) for _ in range(num_items)]
    return attribute("kind", *kinds, is_bag=False), attribute("words", *words, num_values=13)


def tiny_log(sessions=300, num_items=NUM_ITEMS, seed=0, filters_seen=False, with_attributes=True):
    """Most steps lead to the next number, the others anywhere."""
    rng = np.random.default_rng(seed)

    def walk():
        items = [int(rng.integers(num_items))]
        for _ in range(rng.integers(1, 9)):
            items.append((items[-1] + 1) % num_items if rng.random() < 0.8 else int(rng.integers(num_items)))
        return items

    def cases(number):
        own = sequences(*(numbers[walk()] for _ in range(number)))
        rows = np.repeat(np.arange(len(own), dtype=np.int32), own.lengths - 1)
        ends = np.concatenate([np.arange(1, length, dtype=np.int32) for length in own.lengths])
        return Cases(own, rows, ends)

    walks = [walk() for _ in range(sessions)]
    counts, numbers = np.bincount(np.concatenate(walks), minlength=num_items), np.empty(num_items, np.int64)
    numbers[np.argsort(counts == 0, kind="stable")] = np.arange(num_items)  # items that training lacks come last
    train = sequences(*(numbers[one] for one in walks))
    counts = np.bincount(train.items, minlength=num_items)
    catalogue = Catalogue(num_items, counts, np.arange(num_items), attributes(num_items) if with_attributes else ())
    return SessionLog("tiny", catalogue, train, cases(40), cases(40), f"tiny-{seed}", filters_seen)


def log_with_unseen_items(seen=25):
    """The items from `seen` on are of a kind that no other has, and occur in validation and test alone."""
    log, kinds = tiny_log(num_items=seen), [[item % 6 if item < seen else 6] for item in range(NUM_ITEMS)]
    counts = np.append(log.catalogue.counts, np.zeros(NUM_ITEMS - seen, np.int64))
    known = (attribute("kind", *kinds, num_values=7, is_bag=False), attributes()[1])
    whole = tiny_log(seed=1)
    return dataclasses.replace(
        whole, catalogue=Catalogue(NUM_ITEMS, counts, np.arange(NUM_ITEMS), known), train=log.train
    )


def tiny_model(log, name="sasrec", strategy="full", budget=None, dim=16, init_std=0.05, seed=0, **options):
    """A model for `tiny_log`, the same at every call."""
    torch.manual_seed(seed)
    options = {"max_length": 8, **options}
    specs = session_specs(name, log.catalogue, dim, init_std, **options)
    tables = build_tables(specs, strategy, budget, table_counts(specs, log.catalogue))
    return build_session_model(name, tables, log.catalogue, **options)


def padded(sessions, width=None, filler=0):
    width = width or max(map(len, sessions))
    items = torch.full((len(sessions), width), filler)
    for row, session in enumerate(sessions):
        items[row, : len(session)] = torch.tensor(session)
    return items, torch.tensor([len(session) for session in sessions])


def items_of(catalogue, strategy="full", residual=False, **options):
    torch.manual_seed(0)
    name = "hybrid" if residual else "metadata"
    tables = build_tables(session_specs("m2trec", catalogue, 8, 0.5, items=name), strategy)
    items = MetadataItems(tables, catalogue.attributes, tables if residual else None, **options)
    torch.nn.init.normal_(items.norm.weight)
    return tables, items


def constant_attributes(num_items, known=True):
    """A category that all items share, or none has, and two words that all have."""
    one = attribute("kind", *[[0 if known else 1]] * num_items, num_values=2, is_bag=False)
    return one, attribute("words", *[[0, 1]] * num_items, num_values=3)
