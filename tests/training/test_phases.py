"""Phases in a user's own loop: what is trained when, what a rewind brings back, and groups that go along."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import embcomp
from embcomp.errors import ConfigError, InputError
from embcomp.training import Phase, Phases
from tests.examples.optembed_loop import ClickModel, train
from tests.training.clicks import SIZES, WideModel, batches, compressed

TRAIN, VALIDATION = batches(20, seed=1), batches(4, seed=2)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module, before):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def log_loss(model):
    model.eval()
    with torch.no_grad():
        losses = [F.binary_cross_entropy_with_logits(model(inputs), labels) for inputs, labels in VALIDATION]
    return torch.stack(losses).mean().item()


def step(phases, batch, optimizer=None):
    inputs, labels = batch
    loss = phases.loss(partial(phases.model, inputs), partial(F.binary_cross_entropy_with_logits, target=labels))
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    phases.step_()
    return loss


def architecture_step(phases, batch):
    inputs, labels = batch
    phases.architecture_step_(partial(phases.model, inputs), partial(F.binary_cross_entropy_with_logits, target=labels))


def supernet(model):
    phases = Phases(model)
    phases.enter_(phases.phases[0])
    return phases, torch.optim.Adam(phases.parameters(), 0.02)


# ---- the loop that users are shown ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pruned": "zero", "rows": "int8"},
        {"search_dims": False},
        {"prune_rows": False},
        {"bilevel": True, "score": "taylor", "decay": 1e-3},
        {"retrain_from": "supernet", "threshold_per_id": True},
    ],
    ids=str,
)
def test_a_plain_loop_trains_optembed_to_a_quarter_of_the_bytes(options, tmp_path):
    model, handle = compressed(budget="25%", **options)
    untrained = log_loss(model)
    train(model, TRAIN, VALIDATION, checkpoint=tmp_path / "search.json")
    trained = log_loss(model)
    assert trained < untrained - 0.02
    assert list(tmp_path.iterdir()) == []
    (tables,) = handle.tables
    allowed = 0.25 * handle.memory().full_bytes
    assert handle.memory().serve_bytes <= allowed
    assert set(tables.config.dims) == {f"embeddings.{name}" for name in SIZES}
    embcomp.finalize_(model)
    assert log_loss(model) == pytest.approx(trained, abs=1e-5)
    assert sum(t.nbytes for t in tables.state_dict().values()) == handle.memory().serve_bytes <= allowed


def test_the_loop_trains_strategies_with_a_single_phase_too():
    model, _ = compressed(strategy="hash", budget="50%")
    untrained = log_loss(model)
    phases = train(model, TRAIN, VALIDATION)
    assert [phase.name for phase in phases] == ["train"]
    assert log_loss(model) < untrained - 0.02


@pytest.mark.parametrize("budget", ["8%", "25%", "60%"])
def test_two_groups_of_different_dimension_go_through_the_phases_together_and_fit_one_budget(budget):
    model, handle = compressed(WideModel, budget)
    untrained = log_loss(model)
    train(model, TRAIN, VALIDATION)
    assert {tables.embedding_dim for tables in handle.tables} == {8, 1}
    assert log_loss(model) < untrained
    allowed = handle.memory().full_bytes * int(budget[:-1]) // 100
    assert sum(tables.config.limit_bytes for tables in handle.tables) <= allowed
    assert handle.memory().serve_bytes <= allowed
    embcomp.finalize_(model)
    assert sum(t.nbytes for g in handle.tables for t in g.state_dict().values()) <= allowed


def test_tables_with_a_single_phase_train_along():
    torch.manual_seed(7)
    model = WideModel(SIZES)
    patterns = {"linear.*": "hash", "*": embcomp.make_config("optembed", generations=2)}
    handle = embcomp.compress_(model, patterns, "25%", verbose=False)
    hashed = next(tables for tables in handle.tables if tables.embedding_dim == 1)
    before = hashed.rows.weight.detach().clone()
    phases = train(model, TRAIN, VALIDATION)
    assert [phase.name for phase in phases] == ["supernet", "search", "retrain"]
    assert not torch.equal(hashed.rows.weight, before)


# ---- phases --------------------------------------------------------------------------------------------------------


def test_only_what_a_phase_trains_has_gradients():
    model, handle = compressed()
    model.mlp[0].bias.requires_grad_(False)  # the user's own wish
    thresholds, every = handle.tables[0].thresholds, {name for name, p in model.named_parameters()}
    trained = every - {"mlp.0.bias", "embcomp_tables.0.thresholds"}

    def with_gradients():
        return {name for name, p in model.named_parameters() if p.requires_grad}

    assert "embcomp_tables.0.thresholds" in every
    phases = Phases(model)
    for phase in phases:
        phases.enter_(phase)
        wanted = {"supernet": trained | {"embcomp_tables.0.thresholds"}, "search": set(), "retrain": trained}
        assert with_gradients() == wanted[phase.name]
        assert {id(p) for p in phases.parameters()}.isdisjoint({id(thresholds), id(model.mlp[0].bias)})
        if phase.is_search:
            phases.search_(lambda: 0.5)
        else:
            assert {id(p) for p in phases.parameters()} == {id(p) for n, p in model.named_parameters() if n in trained}
            step(phases, TRAIN[0])
        phases.leave_(phase)
        assert with_gradients() == trained
        assert all(p.grad is None for p in model.parameters())


def test_a_rewind_brings_network_and_rows_back_and_keeps_what_was_chosen():
    model, handle = compressed(threshold_lr=0.5)
    tables, first = handle.tables[0], state(model)
    phases, optimizer = supernet(model)
    for batch in TRAIN:
        step(phases, batch, optimizer)
    phases.leave_(phases.phases[0])
    phases.enter_(phases.phases[1])
    phases.search_(lambda: torch.rand(()).item())
    phases.leave_(phases.phases[1])
    before = state(model)
    assert {"mlp.1.running_mean", "mlp.1.num_batches_tracked", "mlp.0.weight"} < changed(model, first)
    phases.enter_(phases.phases[2])
    kept = {f"embcomp_tables.0.{name}" for name in ("kept", "widths", "thresholds")}
    assert changed(model, first) == kept
    assert changed(model, before).isdisjoint(kept)
    assert tables.config.dims == dict(zip(tables.names, tables.widths.tolist(), strict=True))


def test_without_a_rewind_training_goes_on_from_the_supernet():
    model, _ = compressed(retrain_from="supernet", search_dims=False)
    phases, optimizer = supernet(model)
    assert phases.initial == {}
    step(phases, TRAIN[0], optimizer)
    phases.leave_(phases.phases[0])
    before = state(model)
    phases.enter_(phases.phases[1])
    assert changed(model, before) == set()


def test_thresholds_learn_by_their_own_learning_rate():
    model, handle = compressed(threshold_lr=0.25, alpha=0.1)
    thresholds, (inputs, labels) = handle.tables[0].thresholds, TRAIN[0]
    phases, _ = supernet(model)
    phases.loss(partial(model, inputs), partial(F.binary_cross_entropy_with_logits, target=labels)).backward()
    expected = thresholds.detach() - 0.25 * thresholds.grad
    phases.step_()
    torch.testing.assert_close(thresholds.detach(), expected)
    assert bool((expected != 0).all())
    assert thresholds.grad is None


@pytest.mark.parametrize("scale", [2.0**10, float("inf")])
def test_thresholds_learn_from_scaled_losses_what_plain_ones_tell_and_nothing_where_those_overflow(scale):
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=scale)):
        model, handle = compressed(threshold_lr=0.25, alpha=0.1, score="taylor")
        phases, optimizer = supernet(model)
        before = handle.tables[0].thresholds.detach().clone()
        loss = phases.loss(partial(model, TRAIN[0][0]), partial(F.binary_cross_entropy_with_logits, target=TRAIN[0][1]))
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
        phases.step_(scaler=scaler)
        if scaler is not None:
            scaler.update()
        found.append(handle.tables[0].thresholds.detach())
        assert bool(handle.tables[0].importance.isfinite().all())
    torch.testing.assert_close(found[1], before if scale == float("inf") else found[0])


# ---- bilevel -------------------------------------------------------------------------------------------------------


def test_bilevel_architecture_parameters_learn_from_validation_batches_alone():
    model, handle = compressed(bilevel=True, threshold_lr=0.25, decay=0.1, score="taylor")
    tables, thresholds = handle.tables[0], "embcomp_tables.0.thresholds"
    phases, optimizer = supernet(model)
    before = state(model)
    step(phases, TRAIN[0], optimizer)
    assert thresholds not in changed(model, before)
    assert {"embcomp_tables.0.rows.weight", "mlp.0.weight"} < changed(model, before)
    before = state(model)
    architecture_step(phases, VALIDATION[0])
    assert changed(model, before) == {thresholds}  # batch norms keep the statistics of training batches
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in phases.parameters())
    weight = tables.rows.weight.detach().clone()
    phases.step_()  # nothing was trained since: rows of the validation batch don't shrink
    assert torch.equal(weight, tables.rows.weight)


def test_a_bilevel_step_that_fails_leaves_everything_trainable():
    model, _ = compressed(bilevel=True)
    phases, _ = supernet(model)
    with pytest.raises(KeyError):
        phases.architecture_step_(lambda: model({}), torch.sum)
    assert all(p.requires_grad for p in phases.parameters())


def test_there_are_no_steps_on_validation_batches_in_other_phases():
    phases, _ = supernet(compressed()[0])
    with pytest.raises(ConfigError, match="'supernet' is not bilevel"):
        architecture_step(phases, VALIDATION[0])


# ---- what does not go together -------------------------------------------------------------------------------------


def test_two_strategies_with_different_phases_are_refused():
    model = WideModel(SIZES)
    patterns = {"linear.*": embcomp.make_config("magnitude", finetune_epochs=1), "*": embcomp.make_config("optembed")}
    embcomp.compress_(model, patterns, "25%", verbose=False)
    with pytest.raises(ConfigError, match=r"strategies (optembed and magnitude|magnitude and optembed) train in diff"):
        Phases(model)


def test_a_plain_model_is_told_to_compress_first():
    with pytest.raises(ConfigError, match="call compress_ first"):
        Phases(ClickModel(SIZES))


def test_there_is_no_search_in_a_phase_that_trains():
    phases, _ = supernet(compressed()[0])
    with pytest.raises(ConfigError, match="'supernet' is no search"):
        phases.search_(lambda: 0.5)


def test_bug_a_search_that_is_left_out_loses_what_the_supernet_learned():
    phases, _ = supernet(compressed()[0])
    phases.leave_(phases.phases[0])
    phases.enter_(phases.phases[1])
    with pytest.raises(InputError, match=r"search_\(evaluate=None\).*search_dims=False"):
        phases.search_(None)
    with pytest.raises(ConfigError, match=r"'search' ends without a search: call search_.*search_dims=False"):
        phases.leave_(phases.phases[1])
    phases.search_(lambda: 0.5)
    phases.leave_(phases.phases[1])


@pytest.mark.parametrize("phase", ["supernet", Phase("supernet"), None])
def test_phases_of_other_models_are_refused(phase):
    with pytest.raises(ConfigError, match=r"give a phase of this model.*'supernet', 'search', 'retrain'"):
        Phases(compressed()[0]).enter_(phase)


@pytest.mark.parametrize("strategy", ["optembed", "nested", "magnitude", "hash"])
def test_around_finalized_tables_the_network_goes_on_training(strategy):
    model, handle = compressed(strategy=strategy)
    handle.finalize_()
    phases = Phases(model)
    assert [phase.name for phase in phases] == ["train"]
    before, tables = state(model.mlp), state(handle.tables[0])
    phases.enter_(phases.phases[0])
    step(phases, TRAIN[0], torch.optim.SGD(phases.parameters(), 0.1))
    phases.leave_(phases.phases[0])
    assert changed(model.mlp, before)
    assert not changed(handle.tables[0], tables)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "serach"}, "did you mean 'search'"),
        ({"trains": ("network", "rows")}, "choose from network, tables, architecture"),
        ({"bilevel": True}, "trains no architecture"),
    ],
)
def test_phases_that_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        Phase("mine", **values)


@pytest.mark.parametrize("columns", [None, 1, 3])
def test_distillation_adds_the_divergence_from_the_first_pass(columns):
    def predict(model, inputs):
        logits = model(inputs)
        if columns is None:
            return logits
        return logits[:, None] if columns == 1 else torch.stack([logits, torch.zeros_like(logits), -logits], dim=1)

    def shares(logits):
        """Probabilities of all classes, by hand."""
        if columns == 3:
            odds = logits.double().exp()
            return odds / odds.sum(1, keepdim=True)
        clicked = 1 / (1 + (-logits.double().flatten()).exp())
        return torch.stack([clicked, 1 - clicked], dim=1)

    def loss(logits):
        return logits.square().mean()

    inputs, _ = TRAIN[0]
    model, handle = compressed(strategy="nested", distill=2.0, budget=None)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    phases = Phases(model)
    phases.enter_(phases.phases[0])
    seen = []

    def noting(logits):
        seen.append(logits.detach())
        return loss(logits)

    total = phases.loss(partial(predict, model, inputs), noting)
    teacher = shares(seen[0])
    divergences = [(teacher * (teacher / shares(logits)).log()).sum(1).mean() for logits in seen]
    assert float(divergences[-1]) > 1e-3
    expected = torch.stack(
        [loss(logits).double() + 2.0 * d for logits, d in zip(seen, divergences, strict=True)]
    ).mean()
    assert total.item() == pytest.approx((expected + handle.penalty()).item(), rel=1e-5)
