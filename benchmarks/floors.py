"""Popularity and item-kNN on a data set of sessions: ``python -m benchmarks.floors data=sessions/movielens_1m``.

They have no tables, and so no cells; what is printed are Markdown tables with the metrics of session models.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

import hydra
import pandas as pd
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from benchmarks.errors import OverrideError
from benchmarks.frames import with_random_ties
from benchmarks.markdown import markdown_table, parts_table
from benchmarks.measure import state_bytes
from benchmarks.overrides import check_overrides
from benchmarks.results import COMPARED, METRICS
from benchmarks.workloads import group_options, places_of
from recsys_models.data import SessionLog, load_sessions
from recsys_models.data.errors import DataError
from recsys_models.ranking import bound_cases, ranking_metrics, sliced_metrics, slices_of
from recsys_models.session import ItemKNN, Popularity

_RANKING = COMPARED[1]


def floors(log: SessionLog) -> pd.DataFrame:
    """One row per floor: its name, bytes and metrics, and those of parts of the test split as ``slices``."""
    models = {
        "popularity": Popularity(log.catalogue.counts),
        "item_knn": ItemKNN(log.train, log.catalogue.num_items),
    }
    rows = []
    for name, model in models.items():
        best, worst = bound_cases(model, log.test, log.filters_seen)
        metrics = {f"test_{metric}": value for metric, value in ranking_metrics(worst, best=best).items()}
        slices = sliced_metrics(worst, slices_of(log.catalogue, log.test), best=best)
        rows.append({"model": name, "bytes": state_bytes(model), **metrics, "slices": slices})
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables; the process ends with status 2 on wrong arguments, or if the data can't be read.

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
    except (ConfigCompositionException, OverrideError, DataError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    points = floors(log)
    metrics = with_random_ties(_RANKING, points)
    head = ["model", "bytes", *(METRICS[name].title for name in metrics)]
    rows = [[row.model, f"{row.bytes:,}", *(f"{row[name]:.4f}" for name in metrics)] for _, row in points.iterrows()]
    print("\n".join([*markdown_table(head, rows), "", *parts_table(["model"], points, _RANKING[0])]))


if __name__ == "__main__":
    main()
