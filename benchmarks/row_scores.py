"""Whether scores of rows say more than how often ids occur: ``python -m benchmarks.row_scores``.

Trains the supernet of ``optembed`` (DeepFM on Frappe, D = 16, the recipe of ``training=optembed``) with L2 over all
rows, with decay of the rows that are looked up, and with neither; then compares the norms of rows with the counts of
their ids in training, by Spearman's rank correlation, and the best tenth of the rows by a score with the most frequent
tenth. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.markdown import markdown_table
from embcomp import build_tables
from embcomp.strategies.optembed import OptEmbedConfig, OptEmbedTables
from embcomp.training import Phase
from recsys_models.ctr import build_model, get_model
from recsys_models.data import ClickLog, load_dataset
from recsys_models.training import Callback, TrainingConfig, fit

RECIPES = {"L2 of 0.01 over all rows": (0.01, 0.0), "decay of 0.001": (0.0, 0.001), "neither": (0.0, 0.0)}
"""Name -> ``embedding_l2`` of training, ``decay`` of the strategy."""
LARGE = 100
"""Ids from which a table has a column of its own."""


@dataclass
class Norms(Callback):
    """Keeps the L1 norms of rows as the supernet leaves them.

    Attributes:
        of: table name -> float32 ``(V,)``.
    """

    of: dict[str, np.ndarray] = field(default_factory=dict)

    def on_phase_start(self, model: nn.Module, phase: Phase) -> None:
        """Look at the weights that retraining begins with, which are the supernet's."""
        if phase.name == "retrain":
            tables = cast(OptEmbedTables, model.tables)
            weight = cast(Tensor, tables.rows.weight).detach()
            for name, start, size in zip(tables.names, tables.rows.starts(), tables.sizes, strict=True):
                self.of[name] = weight[start : start + size].abs().sum(1).numpy()


def supernet_norms(data: ClickLog, l2: float, decay: float, seed: int, epochs: int) -> dict[str, np.ndarray]:
    """Train a supernet; return table name -> float32 ``(V,)``, the norms of its rows."""
    torch.manual_seed(seed)
    strategy = OptEmbedConfig(
        decay=decay,
        seed=seed,
        search_dims=False,
        retrain_from="supernet",
        supernet_epochs=epochs,
        supernet_patience=2,
    )
    specs = get_model("deepfm").table_specs(data.fields, 16, 0.01)
    tables = build_tables(specs, strategy, "10%", counts=_counts(data))
    model = build_model("deepfm", tables, len(data.dense_names), hidden_units=(128, 64), batch_norm=True)
    config = TrainingConfig(
        seed=seed,
        batch_size=4096,
        epochs=1,
        learning_rate=3e-3,
        embedding_l2=l2,
        plateau_factor=0.2,
        plateau_rewind=True,
        device="cpu",
        progress=False,
    )
    norms = Norms()
    fit(model, data, config, callbacks=[norms])
    return norms.of


def compared(data: ClickLog, norms: dict[str, np.ndarray]) -> list[float]:
    """Rank correlations of each large table and of all rows; shares of the best tenths that are the most frequent."""
    counts = {name: known.numpy() for name, known in _counts(data).items()}
    large = [spearmanr(norms[name], counts[name]).statistic for name in _large(data)]
    norm, count = (np.concatenate([own[name] for name in norms]) for own in (norms, counts))
    most = _best(count)
    shares = [len(most & _best(score)) / len(most) for score in (norm, norm * count)]
    return [*large, float(spearmanr(norm, count).statistic), *shares]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; see the options with ``--help``."""
    parser = argparse.ArgumentParser("python -m benchmarks.row_scores")
    parser.add_argument("--data", default="frappe", help="a data set without options")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=25, help="at most")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = load_dataset(given.data)
    head = ["recipe", *(f"{name}: norm, count" for name in _large(data)), "all: norm, count"]
    head += ["best tenth by norm", "best tenth by norm × count"]
    rows = []
    for recipe, (l2, decay) in RECIPES.items():
        seeds = range(1, given.seeds + 1)
        found = np.array([compared(data, supernet_norms(data, l2, decay, seed, given.epochs)) for seed in seeds])
        rows.append([recipe, *(f"{own.mean():.2f} ± {own.std(ddof=len(own) > 1):.2f}" for own in found.T)])
    print("\n".join(markdown_table(head, rows)))


def _counts(data: ClickLog) -> dict[str, Tensor]:
    return {known.name: torch.as_tensor(np.asarray(known.counts)) for known in data.fields}


def _large(data: ClickLog) -> list[str]:
    return [known.name for known in data.fields if known.num_ids >= LARGE]


def _best(score: np.ndarray) -> set[int]:
    """The places of the best tenth."""
    return set(np.argsort(-score, kind="stable")[: len(score) // 10].tolist())


if __name__ == "__main__":
    main()
