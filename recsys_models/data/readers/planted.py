"""What a synthetic click log is made of: its fields, how they are drawn, and how much of the clicks they explain."""

from dataclasses import dataclass, field, replace

import numpy as np

from recsys_models.data.errors import DataError

SKEWS = {"criteo": 0.9, "ip": 0.61, "frappe": 1.13, "lastfm": 1.15, "sessions": 0.4}
"""Slopes of log count on log rank, measured on real logs."""

CRITEO_SIZES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
"""Distinct ids per categorical column of Criteo Kaggle's train.txt, C1 to C26."""

_SMALL, _LARGE = 32, 50_000


@dataclass(frozen=True)
class PlannedField:
    """One field of a synthetic log.

    Args:
        name: of the field.
        size: number of raw values.
        slope: of log count on log rank; 0 draws uniformly.
        effect: standard deviation over values of what a value adds to the log-odds of a click.
        of: the field that determines this one, as an item its category; None if it is drawn on its own.
        clock: hours per step and this field counts steps of the clock; 0 if it is drawn.
        late: whether some values appear only late.
    """

    name: str
    size: int
    slope: float
    effect: float
    of: str | None = None
    clock: int = 0
    late: bool = False


@dataclass(frozen=True)
class PlannedPair:
    """An interaction of two fields: the product of their vectors, and so a matrix of low rank.

    Args:
        first: name of a field.
        second: name of another.
        effect: standard deviation of what the pair adds to the log-odds.
        rank: length of the vectors.
    """

    first: str
    second: str
    effect: float
    rank: int = 4


@dataclass(frozen=True)
class Plan:
    """Fields and interactions of a synthetic log."""

    fields: tuple[PlannedField, ...]
    pairs: tuple[PlannedPair, ...] = field(default=())


DEFAULT = Plan(
    fields=(
        PlannedField("user", 10_000, 0.8, 1.0, late=True),
        PlannedField("item", 5_000, 1.0, 1.3, late=True),
        PlannedField("category", 100, 0.0, 0.5, of="item"),
        PlannedField("publisher", 2_000, 0.9, 0.9),
        PlannedField("ip", 100_000, 0.61, 0.3, late=True),
        PlannedField("hour", 24, 0.0, 0.3, clock=1),
        PlannedField("weekday", 7, 0.0, 0.2, clock=24),
        PlannedField("device", 3, 0.9, 0.3),
    ),
    pairs=(
        PlannedPair("user", "item", 0.8),
        PlannedPair("publisher", "category", 0.6),
        PlannedPair("category", "hour", 0.4),
        PlannedPair("device", "item", 0.4),
    ),
)


def criteo_plan() -> Plan:
    """Return a plan with the vocabulary sizes of Criteo Kaggle."""
    fields = tuple(
        PlannedField(f"C{i}", size, SKEWS["criteo"], 0.7 if size > _LARGE else 0.2, late=size > _LARGE)
        for i, size in enumerate(CRITEO_SIZES, start=1)
    )
    return Plan(fields, (PlannedPair("C3", "C10", 0.6), PlannedPair("C15", "C24", 0.6), PlannedPair("C1", "C18", 0.6)))


def scaled(plan: Plan, vocabulary_scale: float, skew: str) -> Plan:
    """Scale the vocabularies of over 32 values, to no fewer, and set the slopes of the fields drawn on their own.

    Args:
        plan: to change.
        vocabulary_scale: factor on the number of values.
        skew: ``"measured"`` leaves the slopes, else a key of :data:`SKEWS` or a number as text.
    """
    slope = None if skew == "measured" else parse_skew(skew)
    return replace(plan, fields=tuple(_scale(planned, vocabulary_scale, slope) for planned in plan.fields))


def parse_skew(skew: str) -> float:
    """Return the slope that ``skew`` names or spells."""
    try:
        slope = SKEWS[skew] if skew in SKEWS else float(skew)
    except ValueError:
        slope = -1.0
    if not 0 <= slope <= 4:
        names = ", ".join(map(repr, SKEWS))
        raise DataError(f"synthetic: option skew is {skew!r}, must be 'measured', {names} or a slope in [0, 4] as text")
    return slope


def find_intercept(log_odds: np.ndarray, click_rate: float) -> float:
    """Return what to add to the log-odds ``(n,)`` so that the mean probability is ``click_rate``."""
    low, high = -30.0, 30.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sigmoid(log_odds + middle).mean() < click_rate else (low, middle)
    return round((low + high) / 2, 6)


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    """Return the probabilities, float64 ``(n,)``, of log-odds ``(n,)``."""
    share: np.ndarray = 1 / (1 + np.exp(-log_odds))
    return share


def _scale(planned: PlannedField, factor: float, slope: float | None) -> PlannedField:
    size = planned.size if planned.size <= _SMALL else max(_SMALL, round(planned.size * factor))
    drawn = planned.of is None and not planned.clock and planned.size > _SMALL
    return replace(planned, size=size, slope=slope if slope is not None and drawn else planned.slope)
