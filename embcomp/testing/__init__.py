"""The contract that every strategy keeps, as checks that anybody's strategy can be put through.

`check_strategy` runs all of them on one strategy; each is also a function ``check_<property>(strategy)`` of its own,
listed in `CHECKS`, so that a test runner can name them one by one:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_contract(check):
        check(MyConfig(rows="int8"))

Checks take a registered strategy's name or config, raise `AssertionError` with what was wanted and found, need torch
and safetensors alone (and look at TorchRec's collections where it is installed), and use tables small enough for all of
them to take seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from embcomp.config import StrategyConfig, config_to_dict, make_config
from embcomp.errors import ConfigError, did_you_mean
from embcomp.testing.budgets import (
    check_budgets,
    check_bytes,
    check_huge_tables,
    check_reconstruction,
    check_size_knob,
    check_smallest_budget,
    reconstruction_error,
)
from embcomp.testing.collections import check_collections
from embcomp.testing.forms import (
    check_compile,
    check_config,
    check_copies,
    check_export,
    check_finalize,
    check_moves,
    check_state_dict,
    check_widths,
)
from embcomp.testing.lookups import (
    check_bags,
    check_ids_differ,
    check_initial_spread,
    check_repr,
    check_seeds,
    check_shapes,
    check_table_argument,
    check_tiny_tables,
    check_whole_tables,
)
from embcomp.testing.scoring import check_scores
from embcomp.testing.training import (
    check_autocast,
    check_evaluation_changes_nothing,
    check_gradients,
    check_learning,
    check_lookup_memory,
    check_padding,
    check_resume,
    check_sparse_gradients,
    check_unseen_error,
    check_unseen_hash,
    check_unseen_oov_row,
    check_unseen_zero,
)

CHECKS: tuple[Callable[[str | StrategyConfig], None], ...] = (
    check_shapes,
    check_tiny_tables,
    check_table_argument,
    check_bags,
    check_whole_tables,
    check_scores,
    check_collections,
    check_seeds,
    check_ids_differ,
    check_initial_spread,
    check_repr,
    check_gradients,
    check_sparse_gradients,
    check_learning,
    check_resume,
    check_padding,
    check_unseen_error,
    check_unseen_zero,
    check_unseen_oov_row,
    check_unseen_hash,
    check_evaluation_changes_nothing,
    check_autocast,
    check_lookup_memory,
    check_bytes,
    check_budgets,
    check_smallest_budget,
    check_size_knob,
    check_reconstruction,
    check_huge_tables,
    check_finalize,
    check_widths,
    check_state_dict,
    check_config,
    check_copies,
    check_moves,
    check_compile,
    check_export,
)
"""Every check, from the simple to the dear."""

__all__ = ["CHECKS", "check_strategy", "reconstruction_error", *(check.__name__ for check in CHECKS)]


def check_strategy(strategy: str | StrategyConfig, skip: Collection[str] = ()) -> None:
    """Put a strategy through the whole contract; the first check that fails raises.

    Args:
        strategy: a registered strategy's name or config. Sizes that the config leaves open are chosen by budgets.
        skip: names of checks to leave out, such as ``"check_export"``.

    Raises:
        AssertionError: where the strategy breaks the contract; a note names the check.
        ConfigError: if the strategy is not registered, or ``skip`` names no check.
    """
    config = make_config(strategy)
    names = [check.__name__ for check in CHECKS]
    for name in skip:
        if name not in names:
            raise ConfigError(f"skip: no check {name!r}; {did_you_mean(name, names)}")
    for check in CHECKS:
        if check.__name__ in skip:
            continue
        try:
            check(config)
        except Exception as error:
            error.add_note(f"in {check.__name__} of {config_to_dict(config)}")
            raise
