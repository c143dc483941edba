"""State of optimizers beside the weights: training goes on bit for bit, or an error says what does not fit."""

import json
import re

import pytest
import torch
from torch import nn

import embcomp
from embcomp import ConfigError, IncompatibleStateError
from embcomp._checkpoint import CONFIG, sealed
from embcomp.training import RowwiseAdagrad
from tests.checkpoints import FUSED, Model
from tests.optimizers import Wrapping

OPTIMIZERS = {
    "Adam": lambda given: [torch.optim.Adam(given, lr=0.1)],
    "fused Adam": lambda given: [torch.optim.Adam(given, lr=0.1, fused=True)],
    "NAdam": lambda given: [torch.optim.NAdam(given, lr=0.1)],
    "SGD": lambda given: [torch.optim.SGD(given, lr=1e-4)],
    "momentum": lambda given: [torch.optim.SGD(given, lr=1e-4, momentum=0.9)],
    "Adagrad": lambda given: [torch.optim.Adagrad(given, lr=0.1)],
    "RMSprop": lambda given: [torch.optim.RMSprop(given, lr=0.1, centered=True)],
    "two": lambda given: [RowwiseAdagrad(given[:2], lr=0.1), torch.optim.Adam(given[2:], lr=0.1)],
    "counting": lambda given: [Counting(given, lr=0.1)],
    "groups": lambda given: [torch.optim.Adam([{"params": given[3:]}, {"params": given[:3], "lr": 0.2}])],
}


class Sparse(nn.Module):
    """What SparseAdam and RowwiseAdagrad train by rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.item = nn.Embedding(50, 8)

    def forward(self, ids):
        return self.item(ids)


class Counting(torch.optim.SGD):
    """Keeps count in its groups, and state in a dtype of its own."""

    def step(self):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["seen"] = state.get("seen", torch.tensor(2**53, dtype=torch.int64)) + 1
                parameter.data.mul_(1 - 0.01 * group["k"])


def plain():
    return embcomp.compress_(Model(), "hash", "50%", fused=FUSED, verbose=False)


def train(model, optimizers, seed, steps=3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss = model(torch.randint(10, (32,), generator=generator)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(mine, others):
    return len(mine) == len(others) and all(torch.equal(*pair) for pair in zip(mine, others, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(name, tmp_path):
    model = plain().model
    optimizers = OPTIMIZERS[name](list(model.parameters()))
    train(model, optimizers, 1)
    embcomp.save_pretrained(model, tmp_path, optimizers)
    wanted = train(model, optimizers, 2)

    resumed = embcomp.load_pretrained_(Model(), tmp_path, verbose=False)
    others = OPTIMIZERS[name](list(resumed.model.parameters()))
    embcomp.load_optimizers_(resumed, tmp_path, others)
    assert same(train(resumed.model, others, 2), wanted)

    anew = embcomp.load_pretrained_(Model(), tmp_path, verbose=False).model
    assert same(train(anew, OPTIMIZERS[name](list(anew.parameters())), 2), wanted) == (name == "SGD")


@pytest.mark.parametrize("kind", [torch.optim.SparseAdam, RowwiseAdagrad])
def test_rows_of_few_bits_and_row_sparse_gradients(kind, tmp_path):
    config = embcomp.HashConfig(sparse=True, rows="bfloat16:pure" if kind is RowwiseAdagrad else "float32")
    model = embcomp.compress_(Sparse(), config, "50%", verbose=False).model
    optimizers = [kind(list(model.parameters()), lr=0.1)]
    train(model, optimizers, 1)
    embcomp.save_pretrained(model, tmp_path, optimizers)
    wanted = train(model, optimizers, 2)
    resumed = embcomp.load_pretrained_(Sparse(), tmp_path, verbose=False).model
    others = [kind(list(resumed.parameters()), lr=0.1)]
    embcomp.load_optimizers_(resumed, tmp_path, others)
    assert same(train(resumed, others, 2), wanted)


def test_a_checkpoint_with_optimizers_is_one_without_to_whoever_wants_no_more(tmp_path):
    model = plain().model
    optimizer = torch.optim.Adam(model.parameters())
    train(model, [optimizer], 1)
    embcomp.save_pretrained(model, tmp_path / "with", [optimizer])
    embcomp.save_pretrained(model, tmp_path / "without")
    loaded = [embcomp.load_pretrained_(Model(), tmp_path / name, verbose=False).model for name in ("with", "without")]
    assert same(list(loaded[0].parameters()), list(loaded[1].parameters()))
    assert len(embcomp.load_tables(tmp_path / "with")) == 2
    versions = [json.loads((tmp_path / name / CONFIG).read_text())["format_version"] for name in ("with", "without")]
    assert versions == [3, 2]
    assert len(list((tmp_path / "with").glob("*.safetensors"))) == 1


def test_of_wrapped_models_the_names_within_are_saved(tmp_path):
    wrapped = nn.DataParallel(plain().model)
    optimizer = torch.optim.Adam(wrapped.parameters())
    train(wrapped, [optimizer], 1)
    embcomp.save_pretrained(wrapped, tmp_path, [optimizer])
    resumed = embcomp.load_pretrained_(Model(), tmp_path, verbose=False)
    other = torch.optim.Adam(resumed.model.parameters())
    embcomp.load_optimizers_(nn.DataParallel(resumed.model), tmp_path, [other])
    mine, theirs = other.state[resumed.model.hidden.bias], optimizer.state[wrapped.module.hidden.bias]
    assert torch.equal(mine["exp_avg"], theirs["exp_avg"])


def saved(folder, make=torch.optim.Adam):
    model = plain().model
    optimizer = make(model.parameters())
    train(model, [optimizer], 1)
    embcomp.save_pretrained(model, folder, [optimizer])
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: [torch.optim.SGD(model.parameters())], r"state of torch.Adam, and is to be loaded by torch.SGD"),
        (
            lambda model: [torch.optim.Adam(list(model.parameters())[1:])],
            r"for other parameters: hidden.weight: make it",
        ),
        (
            lambda model: [torch.optim.Adam([{"params": [p]} for p in model.parameters()])],
            "for the same parameters in other groups",
        ),
        (lambda model: [], "and is to be loaded by none"),
        (lambda model: 2 * [torch.optim.Adam(model.parameters())], "two of the optimizers train"),
        (lambda model: torch.optim.Adam(model.parameters()), r"give a list of them, \[optimizer\]"),
        (lambda model: [torch.optim.Adam([*model.parameters(), nn.Parameter(torch.ones(3))])], r"of shape \(3,\)"),
        (lambda model: [Wrapping(torch.optim.Adam(model.parameters()))], r"give those, its \.inner \(Adam\)"),
        (lambda model: None, "optimizers is one NoneType: give a list"),
        (lambda model: [model], r"optimizers\[0\] is a Model, not a torch.optim.Optimizer"),
    ],
)
def test_other_optimizers_are_refused_and_stay_as_they_were(make, message, tmp_path):
    saved(tmp_path)
    model = embcomp.load_pretrained_(Model(), tmp_path, verbose=False).model
    with pytest.raises((ConfigError, IncompatibleStateError), match=message):
        embcomp.load_optimizers_(model, tmp_path, made := make(model))
    for optimizer in made if isinstance(made, list) else [made]:
        assert not getattr(optimizer, "state", None)


def test_learning_rates_and_schedulers_go_on_too(tmp_path):
    model = plain().model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for epoch in range(2):
        train(model, [optimizer], epoch)
        scheduler.step()
    embcomp.save_pretrained(model, tmp_path, [optimizer])
    kept = scheduler.state_dict()
    resumed = embcomp.load_pretrained_(Model(), tmp_path, verbose=False).model
    other = torch.optim.SGD(resumed.parameters(), lr=1e-3)
    again = torch.optim.lr_scheduler.ExponentialLR(other, 0.5)
    embcomp.load_optimizers_(resumed, tmp_path, [other])
    again.load_state_dict(kept)
    assert other.param_groups[0]["lr"] == 0.25e-3
    again.step()
    assert other.param_groups[0]["lr"] == 0.125e-3


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda given: torch.optim.Adam(given, lr=torch.tensor(0.1))])
def test_options_are_those_that_were_saved(make, tmp_path):
    model = plain().model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.25, betas=(0.5, 0.75), amsgrad=True)
    train(model, [optimizer], 1)
    embcomp.save_pretrained(model, tmp_path, [optimizer])
    wanted = train(model, [optimizer], 2)
    resumed = embcomp.load_pretrained_(Model(), tmp_path, verbose=False).model
    other = make(resumed.parameters())
    embcomp.load_optimizers_(resumed, tmp_path, [other])
    assert type(other.param_groups[0]["betas"]) is tuple
    assert same(train(resumed, [other], 2), wanted)


def test_state_of_other_sizes_is_refused(tmp_path):
    saved(tmp_path)
    other = embcomp.compress_(Model(), "hash", "20%", fused=FUSED, verbose=False).model
    with pytest.raises(IncompatibleStateError, match=r"of shape \(\d+, 8\), which has \(\d+, 8\) in this model"):
        embcomp.load_optimizers_(other, tmp_path, [torch.optim.Adam(other.parameters())])


def test_weights_and_optimizers_are_of_one_checkpoint(tmp_path):
    model = plain().model
    optimizer = torch.optim.Adam(model.parameters())
    embcomp.save_pretrained(model, tmp_path, [optimizer])
    resumed = embcomp.load_pretrained_(Model(), tmp_path, verbose=False).model
    alone = embcomp.load_tables(tmp_path)[0]
    train(model, [optimizer], 1)
    embcomp.save_pretrained(model, tmp_path, [optimizer])
    for other in (resumed, alone):
        with pytest.raises(IncompatibleStateError, match="not the checkpoint that the model was loaded from"):
            embcomp.load_optimizers_(other, tmp_path, [torch.optim.Adam(other.parameters())])
    embcomp.load_pretrained_(resumed, tmp_path, verbose=False)
    embcomp.load_optimizers_(resumed, tmp_path, [torch.optim.Adam(resumed.parameters())])


@pytest.mark.parametrize("value", [print, float("nan"), {"a": 1}])
def test_options_that_are_no_plain_values_are_named(value, tmp_path):
    model = plain().model
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.param_groups[0]["odd"] = value
    with pytest.raises(IncompatibleStateError, match="SGD has the option odd="):
        embcomp.save_pretrained(model, tmp_path, [optimizer])


def test_state_of_no_parameter_is_told(tmp_path):
    model = plain().model
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state["global"] = {"d": torch.tensor(1.0)}
    with pytest.raises(IncompatibleStateError, match="keeps state of none of its parameters, such as 'global'"):
        embcomp.save_pretrained(model, tmp_path, [optimizer])


def test_any_iterable_of_optimizers(tmp_path):
    model = saved(tmp_path)
    other = torch.optim.Adam(model.parameters())
    embcomp.load_optimizers_(model, tmp_path, (one for one in [other]))
    embcomp.save_pretrained(model, tmp_path, (one for one in [other]))
    assert len(other.state) == len(list(model.parameters()))


def test_no_optimizers_are_a_list_too(tmp_path):
    model = plain().model
    embcomp.save_pretrained(model, tmp_path, [])
    embcomp.load_optimizers_(model, tmp_path, [])
    with pytest.raises(IncompatibleStateError, match="has the state of no optimizer"):
        embcomp.load_optimizers_(model, tmp_path, [torch.optim.Adam(model.parameters())])


def test_parameters_that_were_not_trained_then(tmp_path):
    model = plain().model
    optimizer = torch.optim.Adam(list(model.parameters())[1:])
    train(model, [optimizer], 1)
    embcomp.save_pretrained(model, tmp_path, [optimizer])
    with pytest.raises(IncompatibleStateError, match=r"for other parameters: hidden.weight"):
        embcomp.load_optimizers_(model, tmp_path, [torch.optim.Adam(model.parameters())])


def test_what_cannot_be_saved_or_was_not(tmp_path):
    model = plain().model
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def loss():
        lbfgs.zero_grad()
        value = model(torch.arange(4)).square().mean()
        value.backward()
        return value

    lbfgs.step(loss)
    with pytest.raises(IncompatibleStateError, match=r"LBFGS keeps .* only dense tensors and finite numbers"):
        embcomp.save_pretrained(model, tmp_path / "lbfgs", [lbfgs])
    assert not (tmp_path / "lbfgs").exists()
    with pytest.raises(IncompatibleStateError, match="trains a parameter of shape"):
        embcomp.save_pretrained(model, tmp_path, [torch.optim.Adam(Model().parameters())])
    embcomp.save_pretrained(model, tmp_path)
    with pytest.raises(IncompatibleStateError, match=re.escape("save it along, with optimizers=[...]")):
        embcomp.load_optimizers_(model, tmp_path, [torch.optim.Adam(model.parameters())])


@pytest.mark.parametrize(
    "forge",
    [
        lambda raw: raw.update(numbers={"step": "x"}),
        lambda raw: raw.update(numbers=[]),
        lambda raw: raw.update(tensors={"exp_avg": "no such tensor"}),
        lambda raw: raw.update(tensors={"exp_avg": []}),
        lambda raw: raw.update(tensors=3),
        lambda raw: raw.pop("shape"),
    ],
)
def test_forged_states_are_told(forge, tmp_path):
    model = saved(tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    forge(content["training"]["optimizers"][0]["groups"][0]["parameters"]["hidden.bias"])
    (tmp_path / CONFIG).write_text(json.dumps(sealed(content)))
    with pytest.raises(IncompatibleStateError, match=CONFIG):
        embcomp.load_optimizers_(model, tmp_path, [torch.optim.Adam(model.parameters())])


def test_no_reader_of_version_2_takes_them_for_weights(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.setattr("embcomp._checkpoint.FORMAT_VERSION", 2)
    with pytest.raises(IncompatibleStateError, match="this one reads versions up to 2: upgrade embcomp"):
        embcomp.load_tables(tmp_path)
