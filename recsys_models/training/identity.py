"""What tells models apart whose weights have the same shapes: options of their modules, such as dropout."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from torch import nn

from embcomp import EmbeddingTables

_LONGEST = 1000
"""Characters of a module's options that are kept as they are; what is longer is told by a digest."""


def describe_modules(model: nn.Module) -> dict[str, str]:
    """Describe a model's modules by class and options, but for its tables, whose config says more.

    Options are a module's public attributes that are numbers, texts, or dicts, tuples, lists and dataclasses of these.

    Returns:
        ``"model"``, ``"model.mlp"``, … -> ``"Dropout(p=0.2, inplace=False)"``.
    """
    tables = [module for module in model.modules() if isinstance(module, EmbeddingTables)]
    within = {id(module) for group in tables for module in group.modules()}
    return {
        f"model.{name}" if name else "model": _described(module)
        for name, module in model.named_modules()
        if id(module) not in within
    }


def _described(module: nn.Module) -> str:
    options = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    told = ", ".join(f"{name}={value!r}" for name, value in options.items() if _is_plain(value))
    if len(told) > _LONGEST:
        told = f"{told[:_LONGEST]}… sha256 {hashlib.sha256(told.encode(errors='surrogatepass')).hexdigest()}"
    return f"{type(module).__name__}({told})"


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value is None or isinstance(value, bool | int | float | str)
