"""Click logs: readers of the original formats of public data sets, synthetic ones, and mini-batches.

The one entry point is :func:`load_dataset`. It reads a data set in its original format once, encodes it with ids by
train frequency, and keeps the result memory-mapped in a cache.
"""

from recsys_models.data.batches import Batch, Batches
from recsys_models.data.clicklog import ClickLog, Field, Split
from recsys_models.data.errors import DataError
from recsys_models.data.malformed import MalformedLine
from recsys_models.data.registry import list_datasets, load_dataset

__all__ = [
    "Batch",
    "Batches",
    "ClickLog",
    "DataError",
    "Field",
    "MalformedLine",
    "Split",
    "list_datasets",
    "load_dataset",
]
