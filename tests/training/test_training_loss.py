"""Strategies that replace the training step, in a plain loop, in `fit`, and beside other groups."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from embcomp import TableSpec
from embcomp.errors import ConfigError
from embcomp.strategies.full import FullConfig, FullTables
from embcomp.training import Phases
from recsys_models.ctr import build_model, get_model
from recsys_models.training import TrainingConfig, fit
from tests.recsys_models.tiny import tiny_log
from tests.training.stepping import RADIUS, Penalized, SharpnessAware, Silencing, TwiceAlike

IDS = torch.tensor([[0, 2], [1, 1], [3, 0], [3, 2]])
CLICKS = torch.tensor([1.0, 0.0, 1.0, 0.0])


def tables_of(kind, dim=3):
    specs = [TableSpec("user", 4, dim, init_std=1.0), TableSpec("movie", 3, dim, init_std=1.0)]
    return kind(specs, FullConfig(seed=dim))


class Model(nn.Module):
    def __init__(self, *kinds, dropout=0.0):
        super().__init__()
        torch.manual_seed(5)
        self.groups = nn.ModuleList(tables_of(kind, dim) for dim, kind in enumerate(kinds, 3))
        width = sum(2 * dim for dim, _ in enumerate(kinds, 3))
        self.norm, self.dropout, self.out = nn.BatchNorm1d(width), nn.Dropout(dropout), nn.Linear(width, 1)

    def forward(self, ids):
        vectors = torch.cat([tables(ids).flatten(1) for tables in self.groups], 1)
        return self.out(self.dropout(self.norm(vectors))).squeeze(1)


def begun(*kinds, **options):
    phases = Phases(Model(*kinds, **options))
    phases.enter_(phases.phases[0])
    return phases


def loss_of(phases):
    return phases.loss(lambda: phases.model(IDS), lambda logits: F.binary_cross_entropy_with_logits(logits, CLICKS))


def reference(model, weights):
    """The loss with other rows: of the first group, written out."""
    user, movie = weights[IDS[:, 0]], weights[4 + IDS[:, 1]]
    vectors = torch.cat([user, movie], 1)
    normal = (vectors - vectors.mean(0)) / (vectors.var(0, unbiased=False) + model.norm.eps).sqrt()
    logits = model.out(normal * model.norm.weight + model.norm.bias).squeeze(1)
    return F.binary_cross_entropy_with_logits(logits, CLICKS)


def test_gradients_are_those_of_the_perturbed_rows():
    phases = begun(SharpnessAware)
    model, (tables,) = phases.model, phases.groups
    weight = tables.rows.weight
    [gradient] = torch.autograd.grad(reference(model, weight), [weight])
    wanted = reference(model, weight + RADIUS * gradient / gradient.norm())
    expected = torch.autograd.grad(wanted, [weight, model.out.weight])
    loss = loss_of(phases)
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close([weight.grad, model.out.weight.grad], list(expected))
    assert float((weight.grad - gradient).abs().max()) > 1e-3
    assert tables.offset is None
    assert int(model.norm.num_batches_tracked) == 1  # as by a step of one pass


def test_predictions_of_both_passes_can_be_compared():
    plain, twice = begun(FullTables), begun(TwiceAlike)
    torch.testing.assert_close(loss_of(twice), loss_of(plain))  # without dropout the two are alike
    torch.manual_seed(1)
    phases = begun(TwiceAlike, dropout=0.5)
    torch.manual_seed(2)
    total = loss_of(phases)
    torch.manual_seed(2)
    first, second = phases.model(IDS), phases.model(IDS)
    losses = [F.binary_cross_entropy_with_logits(logits, CLICKS) for logits in (first, second)]
    torch.testing.assert_close(total, sum(losses) / 2 + (first - second).square().mean())
    assert float((first - second).detach().abs().max()) > 0.1


# ---- several groups ------------------------------------------------------------------------------------------------


def counted(phases):
    calls, step = [], phases.model.forward
    phases.model.forward = lambda ids: calls.append(1) or step(ids)
    return calls


def test_steps_of_several_groups_are_made_one_within_the_other_and_passes_and_penalties_stay():
    for kinds, number in (
        ((FullTables, FullTables), 1),
        ((SharpnessAware, FullTables), 2),
        ((SharpnessAware, TwiceAlike), 4),
        ((TwiceAlike, SharpnessAware), 4),
        ((SharpnessAware, Penalized, TwiceAlike), 8),
    ):
        phases = begun(*kinds)
        calls, penalty = counted(phases), sum(float(tables.penalty().detach()) for tables in phases.groups)
        loss = loss_of(phases).detach()
        assert len(calls) == number
        phases.groups[-1].penalty = lambda: torch.tensor(1000.0)
        assert float(loss_of(phases).detach() - loss) == pytest.approx(
            1000 - (penalty if kinds[-1] is Penalized else 0), 1e-3
        )


@pytest.mark.parametrize("kinds", [(Silencing,), (Silencing, SharpnessAware), (SharpnessAware, Silencing)])
def test_a_step_that_forgets_the_others_is_refused(kinds):
    with pytest.raises(ConfigError, match=r"training_loss of .*Silencing.* never calls the step that it is given"):
        loss_of(begun(*kinds))


def test_lookups_of_a_step_are_not_repeated_in_its_backward_pass():
    assert tables_of(FullTables).repeatable() is not None
    assert tables_of(SharpnessAware).repeatable() is None
    assert tables_of(SharpnessAware).eval().repeatable() is not None


# ---- whole loops ---------------------------------------------------------------------------------------------------


def test_a_plain_loop_trains_by_it():
    phases, plain = begun(SharpnessAware), begun(FullTables)
    for each in (phases, plain):
        optimizer = torch.optim.SGD(each.parameters(), 0.5)
        first = float(loss_of(each).detach())
        for _ in range(20):
            optimizer.zero_grad()
            loss_of(each).backward()
            optimizer.step()
            each.step_()
        assert float(loss_of(each).detach()) < first - 0.2
    assert not torch.allclose(phases.groups[0].rows.weight, plain.groups[0].rows.weight, atol=1e-3)


def test_fit_trains_by_it_and_says_the_loss_of_the_batch_as_it_was_seen():
    data, found = tiny_log(), {}
    config = TrainingConfig(batch_size=64, epochs=1, learning_rate=0.1, optimizer="sgd", clip_norm=None, device="cpu")
    for kind in (FullTables, SharpnessAware):
        torch.manual_seed(7)
        specs = get_model("deepfm").table_specs(data.fields, 4, 0.1)
        model = build_model("deepfm", kind(specs, FullConfig()), 0, hidden_units=(8,))
        [one] = fit(model, data, dataclasses.replace(config, max_steps=1)).history
        result = fit(model, data, config)
        found[kind] = one.train_loss, model.tables.rows.weight.detach().clone()
        assert result.best.metrics["auc"] > 0.5
    losses, weights = zip(*found.values(), strict=True)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert not torch.allclose(*weights, atol=1e-4)
