"""Killed anywhere and resumed, every strategy ends as if it had not been: weights, optimizers and its own state."""

import dataclasses

import pytest
import torch

from embcomp import build_tables, list_strategies, make_config
from embcomp.errors import ConfigError
from embcomp.facts import smallest_bytes
from recsys_models.ctr import build_model, get_model
from recsys_models.training import TrainingConfig, checkpoint, fit
from tests.recsys_models.killer import Killed, Killer
from tests.recsys_models.tiny import tiny_log

DATA = tiny_log(rows=(400, 150, 100))
CONFIG = TrainingConfig(
    learning_rate=0.02,
    embedding_optimizer="adagrad",
    batch_size=64,
    epochs=3,
    eval_steps=4,
    patience=None,
    device="cpu",
)
QUICK = {
    "dynamic": {"interval": 4},  # ids compete before and after the run is killed
    "optembed": {"generations": 2, "mutations": 3, "crossovers": 3, "parents": 3, "threshold_lr": 0.5},
}
PHASES = {"magnitude": {"finetune_epochs": 2}, "nested": {"retrain": "finetune"}, "optembed": {"decay": 0.01}}
"""Options with which a strategy goes through more phases, or keeps more state."""


def options_of(strategy, **options):
    """The options that a strategy's config takes."""
    found = dict(QUICK.get(strategy, {}))
    for name, value in options.items():
        try:
            make_config(strategy, **found, **{name: value})
        except ConfigError:
            continue
        found[name] = value
    return found


def model_of(strategy, options):
    specs = [dataclasses.replace(spec, init_std=0.1) for spec in get_model("deepfm").table_specs(DATA.fields, 6)]
    generator = torch.Generator().manual_seed(3)
    counts = {s.name: torch.randint(1, 90, (s.num_embeddings,), generator=generator) for s in specs}
    config = make_config(strategy, **options)
    full = sum(spec.full_bytes for spec in specs)
    budget = min(max(smallest_bytes(specs, config, counts), int(0.6 * full)), full)
    torch.manual_seed(7)
    tables = build_tables(specs, config, None if strategy == "full" else f"{budget}B", counts)
    return build_model("deepfm", tables, 0, hidden_units=(8,), dropout=0.2, batch_norm=True)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def killed_and_resumed(strategy, options, settings, phase, step, folder):
    with pytest.raises(Killed):
        fit(model_of(strategy, options), DATA, settings, checkpoint_dir=folder, callbacks=[Killer(phase, step)])
    model = model_of(strategy, options)
    torch.manual_seed(99)  # what comes next must not hang on the process's own generator
    return model, fit(model, DATA, settings, checkpoint_dir=folder, resume=True)


VARIANTS = {
    "plain": ({}, {}),
    "low bits, float at first": ({"rows": "int4:column"}, {"float_epochs": 1}),
    "sparse rows": ({"sparse": True}, {"embedding_optimizer": "rowwise_adagrad"}),
    "other phases": ({}, {"embedding_optimizer": "adam"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("strategy", list_strategies())
def test_every_strategy_resumes_bit_for_bit(strategy, variant, tmp_path):
    options, changes = VARIANTS[variant]
    options = options_of(strategy, **options, **(PHASES.get(strategy, {}) if variant == "other phases" else {}))
    settings = dataclasses.replace(CONFIG, **changes)
    whole = model_of(strategy, options)
    result = fit(whole, DATA, settings)
    wanted = state_of(whole)
    for phase in whole.tables.phases():
        if phase.is_search:
            continue
        model, resumed = killed_and_resumed(strategy, options, settings, phase.name, 10, tmp_path / phase.name)
        found = state_of(model)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=f"{name}, killed in {phase.name}")
        assert resumed.history == result.history
        assert model.tables.config == whole.tables.config
        served, other = whole.tables.finalize().state_dict(), model.tables.finalize().state_dict()
        assert all(torch.equal(served[name], other[name]) for name in served)


@pytest.mark.parametrize("strategy", list_strategies())
def test_checkpoints_hold_all_that_is_trained_and_what_trains_it(strategy, tmp_path):
    model = model_of(strategy, options_of(strategy))
    first = next(phase.name for phase in model.tables.phases() if not phase.is_search)
    with pytest.raises(Killed):
        fit(model, DATA, CONFIG, checkpoint_dir=tmp_path, callbacks=[Killer(first, 10)])
    tensors, _ = checkpoint.read_checkpoint(tmp_path / "checkpoint.safetensors")
    held = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    assert {name for name in model.state_dict() if name.startswith("tables.")} <= held
    optimized = [tensor for name, tensor in tensors.items() if not name.startswith("model.")]
    rows = max((p for p in model.tables.parameters() if p.requires_grad), key=torch.Tensor.numel)
    assert any(tensor.shape == rows.shape and bool(tensor.abs().sum() > 0) for tensor in optimized)
