"""Bridges to other libraries, each of which is imported only where a model uses it."""

from __future__ import annotations

from torch import nn


def fuse_collections(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Let TorchRec's collections, whose tables are compressed, look all their features up at once.

    Args:
        model: whose tables are views by now.

    Returns:
        the model, or its replacement where it is a collection itself, and a line for people on each collection.
    """
    classes = {known for module in model.modules() for known in type(module).__mro__}
    if not any(known.__module__.split(".")[0] == "torchrec" for known in classes):
        return model, []  # a torchrec that can't be imported is nobody's business
    from embcomp.integrations.torchrec import fuse

    return fuse(model)
