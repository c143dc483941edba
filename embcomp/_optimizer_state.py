"""State of training in a checkpoint: that of optimizers, by the names of parameters, and first weights of phases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from embcomp._checkpoint import Checkpoint, get
from embcomp.errors import ConfigError, IncompatibleStateError

_KEYS = {"state", "param_groups"}


@dataclass(frozen=True)
class ParameterState:
    """What an optimizer keeps for one parameter.

    Attributes:
        shape: of the parameter.
        tensors: by the optimizer's names for them.
        numbers: the same.
    """

    shape: tuple[int, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, int | float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupState:
    """A group of parameters: its options, such as the learning rate, and the states by the parameters' names."""

    options: dict[str, Any]
    parameters: dict[str, ParameterState]


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer: its class, and its groups."""

    kind: str
    groups: list[GroupState]

    @property
    def names(self) -> list[list[str]]:
        """Names of the parameters of each group."""
        return [list(group.parameters) for group in self.groups]


@dataclass(frozen=True)
class PhaseState:
    """What a phase of several needs: its name, and the weights, by name, that later ones may go back to."""

    name: str
    initial: dict[str, Tensor]


def wrapped_by(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.optim.Optimizer]]:
    """The optimizers that one holds in its attributes, each with the name of the attribute."""
    held = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups", "defaults")}
    return [(name, part) for name, value in held.items() for part in _optimizers_in(value) if part is not optimizer]


def listed(optimizers: Iterable[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """Optimizers as a list.

    Raises:
        ConfigError: if they are none, or one of them is no plain torch optimizer.
    """
    if isinstance(optimizers, torch.optim.Optimizer) or not isinstance(optimizers, Iterable):
        raise ConfigError(f"optimizers is one {type(optimizers).__name__}: give a list of them, [optimizer]")
    found = list(optimizers)
    for number, optimizer in enumerate(found):
        _check_plain(number, optimizer)
    return found


def states_of(
    parameters: Mapping[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
) -> list[OptimizerState]:
    """The state of optimizers, by the names of parameters.

    Raises:
        ConfigError: if two train one parameter.
        IncompatibleStateError: if one trains what is not among the parameters, or keeps what is no tensor or number.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: list[OptimizerState] = []
    known: set[str] = set()
    for number, optimizer in enumerate(optimizers):
        groups = []
        for group in optimizer.param_groups:
            own: dict[str, ParameterState] = {}
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None:
                    raise IncompatibleStateError(
                        f"optimizers[{number}] trains a parameter of shape {tuple(parameter.shape)} that is not the "
                        "model's: make optimizers after compress_ and load_pretrained_, of the model's own parameters"
                    )
                if name in known:
                    raise ConfigError(f"two of the optimizers train {name!r}")
                known.add(name)
                own[name] = _state_of(optimizer, name, parameter)
            groups.append(GroupState(_options_of(optimizer, group), own))
        if strange := optimizer.state.keys() - {p for group in optimizer.param_groups for p in group["params"]}:
            raise IncompatibleStateError(
                f"optimizers[{number}], {type(optimizer).__name__}, keeps state of none of its parameters, such as "
                f"{next(iter(strange))!r}: it can't be saved by their names"
            )
        found.append(OptimizerState(_kind(optimizer), groups))
    return found


def check_fit(own: Sequence[OptimizerState], saved: Sequence[OptimizerState], checkpoint: Checkpoint) -> None:
    """Check that optimizers can take over what was saved.

    Raises:
        IncompatibleStateError: if they are not of the saved kinds, or do not train the saved parameters.
    """
    file = checkpoint.config_file
    kinds, wanted = [one.kind for one in own], [one.kind for one in saved]
    if kinds != wanted:
        raise IncompatibleStateError(
            f"{file} has the state of {', '.join(wanted) or 'no optimizer'}, and is to be loaded by "
            f"{', '.join(kinds) or 'none'}: make the optimizers as those that were saved, in the same order"
        )
    for number, (mine, theirs) in enumerate(zip(own, saved, strict=True)):
        if mine.names != theirs.names:
            strange = sorted(set(chain(*mine.names)) ^ set(chain(*theirs.names)))
            few = f"other parameters: {', '.join(strange[:3])}" if strange else "the same parameters in other groups"
            raise IncompatibleStateError(
                f"{file} has the state of another {mine.kind} than optimizers[{number}], for {few}"
                f"{f' and {len(strange) - 3} more' if len(strange) > 3 else ''}: make it as the one that was saved"
            )
        for group, other in zip(mine.groups, theirs.groups, strict=True):
            for name, state in other.parameters.items():
                if state.shape != (shape := group.parameters[name].shape):
                    raise IncompatibleStateError(
                        f"{file} has the state of {name!r} of shape {state.shape}, which has {shape} in this model: "
                        "load the model from the same checkpoint first"
                    )


def load_states_(
    parameters: Mapping[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    saved: Sequence[OptimizerState],
) -> None:
    """Give optimizers states that fit them, options included."""
    for optimizer, state in zip(optimizers, saved, strict=True):
        raw = optimizer.state_dict()
        values: dict[Any, Any] = {}
        for group, packed_group in zip(state.groups, raw["param_groups"], strict=True):
            for own, index in zip(group.parameters.values(), packed_group["params"], strict=True):
                if own.tensors or own.numbers:
                    values[index] = own.tensors | own.numbers
            packed_group |= {key: _like(packed_group.get(key), value) for key, value in group.options.items()}
        optimizer.load_state_dict({"state": values, "param_groups": raw["param_groups"]})
        for group in state.groups:
            for name, own in group.parameters.items():
                loaded = optimizer.state.get(parameters[name], {})
                for key, tensor in own.tensors.items():
                    if (
                        key in loaded and loaded[key].dtype != tensor.dtype
                    ):  # torch rounds to the dtype of the parameter
                        loaded[key] = tensor.to(loaded[key].device, copy=True)


def packed(states: Sequence[OptimizerState], phase: PhaseState | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """States as JSON values, and the tensors those name."""
    described: list[Any] = []
    tensors: dict[str, Tensor] = {}
    for optimizer in states:
        groups: list[Any] = []
        for group in optimizer.groups:
            parameters: dict[str, Any] = {}
            for name, own in group.parameters.items():
                places = {key: f"optimizer:{name}.{key}" for key in own.tensors}
                parameters[name] = {"shape": list(own.shape), "numbers": own.numbers, "tensors": places}
                tensors |= {place: own.tensors[key] for key, place in places.items()}
            groups.append({"options": group.options, "parameters": parameters})
        described.append({"kind": optimizer.kind, "groups": groups})
    found: dict[str, Any] = {"optimizers": described}
    if phase is not None:
        places = {name: f"initial:{name}" for name in phase.initial}
        tensors |= {place: phase.initial[name] for name, place in places.items()}
        found["phase"] = {"name": phase.name, "initial": places}
    return found, tensors


def read_states(checkpoint: Checkpoint) -> list[OptimizerState]:
    """The states that a checkpoint has.

    Raises:
        IncompatibleStateError: if it has none, or they are no such states.
    """
    file = checkpoint.config_file
    if "training" not in checkpoint.content:
        raise IncompatibleStateError(f"{file} has no state of optimizers: save it along, with optimizers=[...]")
    return [_read_optimizer(checkpoint, raw) for raw in get(checkpoint.get("training", dict), "optimizers", list, file)]


def read_phase(checkpoint: Checkpoint) -> PhaseState | None:
    """The phase that a checkpoint with state of optimizers was saved in, if it was one of several."""
    raw = checkpoint.get("training", dict).get("phase")
    if raw is None:
        return None
    places = get(raw, "initial", dict, checkpoint.config_file)
    initial = {name: checkpoint.training_tensors[place] for name, place in places.items()}
    return PhaseState(get(raw, "name", str, checkpoint.config_file), initial)


# ---- inside ---------------------------------------------------------------------------------------------------------


def _optimizers_in(value: Any) -> Iterator[torch.optim.Optimizer]:
    """A value, if it is an optimizer, or those in it, if it is a list, a tuple or a mapping."""
    if isinstance(value, torch.optim.Optimizer):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _optimizers_in(part)


def _check_plain(number: int, optimizer: Any) -> None:
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizers[{number}] is a {kind}, not a torch.optim.Optimizer")
    if inner := wrapped_by(optimizer):
        shown = ", ".join(f".{name} ({type(own).__name__})" for name, own in inner)
        raise ConfigError(f"optimizers[{number}] is a {kind} that has its state in others: give those, its {shown}")
    if (keys := optimizer.state_dict().keys()) != _KEYS:
        raise ConfigError(
            f"optimizers[{number}] is a {kind}, whose state_dict has {sorted(keys)}: only those with 'state' and "
            "'param_groups', as torch has them, can be saved"
        )


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__qualname__}"


def _state_of(optimizer: torch.optim.Optimizer, name: str, parameter: nn.Parameter) -> ParameterState:
    own = ParameterState(tuple(parameter.shape))
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.layout is torch.strided:
            own.tensors[key] = value.detach()
        elif _is_number(value):
            own.numbers[key] = value
        else:
            what = f"a tensor of layout {value.layout}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise IncompatibleStateError(
                f"{type(optimizer).__name__} keeps {key!r} of {name!r}, {what}: only dense tensors and finite numbers "
                "can be saved without pickle"
            )
    return own


def _options_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group as JSON values."""
    found = {}
    for key, value in group.items():
        if key == "params":
            continue
        plain = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        plain = list(plain) if isinstance(plain, tuple) else plain
        if not all(_is_plain(part) for part in (plain if isinstance(plain, list) else [plain])):
            raise IncompatibleStateError(
                f"{type(optimizer).__name__} has the option {key}={value!r}: only finite numbers, texts and lists of "
                "them can be saved without pickle"
            )
        found[key] = plain
    return found


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) or _is_number(value)


def _is_number(value: Any) -> bool:
    """Whether a value is one of JSON: a finite number, a flag, or None."""
    return value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _like(now: Any, saved: Any) -> Any:
    """A saved option as the kind that the optimizer has now: a tensor, or a tuple."""
    if isinstance(now, Tensor):
        return torch.full_like(now, saved)
    return tuple(saved) if isinstance(saved, list) and isinstance(now, tuple | None) else saved


def _read_optimizer(checkpoint: Checkpoint, raw: Any) -> OptimizerState:
    file, groups = checkpoint.config_file, []
    for group in get(raw, "groups", list, file):
        parameters = get(group, "parameters", dict, file)
        states = {name: _read_parameter(checkpoint, name, own) for name, own in parameters.items()}
        groups.append(GroupState(get(group, "options", dict, file), states))
    return OptimizerState(get(raw, "kind", str, file), groups)


def _read_parameter(checkpoint: Checkpoint, name: str, raw: Any) -> ParameterState:
    file = checkpoint.config_file
    own = ParameterState(tuple(get(raw, "shape", list, file)), numbers=get(raw, "numbers", dict, file))
    for key, tensor in get(raw, "tensors", dict, file).items():
        own.tensors[key] = checkpoint.training_tensors[tensor]
    if strange := [key for key, value in own.numbers.items() if not _is_number(value)]:
        raise IncompatibleStateError(f"{file}: {strange[0]!r} of the optimizer of {name!r} must be a number")
    return own
