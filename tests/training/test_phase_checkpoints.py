"""A plain loop that is interrupted in any phase, saved with its optimizers and phases, and gone on with elsewhere."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import embcomp
from embcomp import ConfigError, IncompatibleStateError, MagnitudeConfig, NestedConfig, OptEmbedConfig
from embcomp.training import Phases
from tests.examples.optembed_loop import ClickModel
from tests.training.clicks import SIZES, batches

TRAIN, VALIDATION = batches(6, seed=1), batches(4, seed=2)

SEARCH = {"generations": 2, "mutations": 3, "crossovers": 3, "parents": 4}
STEPS = 6
CONFIGS = {
    "optembed": OptEmbedConfig(**SEARCH),
    "optembed, bilevel": OptEmbedConfig(**SEARCH, bilevel=True, score="taylor", decay=1e-3),
    "optembed, int8": OptEmbedConfig(**SEARCH, rows="int8", threshold_per_id=True, retrain_from="supernet"),
    "magnitude": MagnitudeConfig(finetune_epochs=1, rows="int8"),
    "nested": NestedConfig(retrain="initial"),
}


def compressed(name):
    torch.manual_seed(0)
    return embcomp.compress_(ClickModel(SIZES), CONFIGS[name], "40%", verbose=False).model


def log_loss(model):
    model.eval()
    with torch.no_grad():
        losses = [F.binary_cross_entropy_with_logits(model(inputs), labels) for inputs, labels in VALIDATION]
    model.train()
    return -torch.stack(losses).mean().item()


def go_through(model, phases, begin=None, stop=None):
    """Train through the phases; from a phase and a step on, or up to them.

    Args:
        model: that is trained.
        phases: of it; entered, if they begin in the middle.
        begin: phase, step and optimizer to begin with.
        stop: phase and step to stop at; returns the optimizer there.
    """
    for phase in phases:
        first, optimizer = 0, None
        if begin is not None and phase.name != begin[0]:
            continue
        if begin is None:
            phases.enter_(phase)
        else:
            _, first, optimizer = begin
            begin = None
        optimizer = optimizer or torch.optim.Adam(phases.parameters(), 0.02)
        for number in range(first, STEPS):
            if stop == (phase.name, number):
                return optimizer
            if phase.is_search:
                if number == 0:
                    torch.manual_seed(99)
                    phases.search_(partial(log_loss, model))
                continue
            torch.manual_seed(number)  # for what the supernet draws
            inputs, labels = TRAIN[number % len(TRAIN)]
            given = partial(model, inputs), partial(F.binary_cross_entropy_with_logits, target=labels)
            phases.loss(*given).backward()
            optimizer.step()
            optimizer.zero_grad()
            phases.step_()
            if phase.bilevel:
                phases.architecture_step_(*given)
        phases.leave_(phase)
    return None


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_training_goes_on_bit_for_bit_from_any_phase(name, place, tmp_path):
    model = compressed(name)
    phases = Phases(model)
    if place >= len(phases.phases):
        place = 0
    stop = phases.phases[place].name, 0 if phases.phases[place].is_search else STEPS // 2
    optimizer = go_through(model, phases, stop=stop)
    optimizers = None if phases.phase.is_search else [optimizer]
    embcomp.save_pretrained(model, tmp_path, optimizers, phases)
    go_through(model, phases, begin=(*stop, optimizer))

    torch.manual_seed(5)
    handle = embcomp.load_pretrained_(ClickModel(SIZES), tmp_path, verbose=False)
    again = Phases(handle.model)
    again.enter_(again.phases[place])
    other = torch.optim.Adam(again.parameters(), 0.02)
    embcomp.load_optimizers_(handle, tmp_path, [other] if optimizers else [], again)
    go_through(handle.model, again, begin=(*stop, other))

    wanted, got = model.state_dict(), handle.model.state_dict()
    assert wanted.keys() == got.keys()
    assert [key for key in wanted if not torch.equal(wanted[key], got[key])] == []
    assert handle.tables[0].config == phases.groups[0].config


def test_bug_first_weights_were_lost_between_two_phases(tmp_path):
    model = compressed("optembed")
    phases = Phases(model)
    first = model.mlp[0].weight.detach().clone()
    go_through(model, phases, stop=("search", 0))
    phases.search_(partial(log_loss, model))
    phases.leave_(phases.phase)
    with pytest.raises(ConfigError, match="in phase 'search', one of several: give phases= too"):
        embcomp.save_pretrained(model, tmp_path, [])
    embcomp.save_pretrained(model, tmp_path, phases=phases)
    handle = embcomp.load_pretrained_(ClickModel(SIZES), tmp_path, verbose=False)
    again = Phases(handle.model)
    again.enter_(again.phases[1])
    embcomp.load_optimizers_(handle, tmp_path, [], again)
    assert not torch.equal(handle.model.mlp[0].weight, first)
    again.enter_(again.phases[2])
    assert torch.equal(handle.model.mlp[0].weight, first)
    again.leave_(again.phases[2])
    embcomp.save_pretrained(handle, tmp_path, [])


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, partial(torch.compile, backend="eager")])
def test_bug_first_weights_had_the_names_of_what_wraps_a_model(wrap, tmp_path):
    wrapped = wrap(compressed("optembed"))
    phases = Phases(wrapped)
    phases.enter_(phases.phases[0])
    embcomp.save_pretrained(wrapped, tmp_path, [torch.optim.Adam(phases.parameters())], phases)
    handle = embcomp.load_pretrained_(ClickModel(SIZES), tmp_path, verbose=False)
    again = Phases(handle.model)
    again.enter_(again.phases[0])
    embcomp.load_optimizers_(handle, tmp_path, [torch.optim.Adam(again.parameters())], again)
    again.enter_(again.phases[2])


def test_bug_tables_saved_in_a_search_were_frozen_for_good(tmp_path):
    model = compressed("optembed")
    phases = Phases(model)
    go_through(model, phases, stop=("search", 0))
    embcomp.save_pretrained(model, tmp_path)
    assert any(p.requires_grad for p in embcomp.load_tables(tmp_path)[0].parameters())
    phases.release_()
    embcomp.finalize_(model.requires_grad_(False))
    embcomp.save_pretrained(model, tmp_path)
    assert not any(p.requires_grad for p in embcomp.load_tables(tmp_path)[0].parameters())


def test_phases_that_are_missing_or_others_are_told(tmp_path):
    model = compressed("optembed")
    phases = Phases(model)
    optimizer = go_through(model, phases, stop=("supernet", 2))
    with pytest.raises(ConfigError, match="are in phase 'supernet', one of several: give phases= too"):
        embcomp.save_pretrained(model, tmp_path, [optimizer])
    with pytest.raises(ConfigError, match=r"give a list of them, \[optimizer\]"):
        embcomp.save_pretrained(model, tmp_path, optimizer, phases)
    embcomp.save_pretrained(model, tmp_path, [optimizer], phases)
    handle = embcomp.load_pretrained_(ClickModel(SIZES), tmp_path, verbose=False)
    again = Phases(handle.model)
    again.enter_(again.phases[2])
    other = torch.optim.Adam(again.parameters())
    for given, there in ((None, "None"), (again, "retrain")):
        with pytest.raises(IncompatibleStateError, match=f"saved in phase supernet, and is loaded in phase {there}"):
            embcomp.load_optimizers_(handle, tmp_path, [other], given)
