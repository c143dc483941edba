"""Errors of training; wrong options and wrong input raise those of `embcomp.errors`."""

from __future__ import annotations

from embcomp.errors import EmbcompError


class TrainingError(EmbcompError, RuntimeError):
    """Training can't go on: the loss or the predictions are no longer finite."""
