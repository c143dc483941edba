"""Strategies that search for their form, in every click model: trained, finalized, within the budget."""

import dataclasses

import pytest
import torch

from embcomp import NestedConfig, OptEmbedConfig
from recsys_models.ctr import MODELS
from recsys_models.metrics import evaluate
from recsys_models.training import TrainingConfig, fit
from tests.recsys_models.tiny import tiny_log, tiny_model

DATA = tiny_log(num_dense=1)
CONFIG = TrainingConfig(batch_size=64, epochs=2, learning_rate=0.02, patience=None, device="cpu", search_rows=100)
SEARCH = {"generations": 2, "mutations": 3, "crossovers": 3, "parents": 4}


@pytest.mark.parametrize("strategy", [OptEmbedConfig(**SEARCH), NestedConfig(), NestedConfig(retrain="initial")])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_trains_searches_and_serves_within_the_budget(name, strategy):
    torch.manual_seed(0)
    model = tiny_model(DATA, name, strategy, "50%")
    result = fit(model, DATA, CONFIG)
    trained = evaluate(model, DATA.validation)
    model.tables.finalize_()
    assert sum(t.nbytes for t in model.tables.state_dict().values()) <= model.tables.config.limit_bytes
    assert evaluate(model, DATA.validation).auc == pytest.approx(trained.auc, abs=1e-4)
    assert any(phase.stopped == "search" for phase in result.phases)
    assert trained.auc > 0.5


@pytest.mark.parametrize("rows", ["int8", "int4:column", "bfloat16"])
@pytest.mark.parametrize("strategy", [OptEmbedConfig(**SEARCH), NestedConfig(retrain="finetune")])
def test_searches_compose_with_row_formats(strategy, rows):
    torch.manual_seed(0)
    strategy = dataclasses.replace(strategy, rows=rows)
    model = tiny_model(DATA, "deepfm", strategy, "60%", dim=7)
    fit(model, DATA, dataclasses.replace(CONFIG, float_epochs=1))
    trained = evaluate(model, DATA.validation)
    model.tables.finalize_()
    assert sum(t.nbytes for t in model.tables.state_dict().values()) <= model.tables.config.limit_bytes
    assert evaluate(model, DATA.validation).log_loss == pytest.approx(trained.log_loss, abs=1e-4)
