"""Errors of sweeps and reports; wrong options of strategies, models and training raise those of `embcomp.errors`."""

from __future__ import annotations

from embcomp.errors import EmbcompError


class ResultError(EmbcompError, ValueError):
    """A result file can't be written or read, or a cell's result can't be right."""


class OverrideError(EmbcompError, ValueError):
    """The command line of a sweep names something that does not exist, or a budget that can't be."""


class DistributedError(EmbcompError, RuntimeError):
    """A run in several processes failed."""
