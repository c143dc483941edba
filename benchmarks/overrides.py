"""Checks of a sweep's command line before anything runs: names with did-you-mean, budgets, seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from benchmarks.errors import OverrideError
from embcomp import Budget
from embcomp.errors import BudgetError, did_you_mean

GROUPS = ("strategy", "model", "data", "training", "experiment")
_OWN_CONFIGS = ("-cd", "--config-dir", "-cp", "--config-path", "-cn", "--config-name")


def check_overrides(arguments: Sequence[str]) -> None:
    """Check what can be checked without composing configs; whatever is not known here is left to Hydra.

    Raises:
        OverrideError: for an unknown strategy, model, data set, training or experiment, a budget that is not in
            (0, 100 %], a seed that is no whole number of at least 0, or an unknown key.
    """
    for override in parse(arguments):
        key = override.key_or_group
        if override.type == OverrideType.CHANGE and not has_own_configs(arguments):
            _check_key(key)
        for value in _values(override):
            if key in GROUPS and not has_own_configs(arguments):
                _check_choice(key, value)
            elif key == "budget":
                _check_budget(value)
            elif key == "seed" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise OverrideError(
                    f"seed={value!r}: must be a whole number of at least 0; seed=1,2,3 sweeps over three"
                )


def parse(arguments: Iterable[str]) -> list[Override]:
    """The Hydra overrides among command-line arguments; those that can't be parsed are left to Hydra."""
    parser, found = OverridesParser.create(), []
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            continue
        try:
            found.append(parser.parse_override(argument))
        except OverrideParseException:
            continue
    return found


def number_of_jobs(arguments: Sequence[str]) -> int:
    """How many jobs Hydra's sweeper makes of overrides: the product of all lists; of one key the last counts."""
    sizes = {override.get_key_element(): len(_values(override)) for override in parse(arguments)}
    total = 1
    for size in sizes.values():
        total *= max(size, 1)
    return total


def options_of(group: str) -> list[str]:
    """The names in a config group, such as ``hash`` or, in a sub-folder, ``bars_frappe/deepfm``."""
    return sorted(_yaml_names(files("configs") / group, ""))


def _yaml_names(folder: Traversable, prefix: str) -> Iterable[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _yaml_names(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml")


def _values(override: Override) -> list[Any]:
    if not override.is_sweep_override():
        return [override.value()]
    return list(override.sweep_iterator()) if override.is_discrete_sweep() else []


def _check_choice(group: str, value: Any) -> None:
    allowed = options_of(group)
    if value is not None and value not in allowed:
        near = did_you_mean(str(value).lower(), allowed)
        raise OverrideError(f"no {group} {value!r}; {near}")


def _check_key(key: str) -> None:
    top = key.split(".")[0].split("/")[0]
    own = OmegaConf.create((files("configs") / "config.yaml").read_text(encoding="utf-8"))
    allowed = {str(name) for name in own if name != "defaults"} | set(GROUPS)
    if top not in allowed:
        raise OverrideError(f"there is nothing called {key!r} to set; {did_you_mean(top, allowed)}")


def _check_budget(value: Any) -> None:
    if value is None:
        return
    try:
        Budget.parse(value)
    except BudgetError as error:
        raise OverrideError(str(error)) from error


def has_own_configs(arguments: Sequence[str]) -> bool:
    """Whether the command line brings config files of its own, of which nothing is known here."""
    return any(a.split("=")[0] in (*_OWN_CONFIGS, "hydra.searchpath", "+hydra.searchpath") for a in arguments)
