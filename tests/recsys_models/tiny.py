"""A click log small enough for tests, with a signal to learn."""

import numpy as np

from embcomp import build_tables
from recsys_models.ctr import build_model, get_model
from recsys_models.data import ClickLog, Field, Split

SIZES = (50, 20, 4)


def tiny_log(rows=(600, 200, 200), sizes=SIZES, num_dense=0, seed=0, **replaced):
    """Clicks that depend on a hidden weight per id and on the dense features."""
    rng = np.random.default_rng(seed)
    hidden = [rng.normal(0, 1.5, size) for size in sizes]

    def split(count):
        ids = np.column_stack([rng.integers(0, size, count) for size in sizes]).astype(np.int32)
        dense = rng.normal(size=(count, num_dense)).astype(np.float32)
        score = sum(weights[ids[:, i]] for i, weights in enumerate(hidden)) + dense.sum(1)
        return Split(ids, dense, (score + rng.logistic(size=count) > 0).astype(np.float32))

    fields = tuple(Field(f"f{i}", size, np.arange(size, 0, -1)) for i, size in enumerate(sizes))
    splits = dict(zip(("train", "validation", "test"), map(split, rows), strict=True))
    values = {"name": "tiny", "fields": fields, "dense_names": tuple(f"d{i}" for i in range(num_dense))}
    return ClickLog(**{**values, **splits, "content_hash": f"tiny-{seed}", **replaced})


def tiny_model(data, name="deepfm", strategy="full", budget=None, dim=4, init_std=0.01, **options):
    """A model for `tiny_log`, the same at every call but for torch's global generator."""
    specs = get_model(name).table_specs(data.fields, dim, init_std)
    if name in ("fnn", "ipnn", "deepfm", "widedeep", "dcnv2", "dlrm"):
        options = {"hidden_units": (16, 8), **options}
    return build_model(name, build_tables(specs, strategy, budget), len(data.dense_names), **options)
