"""The one error that reading and preparing data raises."""

from __future__ import annotations

from embcomp.errors import EmbcompError


class DataError(EmbcompError, ValueError):
    """A data set cannot be read as asked.

    Raised for missing, empty, truncated or binary files, for too many malformed lines, and for unknown data sets or
    options. The message names the file or option, what was found, what is allowed, and the way out. Also a
    ``ValueError``, so that callers who know nothing of this package still catch it.
    """
