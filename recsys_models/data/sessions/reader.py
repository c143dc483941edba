"""What a reader of one data set of sessions provides; the rest of the package does everything else for it."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recsys_models.data.errors import DataError
from recsys_models.data.malformed import MalformedLog
from recsys_models.data.reader import Source, check_at_least, check_one_of
from recsys_models.data.sessions.attributes import as_known, ids_of
from recsys_models.data.sessions.editing import core, cut, group, without_repeats
from recsys_models.data.sessions.protocols import Parts, begin_of_test, hold_out, last_days, leave_one_out
from recsys_models.data.sessions.raw import Events, RawAttribute, RawSessions
from recsys_models.data.sessions.sequences import Sequences


@dataclass(frozen=True, kw_only=True)
class SessionReader(Source):
    """Reads one data set of sessions. Subclasses are dataclasses whose fields are the options."""

    @property
    @abstractmethod
    def filters_seen(self) -> bool:
        """Whether rankings leave out the items of the prefix."""

    @abstractmethod
    def open(self, files: Mapping[str, Path], log: MalformedLog) -> RawSessions:
        """Read and split.

        Args:
            files: what :meth:`files` returned.
            log: where malformed lines are recorded.

        Raises:
            DataError: if a file cannot be read, or too many of its lines are malformed.
        """

    def check_lines(self, log: MalformedLog) -> None:
        """Raise a :class:`DataError` if too many lines are malformed; called once all files are read."""
        log.sort()
        log.check_share(self.max_malformed)


@dataclass(frozen=True, kw_only=True)
class EventReader(SessionReader):
    """Reads histories and tests on their last items (leave-one-out).

    The last item of a history is for the test, the one before it for validation, and the rest trains; histories of
    fewer than three items only train.

    Args:
        merge_repeats: whether consecutive events on one item in a session become one, before anything is counted.
        min_length: sessions of fewer items are left out, first as they come, then once more without rare items.
        min_item_count: items of fewer events, in the sessions of at least ``min_length``, are left out.
        iterate: whether the last two go on until nothing changes, which gives a k-core; else there is a single pass.
        all_items: whether the catalogue has all items that the files of metadata describe, those without an event, or
            with too few to be left, with count 0, so that they are ranked and can be recommended. Else it has the items
            of events alone, as published figures have, and the only cold ones are those of validation and test.
    """

    merge_repeats: bool = False
    min_length: int = 1
    min_item_count: int = 1
    iterate: bool = False
    all_items: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_at_least(self.name, "min_length", self.min_length, 1)
        check_at_least(self.name, "min_item_count", self.min_item_count, 1)

    @property
    def filters_seen(self) -> bool:
        """Whether rankings leave out the items of the prefix."""
        return True

    @abstractmethod
    def read(self, files: Mapping[str, Path], log: MalformedLog) -> tuple[Events, tuple[RawAttribute, ...]]:
        """Return all events, and what the files say about items; takes what :meth:`open` does."""

    def open(self, files: Mapping[str, Path], log: MalformedLog) -> RawSessions:
        """Read and split.

        Raises:
            DataError: also if ``all_items`` is asked for and no file describes any.
        """
        events, attributes = self.read(files, log)
        self.check_lines(log)
        positions, items = np.unique(events.items, return_inverse=True)
        values = positions if events.item_texts is None else events.item_texts[positions]
        described = None
        if self.all_items:
            named = self._described(attributes)
            found, values = values, np.union1d(values, named)
            items, described = np.searchsorted(values, found)[items], np.searchsorted(values, named)
        items = items.astype(np.int32)
        places, ends = group(events.sessions, np.arange(len(items)), events.times, events.days)
        if self.merge_repeats:
            places = without_repeats(places, items)
        places, rows = core(places, items, self.min_item_count, self.min_length, self.iterate)
        ends = ends[rows] if ends is not None and events.dated else None
        parts = self.split(Sequences(items[places.items], places.offsets), ends)
        moment = self.test_begins(ends)
        # Without a test period, training has the first events of every session.
        trained = cut(places, parts.train.lengths).items if moment is None else np.empty(0, np.int64)

        def known(attribute: RawAttribute) -> np.ndarray:
            assert attribute.times is not None
            if moment is not None:
                return attribute.times < moment
            if attribute.of_events:
                return np.isin(np.arange(len(items)), trained)
            dates = events.times if events.days is None else events.days
            assert dates is not None
            last = np.full(len(values) + 1, -np.inf)  # the last place is for what is no item
            np.maximum.at(last, items[trained], dates[trained])
            owners = ids_of(attribute.keys, values, np.arange(len(values)))[attribute.owners]
            return attribute.times <= last[owners]

        found_attributes = tuple(a if a.times is None else as_known(a, known(a)) for a in attributes)
        return RawSessions(parts, values, found_attributes, described)

    def _described(self, attributes: tuple[RawAttribute, ...]) -> np.ndarray:
        """Return the raw keys of all items that the files describe, ascending."""
        if not attributes:
            raise DataError(
                f"{self.name}: option all_items is True, but no file that is there says anything about items, so that "
                "none can be added to those of events. Put the files of metadata beside, or leave all_items out"
            )
        return np.unique(np.concatenate([attribute.keys for attribute in attributes]))

    def split(self, sequences: Sequences, ends: np.ndarray | None) -> Parts:
        """Return the parts of the sessions, which ended at ``ends``, ``(S,)``, in seconds; None if it is not known."""
        return leave_one_out(sequences)

    def test_begins(self, ends: np.ndarray | None) -> float | None:
        """Return when the test period begins, in seconds since 1970; None where there is none."""
        return None


@dataclass(frozen=True, kw_only=True)
class TimedReader(EventReader):
    """Reads events with dates, which can be split by time as well.

    With ``protocol="last_days"`` the test is on every prefix of the sessions that ended in the last days, in which
    items may come again. It is the protocol of session models since SR-GNN, which leaves out sessions of one item, then
    items of fewer than 5 events, then sessions of one item again. Like there, sessions that ended exactly ``test_days``
    before the last one (a whole day of them, where sessions are dated by days) neither train nor test.

    Args:
        protocol: ``"leave_one_out"`` or ``"last_days"``. The options below are for the latter.
        test_days: length of the test period in days, back from the end of the last session.
        fraction: train on the most recent 1/``fraction`` of the prefixes before the test.
        keep_unseen: whether test sessions keep items that no session before the test period has. Needed to look at cold
            items; published figures are without them.
        validation_share: share of the training sessions that validate, drawn under ``split_seed``; may be 0.
    """

    protocol: str = "leave_one_out"
    test_days: int = 1
    fraction: int = 1
    keep_unseen: bool = False
    validation_share: float = 0.1

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_one_of(self.name, "protocol", self.protocol, ("leave_one_out", "last_days"))
        check_at_least(self.name, "test_days", self.test_days, 1)
        check_at_least(self.name, "fraction", self.fraction, 1)
        check_share(self.name, self.validation_share)

    @property
    def filters_seen(self) -> bool:
        """Whether rankings leave out the items of the prefix."""
        return self.protocol == "leave_one_out"

    def split(self, sequences: Sequences, ends: np.ndarray | None) -> Parts:
        """Return the parts of the sessions."""
        if self.protocol == "leave_one_out":
            return super().split(sequences, ends)
        if ends is None:
            raise DataError(
                f"{self.name}: the files that are there have no time stamps, which protocol='last_days' needs. "
                "Use protocol='leave_one_out', or the original files"
            )
        train, test = last_days(sequences, ends, self.test_days, self.fraction, self.keep_unseen)
        if len(sequences) and not len(train):
            raise DataError(
                f"{self.name}: no session is left to train on: the last days, test_days={self.test_days}, which test, "
                f"cover all {len(sequences)} sessions, or fraction={self.fraction} takes none of those before. Lower "
                "these options, or use protocol='leave_one_out'"
            )
        train, validation = hold_out(train, self.validation_share, self.split_seed, self.name)
        return Parts(train, validation, test)

    def test_begins(self, ends: np.ndarray | None) -> float | None:
        """Return when the test period begins."""
        return None if self.protocol == "leave_one_out" or ends is None else begin_of_test(ends, self.test_days)


def check_share(dataset: str, share: float) -> None:
    """Raise a :class:`DataError` unless the option ``validation_share`` leaves something to train on."""
    if not 0 <= share < 1:
        raise DataError(f"{dataset}: option validation_share is {share!r}, must be a share in [0, 1)")


def find_file(folder: Path, names: Sequence[str], expected: str) -> Path:
    """Return the first of the files ``names`` that is in ``folder``.

    Raises:
        DataError: if none is, saying what was ``expected``.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    tried = " or ".join(names)
    raise DataError(f"{folder}: no such file: {tried}. Expected {expected}; unpack it there or pass another root")


def present(folder: Path, names: Mapping[str, str]) -> dict[str, Path]:
    """Return those files, given by role and name, that are in ``folder``."""
    return {role: folder / name for role, name in names.items() if (folder / name).is_file()}
