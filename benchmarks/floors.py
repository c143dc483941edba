"""Popularity and item-kNN on a data set of sessions: ``python -m benchmarks.floors data=sessions/movielens_1m``.

They have no tables, and so no cells; what is printed is a Markdown table with the metrics of session models.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

import hydra
from omegaconf import OmegaConf

from benchmarks.errors import OverrideError
from benchmarks.measure import state_bytes
from benchmarks.overrides import check_overrides
from benchmarks.results import METRICS
from benchmarks.workloads import group_options, places_of
from recsys_models.data import SessionLog, load_sessions
from recsys_models.data.errors import DataError
from recsys_models.ranking import evaluate_cases
from recsys_models.session.floors import ItemKNN, Popularity

COLUMNS = ("ndcg@10", "hr@10", "mrr@20", "hr@20")


def floors(log: SessionLog) -> list[tuple[str, int, dict[str, float]]]:
    """Name, bytes and test metrics of each floor."""
    models = {
        "popularity": Popularity(log.catalogue.counts),
        "item_knn": ItemKNN(log.train, log.catalogue.num_items),
    }
    return [
        (name, state_bytes(model), evaluate_cases(model, log.test, log.filters_seen)) for name, model in models.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; the process ends with status 2 on wrong arguments, or if the data can't be read.

    Args:
        arguments: Hydra overrides, of which those of ``data``, ``data_root`` and ``data_cache`` matter; None for those
            of the command line.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        check_overrides(given)
        with hydra.initialize_config_module("configs", version_base="1.3"):
            config = cast(dict[str, Any], OmegaConf.to_container(hydra.compose("config", given), resolve=True))
        data = config["data"]
        log = load_sessions(data["name"], *places_of(config), **group_options(data))
    except (OverrideError, DataError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    head = ["model", "bytes", *(METRICS[f"test_{name}"].title for name in COLUMNS)]
    rows = [[name, f"{size:,}", *(f"{found[c]:.4f}" for c in COLUMNS)] for name, size, found in floors(log)]
    for line in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
