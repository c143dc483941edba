"""embcomp: embedding tables of PyTorch recommenders, compressed to a memory budget."""

from embcomp.budget import Budget, Plan, build_tables, plan
from embcomp.config import (
    StrategyConfig,
    config_from_dict,
    config_to_dict,
    get_strategy,
    list_strategies,
    make_config,
    register_strategy,
)
from embcomp.errors import (
    BudgetError,
    ConfigError,
    EmbcompError,
    IncompatibleStateError,
    InputError,
    MissingDependencyError,
    NoMatchingTableError,
    SpecError,
    UnseenIdError,
)
from embcomp.memory import MemoryReport, format_bytes
from embcomp.strategies import *  # noqa: F403
from embcomp.strategies import __all__ as _strategy_names
from embcomp.tables import EmbeddingTables, Knowledge, TableSpec

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "BudgetError",
    "ConfigError",
    "EmbcompError",
    "EmbeddingTables",
    "IncompatibleStateError",
    "InputError",
    "Knowledge",
    "MemoryReport",
    "MissingDependencyError",
    "NoMatchingTableError",
    "Plan",
    "SpecError",
    "StrategyConfig",
    "TableSpec",
    "UnseenIdError",
    "build_tables",
    "config_from_dict",
    "config_to_dict",
    "format_bytes",
    "get_strategy",
    "list_strategies",
    "make_config",
    "plan",
    "register_strategy",
    *_strategy_names,
]
