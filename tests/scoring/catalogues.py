"""Small catalogues: a table of every strategy, and matrices."""

import torch

import embcomp
from embcomp import TableSpec, build_tables, make_config
from embcomp.scoring import MatrixScorer, TableScorer

SPECS = (TableSpec("user", 40, 6, init_std=1.0), TableSpec("item", 130, 6, padding_idx=3, init_std=1.0))
OPTIONS = {
    "hash, sum of 2": ("hash", {"num_hashes": 2}),
    "hash, weighted": ("hash", {"num_hashes": 2, "combine": "weighted"}),
    "compositional, sum": ("compositional", {"combine": "sum"}),
    "compositional, concat": ("compositional", {"combine": "concat"}),
    "compact, shared": ("compact", {"layout": {"user": "40<6x32", "item": "20<6x32 70<3x8 130<2x32/3"}}),
    "quantize, 2 bits": ("quantize", {"bits": 2}),
    "full, int4": ("full", {"rows": "int4:row"}),
    "hash, sparse": ("hash", {"sparse": True}),
    "low_rank, sparse": ("low_rank", {"sparse": True}),
    **{name: (name, {}) for name in embcomp.list_strategies()},
}


def build(name, **options):
    """A group with counts, trained by a step."""
    strategy, chosen = OPTIONS[name]
    config = make_config(strategy, **chosen, **options)
    sized = config.__class__.__name__ == "FullConfig" or chosen.keys() & {"layout", "bits"}
    counts = {spec.name: torch.arange(spec.num_embeddings, 0, -1) for spec in SPECS}
    tables = build_tables(SPECS, config, None if sized else "60%", counts)
    with torch.no_grad():
        for number, parameter in enumerate(tables.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return tables


def scorer_of(name, bias=None):
    return TableScorer(build(name), "item", bias)


def matrix_scorer(num_items=50, dim=4, seed=0, dtype=torch.float32, bias=False):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(num_items, dim, generator=generator, dtype=dtype)
    return MatrixScorer(matrix, torch.randn(num_items, generator=generator, dtype=dtype) if bias else None)
