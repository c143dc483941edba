"""State of optimizers in a checkpoint: tensors and plain numbers, by the names of the parameters they belong to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from embcomp._checkpoint import Checkpoint, get
from embcomp.errors import ConfigError, IncompatibleStateError


@dataclass(frozen=True)
class ParameterState:
    """What an optimizer keeps for one parameter.

    Attributes:
        kind: the class of the optimizer.
        tensors: by the optimizer's names for them.
        numbers: the same.
    """

    kind: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, int | float] = field(default_factory=dict)


def states_of(
    parameters: Mapping[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, ParameterState]:
    """The state of optimizers by the names of parameters, which has an entry for each that they train.

    Raises:
        ConfigError: if one is no torch optimizer, or two train one parameter.
        IncompatibleStateError: if one trains what is not among the parameters, or keeps what is no tensor or number.
    """
    found: dict[str, ParameterState] = {}
    for name, _, _, parameter, optimizer in _trained(parameters, optimizers):
        own = found[name] = ParameterState(type(optimizer).__name__)
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.layout is torch.strided:
                own.tensors[key] = value.detach()
            elif isinstance(value, int | float) and math.isfinite(value):
                own.numbers[key] = value
            elif value is not None:
                raise IncompatibleStateError(
                    f"{own.kind} keeps {key!r} of {name!r}, a {type(value).__name__}: only tensors and finite numbers "
                    "can be saved without pickle"
                )
    return found


def fitted_states(
    parameters: Mapping[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    saved: Mapping[str, ParameterState],
    checkpoint: Checkpoint,
) -> list[dict[str, Any]]:
    """What each of the optimizers is to load of the states that `read_states` has read.

    Raises:
        ConfigError, IncompatibleStateError: as `states_of`, or if the optimizers are not of the saved kinds or do not
            train the saved parameters.
    """
    trained = list(_trained(parameters, optimizers))
    names = {name for name, *_ in trained}
    for whose, few in (("these optimizers do not train", saved.keys() - names), ("it lacks", names - saved.keys())):
        if few:
            raise IncompatibleStateError(
                f"{checkpoint.config_file} has the state of other optimizers: {whose} {', '.join(sorted(few)[:3])}"
                f"{f' and {len(few) - 3} more' if len(few) > 3 else ''}. Make them as those that were saved"
            )
    states: list[dict[Any, Any]] = [{} for _ in optimizers]
    for name, number, index, _, optimizer in trained:
        if saved[name].kind != (kind := type(optimizer).__name__):
            raise IncompatibleStateError(
                f"{checkpoint.config_file} has the state of {saved[name].kind} for {name!r}, which {kind} trains now"
            )
        if own := saved[name].tensors | saved[name].numbers:
            states[number][index] = own
    return [optimizer.state_dict() | {"state": state} for optimizer, state in zip(optimizers, states, strict=True)]


def packed(states: Mapping[str, ParameterState]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """States as JSON values, and the tensors those name."""
    described: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, own in states.items():
        places = {key: f"optimizer:{name}.{key}" for key in own.tensors}
        described[name] = {"kind": own.kind, "numbers": own.numbers, "tensors": places}
        tensors |= {place: own.tensors[key] for key, place in places.items()}
    return described, tensors


def read_states(checkpoint: Checkpoint) -> dict[str, ParameterState]:
    """The states that a checkpoint has.

    Raises:
        IncompatibleStateError: if it has none.
    """
    file = checkpoint.config_file
    described = checkpoint.content.get("optimizers", {})
    if not described:
        raise IncompatibleStateError(f"{file} has no state of optimizers: save it along, with optimizers=[...]")
    found = {}
    for name, raw in described.items():
        own = found[name] = ParameterState(get(raw, "kind", str, file), numbers=get(raw, "numbers", dict, file))
        for key, tensor in get(raw, "tensors", dict, file).items():
            own.tensors[key] = checkpoint.optimizer_tensors[tensor]
        if strange := [key for key, value in own.numbers.items() if not isinstance(value, int | float)]:
            raise IncompatibleStateError(f"{file}: {strange[0]!r} of the optimizer of {name!r} must be a number")
    return found


# ---- inside ---------------------------------------------------------------------------------------------------------


def _trained(
    parameters: Mapping[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[str, int, Any, nn.Parameter, torch.optim.Optimizer]]:
    """Name, number of the optimizer, its own index, parameter and optimizer, of each parameter that is trained."""
    if isinstance(optimizers, torch.optim.Optimizer):
        raise ConfigError(f"optimizers is one {type(optimizers).__name__}: give a list of them, [optimizer]")
    names = {id(parameter): name for name, parameter in parameters.items()}
    known: set[str] = set()
    for number, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(f"optimizers[{number}] is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
        groups = zip(optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True)
        for parameter, index in (
            pair for own, raw in groups for pair in zip(own["params"], raw["params"], strict=True)
        ):
            name = names.get(id(parameter))
            if name is None:
                raise IncompatibleStateError(
                    f"optimizers[{number}] trains a parameter of shape {tuple(parameter.shape)} the model has not: "
                    "make optimizers after compress_ and load_pretrained_, of the model's own parameters"
                )
            if name in known:
                raise ConfigError(f"two of the optimizers train {name!r}")
            known.add(name)
            yield name, number, index, parameter, optimizer
