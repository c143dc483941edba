"""RecBole's SASRec as a peer, where it is installed: ``pip install recbole``."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

_PADDING = 1
"""RecBole's items begin at 1: 0 stands behind the ends."""

_NAMES = {
    "USER_ID_FIELD": "user",
    "ITEM_ID_FIELD": "item",
    "LIST_SUFFIX": "_list",
    "ITEM_LIST_LENGTH_FIELD": "item_length",
    "NEG_PREFIX": "neg_",
}


def sasrec(num_items: int, length: int, dim: int, **options: Any) -> nn.Module | None:
    """RecBole's model with cross-entropy over all items; None if it is not installed.

    Args:
        num_items: of the catalogue.
        length: of sessions, at most.
        dim: D.
        options: ``n_layers``, ``n_heads``, ``inner_size``, ``hidden_dropout_prob``, ``attn_dropout_prob`` and
            ``hidden_act``.
    """
    try:
        module = importlib.import_module("recbole.model.sequential_recommender.sasrec")
    except ImportError:
        return None
    config = _NAMES | {
        "MAX_ITEM_LIST_LENGTH": length,
        "device": "cpu",
        "hidden_size": dim,
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "loss_type": "CE",
        **options,
    }
    model: nn.Module = module.SASRec(config, SimpleNamespace(num=lambda field: num_items + _PADDING))
    return model


def interaction(items: Tensor, lengths: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """A batch as RecBole takes it: items int64 ``(B, L)`` with zeros behind the ends of lengths ``(B,)``, targets."""
    behind = items.new_ones(items.shape).cumsum(1) > lengths[:, None]
    return {
        "item_list": (items + _PADDING).masked_fill(behind, 0),
        "item_length": lengths,
        "item": targets + _PADDING,
    }
