"""Which sequences train and which cases validate and test."""

from dataclasses import dataclass

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.sessions.editing import cut, keep_items, rows_of, select
from recsys_models.data.sessions.sequences import Cases, Sequences

DAY = 86_400
"""Seconds of a day."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Training sequences, and cases to validate and to test."""

    train: Sequences
    validation: Cases
    test: Cases


def leave_one_out(sequences: Sequences) -> Parts:
    """Test on the last item of each sequence, validate on the one before it, train on the rest.

    Sequences of fewer than three items only train.
    """
    lengths = sequences.lengths
    held = np.flatnonzero(lengths >= 3)
    whole = select(sequences, held)
    train = cut(sequences, np.where(lengths >= 3, lengths - 2, lengths))
    return Parts(train, _last_items(cut(whole, whole.lengths - 1)), _last_items(whole))


def last_days(
    sequences: Sequences, ends: np.ndarray, test_days: int, fraction: int, keep_unseen: bool
) -> tuple[Sequences, Cases]:
    """Test on all prefixes of the sessions of the last days, train on those before, both in the order of time.

    A session that ended exactly ``test_days`` before the last one is in neither part, as in the preprocessing that
    published figures rest on: where ends are whole days, that is one day of sessions.

    Args:
        sequences: the sessions.
        ends: ``(S,)``, when each ended, in seconds, taken as whole ones; ties keep their order.
        test_days: how many days before the end of the last session the test begins.
        fraction: train on the last 1/``fraction`` of all training prefixes. It may begin within a session, of which
            the shorter prefixes are taken.
        keep_unseen: whether test sessions keep the items that no training session has, before ``fraction``.

    Returns:
        The training sequences, and the test cases, of sessions of at least two items.
    """
    ends = np.floor(ends)
    order = np.argsort(ends, kind="stable")
    middle = begin_of_test(ends, test_days)
    train = select(sequences, order[ends[order] < middle])
    test = select(sequences, order[ends[order] > middle])
    if not keep_unseen:
        seen = np.zeros(sequences.items.max(initial=0) + 1, np.bool_)
        seen[train.items] = True
        test = keep_items(test, seen[test.items])
    return _most_recent(train, fraction), all_prefixes(select(test, np.flatnonzero(test.lengths >= 2)))


def begin_of_test(ends: np.ndarray, test_days: int) -> float:
    """Return when the test of `last_days` begins, in seconds; arguments as there."""
    return float(np.floor(ends).max(initial=0) - test_days * DAY)


def hold_out(sequences: Sequences, share: float, seed: int, name: str) -> tuple[Sequences, Cases]:
    """Take a random share of the sequences for validation, with all their prefixes.

    Args:
        sequences: all that could train.
        share: rounded to whole sequences, at least one unless it is 0.
        seed: of the draw.
        name: of the data set, for messages.

    Returns:
        The other sequences, in order, and the cases.

    Raises:
        DataError: if nothing would be left to train on.
    """
    if not len(sequences):
        raise DataError(f"{name}: no sequences to train on. Check the file and the options that drop sessions")
    number = max(1, round(share * len(sequences))) if share else 0
    if number >= len(sequences):
        raise DataError(
            f"{name}: {len(sequences)} training sequences, of which {number} would be for validation: none is left to "
            "train on. Lower the option validation_share, or check the file and the options that drop sessions"
        )
    chosen = np.zeros(len(sequences), np.bool_)
    chosen[np.random.default_rng(seed).permutation(len(sequences))[:number]] = True
    return select(sequences, np.flatnonzero(~chosen)), all_prefixes(select(sequences, np.flatnonzero(chosen)))


def all_prefixes(sequences: Sequences) -> Cases:
    """Return a case per item but the first of each sequence."""
    rows = rows_of(sequences)
    position = np.arange(len(rows)) - sequences.offsets[rows]
    return Cases(sequences, rows[position > 0].astype(np.int32), position[position > 0].astype(np.int32))


def _last_items(sequences: Sequences) -> Cases:
    return Cases(sequences, np.arange(len(sequences), dtype=np.int32), (sequences.lengths - 1).astype(np.int32))


def _most_recent(sequences: Sequences, fraction: int) -> Sequences:
    if fraction == 1:
        return sequences
    prefixes = np.maximum(sequences.lengths - 1, 0)
    behind = prefixes.sum() - np.cumsum(prefixes)
    kept = np.clip(prefixes.sum() // fraction - behind, 0, prefixes)
    rows = np.flatnonzero(kept)
    return cut(select(sequences, rows), kept[rows] + 1)
