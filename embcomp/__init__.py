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
    ExportError,
    IncompatibleStateError,
    InputError,
    MissingDependencyError,
    NoMatchingTableError,
    SpecError,
    UnseenIdError,
    WriteError,
)
from embcomp.growth import resize_
from embcomp.io import from_pretrained, load_optimizers_, load_pretrained_, load_tables, save_pretrained
from embcomp.memory import MemoryReport, format_bytes
from embcomp.planning import plan_groups
from embcomp.specs import Knowledge, TableSpec
from embcomp.strategies import *  # noqa: F403
from embcomp.strategies import __all__ as _strategy_names
from embcomp.swap import Compression, compress_, finalize_, to_dense
from embcomp.tables import EmbeddingTables
from embcomp.views import EmbeddingBagView, EmbeddingView, TiedLinear

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "BudgetError",
    "Compression",
    "ConfigError",
    "EmbcompError",
    "EmbeddingBagView",
    "EmbeddingTables",
    "EmbeddingView",
    "ExportError",
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
    "TiedLinear",
    "UnseenIdError",
    "WriteError",
    "build_tables",
    "compress_",
    "config_from_dict",
    "config_to_dict",
    "finalize_",
    "format_bytes",
    "from_pretrained",
    "get_strategy",
    "list_strategies",
    "load_optimizers_",
    "load_pretrained_",
    "load_tables",
    "make_config",
    "plan",
    "plan_groups",
    "register_strategy",
    "resize_",
    "save_pretrained",
    "to_dense",
    *_strategy_names,
]
