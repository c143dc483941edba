"""Statistics of batch norms where a model has several forms."""

import pytest
import torch
from torch import nn

from embcomp import NestedConfig, TableSpec, plan
from embcomp.training import Phases
from embcomp.training.batch_norms import recalibrate_, unmoved

DATA = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * 2 + 5


@pytest.mark.parametrize("momentum", [0.1, None])
def test_recalibration_is_for_good_and_of_all_that_was_run(momentum):
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum), nn.Dropout(0.9))
    model(DATA + 100)
    recalibrate_(model, lambda: [model(part) for part in DATA.split(16)])
    torch.testing.assert_close(model[0].running_mean, DATA.mean(0))
    variance = torch.stack([part.var(0) for part in DATA.split(16)]).mean(0)
    torch.testing.assert_close(model[0].running_var, variance)
    assert (model.training, model[0].training, model[0].momentum) == (True, True, momentum)


def test_a_model_without_batch_norms_is_not_run():
    recalibrate_(nn.Linear(3, 1), lambda: pytest.fail("there is nothing to recalibrate"))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_unmoved_statistics_stay_and_batches_are_normalized_by_themselves(momentum):
    norm = nn.BatchNorm1d(3, momentum=momentum)
    norm(DATA)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    with unmoved(norm):
        shifted = norm(3 * DATA + 100)
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
    torch.testing.assert_close(shifted, norm(DATA + 1), rtol=1e-3, atol=1e-3)
    assert not torch.equal(norm.running_mean, before["running_mean"])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = plan([TableSpec("a", 50, 8, init_std=1.0)], NestedConfig(projection="none")).build()
        self.norm, self.last = nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, ids):
        return self.last(self.norm(self.tables(ids).flatten(1))).squeeze(1)


def test_statistics_of_passes_are_those_of_the_first():
    model, ids = Model(), torch.arange(50).unsqueeze(1)
    phases = Phases(model)
    phases.enter_(phases.phases[0])
    assert phases.phase.passes[0] == "full"
    phases.loss(lambda: model(ids), lambda logits: logits.square().mean()).backward()
    torch.testing.assert_close(model.norm.running_mean, 0.1 * model.tables.rows.weight.mean(0))
    assert model.norm.num_batches_tracked == 1
