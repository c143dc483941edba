"""Runs that are killed and resumed, and checkpoints that are of something else, damaged, or can't be written."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embcomp import QuantizeConfig
from embcomp.errors import ConfigError, IncompatibleStateError, WriteError
from recsys_models.training import TrainingConfig, checkpoint, fit
from recsys_models.training.identity import describe_modules
from recsys_models.training.result import Evaluation
from tests.recsys_models import killed_run
from tests.recsys_models.killer import Killed, Killer
from tests.recsys_models.runs import CONFIG, DROPOUT, assert_same, config, scripted, seeded, state
from tests.recsys_models.session import tiny as sessions
from tests.recsys_models.tiny import tiny_log, tiny_model


@pytest.mark.parametrize("strategy", killed_run.STRATEGIES)
def test_killed_and_resumed_gives_the_same_weights_bit_for_bit(tmp_path, strategy):
    whole, whole_weights = killed_run.run(tmp_path / "whole", strategy=strategy)
    assert not all(evaluation.improved for evaluation in whole.history)  # so best and last weights differ
    for where in killed_run.PLACES[strategy]:
        command = [sys.executable, "-m", killed_run.__name__, str(tmp_path / "killed"), where, strategy]
        root = Path(__file__).parents[2]
        killed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=root)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed, weights = killed_run.run(tmp_path / "killed", strategy=strategy)
    assert resumed.history == whole.history
    assert resumed.steps == whole.steps == 40 * len({evaluation.phase for evaluation in whole.history})
    assert [(p.candidate, p.num_evaluated) for p in resumed.phases] == [
        (p.candidate, p.num_evaluated) for p in whole.phases
    ]
    assert_same(weights, whole_weights)


def test_a_finished_run_is_not_run_again_and_can_be_prolonged(tmp_path):
    data = tiny_log()
    long = seeded(data, **DROPOUT)
    fit(long, data, config(epochs=4, patience=None))
    model = seeded(data, **DROPOUT)
    first = fit(model, data, config(epochs=2, patience=None), checkpoint_dir=tmp_path)
    fresh = seeded(data, **DROPOUT)
    again = fit(fresh, data, config(epochs=2, patience=None), checkpoint_dir=tmp_path, resume=True)
    assert again == first
    assert_same(state(fresh), state(model))
    prolonged = seeded(data, **DROPOUT)
    assert fit(prolonged, data, config(epochs=4, patience=None), checkpoint_dir=tmp_path, resume=True).epochs == 4
    assert_same(state(prolonged), state(long))


def test_the_best_weights_are_those_from_before_the_resume(tmp_path, monkeypatch):
    data = tiny_log()
    seen = scripted(monkeypatch, [0.8, 0.7, 0.75])
    fit(seeded(data), data, config(epochs=2, patience=None), checkpoint_dir=tmp_path)
    model = seeded(data)
    result = fit(model, data, config(epochs=3, patience=None), checkpoint_dir=tmp_path, resume=True)
    assert (result.best.epoch, result.epochs) == (1, 3)
    assert_same(state(model), seen[0])


def test_resume_without_a_checkpoint_starts_anew_and_no_resume_overwrites(tmp_path):
    data = tiny_log()
    assert fit(seeded(data), data, CONFIG, checkpoint_dir=tmp_path / "a" / "b", resume=True).steps == 30
    assert fit(seeded(data), data, config(epochs=1), checkpoint_dir=tmp_path / "a" / "b").steps == 10
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["checkpoint.safetensors"]


def test_foreign_and_damaged_checkpoints(tmp_path):
    data = tiny_log()
    fit(seeded(data), data, CONFIG, checkpoint_dir=tmp_path)
    file, resumed = tmp_path / "checkpoint.safetensors", {"checkpoint_dir": tmp_path, "resume": True}
    with pytest.raises(IncompatibleStateError, match=r"learning_rate=0\.01, not 0\.1"):
        fit(seeded(data), data, config(learning_rate=0.1), **resumed)
    with pytest.raises(IncompatibleStateError, match="data='tiny-0', not 'tiny-1'"):
        fit(seeded(tiny_log(seed=1)), tiny_log(seed=1), CONFIG, **resumed)
    with pytest.raises(IncompatibleStateError, match=r"model='DeepFM\(.*\)', not 'FM\("):
        fit(seeded(data, "fm"), data, CONFIG, **resumed)
    with pytest.raises(IncompatibleStateError, match=r"model\.mlp\.0='Linear.*out_features=16\)', not .*=5\)'"):
        fit(seeded(data, hidden_units=(5,)), data, CONFIG, **resumed)
    with pytest.raises(IncompatibleStateError, match=r"model\.mlp\.2='Linear.*', not 'Dropout\(p=0\.2"):
        fit(seeded(data, dropout=0.2), data, CONFIG, **resumed)
    without_bias = seeded(data)
    without_bias.mlp[0].register_parameter("bias", None)
    with pytest.raises(IncompatibleStateError, match="another shape"):
        fit(without_bias, data, CONFIG, **resumed)
    with pytest.raises(ConfigError, match="checkpoint_dir"):
        fit(seeded(data), data, CONFIG, resume=True)
    content = file.read_bytes()
    for damaged in (content[:-9], content[: len(content) // 2], b"", b"\x80\x04pickle"):
        file.write_bytes(damaged)
        with pytest.raises(IncompatibleStateError, match="delete it to start anew"):
            fit(seeded(data), data, CONFIG, **resumed)


def test_a_full_disk_is_an_error_that_names_the_checkpoint_and_leaves_the_last(tmp_path, full_disk):
    file, tensors = tmp_path / "checkpoint.safetensors", {"weight": torch.ones(100)}
    checkpoint.write_checkpoint(file, tensors, {"epoch": 1})
    with (
        full_disk(),
        pytest.raises(WriteError, match=r"safetensors can't be written .*another checkpoint_dir"),
    ):
        checkpoint.write_checkpoint(file, tensors, {"epoch": 2})
    assert checkpoint.read_checkpoint(file)[1] == {"epoch": 1}


def test_bug_a_checkpoint_with_a_flipped_bit_is_refused_or_has_the_right_values(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    tensors = {"weight": torch.arange(60.0).view(20, 3), "step": torch.tensor(7)}
    info = {"done": [], "run": {"epoch": 3, "rates": [0.1, 0.2]}}
    checkpoint.write_checkpoint(file, tensors, info)
    content, refused = file.read_bytes(), 0
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        try:
            found, told = checkpoint.read_checkpoint(file)
        except IncompatibleStateError:
            refused += 1
        else:
            assert told == info
            assert_same(found, tensors)
    assert refused > 0.9 * len(content)


def test_bug_a_run_that_begins_anew_and_is_killed_early_does_not_go_on_as_the_one_before(tmp_path):
    data = tiny_log()
    fit(seeded(data, dropout=0.2), data, CONFIG, checkpoint_dir=tmp_path)
    for model in (seeded(data, dropout=0.5), seeded(data, dropout=0.2)):
        with pytest.raises(Killed):
            fit(model, data, CONFIG, checkpoint_dir=tmp_path, callbacks=[Killer("train", 3)])
        assert list(tmp_path.iterdir()) == []
    model, alone = seeded(data, dropout=0.5), seeded(data, dropout=0.5)
    fit(model, data, CONFIG, checkpoint_dir=tmp_path, resume=True)
    fit(alone, data, CONFIG)
    assert_same(state(model), state(alone))


def test_bug_a_checkpoint_of_other_dropout_is_refused_and_so_is_one_that_does_not_say(tmp_path):
    data, file, resumed = tiny_log(), tmp_path / "checkpoint.safetensors", {"checkpoint_dir": tmp_path, "resume": True}
    first = fit(seeded(data, dropout=0.2), data, CONFIG, checkpoint_dir=tmp_path)
    with pytest.raises(IncompatibleStateError, match=r"model\.mlp\.2='Dropout\(p=0\.2, .*', not 'Dropout\(p=0\.5, "):
        fit(seeded(data, dropout=0.5), data, CONFIG, **resumed)
    torch.manual_seed(99)  # first weights need not be the same, since none of them is used
    assert fit(tiny_model(data, dropout=0.2), data, CONFIG, **resumed) == first
    tensors, info = checkpoint.read_checkpoint(file)
    info["identity"] = {name: value for name, value in info["identity"].items() if not name.startswith("model.")}
    checkpoint.write_checkpoint(file, tensors, {**info, "identity": {**info["identity"], "model": "DeepFM"}})
    with pytest.raises(IncompatibleStateError, match=r"model='DeepFM', not 'DeepFM\(.*use the same, or another check"):
        fit(seeded(data, dropout=0.2), data, CONFIG, **resumed)


def test_models_are_told_apart_by_what_their_modules_hold_but_not_by_what_training_changes():
    data = tiny_log()
    model = seeded(data, "deepfm", "optembed", "50%", **DROPOUT)
    before = describe_modules(model)
    assert before["model.mlp.3"] == "Dropout(p=0.2, inplace=False)"
    assert not any(name.startswith("model.tables") for name in before)
    fit(model, data, config(epochs=1))
    assert describe_modules(model.eval()) == before
    log = sessions.tiny_log()
    models = [
        sessions.tiny_model(log),
        sessions.tiny_model(log, loss="sampled"),
        sessions.tiny_model(log, loss="sampled", num_negatives=8),
        sessions.tiny_model(log, "bert4rec"),
        sessions.tiny_model(log, items="metadata"),
    ]
    assert len({str(describe_modules(model)) for model in models}) == len(models)


def test_modules_with_odd_attributes_are_described():
    module = torch.nn.Dropout(0.5)
    module.weights, module.call, module.sizes, module.mixed = torch.ones(3), len, (1, (2.0, "x")), [1, torch.ones(1)]
    module.kind, module.keyed, module.config = TrainingConfig, {len: 1}, Evaluation(1, 2, {"auc": 0.5}, 0.1, 0.2, True)
    text = f"Dropout(p=0.5, inplace=False, sizes=(1, (2.0, 'x')), config={module.config!r})"
    assert describe_modules(module) == {"model": text}
    lengths = []
    for last in (7, 8):
        module.items = [*range(100_000), last]
        lengths.append(describe_modules(module)["model"])
    assert lengths[0] != lengths[1]
    assert len(lengths[0]) == len(lengths[1]) < 1200


def test_float_epochs_resume_as_uninterrupted(tmp_path):
    data = tiny_log()
    settings = {"float_epochs": 2, "patience": None}
    strategy = QuantizeConfig(bits=2, granularity="column")
    whole, halves = seeded(data, strategy=strategy), seeded(data, strategy=strategy)
    fit(whole, data, config(epochs=5, **settings))
    fit(halves, data, config(epochs=3, **settings), checkpoint_dir=tmp_path)
    halves = seeded(data, strategy=strategy)
    fit(halves, data, config(epochs=5, **settings), checkpoint_dir=tmp_path, resume=True)
    assert_same(state(whole), state(halves))
