"""Bridges to other libraries, each of which is imported only where a model uses it."""

from __future__ import annotations

import sys

from torch import nn


def fuse_collections(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Let TorchRec's collections, whose tables are compressed, look all their features up at once.

    Args:
        model: whose tables are views by now.

    Returns:
        the model, or its replacement where it is a collection itself, and a line for people on each collection.
    """
    if sys.modules.get("torchrec") is None:  # then no module can be one of its
        return model, []
    from embcomp.integrations.torchrec import fuse

    return fuse(model)
