"""Click logs and sessions: readers of the original formats of public data sets, synthetic ones, and mini-batches.

There are two entry points, :func:`load_dataset` for click logs and :func:`load_sessions` for sequences of items. Both
read a data set in its original format once, encode it with ids by train frequency, and keep the result memory-mapped in
a cache.
"""

from recsys_models.data.batches import Batch, Batches
from recsys_models.data.clicklog import ClickLog, Field, Split
from recsys_models.data.errors import DataError
from recsys_models.data.malformed import MalformedLine
from recsys_models.data.registry import list_datasets, load_dataset
from recsys_models.data.sessions import (
    NO_TARGET,
    Attribute,
    Cases,
    Catalogue,
    Sequences,
    SessionBatch,
    SessionBatches,
    SessionLog,
    list_session_datasets,
    load_sessions,
    metadata_twin_rate,
)

__all__ = [
    "NO_TARGET",
    "Attribute",
    "Batch",
    "Batches",
    "Cases",
    "Catalogue",
    "ClickLog",
    "DataError",
    "Field",
    "MalformedLine",
    "Sequences",
    "SessionBatch",
    "SessionBatches",
    "SessionLog",
    "Split",
    "list_datasets",
    "list_session_datasets",
    "load_dataset",
    "load_sessions",
    "metadata_twin_rate",
]
