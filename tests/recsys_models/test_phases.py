"""Several phases through `fit`: ``optembed`` killed in any of them and resumed, and what its result says."""

import dataclasses
import io
import re
import sys

import numpy as np
import pytest
import torch

from embcomp import MagnitudeConfig, NestedConfig, OptEmbedConfig
from embcomp.errors import IncompatibleStateError, InputError
from embcomp.training.batch_norms import recalibrate_
from recsys_models.metrics import evaluate
from recsys_models.training import Callback, TrainingConfig, fit
from recsys_models.training.click_search import ClickSearch
from recsys_models.training.clicks import ClickTask
from tests.recsys_models.killer import Killed, Killer
from tests.recsys_models.runs import assert_same, state
from tests.recsys_models.tiny import SIZES, tiny_log, tiny_model

CONFIG = TrainingConfig(
    batch_size=64, epochs=2, eval_steps=7, learning_rate=0.02, patience=None, device="cpu", search_rows=100
)
SEARCH = {"generations": 3, "mutations": 4, "crossovers": 4, "parents": 5}
DATA = tiny_log(num_dense=1)


def config(**changes):
    return dataclasses.replace(CONFIG, **changes)


def model_of(budget="40%", data=DATA, **options):
    torch.manual_seed(7)
    strategy = OptEmbedConfig(**{**SEARCH, **options})
    return tiny_model(data, "deepfm", strategy, budget, dim=6, init_std=0.1, dropout=0.2, batch_norm=True)


def timeless(result):
    """A result without what clocks said."""
    phases = tuple(dataclasses.replace(phase, seconds=0.0) for phase in result.phases)
    return dataclasses.replace(result, train_seconds=0.0, samples_per_second=0.0, phases=phases)


def killing(monkeypatch, where, kill_at):
    """Let evaluations of the search raise; or give the callback that does so in a phase of training."""
    if where not in ("evaluate", "evaluate_many", "recalibrate"):
        return [Killer(where, kill_at)]
    calls, evaluation = [], getattr(ClickSearch, where)

    def dying(self, *args):
        calls.append(1)
        if len(calls) == kill_at:
            raise Killed
        return evaluation(self, *args)

    monkeypatch.setattr(ClickSearch, where, dying)
    return []


# ---- killed and resumed --------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "bilevel": {"bilevel": True, "decay": 0.01, "score": "taylor", "pruned": "zero", "threshold_lr": 0.5},
    "rows alone": {"search_dims": False, "rows": "int8", "threshold_per_id": True, "projection": "none"},
    "widths alone": {"prune_rows": False, "retrain_from": "supernet"},
}
KILLS = {
    "plain": [("supernet", 3), ("supernet", 15), ("evaluate_many", 1), ("evaluate_many", 6), ("retrain", 2)],
    "bilevel": [("supernet", 5), ("supernet", 19), ("retrain", 9)],
    "rows alone": [("supernet", 20), ("retrain", 1), ("retrain", 20)],
    "widths alone": [("supernet", 8), ("evaluate", 2), ("recalibrate", 1), ("retrain", 8)],
}
uninterrupted = {}


def whole(variant):
    if variant not in uninterrupted:
        model = model_of(**VARIANTS[variant])
        uninterrupted[variant] = timeless(fit(model, DATA, CONFIG)), state(model), model.tables.config
    return uninterrupted[variant]


@pytest.mark.parametrize(
    ("variant", "where", "kill_at"), [(variant, *kill) for variant, kills in KILLS.items() for kill in kills]
)
def test_killed_in_any_phase_and_resumed_gives_the_same_bit_for_bit(variant, where, kill_at, tmp_path, monkeypatch):
    result, weights, chosen = whole(variant)
    model = model_of(**VARIANTS[variant])
    with pytest.raises(Killed), monkeypatch.context() as patch:
        fit(model, DATA, CONFIG, checkpoint_dir=tmp_path, callbacks=killing(patch, where, kill_at))
    assert all(p.requires_grad for name, p in model.named_parameters() if "thresholds" not in name)
    again = model_of(**VARIANTS[variant])
    torch.manual_seed(99)
    resumed = fit(again, DATA, CONFIG, checkpoint_dir=tmp_path, resume=True)
    assert_same(state(again), weights)
    assert timeless(resumed) == result
    assert again.tables.config == chosen
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.parametrize(("where", "kill_at"), [("supernet", 15), ("evaluate_many", 6), ("retrain", 9)])
def test_the_model_that_was_interrupted_can_be_trained_on(where, kill_at, tmp_path, monkeypatch):
    result, weights, _ = whole("plain")
    model = model_of()
    with pytest.raises(Killed), monkeypatch.context() as patch:
        fit(model, DATA, CONFIG, checkpoint_dir=tmp_path, callbacks=killing(patch, where, kill_at))
    assert timeless(fit(model, DATA, CONFIG, checkpoint_dir=tmp_path, resume=True)) == result
    assert_same(state(model), weights)


def test_killed_again_and_again_gives_the_same_bit_for_bit(tmp_path, monkeypatch):
    result, weights, _ = whole("bilevel")
    for where, kill_at in (("supernet", 8), ("supernet", 16), ("evaluate_many", 6), ("evaluate", 3), ("retrain", 8)):
        model = model_of(**VARIANTS["bilevel"])
        with pytest.raises(Killed), monkeypatch.context() as patch:
            fit(
                model,
                DATA,
                CONFIG,
                checkpoint_dir=tmp_path,
                resume=True,
                callbacks=killing(patch, where, kill_at),
            )
    model = model_of(**VARIANTS["bilevel"])
    assert timeless(fit(model, DATA, CONFIG, checkpoint_dir=tmp_path, resume=True)) == result
    assert_same(state(model), weights)
    again = model_of(**VARIANTS["bilevel"])
    assert timeless(fit(again, DATA, CONFIG, checkpoint_dir=tmp_path, resume=True)) == result
    assert_same(state(again), weights)


def test_starting_anew_forgets_an_interrupted_search(tmp_path, monkeypatch):
    result, weights, _ = whole("plain")
    with pytest.raises(Killed), monkeypatch.context() as patch:
        fit(
            model_of(),
            DATA,
            config(seed=5),
            checkpoint_dir=tmp_path,
            callbacks=killing(patch, "evaluate_many", 6),
        )
    assert (tmp_path / "search.json").is_file()
    model = model_of()
    assert timeless(fit(model, DATA, CONFIG, checkpoint_dir=tmp_path)) == result
    assert_same(state(model), weights)


class EndOfSearch(Callback):
    """Raises when the search is over, and nothing is saved of what it found but its file."""

    def on_phase_start(self, model, phase):
        if phase.name == "retrain":
            raise Killed


def unsearchable(patch):
    for name in ("evaluate", "evaluate_many"):
        patch.setattr(ClickSearch, name, lambda *args: pytest.fail("evaluated again"))


def test_bug_killed_when_its_search_is_over_it_is_not_searched_again(tmp_path, monkeypatch):
    result, weights, chosen = whole("plain")
    with pytest.raises(Killed):
        fit(model_of(), DATA, CONFIG, checkpoint_dir=tmp_path, callbacks=[EndOfSearch()])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "search.json"]
    again = model_of()
    with monkeypatch.context() as patch:
        unsearchable(patch)
        resumed = fit(again, DATA, CONFIG, checkpoint_dir=tmp_path, resume=True)
    assert timeless(resumed) == result
    assert_same(state(again), weights)
    assert again.tables.config == chosen
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_bug_a_finished_run_that_ends_with_a_search_is_not_searched_again_and_keeps_its_front(tmp_path, monkeypatch):
    model, again = (shared_model(NestedConfig(), "30%") for _ in range(2))
    result = fit(model, DATA, CONFIG, checkpoint_dir=tmp_path)
    with monkeypatch.context() as patch:
        unsearchable(patch)
        assert timeless(fit(again, DATA, CONFIG, checkpoint_dir=tmp_path, resume=True)) == timeless(result)
    assert_same(state(again), state(model))
    assert again.tables.pareto() == model.tables.pareto()
    again.tables.cut_("20%")
    with pytest.raises(Killed):
        fit(again, DATA, CONFIG, checkpoint_dir=tmp_path, callbacks=[Killer("train", 3)])
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("strategy", [OptEmbedConfig(**SEARCH), NestedConfig()], ids=["optembed", "nested"])
def test_bug_the_progress_bar_of_a_search_shows_the_best_metric_and_its_bytes(strategy, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    model = shared_model(strategy, "40%")
    fit(model, DATA, config(epochs=1))
    name = next(phase.name for phase in model.tables.phases() if phase.is_search)
    bars = [line for line in terminal.getvalue().split("\r") if line.startswith(f"tiny {name}") and "best" in line]
    told = [re.search(r"best auc (0\.\d{5}), (.+)\]", bar) for bar in bars]
    assert all(told)
    limit = model.tables.config.limit_bytes
    size, unit = told[-1][2].split(" ")
    assert 0.5 * limit < float(size) * {"B": 1, "KiB": 1024}[unit] <= limit + 5
    if name == "cut":
        assert told[0][2] != told[-1][2]


# ---- shared between budgets ------------------------------------------------------------------------------------------

SHARING = {
    **{name: OptEmbedConfig(**SEARCH, **options) for name, options in VARIANTS.items() if name != "bilevel"},
    "magnitude, int8": MagnitudeConfig(finetune_epochs=1, rows="int8"),
    "magnitude": MagnitudeConfig(finetune_epochs=1),
    "nested": NestedConfig(),
    "nested, int8, retrained": NestedConfig(rows="int8", retrain="initial"),
    "nested, tiers": NestedConfig(tiers=3, retrain="finetune"),
}


def shared_model(strategy, budget, seed=7):
    torch.manual_seed(seed)
    return tiny_model(DATA, "deepfm", strategy, budget, dim=6, init_std=0.1, dropout=0.2, batch_norm=True)


@pytest.mark.parametrize("name", SHARING)
def test_a_phase_that_is_the_same_for_every_budget_is_done_once(name, tmp_path):
    first = fit(shared_model(SHARING[name], "60%"), DATA, CONFIG, shared_dir=tmp_path)
    assert [phase.shared for phase in first.phases] == [False] * len(first.phases)
    for budget in ("30%", "100%"):
        alone, model = (shared_model(SHARING[name], budget) for _ in range(2))
        wanted = timeless(fit(alone, DATA, CONFIG))
        phases, found = [], []
        callback = Callback()
        callback.on_phase_start = lambda model, phase, phases=phases: phases.append(phase.name)
        callback.on_step_end = lambda model, step, found=found, phases=phases: found.append(phases[-1])
        result = timeless(fit(model, DATA, CONFIG, callbacks=[callback], shared_dir=tmp_path))
        assert result.phases[0].shared
        assert result.phases[0].name not in found
        unshared = tuple(dataclasses.replace(phase, shared=False) for phase in result.phases)
        assert dataclasses.replace(result, phases=unshared) == wanted
        assert_same(state(model), state(alone))
        assert model.tables.config == alone.tables.config


def test_phases_of_other_options_are_not_shared(tmp_path):
    fit(model_of(), DATA, CONFIG, shared_dir=tmp_path)
    assert fit(model_of("60%"), DATA, CONFIG, shared_dir=tmp_path).phases[0].shared
    other = model_of()
    other.mlp[3].p = 0.5
    assert not fit(other, DATA, CONFIG, shared_dir=tmp_path).phases[0].shared
    for changed in ({"seed": 3}, {"epochs": 1}, {"learning_rate": 0.01}):
        assert not fit(model_of(), DATA, config(**changed), shared_dir=tmp_path).phases[0].shared
    for options in (
        {"decay": 0.01},
        {"alpha": 0.5},
        {"sampling": "uniform"},
        {"bilevel": True},
        {"norm": 2},
        {"seed": 4},
    ):
        assert not fit(model_of(**options), DATA, CONFIG, shared_dir=tmp_path).phases[0].shared, options
    result = fit(model_of(score="taylor"), DATA, CONFIG, shared_dir=tmp_path)
    assert not any(phase.shared for phase in result.phases)
    (tmp_path / "supernet.safetensors").write_bytes(b"cut short")
    with pytest.raises(IncompatibleStateError, match=r"supernet\.safetensors is no readable checkpoint"):
        fit(model_of(), DATA, CONFIG, shared_dir=tmp_path)


# ---- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["20%", "50%"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_finalized_model_fits_the_budget_and_predicts_the_same(variant, budget):
    model = model_of(budget, **VARIANTS[variant])
    result = fit(model, DATA, config(epochs=4))
    allowed = model.tables.memory().full_bytes * int(budget[:-1]) // 100
    assert model.tables.memory().serve_bytes <= allowed
    before = evaluate(model, DATA.validation)
    assert before.auc == pytest.approx(result.best.metrics["auc"], abs=1e-6)
    model.tables.finalize_()
    assert sum(tensor.nbytes for tensor in model.tables.state_dict().values()) <= allowed
    assert evaluate(model, DATA.validation).log_loss == pytest.approx(before.log_loss, abs=1e-5)
    assert before.auc > 0.6


def test_the_result_tells_the_phases_apart():
    result, _, chosen = whole("plain")
    assert [phase.name for phase in result.phases] == ["supernet", "search", "retrain"]
    assert [(e.phase, e.step) for e in result.history] == [
        (name, step) for name in ("supernet", "retrain") for step in (7, 14, 20)
    ]
    supernet, search, retrain = result.phases
    assert search.candidate == tuple(chosen.dims.values())
    assert search.num_evaluated > 8
    assert (search.stopped, search.steps, search.best, search.history) == ("search", 0, None, ())
    assert result.best == retrain.best == max(retrain.history, key=lambda e: e.metrics["auc"])
    assert result.steps == supernet.steps + retrain.steps == 40
    assert result.epochs == 4


def test_the_supernet_has_limits_of_its_own():
    model = model_of(supernet_epochs=1, supernet_patience=1, search_dims=False)
    result = fit(model, DATA, config(epochs=3, eval_steps=None))
    assert [(phase.name, phase.epochs) for phase in result.phases] == [("supernet", 1), ("retrain", 3)]


@pytest.mark.parametrize("changes", [{"monitor": "log_loss"}, {"search_rows": None}, {"search_at_once": 3}], ids=str)
def test_searches_compare_by_the_monitored_metric_on_as_many_rows_as_said(changes, monkeypatch):
    settings, rows, finalists = config(**changes), [], []
    value, full = ClickSearch._value, ClickSearch.evaluate

    def counting(self, logits):
        rows.append(len(logits))
        return value(self, logits)

    def noting(self):
        finalists.append((full(self), evaluate(self.model, DATA.validation)))
        return finalists[-1][0]

    monkeypatch.setattr(ClickSearch, "_value", counting)
    monkeypatch.setattr(ClickSearch, "evaluate", noting)
    result = fit(model_of(), DATA, settings)
    assert set(rows) == {200 if settings.search_rows is None else 100}
    assert len(rows) == result.phases[1].num_evaluated
    assert len(finalists) == 5
    by_loss = settings.monitor == "log_loss"
    assert all(found == (-metrics.log_loss if by_loss else metrics.auc) for found, metrics in finalists)


def test_candidates_at_once_have_the_values_that_they_have_alone():
    model = model_of(prune_rows=False, budget=None)
    fit(model, DATA, config(epochs=1))
    search = ClickTask(DATA).search(model, config(search_rows=None), torch.device("cpu"))
    shown = [(7, 7, 7), (1, 1, 1), (2, 7, 3)]
    model.tables.show_(shown)
    together = search.evaluate_many(3)
    for candidate, value in zip(shown, together, strict=True):
        model.tables.show_([candidate])
        assert value == pytest.approx(search.evaluate(), abs=1e-4)


# ---- the splits ----------------------------------------------------------------------------------------------------


class Untouchable:
    def __getattribute__(self, name):
        raise AssertionError(f"the test split was touched: {name}")

    def __len__(self):
        raise AssertionError("the test split was touched: len")


@pytest.mark.parametrize("variant", VARIANTS)
def test_bug_selection_on_the_test_split_no_phase_touches_it(variant):
    data = dataclasses.replace(DATA, test=Untouchable())
    model = model_of(**VARIANTS[variant])
    assert timeless(fit(model, data, CONFIG)) == whole(variant)[0]


def test_bug_stale_batch_norm_statistics_finalists_are_recalibrated_on_training_rows(monkeypatch):
    seen, recalibrate = [], ClickSearch.recalibrate

    def noting(self):
        norm = self.model.mlp[1]
        assert norm.training
        assert not self.model.training
        recalibrate(self)
        seen.append((norm.num_batches_tracked.item(), norm.running_mean.clone()))

    monkeypatch.setattr(ClickSearch, "recalibrate", noting)
    model = model_of()
    fit(model, DATA, CONFIG)
    assert [batches for batches, _ in seen] == [10] * 6  # all of the epoch, being fewer than twenty
    assert len({tuple(mean.tolist()) for _, mean in seen}) == 5  # the last is of what was adopted, one of the five
    assert_same(state(model), whole("plain")[1])


def test_bug_stale_batch_norm_statistics_what_is_served_without_retraining_has_its_own():
    model = shared_model(NestedConfig(), "30%")
    fit(model, DATA, CONFIG)
    model.tables.finalize_()
    served = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    assert len(served) == 4
    recalibrate_(model, ClickTask(DATA).search(model, CONFIG, torch.device("cpu")).recalibrate)
    for name, buffer in model.named_buffers():
        if "running" in name:
            torch.testing.assert_close(buffer, served[name])


def test_a_validation_split_is_needed_and_one_of_a_single_class_needs_another_metric():
    with pytest.raises(InputError, match=r"the validation split of tiny has no rows.*split='random'"):
        fit(model_of(), tiny_log((600, 0, 200), num_dense=1), CONFIG)
    validation = dataclasses.replace(DATA.validation, labels=np.ones_like(DATA.validation.labels))
    data = dataclasses.replace(DATA, validation=validation)
    with pytest.raises(InputError, match="set monitor='log_loss'"):
        fit(model_of(), data, CONFIG)
    result = fit(model_of(), data, config(monitor="log_loss"))
    assert len(result.phases[1].candidate) == len(SIZES)


def test_the_sample_of_the_validation_split_has_both_labels():
    labels = np.zeros_like(DATA.validation.labels)
    labels[17] = 1
    data = dataclasses.replace(DATA, validation=dataclasses.replace(DATA.validation, labels=labels))
    for seed in range(5):
        search = ClickTask(data).search(model_of(), config(search_rows=2, seed=seed), torch.device("cpu"))
        assert sorted(search._labels.tolist()) == [0, 1]


@pytest.mark.parametrize(
    "strategy", [OptEmbedConfig(**SEARCH), NestedConfig()], ids=lambda config: type(config).__name__
)
def test_bug_a_train_split_with_one_row_over_recalibrates_without_it(strategy):
    data = tiny_log(rows=(129, 60, 60))
    model = tiny_model(data, "deepfm", strategy, "40%", dim=6, batch_norm=True)
    assert fit(model, data, config(epochs=1, eval_steps=None)).phases[1].name in ("search", "cut")


def test_a_bilevel_phase_needs_two_validation_rows():
    data = tiny_log(rows=(128, 1, 60))
    with pytest.raises(InputError, match=r"validation split of tiny has one row.*bilevel=False"):
        fit(model_of(data=data, bilevel=True), data, config(monitor="log_loss"))
