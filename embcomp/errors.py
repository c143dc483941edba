"""The errors of embcomp, each also the built-in error that plain torch code would raise in its place."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class EmbcompError(Exception):
    """Base of every error that embcomp raises on purpose."""


class SpecError(EmbcompError, ValueError):
    """A table description is impossible: its sizes, its dimension, its padding index or its name."""


class ConfigError(EmbcompError, ValueError):
    """A strategy config has an unknown field, a value out of range, or lacks a value that nobody can choose for it."""


class BudgetError(EmbcompError, ValueError):
    """A budget can't be read or can't be met.

    Attributes:
        minimum_bytes: the smallest feasible budget in bytes, or None where the budget could not even be read.
    """

    def __init__(self, message: str, minimum_bytes: int | None = None) -> None:
        super().__init__(message)
        self.minimum_bytes = minimum_bytes


class UnseenIdError(EmbcompError, IndexError):
    """An id lies outside its table and ``unseen="error"``."""


class InputError(EmbcompError, ValueError):
    """The arguments of a lookup have the wrong dtype, device or shape."""


class NoMatchingTableError(EmbcompError, ValueError):
    """A swap found no embedding table to replace."""


class IncompatibleStateError(EmbcompError, RuntimeError):
    """A checkpoint is corrupt, truncated, foreign, or of another strategy or shape."""


class WriteError(EmbcompError, OSError):
    """A checkpoint can't be written: a full disk, no rights, or a file where its folder should be."""


class ExportError(EmbcompError, ValueError):
    """A model, or its tables, can't be exported to what was asked for, or not to that file."""


class MissingDependencyError(EmbcompError, ImportError):
    """An optional package is needed and not there, or not in a version that works."""


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'? Allowed: a, b"`` for an error message about an unknown name."""
    names = sorted(allowed)
    close = get_close_matches(str(value), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Allowed: {', '.join(names)}"
