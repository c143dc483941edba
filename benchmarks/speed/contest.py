"""Contests: contestants take turns in one process, so that what slows the machine down slows all of them down."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]
WARM_UP = 3
NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Versus:
    """What a contestant is compared with.

    Attributes:
        peers: names of contestants; the one with the smallest median counts. Empty where its own median is judged.
        limit: the largest ratio of time to that of the peer that is wanted, or the largest median, in its unit, where
            there is none; None where nothing is wanted.
    """

    peers: tuple[str, ...]
    limit: float | None = None


@dataclass(frozen=True)
class Contestant:
    """Something that is timed.

    Attributes:
        name: unique within its contest.
        run: takes the number of the round; None where it can't run here, and ``note`` says why.
        versus: what it is compared with; one row of the result for each, or one without.
        bytes_per_id: bytes that an id makes a lookup move: index, stored row and vector, each once.
        note: for the reader.
    """

    name: str
    run: Callable[[int], object] | None = None
    versus: tuple[Versus, ...] = ()
    bytes_per_id: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes:
        section: ``"lookup"``, ``"training step"``, ``"memory"``, ``"scores"``, ``"memory of scores"``, ``"deepfm"``,
            ``"optembed"`` or ``"sessions"``.
        case: what all rows of the contest have in common.
        name: of the contestant.
        unit: of ``median`` and ``minimum``.
        median: over the rounds; None where it did not run.
        minimum: likewise.
        bytes_per_id: see `Contestant`.
        gigabytes_per_second: that many bytes over the median time.
        peer: what ``ratio`` compares with.
        ratio: median over the rounds of its time over the peer's in the same round.
        limit: the largest ratio wanted; where there is no peer, the largest median.
        met: whether that is within ``limit``; None where there is no limit, or nothing to compare.
        note: for the reader.
    """

    section: str
    case: str
    name: str
    unit: str
    median: float | None = None
    minimum: float | None = None
    bytes_per_id: float | None = None
    gigabytes_per_second: float | None = None
    peer: str | None = None
    ratio: float | None = None
    limit: float | None = None
    met: bool | None = None
    note: str = ""


def take_turns(contestants: Sequence[Contestant], rounds: int) -> dict[str, Seconds]:
    """Time contestants one after the other, again and again; seconds ``(rounds,)`` of each that can run."""
    runs = {one.name: one.run for one in contestants if one.run is not None}
    seconds: dict[str, Seconds] = {name: np.zeros(rounds) for name in runs}
    gc.collect()
    gc.disable()
    try:
        for turn in range(-WARM_UP, rounds):
            for name, run in runs.items():
                started = time.perf_counter()
                run(turn)
                if turn >= 0:
                    seconds[name][turn] = time.perf_counter() - started
    finally:
        gc.enable()
    return seconds


def rows_of(
    section: str,
    case: str,
    contestants: Sequence[Contestant],
    seconds: Mapping[str, Seconds],
    unit: str = "ns/id",
    per_second: float = 1.0,
) -> list[Row]:
    """Turn times into rows.

    Args:
        section: of the rows.
        case: of the rows.
        contestants: in the order of the rows.
        seconds: times by name, or whatever else is measured; of contestants that did not run, none.
        unit: what is reported.
        per_second: units in a second, e.g. 1e9 / ids for ns per id.
    """
    rows = []
    for one in contestants:
        plain = _plain_row(section, case, one, seconds.get(one.name), unit, per_second)
        rows += [_compared(plain, versus, seconds) for versus in one.versus] or [plain]
    return rows


def _plain_row(section: str, case: str, one: Contestant, own: Seconds | None, unit: str, per_second: float) -> Row:
    if own is None:
        return Row(section, case, one.name, unit, bytes_per_id=one.bytes_per_id, note=one.note)
    median = float(np.median(own)) * per_second
    bandwidth = one.bytes_per_id / median if one.bytes_per_id and unit == "ns/id" else None
    minimum = float(own.min()) * per_second
    return Row(section, case, one.name, unit, median, minimum, one.bytes_per_id, bandwidth, note=one.note)


def _compared(row: Row, versus: Versus, seconds: Mapping[str, Seconds]) -> Row:
    if not versus.peers:
        met = None if row.median is None or versus.limit is None else row.median <= versus.limit
        return _replace(row, limit=versus.limit, met=met)
    there = [peer for peer in versus.peers if peer in seconds]
    if row.name not in seconds or not there:
        why = row.note or f"to compare with: {NOT_INSTALLED}"
        return _replace(row, peer=" / ".join(versus.peers), limit=versus.limit, note=why)
    peer = min(there, key=lambda name: float(np.median(seconds[name])))
    ratio = float(np.median(seconds[row.name] / seconds[peer]))
    met = None if versus.limit is None else ratio <= versus.limit
    return _replace(row, peer=peer, ratio=ratio, limit=versus.limit, met=met)


def _replace(row: Row, **changed: object) -> Row:
    return Row(**{**vars(row), **changed})
