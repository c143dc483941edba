"""The strategies: every module of this folder is imported, and its config class exported, so a new file is enough."""

from __future__ import annotations

import importlib
import pkgutil

from embcomp.config import get_strategy, list_strategies

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

_configs = [get_strategy(name).config_class for name in list_strategies()]
globals().update({config.__name__: config for config in _configs})
__all__ = [config.__name__ for config in _configs]
