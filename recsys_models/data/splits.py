"""Which rows train, validate and test: random under a seed, or by time."""

import numpy as np

from recsys_models.data.errors import DataError

TRAIN, VALIDATION, TEST = 0, 1, 2
SPLIT_NAMES = ("train", "validation", "test")


def random_split(rows: int, seed: int, validation: float = 0.1, test: float = 0.1) -> np.ndarray:
    """Assign rows at random, in exact shares.

    Args:
        rows: number of rows.
        seed: of the permutation; the same seed and number of rows give the same split.
        validation: share of rows for validation, rounded to whole rows, at least one.
        test: share of rows for the test, likewise.

    Returns:
        int8 ``(rows,)`` of :data:`TRAIN`, :data:`VALIDATION` and :data:`TEST`.

    Raises:
        DataError: if there are too few rows for three parts.
    """
    codes = temporal_split(rows, validation, test)
    return np.random.default_rng(seed).permutation(codes)


def temporal_split(rows: int, validation: float = 0.1, test: float = 0.1) -> np.ndarray:
    """Assign the last rows to the test, those before them to validation, the rest to training.

    Takes and returns what :func:`random_split` does, without the seed.
    """
    num_validation, num_test = max(1, round(rows * validation)), max(1, round(rows * test))
    num_train = rows - num_validation - num_test
    if num_train < 1:
        raise DataError(
            f"{rows} usable rows cannot be split into train, validation ({validation:.1%}) and test ({test:.1%}); "
            "at least 3 are needed. Check the file and the options that drop rows"
        )
    return np.repeat(np.array([TRAIN, VALIDATION, TEST], np.int8), [num_train, num_validation, num_test])
