"""Three models as people write them, which know nothing of embcomp, through a whole life: three lines changed."""

import copy

import pytest
import torch
import torch.nn.functional as F

import embcomp
from tests.examples.fused_deepfm import FIELD_DIMS, FusedDeepFM
from tests.examples.moduledict_deepfm import FEATURES, DeepFM
from tests.examples.sasrec import SASRec

BATCH = 16


def deepfm_batch():
    batch = {
        name: torch.randint(0, spec["vocab_size"], (BATCH,))
        for name, spec in FEATURES.items()
        if spec["type"] == "categorical"
    }
    batch["history"] = torch.randint(0, 500, (BATCH, 5))
    batch["history"][0] = 0
    return batch | {"price": torch.rand(BATCH)}


def fused_batch():
    return torch.stack([torch.randint(0, size, (BATCH,)) for size in FIELD_DIMS], 1)


def sasrec_batch():
    seqs = torch.randint(1, 401, (BATCH, 10))
    seqs[:, :4] = 0
    return seqs


FUSED = {"embedding.embedding": FIELD_DIMS, "linear.fc": {f"field{i}": size for i, size in enumerate(FIELD_DIMS)}}
CASES = {
    "moduledict_deepfm": (DeepFM, deepfm_batch, {}),
    "fused_deepfm": (FusedDeepFM, fused_batch, {"fused": FUSED}),
    "sasrec": (SASRec, sasrec_batch, {}),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    make, batch, options = CASES[request.param]
    return make(), batch(), {"verbose": False, **options}


def train(model, batch, steps=12):
    """Fit random labels; returns the first and the last loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with torch.no_grad():
        labels = (torch.rand_like(model(batch)) > 0.5).float()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(batch), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def test_full_tables_fitted_to_trained_ones_change_nothing(case):
    model, batch, options = case
    expected = model.eval()(batch)
    embcomp.compress_(model, "full", init="trained", **options)
    torch.testing.assert_close(model(batch), expected)


def test_trains_at_a_tenth_of_the_bytes_then_saves_and_serves(case, tmp_path):
    model, batch, options = case
    fresh, shape = copy.deepcopy(model), model(batch).shape
    handle = embcomp.compress_(model, "hash", budget="10%", **options)
    assert model(batch).shape == shape
    assert handle.memory().serve_bytes <= 0.1 * handle.memory().full_bytes
    assert not any(isinstance(module, torch.nn.Embedding) for module in model.modules())
    first, last = train(model, batch)
    assert last < 0.9 * first
    expected = model.eval()(batch)
    embcomp.finalize_(model)
    torch.testing.assert_close(model(batch), expected)
    embcomp.save_pretrained(model, tmp_path)
    served = embcomp.load_pretrained_(fresh.eval(), tmp_path, verbose=False).model
    assert torch.equal(served(batch), model(batch))


def test_exports(case):
    model, batch, options = case
    embcomp.compress_(model, "hash", budget="10%", **options)
    embcomp.finalize_(model.eval())
    program = torch.export.export(model, (batch,))
    torch.testing.assert_close(program.module()(batch), model(batch))


def test_the_shared_embedding_stays_one_table():
    model = DeepFM()
    handle = embcomp.compress_(model, "hash", budget="10%", verbose=False)
    layers = model.embedding.embedding_layers
    assert layers["history"] is layers["item"]
    assert "embedding.embedding_layers.history" in handle.report()
    assert sum(tables.num_tables for tables in handle.tables) == 6


def test_the_linear_tables_of_dimension_one_are_a_group_of_their_own():
    model = FusedDeepFM()
    handle = embcomp.compress_(model, "hash", budget="10%", fused=FUSED, verbose=False)
    assert {tables.embedding_dim: tables.names for tables in handle.tables} == {
        1: tuple(f"linear.fc.field{i}" for i in range(5)),
        16: tuple(f"embedding.embedding.{i}" for i in range(5)),
    }


def test_the_tied_softmax_follows_the_item_table():
    torch.manual_seed(0)
    model, seqs = SASRec(), sasrec_batch()
    handle = embcomp.compress_(model, "hash", budget="10%", verbose=False)
    assert isinstance(model.head, embcomp.TiedLinear)
    assert "head: tied to item_emb" in handle.report()
    hidden = model.encode(seqs)
    dense = handle.to_dense()["item_emb"]
    torch.testing.assert_close(model.head(hidden), hidden @ dense.T + model.head.bias)
    torch.testing.assert_close(model.predict(seqs), hidden[:, -1] @ dense.T)
    torch.testing.assert_close(model.predict(seqs, seqs), (dense[seqs] @ hidden[:, -1].unsqueeze(-1)).squeeze(-1))
    model.head(hidden.detach()).sum().backward()
    assert handle.tables[0].rows.weight.grad.abs().sum() > 0
    positive, negative = model.sampled(seqs, seqs, seqs.flip(1))
    assert positive.shape == negative.shape == seqs.shape
