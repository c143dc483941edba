"""Session models through `fit`: they learn, go on where they were killed, and serve any strategy within its budget."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from embcomp import NestedConfig, OptEmbedConfig, list_strategies
from embcomp.errors import ConfigError, InputError
from embcomp.scoring import sampled_cross_entropy
from recsys_models.data import NO_TARGET, Cases
from recsys_models.ranking import evaluate_cases, rank_cases
from recsys_models.session.floors import Popularity
from recsys_models.training import TrainingConfig, fit
from recsys_models.training.sessions import SessionTask
from tests.recsys_models.killer import Killed, Killer
from tests.recsys_models.runs import assert_same
from tests.recsys_models.session.tiny import NAMES, NUM_ITEMS, sequences, tiny_log, tiny_model
from tests.recsys_models.tiny import tiny_log as tiny_clicks
from tests.recsys_models.tiny import tiny_model as tiny_click_model

LOG = tiny_log()
CONFIG = TrainingConfig(
    batch_size=64,
    epochs=3,
    eval_steps=4,
    learning_rate=0.01,
    patience=None,
    plateau_factor=1.0,
    device="cpu",
    search_rows=60,
)
SEARCH = {"generations": 2, "mutations": 3, "crossovers": 3, "parents": 4}


def config(**changes):
    return dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("name", "items"),
    [*itertools.product(sorted(set(NAMES) - {"bert4rec"}), ["id", "metadata", "hybrid"]), ("bert4rec", "id")],
)
def test_every_model_learns_what_follows(name, items):
    model = tiny_model(LOG, name, items=items, dropout=0.0) if name != "sr_gnn" else tiny_model(LOG, name, items=items)
    epochs = 45 if name == "bert4rec" else 25  # it sees a few gaps per session, where others learn from all positions
    batch_size = 128 if model.encoder.targets == "prefixes" else 32  # about as many targets
    result = fit(model, LOG, config(epochs=epochs, batch_size=batch_size, eval_steps=None))
    found = evaluate_cases(model, LOG.test)
    floor = evaluate_cases(Popularity(LOG.catalogue.counts), LOG.test)
    assert result.best.metrics["ndcg@10"] == max(e.metrics["ndcg@10"] for e in result.history)
    assert found["ndcg@10"] > floor["ndcg@10"] + 0.25
    assert evaluate_cases(model, LOG.validation) == pytest.approx(result.best.metrics)


@pytest.mark.parametrize(
    ("name", "strategy", "phase", "step"),
    [
        ("sasrec", "full", "train", 6),
        ("narm", "full", "train", 13),
        ("bert4rec", "full", "train", 7),
        ("gru4rec", "hash", "train", 11),
        ("m2trec", "full", "train", 9),
        ("sasrec", OptEmbedConfig(**SEARCH), "supernet", 6),
        ("m2trec", OptEmbedConfig(**SEARCH), "retrain", 6),
    ],
)
def test_killed_and_resumed_gives_the_same_bit_for_bit(name, strategy, phase, step, tmp_path):
    budget = None if strategy == "full" else "50%"
    options = {"loss": "sampled", "num_negatives": 20} if name == "narm" else {}
    whole, killed = (tiny_model(LOG, name, strategy, budget, **options) for _ in range(2))
    expected = fit(whole, LOG, CONFIG)
    with pytest.raises(Killed):
        fit(killed, LOG, CONFIG, checkpoint_dir=tmp_path, callbacks=[Killer(phase, step)])
    other = tiny_model(LOG, name, strategy, budget, seed=5, **options)
    found = fit(other, LOG, CONFIG, checkpoint_dir=tmp_path, resume=True)
    assert_same(other.state_dict(), whole.state_dict())
    assert [e.metrics for e in found.history] == [e.metrics for e in expected.history]


@pytest.mark.parametrize("strategy", list_strategies())
@pytest.mark.parametrize("name", ["sasrec", "m2trec"])
def test_every_strategy_trains_and_serves_the_same_within_its_budget(name, strategy):
    roomy = ("full", "mixed_dim") if name == "sasrec" else ("full", "compositional")  # they shrink no such tables
    budget = "100%" if strategy in roomy else "60%"
    options = {"optembed": OptEmbedConfig(**SEARCH)}
    model = tiny_model(LOG, name, options.get(strategy, strategy), budget, dim=16)
    fit(model, LOG, config(epochs=1))
    before = rank_cases(model, LOG.test)
    model.tables.finalize_()
    after = rank_cases(model, LOG.test)
    assert abs(before - after).mean() < 0.2  # float sums in another order may swap two items
    allowed = model.tables.memory().full_bytes * int(budget[:-1]) // 100
    assert sum(t.nbytes for t in model.tables.state_dict().values()) <= allowed


@pytest.mark.parametrize("strategy", list_strategies())
@pytest.mark.parametrize("name", ["bert4rec", "gru4rec", "narm", "sr_gnn"])
def test_every_model_of_ids_takes_a_step_with_every_strategy_and_serves_the_same(name, strategy):
    log = tiny_log(sessions=40)
    budget = "100%" if strategy in ("full", "mixed_dim") else "60%"
    model = tiny_model(log, name, OptEmbedConfig(**SEARCH) if strategy == "optembed" else strategy, budget)
    before = {key: value.clone() for key, value in model.encoder.state_dict().items()}
    fit(model, log, config(epochs=1, eval_steps=None))
    assert any(not torch.equal(value, before[key]) for key, value in model.encoder.state_dict().items())
    items, lengths = torch.tensor([[3, 4, 3, 5], [7, 0, 0, 0], [29, 1, 0, 0]]), torch.tensor([4, 1, 2])
    model.eval()
    with torch.no_grad():
        trained = model(items, lengths)
        model.tables.finalize_()
        torch.testing.assert_close(model(items, lengths), trained, rtol=1e-4, atol=1e-5)
    assert trained.isfinite().all()


def test_windows_train_on_all_of_a_long_session():
    log = dataclasses.replace(LOG, train=sequences(*([[step % NUM_ITEMS for step in range(40)]] * 8)))
    for windows, targets in (("last", 8), ("all", 39)):
        model = tiny_model(log, windows=windows)
        seen = []
        model.learn = lambda examples, m=model, s=seen: s.append(examples) or type(m).learn(m, examples)
        fit(model, log, config(epochs=1, eval_steps=None))
        assert sum(int((e.targets >= 0).sum()) for e in seen) == 8 * targets


def test_what_is_learned_from_can_be_chosen():
    log = dataclasses.replace(LOG, train=sequences([1, 2, 3, 4], [5, 6, 7]))
    for targets, sessions in (("positions", 2), ("prefixes", 5)):
        model = tiny_model(log, targets=targets)
        seen = []
        model.learn = lambda examples, m=model, s=seen: s.append(examples) or type(m).learn(m, examples)
        fit(model, log, config(epochs=1, eval_steps=None))
        assert [len(examples.items) for examples in seen] == [sessions]
        assert sum(int((examples.targets >= 0).sum()) for examples in seen) == 5


@pytest.mark.parametrize("loss", ["softmax", "binary"])
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in NAMES), ("m2trec", {"causal": True})])
def test_validation_cases_are_learned_from_as_they_are(name, options, loss):
    model = tiny_model(LOG, name, loss=loss, **options).eval()
    task = SessionTask(LOG)
    raw = next(iter(LOG.validation.batches(64, 8, shuffle=True, seed=CONFIG.seed).epoch(0)))
    examples = next(iter(task.batches("validation", model, CONFIG, torch.device("cpu")).epoch(0)))
    for row, length in enumerate(raw.lengths.tolist()):
        assert torch.equal(examples.items[row, :length], raw.items[row, :length])
    assert torch.equal(examples.targets[examples.targets >= 0], raw.targets)
    learned = task.predict(model, examples)
    torch.testing.assert_close(model.encoder.to_queries(learned), model.queries(raw.items, raw.lengths))
    if loss == "softmax":
        wanted = torch.nn.functional.cross_entropy(model(raw.items, raw.lengths), raw.targets)
        torch.testing.assert_close(task.loss(model, examples, learned), wanted)
    assert task.loss(model, examples, learned).isfinite()


def chances_of(model, log, monkeypatch):
    """The chance of each item in one draw of a target, from what the loss was corrected by; NaN where it was not."""
    found, drawn = torch.full((NUM_ITEMS,), torch.nan, dtype=torch.float64), model.objective.config.num_negatives

    def look(scorer, queries, targets, negatives):
        taken = min(drawn, len(targets)) * (len(targets) - 1) / len(targets)
        of_batch = negatives.log_counts.double().exp() - drawn / NUM_ITEMS
        found[negatives.ids] = of_batch / taken
        return sampled_cross_entropy(scorer, queries, targets, negatives)

    monkeypatch.setattr("recsys_models.session.objectives.sampled_cross_entropy", look)
    fit(model, log, config(epochs=1, eval_steps=None))
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sasrec", {"windows": "last"}),
        ("sasrec", {"windows": "all"}),
        ("sasrec", {"targets": "prefixes"}),
        ("m2trec", {}),
        ("bert4rec", {}),
        ("bert4rec", {"windows": "all", "mask_share": 0.6, "last_share": 0.5}),
    ],
)
def test_bug_targets_are_corrected_by_how_often_training_asks_for_them(name, options, monkeypatch):
    """Sessions begin with item 0, which is never asked for, and long ones have their early items cut off."""
    rng = np.random.default_rng(0)
    walks = [[0, *rng.integers(1, 15, size), *rng.integers(15, NUM_ITEMS, 5)] for size in rng.integers(0, 12, 150)]
    log = dataclasses.replace(LOG, train=sequences(*walks))
    counts = np.bincount(log.train.items, minlength=NUM_ITEMS)
    log = dataclasses.replace(log, catalogue=dataclasses.replace(log.catalogue, counts=counts))
    model = tiny_model(log, name, loss="sampled", num_negatives=64, **options)
    wanted = torch.zeros(NUM_ITEMS, dtype=torch.float64)
    length, of_last = model.max_length, options.get("windows") == "last"
    if name == "bert4rec":
        mode, windows = model.encoder.targets, options.get("windows", "last")
        for batch in log.train.batches(len(log.train), length, mode=mode, windows=windows):
            for _ in range(2000):
                targets = model.prepare(batch).targets
                wanted += torch.bincount(targets[targets != NO_TARGET], minlength=NUM_ITEMS)
    else:
        for walk in walks:
            for item in walk[max(1, len(walk) - length) if of_last else 1 :]:
                wanted[item] += 1
    found = chances_of(model, log, monkeypatch)
    tolerance = {"rtol": 0.03, "atol": 1e-4} if name == "bert4rec" else {"rtol": 1e-3, "atol": 1e-6}
    torch.testing.assert_close(found, wanted / wanted.sum(), **tolerance)
    by_events = torch.from_numpy(counts / counts.sum())
    assert not torch.allclose(found, by_events, **tolerance)


# ---- wrong input ---------------------------------------------------------------------------------------------------


def test_models_and_data_that_do_not_go_together():
    with pytest.raises(ConfigError, match="has 30 items, but the model has 12"):
        fit(tiny_model(tiny_log(num_items=12)), LOG, CONFIG)
    clicks = tiny_clicks()
    with pytest.raises(ConfigError, match="or data of load_sessions for session models"):
        fit(tiny_model(LOG), clicks, CONFIG)
    with pytest.raises(ConfigError, match="or data of load_dataset for click models"):
        fit(tiny_click_model(clicks), LOG, CONFIG)
    with pytest.raises(ConfigError, match="monitor='auc'"):
        fit(tiny_model(LOG), LOG, config(monitor="auc"))
    with pytest.raises(ConfigError, match="distill=0"):
        fit(tiny_model(LOG, "sasrec", NestedConfig(distill=1.0), "50%"), LOG, CONFIG)


def test_splits_that_cannot_be_used():
    single = dataclasses.replace(LOG, train=sequences([1], [2], [3]))
    with pytest.raises(InputError, match="no training session of tiny has a second item"):
        fit(tiny_model(LOG), single, CONFIG)
    none = Cases(LOG.validation.sequences, LOG.validation.rows[:0], LOG.validation.ends[:0])
    with pytest.raises(InputError, match=r"validation split of tiny has no cases.*validation_share.*leave_one_out"):
        fit(tiny_model(LOG), dataclasses.replace(LOG, validation=none), CONFIG)
