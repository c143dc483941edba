"""Sessions and histories: readers of public data sets, synthetic sessions, and mini-batches.

The one entry point is :func:`load_sessions`. It reads a data set in its original format once, splits it by a protocol
of the literature, numbers items and their attributes by train frequency, and keeps the result memory-mapped in a cache.
"""

from recsys_models.data.sessions.batches import NO_TARGET, SessionBatch, SessionBatches
from recsys_models.data.sessions.catalogue import Attribute, Catalogue
from recsys_models.data.sessions.registry import list_session_datasets, load_sessions
from recsys_models.data.sessions.sequences import Cases, Sequences
from recsys_models.data.sessions.sessionlog import SessionLog, metadata_twin_rate

__all__ = [
    "NO_TARGET",
    "Attribute",
    "Cases",
    "Catalogue",
    "Sequences",
    "SessionBatch",
    "SessionBatches",
    "SessionLog",
    "list_session_datasets",
    "load_sessions",
    "metadata_twin_rate",
]
