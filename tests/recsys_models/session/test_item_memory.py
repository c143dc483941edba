"""What composes and scores items takes no memory for all of them at once."""

import numpy as np
import pytest
import torch

from embcomp import build_tables, range_scores
from embcomp.scoring import cross_entropy, softmax
from embcomp.testing.training import LargestTensor
from recsys_models.data import Catalogue
from recsys_models.session import MetadataItems, build_session_model, distillation, session_specs
from recsys_models.session.distillation import distill_
from tests.recsys_models.session.tiny import attribute, constant_attributes, items_of


@pytest.mark.parametrize("items", ["metadata", "hybrid"])
@pytest.mark.parametrize("strategy", ["full", "unified"])
def test_bug_composing_many_items_takes_no_more_memory_than_gradients_do(strategy, items, monkeypatch):
    """All of them were composed at once where tables are large: of a million items 5.6 GiB."""
    monkeypatch.setattr(softmax, "_PIECE", 100)
    number, rng = 20_000, np.random.default_rng(0)
    bags = [np.unique(rng.integers(0, number, 8)) for _ in range(number)]
    known = (attribute("words", *bags, num_values=number + 1), attribute("more", *bags, num_values=number + 1))
    catalogue = Catalogue(number, np.ones(number, np.int64), np.arange(number), known)
    specs = session_specs("m2trec", catalogue, 16, items=items)
    tables = build_tables(specs, strategy, None if strategy == "full" else "50%")
    made = MetadataItems(tables, known, tables if items == "hybrid" else None)
    queries, targets = torch.randn(4, 16, requires_grad=True), torch.arange(4)
    with (largest := LargestTensor()):
        cross_entropy(made.scorer(), queries, targets, chunk=100).backward()
    assert largest.size <= 1.1 * sum(p.nbytes for p in tables.parameters()), largest.by


@pytest.mark.parametrize("items", ["id", "metadata", "hybrid"])
def test_bug_scores_of_models_take_no_matrix_of_all_items(items, monkeypatch):
    monkeypatch.setattr(range_scores, "ids_at_once", lambda queries: 500)
    number = 20_000
    catalogue = Catalogue(number, np.ones(number, np.int64), np.arange(number), (constant_attributes(number)[1],))
    specs = session_specs("m2trec", catalogue, 16, items=items)
    tables = build_tables(specs, "compositional", "20%") if items == "id" else build_tables(specs)
    model = build_session_model("m2trec", tables, catalogue, items=items, max_length=8).eval()
    sessions = torch.tensor([[1, 2]]), torch.tensor([2])
    with (largest := LargestTensor()):
        scores = model(*sessions)
    assert scores.shape == (1, number)
    if items == "id":  # of metadata a matrix is composed once, where there are no gradients
        assert largest.size < 16 * number, largest.by
    with torch.no_grad():
        torch.testing.assert_close(model(*sessions), scores.detach(), rtol=1e-4, atol=1e-6)


def test_bug_distilling_composes_no_matrix_of_all_items(monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", 100)
    number = 5000
    catalogue = Catalogue(number, np.ones(number, np.int64), np.arange(number), constant_attributes(number))
    _, items = items_of(catalogue)
    vectors = torch.randn(number, 8)
    with (largest := LargestTensor()):
        left = distill_(items, vectors, np.ones(number, np.int64), steps=0)
    assert largest.size <= 8 * 4 * number, largest.by  # two attributes of all items would take twice that
    with torch.no_grad():
        total = (items(torch.arange(number)) - vectors).square().sum() / (vectors - vectors.mean(0)).square().sum()
    assert left == pytest.approx(float(total), rel=1e-5)
