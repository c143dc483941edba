import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

from embcomp.errors import InputError
from recsys_models.errors import TrainingError
from recsys_models.metrics import click_metrics, evaluate, predict
from tests.recsys_models.tiny import tiny_log, tiny_model


def test_against_the_definitions():
    rng = np.random.default_rng(0)
    labels = (rng.random(60) < 0.3).astype(np.float32)
    logits = np.round(rng.normal(size=60) + labels, 1).astype(np.float32)  # rounded, so that there are ties
    pairs = [(p > n) + 0.5 * (p == n) for p in logits[labels == 1] for n in logits[labels == 0]]
    losses = [math.log1p(math.exp(-x if y else x)) for x, y in zip(logits.tolist(), labels, strict=True)]
    metrics = click_metrics(labels, logits)
    assert metrics.auc == pytest.approx(np.mean(pairs), abs=1e-12)
    assert metrics.log_loss == pytest.approx(np.mean(losses), abs=1e-12)
    assert metrics.num_rows == 60


def test_certain_mistakes_are_clipped_and_keep_their_rank():
    metrics = click_metrics(np.array([0.0, 1.0, 1.0]), np.array([1000.0, 2000.0, -3000.0]))
    assert metrics.log_loss == pytest.approx(-2 / 3 * math.log(1e-7), rel=1e-6)
    assert metrics.auc == 0.5  # float probabilities of 1000 and 2000 would be tied


def test_one_class(caplog):
    with caplog.at_level(logging.WARNING):
        metrics = click_metrics(np.ones(3), np.zeros(3))
    assert math.isnan(metrics.auc)
    assert metrics.log_loss == pytest.approx(math.log(2))
    assert "AUC is undefined" in caplog.text


def test_wrong_inputs():
    with pytest.raises(InputError, match="at least 1"):
        click_metrics(np.empty(0), np.empty(0))
    with pytest.raises(InputError, match="one shape"):
        click_metrics(np.ones(3), np.ones(4))
    with pytest.raises(InputError, match=r"0 or 1; found .*0\.5"):
        click_metrics(np.array([0.0, 0.5]), np.ones(2))
    with pytest.raises(TrainingError, match="1 of 2 logits"):
        click_metrics(np.array([0.0, 1.0]), np.array([np.nan, 1.0]))


def test_predict_in_any_batch_size():
    data = tiny_log(num_dense=2)
    model = tiny_model(data, batch_norm=True, dropout=0.5).train()
    whole = predict(model, data.test)
    assert model.training
    assert whole.dtype == np.float32
    assert whole.shape == (len(data.test),)
    model.eval()
    expected = model(torch.from_numpy(data.test.ids).long(), torch.from_numpy(data.test.dense))
    np.testing.assert_allclose(whole, expected.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(predict(model, data.test, batch_size=7), whole, rtol=1e-5, atol=1e-7)
    assert not model.training
    assert evaluate(model, data.test.batches(64)).auc == pytest.approx(click_metrics(data.test.labels, whole).auc)


def test_a_model_without_parameters_and_an_empty_split():
    class Constant(nn.Module):
        def forward(self, ids, dense):
            return torch.zeros(len(ids))

    data = tiny_log()
    assert evaluate(Constant(), data.test).auc == 0.5
    empty = type(data.test)(data.test.ids[:0], data.test.dense[:0], data.test.labels[:0])
    assert len(predict(Constant(), empty)) == 0
    with pytest.raises(InputError, match="at least 1"):
        evaluate(Constant(), empty)
