"""ISO 8601 times as numbers, many at once."""

import numpy as np

LONGEST_TIME = 24
"""Characters of ``2014-04-07T10:51:09.277Z``."""

_PATTERN = np.frombuffer(b"0000-00-00T00:00:00.000", np.uint8)
_IS_DIGIT = ord("0") == _PATTERN
_LENGTHS = (10, 19, 23)
_SECONDS = (86_400, 3_600, 60, 1)


def parse_times(text: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parse dates and times in UTC.

    Args:
        text: uint8 ``(n, width)``, characters from the left, and anything behind the end.
        length: int64 ``(n,)``, number of characters.

    Returns:
        Seconds since 1970, float64 ``(n,)``, and which are no times, bool ``(n,)``; these have 0.
    """
    filled = np.tile(_PATTERN, (len(text), 1))
    width = min(text.shape[1], len(_PATTERN))
    filled[:, :width] = text[:, :width]
    has_zone = (length > 11) & (text[np.arange(len(text)), np.clip(length - 1, 0, text.shape[1] - 1)] == ord("Z"))
    length = length - has_zone
    filled = np.where(np.arange(len(_PATTERN)) < length[:, None], filled, _PATTERN)
    digits = filled - np.uint8(ord("0"))  # wraps around below 0, to what is no digit either
    fits = np.where(_IS_DIGIT, digits <= 9, filled == _PATTERN).all(axis=1)
    year, month, day, hour, minute, second, thousandth = (
        _number(digits[:, start:stop])
        for start, stop in ((0, 4), (5, 7), (8, 10), (11, 13), (14, 16), (17, 19), (20, 23))
    )
    months = (year - 1970) * 12 + np.clip(month, 1, 12) - 1
    days = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) + day - 1
    next_month = (months + 1).astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    exists = (
        (month >= 1) & (month <= 12) & (day >= 1) & (days < next_month) & (hour < 24) & (minute < 60) & (second < 60)
    )
    good = fits & exists & np.isin(length, _LENGTHS)
    seconds = sum(part * unit for part, unit in zip((days, hour, minute, second), _SECONDS, strict=True))
    return np.where(good, seconds + thousandth / 1000, 0.0), ~good


def _number(digits: np.ndarray) -> np.ndarray:
    """Return the numbers of decimal digits uint8 ``(n, k)``, int64 ``(n,)``."""
    value = np.zeros(len(digits), np.int64)
    for column in digits.T:
        value = value * 10 + column
    return value
