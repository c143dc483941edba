"""The data model: sequences to train on, cases to choose and to report by, and the catalogue of items."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recsys_models.data.malformed import MalformedLine
from recsys_models.data.reader import check_one_of
from recsys_models.data.sessions.catalogue import Attribute, Catalogue
from recsys_models.data.sessions.sequences import Cases, Sequences


@dataclass(frozen=True, eq=False)
class SessionLog:
    """A data set of sessions, or of users' histories, encoded and split.

    Args:
        name: of the data set.
        catalogue: the items.
        train: the sequences that item ids and counts come from.
        validation: the cases to choose by.
        test: the cases to report on.
        content_hash: of the source files, the options and the version of the reader: equal hashes mean equal data.
        filters_seen: whether the items of the prefix are left out of the ranking: so it is where the last item of a
            history is asked for; in sessions, items come again.
        malformed: the first lines that were left out.
        num_malformed: how many lines were left out.
    """

    name: str
    catalogue: Catalogue
    train: Sequences
    validation: Cases
    test: Cases
    content_hash: str
    filters_seen: bool
    malformed: tuple[MalformedLine, ...] = ()
    num_malformed: int = 0

    @property
    def statistics(self) -> dict[str, float]:
        """Figures for people: sizes, lengths of training sequences, and the share of test targets never trained on."""
        lengths, num_seen = self.train.lengths, self.catalogue.num_seen
        return {
            "items": self.catalogue.num_items,
            "items_seen_in_training": num_seen,
            "train_sequences": len(self.train),
            "train_events": len(self.train.items),
            "train_targets": int(np.maximum(lengths - 1, 0).sum()),
            "mean_length": round(float(lengths.mean()), 3),
            "median_length": float(np.median(lengths)),
            "longest": int(lengths.max()),
            "validation_cases": len(self.validation),
            "test_sequences": len(self.test.sequences),
            "test_cases": len(self.test),
            "cold_test_targets": round(float(np.mean(self.test.targets >= num_seen)), 6),
        }


def metadata_twin_rate(log: SessionLog, split: str = "test", attributes: Sequence[Attribute] | None = None) -> float:
    """Return the share of events on items that no attribute tells from every other item.

    A model that knows items by their attributes alone can't tell such twins apart; `recsys_models.ranking` has
    ``metadata_bounds``, which say what that costs.

    Args:
        log: the data set.
        split: ``"test"`` or ``"validation"``, whose events are the targets, or ``"train"``.
        attributes: those that are known; None for all of the catalogue.

    Raises:
        DataError: if there is no such split.
    """
    check_one_of(log.name, "split", split, ("train", "validation", "test"))
    part: Sequences | Cases = getattr(log, split)
    events = part.items if isinstance(part, Sequences) else part.targets
    group = log.catalogue.twin_groups(attributes)
    return float(np.mean(np.bincount(group)[group[events]] > 1)) if len(events) else 0.0
