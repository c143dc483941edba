import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from embcomp import DynamicConfig, QuantizeConfig
from embcomp.errors import ConfigError, InputError
from recsys_models.errors import TrainingError
from recsys_models.metrics import evaluate
from recsys_models.training import Callback, TrainingConfig, fit, make_optimizers, parameter_groups
from recsys_models.training.optimizers import clip_gradients
from recsys_models.training.run import Run
from tests.recsys_models.runs import CONFIG, DROPOUT, assert_same, config, scripted, seeded, state
from tests.recsys_models.tiny import tiny_log

# ---- the loop ------------------------------------------------------------------------------------------------------


def test_learns():
    data = tiny_log((3000, 500, 500), num_dense=1)
    model = seeded(data, init_std=0.1, **DROPOUT)
    result = fit(model, data, config(epochs=40, patience=5))
    assert result.best.metrics["auc"] > 0.85
    assert evaluate(model, data.test).auc > 0.85
    assert evaluate(model, data.validation).auc == pytest.approx(result.best.metrics["auc"], abs=1e-6)
    assert result.history[-1].train_loss < result.history[0].train_loss - 0.1
    assert result.samples_per_second * result.train_seconds == pytest.approx(3000 * result.epochs)
    assert result.best.metrics["auc"] == max(evaluation.metrics["auc"] for evaluation in result.history)


def test_same_weights_as_a_plain_loop():
    data = tiny_log(num_dense=1)
    settings = config(embedding_l2=0.05, clip_norm=0.01, plateau_factor=1.0, restore_best=False, patience=None)
    model = seeded(data, **DROPOUT).eval()
    fit(model, data, settings)

    plain = seeded(data, **DROPOUT)
    torch.manual_seed(0)
    rows = [p for name, p in plain.named_parameters() if name.startswith("tables.")]
    network = [p for name, p in plain.named_parameters() if not name.startswith("tables.")]
    groups = [{"params": rows, "weight_decay": 0.05}, {"params": network}]
    optimizer = torch.optim.Adam(groups, lr=0.01, fused=True)
    for epoch in range(3):
        order = np.random.default_rng([0, epoch]).permutation(600)
        for start in range(0, 600, 64):
            index = order[start : start + 64]
            ids, dense, labels = (
                torch.from_numpy(a[index]) for a in (data.train.ids, data.train.dense, data.train.labels)
            )
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(plain(ids.long(), dense), labels).backward()
            torch.nn.utils.clip_grad_norm_([p for p in plain.parameters()], 0.01)
            optimizer.step()
    assert_same(state(model), state(plain))


def test_same_seed_same_weights_other_seed_others_and_the_global_generator_untouched():
    data, models = tiny_log(), []
    for seed in (1, 1, 2):
        models.append(seeded(data, **DROPOUT))
        before = torch.get_rng_state()
        fit(models[-1], data, config(seed=seed))
        assert torch.equal(before, torch.get_rng_state())
    assert_same(state(models[0]), state(models[1]))
    assert not torch.equal(models[0].mlp[0].weight, models[2].mlp[0].weight)


def test_the_test_split_is_never_touched():
    data = tiny_log()
    fit(seeded(data), dataclasses.replace(data, test=None), CONFIG)


def test_penalty_is_part_of_the_loss():
    data = tiny_log()
    model = seeded(data)
    rows = model.tables.rows.weight
    model.tables.penalty = lambda: 1e6 * rows.square().sum()
    before = rows.norm().item()
    fit(model, data, config(optimizer="sgd", learning_rate=1e-7, clip_norm=None, epochs=1))
    assert rows.norm().item() < 0.3 * before  # (1 - 2e6 * 1e-7) ** 10 = 0.11


def test_a_last_batch_of_one_row_is_left_out():
    data = tiny_log((129, 50, 50))
    assert fit(seeded(data, **DROPOUT), data, config(epochs=1)).steps == 2
    assert fit(seeded(data, **DROPOUT), data, config(epochs=1, batch_size=43)).steps == 3


@pytest.mark.parametrize(
    ("settings", "expected", "stopped"),
    [
        ({}, [10, 20, 30], "epochs"),
        ({"eval_steps": 7}, [7, 14, 21, 28, 30], "epochs"),
        ({"max_steps": 13}, [10, 13], "max_steps"),
        ({"max_steps": 13, "eval_steps": 5}, [5, 10, 13], "max_steps"),
        ({"max_steps": 20}, [10, 20], "max_steps"),
    ],
)
def test_when_it_evaluates_and_stops(settings, expected, stopped):
    data = tiny_log()
    result = fit(seeded(data), data, config(patience=None, **settings))
    assert [evaluation.step for evaluation in result.history] == expected
    assert (result.stopped, result.steps, result.epochs) == (stopped, expected[-1], expected[-1] // 10)


def test_callbacks_are_called_in_order():
    data, calls = tiny_log((128, 50, 50)), []

    class Recorder(Callback):
        def on_step_end(self, model, step):
            calls.append(("step", step))

        def on_epoch_end(self, model, epoch):
            calls.append(("epoch", epoch))

        def on_evaluation(self, model, evaluation):
            calls.append(("evaluation", evaluation.step))

    fit(seeded(data), data, config(epochs=2), callbacks=[Recorder()])
    one, two = [("step", 1), ("step", 2), ("epoch", 1)], [("step", 3), ("step", 4), ("epoch", 2)]
    assert calls == [*one, ("evaluation", 2), *two, ("evaluation", 4)]


# ---- selection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("monitor", ["auc", "log_loss"])
def test_plateau_patience_and_the_best_weights(monkeypatch, monitor):
    data = tiny_log()
    seen = scripted(monkeypatch, [0.6, 0.7, 0.7 + 5e-7, 0.8, 0.75, 0.8, 0.9])
    model = seeded(data, **DROPOUT)
    result = fit(model, data, config(epochs=50, monitor=monitor))
    assert (result.epochs, result.stopped, result.best.epoch) == (6, "patience", 4)
    assert [e.improved for e in result.history] == [True, True, False, True, False, False]
    assert [e.learning_rate for e in result.history] == pytest.approx([1e-2, 1e-2, 1e-2, 1e-3, 1e-3, 1e-4])
    assert_same(state(model), seen[3])
    assert result.best.metrics == pytest.approx({"auc": 0.8, "log_loss": 0.2})


def test_a_plateau_can_rewind_to_the_best_weights(monkeypatch):
    data, after = tiny_log(), []

    class Recorder(Callback):
        def on_evaluation(self, model, evaluation):
            after.append(state(model))

    seen = scripted(monkeypatch, [0.6, 0.7, 0.65, 0.8, 0.75])
    settings = config(epochs=5, patience=None, plateau_rewind=True, restore_best=False)
    fit(seeded(data), data, settings, callbacks=[Recorder()])
    for found, expected in zip(after, (0, 1, 1, 3, 3), strict=True):
        assert_same(found, seen[expected])
    with pytest.raises(AssertionError):
        assert_same(seen[2], seen[1])


def test_rates_can_wait_for_several_evaluations_without_improvement(monkeypatch):
    data, after = tiny_log(), []

    class Recorder(Callback):
        def on_evaluation(self, model, evaluation):
            after.append(state(model))

    seen = scripted(monkeypatch, [0.6, 0.7, 0.65, 0.8, 0.75, 0.7, 0.75, 0.6, 0.9])
    settings = config(epochs=50, plateau_patience=2, patience=4, plateau_rewind=True, restore_best=False)
    result = fit(seeded(data), data, settings, callbacks=[Recorder()])
    assert (result.epochs, result.stopped, result.best.epoch) == (8, "patience", 4)
    assert [e.learning_rate for e in result.history] == pytest.approx([1e-2] * 6 + [1e-3] * 2)
    for place, expected in enumerate((0, 1, 2, 3, 4, 3, 6, 3)):  # back to the fourth at the second bad one of each pair
        assert_same(after[place], seen[expected])


def test_bug_a_rewind_that_gives_rows_back_clears_their_optimizer_state(monkeypatch):
    data, owners, sums = tiny_log(), [], []
    strategy = DynamicConfig(num_slots={"f0": 20, "f1": 6, "f2": 2}, interval=3)
    model, evaluated = seeded(data, strategy=strategy), Run._evaluate

    def noting(self, train_loss):
        (weight, before), optimizer = model.tables.row_owners(), self.optimizers[0]
        old = optimizer.state[weight]["sum"].clone()
        found = evaluated(self, train_loss)
        owners.append((before, model.tables.row_owners()[1]))
        sums.append((old, optimizer.state[weight]["sum"].clone()))
        return found

    monkeypatch.setattr(Run, "_evaluate", noting)
    scripted(monkeypatch, [0.7, 0.65])
    fit(model, data, config(epochs=2, patience=None, plateau_rewind=True, optimizer="adagrad", restore_best=False))
    assert torch.equal(*owners[0])
    assert torch.equal(*sums[0])
    went = owners[1][0] != owners[1][1]
    assert 0 < int(went.sum()) < len(went)
    assert float(sums[1][0][went].abs().sum()) > 0
    assert float(sums[1][1][went].abs().sum()) == 0
    assert torch.equal(sums[1][1][~went], sums[1][0][~went])


def test_learning_rates_stop_at_the_minimum_and_the_last_weights_can_be_kept(monkeypatch):
    data = tiny_log()
    seen = scripted(monkeypatch, [0.6] * 9)
    model = seeded(data)
    rates = {"learning_rate": 1e-4, "embedding_learning_rate": 1e-7, "patience": None, "restore_best": False}
    result = fit(model, data, config(epochs=5, **rates))
    assert [e.learning_rate for e in result.history] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-6, 1e-6])
    assert_same(state(model), seen[-1])


# ---- optimizers ----------------------------------------------------------------------------------------------------


def test_parameter_groups():
    data = tiny_log()
    model = seeded(data, "deepfm", "reduced_dim", "60%", dim=8)
    model.mlp[0].bias.requires_grad_(False)
    groups = parameter_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    rows, tables, network = ([names[id(p)] for p in groups[key]] for key in ("rows", "tables", "network"))
    assert rows
    assert all(name.endswith("rows.weight") for name in rows)
    assert tables
    assert all(name.endswith("projection") for name in tables)
    assert "mlp.0.bias" not in network
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(rows + tables + network) == sorted(trained)


def test_embedding_l2_is_the_regularizer_of_bars():
    data = tiny_log()
    settings = {"optimizer": "sgd", "learning_rate": 0.1, "embedding_learning_rate": 0.5, "max_steps": 1}
    model = seeded(data, "deepfm", "reduced_dim", "60%", dim=8, init_std=1.0)
    fit(model, data, config(**settings, embedding_l2=0.3, clip_norm=None))

    plain = seeded(data, "deepfm", "reduced_dim", "60%", dim=8, init_std=1.0)
    batch = next(data.train.batches(64, shuffle=True, seed=0).epoch(0))
    groups = parameter_groups(plain)
    regularizer = 0.15 * sum(p.square().sum() for p in groups["rows"])
    (F.binary_cross_entropy_with_logits(plain(batch.ids, batch.dense), batch.labels) + regularizer).backward()
    with torch.no_grad():
        for key, rate in (("rows", 0.5), ("tables", 0.5), ("network", 0.1)):
            for parameter in groups[key]:
                parameter -= rate * parameter.grad
    for name, tensor in state(plain).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)


@pytest.mark.parametrize(
    "names", [("adam", None), ("adagrad", None), ("sgd", None), ("rowwise_adagrad", None), ("adam", "rowwise_adagrad")]
)
def test_every_optimizer_trains(names):
    data = tiny_log()
    model = seeded(data, init_std=0.1)
    before = state(model)
    result = fit(model, data, config(optimizer=names[0], embedding_optimizer=names[1], learning_rate=0.1))
    assert result.history[-1].train_loss < result.history[0].train_loss
    for name in ("tables.rows.weight", "mlp.0.weight"):
        assert not torch.equal(before[name], model.state_dict()[name])


@pytest.mark.parametrize(("optimizer", "clip_norm"), [("adagrad", None), ("adagrad", 0.05), ("rowwise_adagrad", 0.05)])
def test_sparse_rows_train_as_dense_ones(optimizer, clip_norm):
    data, models = tiny_log(), []
    for sparse in (False, True):
        model = seeded(data, init_std=0.1)
        model.tables.rows.sparse = sparse
        fit(model, data, config(optimizer=optimizer, learning_rate=0.1, clip_norm=clip_norm))
        models.append(state(model))
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, msg=name, rtol=1e-4, atol=1e-5)


def test_clipping_row_sparse_gradients():
    embedding, layer = torch.nn.Embedding(5, 3, sparse=True), torch.nn.Linear(3, 1)
    layer(embedding(torch.tensor([1, 1, 2]))).sum().backward()
    parameters = [*embedding.parameters(), *layer.parameters()]
    dense = torch.cat([p.grad.to_dense().flatten() for p in parameters])
    for norm in (100.0, 0.5):
        clip_gradients(parameters, norm)
        clipped = torch.cat([p.grad.to_dense().flatten() for p in parameters])
        torch.testing.assert_close(clipped, dense * min(1.0, norm / dense.norm().item()))


def test_what_does_not_go_with_sparse_rows():
    data = tiny_log()
    model = seeded(data)
    model.tables.rows.sparse = True
    with pytest.raises(ConfigError, match=r"takes no row-sparse gradients.*adagrad"):
        make_optimizers(model, CONFIG)
    with pytest.raises(ConfigError, match=r"embedding_l2=0\.1 decays every row"):
        make_optimizers(model, config(optimizer="adagrad", embedding_l2=0.1))
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        make_optimizers(model, config(optimizer="sgd"))


# ---- errors and configs --------------------------------------------------------------------------------------------


def test_divergence_is_an_error():
    data = tiny_log()
    with pytest.raises(TrainingError, match="lower learning_rate"):
        fit(seeded(data), data, config(optimizer="sgd", learning_rate=1e30, clip_norm=None))


def test_a_model_for_other_data():
    data = tiny_log()
    for other in (tiny_log(sizes=(50, 20)), tiny_log(num_dense=1)):
        with pytest.raises(ConfigError, match="build it for this data set"):
            fit(seeded(data), other, CONFIG)
    with pytest.raises(ConfigError, match="'f1' of tiny has 21 ids, but table 'f1' has 20"):
        fit(seeded(data), tiny_log(sizes=(50, 21, 4)), CONFIG)


def test_a_metric_or_a_model_that_clicks_do_not_go_with():
    data = tiny_log()
    with pytest.raises(ConfigError, match=r"monitor='auk'\): tiny has no such metric; did you mean 'auc'"):
        fit(seeded(data), data, config(monitor="auk"))
    with pytest.raises(ConfigError, match="Linear can't be trained on the click log tiny"):
        fit(torch.nn.Linear(1, 1), data, CONFIG)


def test_splits_that_cannot_be_used():
    data = tiny_log()
    for empty in ((0, 9, 9), (9, 0, 9)):
        with pytest.raises(InputError, match="has no rows"):
            fit(seeded(data), tiny_log(empty), CONFIG)
    ones = dataclasses.replace(data.validation, labels=np.ones_like(data.validation.labels))
    data = dataclasses.replace(data, validation=ones)
    with pytest.raises(InputError, match="set monitor='log_loss'"):
        fit(seeded(data), data, CONFIG)
    result = fit(seeded(data), data, config(monitor="log_loss"))
    assert math.isnan(result.best.metrics["auc"])
    assert result.best.metrics["log_loss"] < 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adm"}, "did you mean 'adam'"),
        ({"embedding_optimizer": "adagrat"}, "did you mean 'adagrad'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 4096.0}, "must be int"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"learning_rate": math.nan}, "above 0"),
        ({"embedding_l2": -1.0}, "at least 0"),
        ({"plateau_factor": 2.0}, "at most 1"),
        ({"plateau_patience": 0}, "plateau_patience=0"),
        ({"patience": 0}, "patience=0"),
    ],
)
def test_wrong_configs(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**values)


@pytest.mark.parametrize("name", ["gpu", "cuda:0"])
def test_wrong_devices(name):
    if name == "cuda:0" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match="write 'auto'"):
        fit(seeded(tiny_log()), tiny_log(), config(device=name))


def test_the_config_is_a_structured_config():
    structured = OmegaConf.structured(TrainingConfig)
    merged = OmegaConf.merge(structured, {"patience": None, "embedding_learning_rate": 0.1, "max_steps": 5})
    made = OmegaConf.to_object(merged)
    assert made == TrainingConfig(patience=None, embedding_learning_rate=0.1, max_steps=5)
    assert TrainingConfig(**json.loads(json.dumps(dataclasses.asdict(made)))) == made


def test_rows_stay_float32_for_the_float_epochs_and_only_what_is_served_is_selected():
    data, rounding = tiny_log(), []

    class Watch(Callback):
        def on_step_end(self, model, step):
            rounding.append(model.tables.parts[0].rows.rounding)

    model = seeded(data, strategy=QuantizeConfig(bits=2, granularity="column"))
    result = fit(model, data, config(epochs=4, float_epochs=2, patience=None), callbacks=[Watch()])
    half = len(rounding) // 2
    assert rounding == [False] * half + [True] * half
    assert [evaluation.improved for evaluation in result.history][:2] == [False, True]
    assert result.best.epoch >= 2
    ids = torch.from_numpy(data.test.ids).long()
    assert torch.equal(model.tables.eval()(ids), model.tables.finalize()(ids))


def test_float_epochs_must_leave_some_for_what_is_served():
    with pytest.raises(ConfigError, match="float_epochs=3"):
        TrainingConfig(epochs=3, float_epochs=3)
