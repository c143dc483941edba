"""Short runs of training: their config, their models, and what they end with."""

import dataclasses

import torch

from recsys_models.metrics import Metrics
from recsys_models.training import TrainingConfig
from tests.recsys_models.tiny import tiny_model

CONFIG = TrainingConfig(batch_size=64, epochs=3, learning_rate=0.01, device="cpu")
DROPOUT = {"dropout": 0.2, "batch_norm": True}


def config(**changes):
    return dataclasses.replace(CONFIG, **changes)


def seeded(data, *args, **options):
    torch.manual_seed(7)
    return tiny_model(data, *args, **options)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)


def scripted(monkeypatch, values):
    """Let evaluations find these AUCs (log loss: one minus it); return the weights at each."""
    seen, values = [], iter(values)

    def fake(model, batches):
        seen.append(state(model))
        auc = next(values)
        return Metrics(auc, 1 - auc, 200)

    monkeypatch.setattr("recsys_models.training.clicks.evaluate", fake)
    return seen
