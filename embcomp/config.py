"""Strategy configs: frozen dataclasses, the registry of strategies, and their JSON form.

A strategy is a config class and a tables class, joined by `register_strategy` in the strategy's own file. Configs
hold only JSON values (str, int, float, bool, None, and dicts of these), so they are Hydra structured configs too, and
a saved config builds the same tables again without data at hand.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from embcomp.errors import ConfigError, did_you_mean
from embcomp.storage.formats import RowFormat

if TYPE_CHECKING:
    from embcomp.tables import EmbeddingTables

CONFIG_VERSION = 2
UNSEEN_POLICIES = ("error", "zero", "oov_row", "hash")


@dataclass(frozen=True)
class StrategyConfig:
    """What every strategy can be told.

    Attributes:
        rows: how stored rows are kept: ``"float32"``, ``"float16"``, ``"int8"``, ``"int2:column"``, … (`RowFormat`).
        unseen: what becomes of ids outside ``[0, V)``, negative ones included, in training, evaluation, serving and
            exports alike: ``"error"`` raises, ``"zero"`` gives zeros, ``"oov_row"`` one more row per table, and
            ``"hash"`` maps them onto rows as a hash strategy would.
        seed: seed of the hash functions and of the initial weights.
        sparse: row-sparse gradients of the stored rows.
    """

    rows: str = "float32"
    unseen: str = "error"
    seed: int = 0
    sparse: bool = False

    def __post_init__(self) -> None:
        check_field_types(self)
        RowFormat.parse(self.rows)
        check_choice(self, "unseen", UNSEEN_POLICIES)

    @classmethod
    def of_version(cls, version: int, options: dict[str, Any]) -> dict[str, Any]:
        """Options of a config that was saved at an earlier `CONFIG_VERSION`, so that they mean what they meant then."""
        return options


@dataclass(frozen=True)
class StrategyEntry:
    """A registered strategy: its name and its two classes."""

    name: str
    config_class: type[StrategyConfig]
    tables_class: type[EmbeddingTables]


_REGISTRY: dict[str, StrategyEntry] = {}
_Tables = TypeVar("_Tables", bound="type[EmbeddingTables]")


def register_strategy(name: str, config_class: type[StrategyConfig]) -> Callable[[_Tables], _Tables]:
    """Register an `EmbeddingTables` subclass as a strategy.

    Args:
        name: lower-case identifier, used in configs, on the command line and in file names.
        config_class: its config, a frozen dataclass derived from `StrategyConfig`, every field with a default.

    Raises:
        ConfigError: if the name is taken or not a lower-case identifier, or if the config class is not as required.
    """
    if not (name.isidentifier() and name.islower()):
        raise ConfigError(f"strategy name {name!r} must be a lower-case identifier, such as 'hash'")
    if name in _REGISTRY:
        raise ConfigError(f"strategy {name!r} is registered already, by {_REGISTRY[name].tables_class.__module__}")
    # Its own, not inherited: a class that forgot @dataclass has none, and its fields would be lost.
    if not (issubclass(config_class, StrategyConfig) and "__dataclass_params__" in vars(config_class)):
        raise ConfigError(f"strategy {name!r}: {config_class.__name__} must be a frozen dataclass of StrategyConfig")
    if any(entry.config_class is config_class for entry in _REGISTRY.values()):
        raise ConfigError(f"strategy {name!r}: {config_class.__name__} belongs to another strategy already")

    def register(tables_class: _Tables) -> _Tables:
        _REGISTRY[name] = StrategyEntry(name, config_class, tables_class)
        return tables_class

    return register


def list_strategies() -> list[str]:
    """Names of all registered strategies, sorted."""
    return sorted(_REGISTRY)


def get_strategy(name: str) -> StrategyEntry:
    """Look a strategy up by name.

    Raises:
        ConfigError: if there is none; the message names the nearest.
    """
    if name not in _REGISTRY:
        raise ConfigError(
            f"no strategy {name!r}; {did_you_mean(name, _REGISTRY)}. One of your own is known once the module that "
            "registers it is imported"
        )
    return _REGISTRY[name]


def strategy_of(config: StrategyConfig) -> StrategyEntry:
    """Find the strategy that a config belongs to.

    Raises:
        ConfigError: if ``config`` is not the config of a registered strategy.
    """
    for entry in _REGISTRY.values():
        if type(config) is entry.config_class:
            return entry
    raise ConfigError(
        f"{config!r} is not the config of a strategy; give one of "
        f"{', '.join(e.config_class.__name__ for e in _REGISTRY.values())}"
    )


def make_config(strategy: str | StrategyConfig, **options: Any) -> StrategyConfig:
    """Build a config from a strategy's name and options; a config passes through, with ``options`` replaced.

    Raises:
        ConfigError: for an unknown strategy, an unknown option, or a value that the strategy refuses.
    """
    if isinstance(strategy, StrategyConfig):
        strategy_of(strategy)
        return dataclasses.replace(strategy, **_known(type(strategy), options))
    entry = get_strategy(strategy)
    return entry.config_class(**_known(entry.config_class, options))


def _known(config_class: type[StrategyConfig], options: Mapping[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(config_class)]
    for option in options:
        if option not in names:
            raise ConfigError(f"{config_class.__name__} has no field {option!r}; {did_you_mean(option, names)}")
    return dict(options)


def config_to_dict(config: StrategyConfig) -> dict[str, Any]:
    """The JSON form of a config: ``{"strategy": …, "version": …, fields …}``."""
    return {"strategy": strategy_of(config).name, "version": CONFIG_VERSION, **dataclasses.asdict(config)}


def config_from_dict(values: Mapping[str, Any]) -> StrategyConfig:
    """Read the JSON form of a config.

    Raises:
        ConfigError: for a missing or unknown strategy, a version from the future, or unknown fields.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"a config in JSON form is a mapping of fields; {values!r} is not a mapping")
    options = dict(values)
    name, version = options.pop("strategy", None), options.pop("version", None)
    if not isinstance(name, str):
        raise ConfigError(f"a config needs 'strategy': one of {', '.join(list_strategies())}; got {name!r}")
    if not isinstance(version, int) or not 1 <= version <= CONFIG_VERSION:
        raise ConfigError(
            f"config of strategy {name!r} has version {version!r}; this embcomp reads 1 to {CONFIG_VERSION}: upgrade it"
        )
    return make_config(name, **get_strategy(name).config_class.of_version(version, options))


def config_to_json(config: StrategyConfig) -> str:
    """`config_to_dict` as text."""
    return json.dumps(config_to_dict(config), indent=2)


def check_choice(config: object, field: str, allowed: tuple[str, ...]) -> None:
    """Raise `ConfigError` if a config's field is not one of ``allowed``."""
    value = getattr(config, field)
    if value not in allowed:
        raise ConfigError(f"{type(config).__name__}({field}={value!r}): {did_you_mean(value, allowed)}")


def check_at_least(config: object, field: str, minimum: float) -> None:
    """Raise `ConfigError` if a config's field is set and below ``minimum``, NaN or infinite."""
    value = getattr(config, field)
    if value is not None and not minimum <= value < math.inf:
        finite = ", and finite" if value == math.inf else ""
        raise ConfigError(f"{type(config).__name__}({field}={value!r}): must be at least {minimum}{finite}")


def check_at_most(config: object, field: str, maximum: float) -> None:
    """Raise `ConfigError` if a config's field is set and above ``maximum``."""
    value = getattr(config, field)
    if value is not None and not value <= maximum:
        raise ConfigError(f"{type(config).__name__}({field}={value!r}): must be at most {maximum}")


def check_field_types(config: object) -> None:
    """Raise `ConfigError` where a field's value is not of its annotated type (ints are fine for floats)."""
    hints = _hints(type(config))  # type: ignore[arg-type]
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        _check_type(type(config).__name__, field.name, getattr(config, field.name), hints[field.name], field.type)


def check_option_types(owner: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where an option's value is not of the type that a function's parameter is annotated with.

    Args:
        owner: whose options they are, for the message.
        function: that takes them.
        options: by name of the parameter.
    """
    hints = _hints(function)
    for name, value in options.items():
        _check_type(owner, name, value, hints[name], function.__annotations__[name])


def _check_type(owner: str, name: str, value: Any, hint: Any, shown: Any) -> None:
    if not _is_of(value, hint):
        raise ConfigError(f"{owner}({name}={value!r}): must be {shown}, not {_type_of(value)}")


def _type_of(value: Any) -> str:
    """The name of a value's type, with those of what a dict holds."""
    if not isinstance(value, dict) or not value:
        return type(value).__name__
    keys, values = (" | ".join(sorted({type(part).__name__ for part in parts})) for parts in (value, value.values()))
    return f"dict[{keys}, {values}]"


@functools.cache  # searches make a config for every form that they weigh
def _hints(annotated: Any) -> dict[str, Any]:
    return typing.get_type_hints(annotated)


def _is_of(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, option) for option in typing.get_args(hint))
    if origin is dict:
        key_hint, value_hint = typing.get_args(hint)
        return isinstance(value, dict) and all(_is_of(k, key_hint) and _is_of(v, value_hint) for k, v in value.items())
    if origin is Sequence:
        (part,) = typing.get_args(hint)
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_is_of(v, part) for v in value)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
