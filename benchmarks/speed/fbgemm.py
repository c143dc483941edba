"""FBGEMM's table-batched embeddings as peers, where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.setting import Setting

OPTIMIZERS = {"exact Adagrad": "EXACT_ADAGRAD", "exact row-wise Adagrad": "EXACT_ROWWISE_ADAGRAD"}
"""Name -> FBGEMM's, of those that are compared with."""


def lookup(setting: Setting, dim: int, kind: str, batches: Sequence[Tensor]) -> Callable[[int], object] | None:
    """Lookups of quantized rows by the inference kernel, on ids that lie as it likes them; None if not installed.

    Args:
        setting: sizes.
        dim: D.
        kind: ``"INT8"`` or ``"INT4"``.
        batches: int64 ``(B, T)`` each.
    """
    ops = _module("split_table_batched_embeddings_ops_inference")
    if ops is None:
        return None
    specs = [("", setting.rows, dim, ops.SparseType[kind], ops.EmbeddingLocation.HOST)] * setting.tables
    tables = ops.IntNBitTableBatchedEmbeddingBagsCodegen(specs, device="cpu", output_dtype=ops.SparseType.FP32)
    tables.fill_random_weights()
    inputs = [_table_major(ids.int()) for ids in batches]
    return lambda turn: tables(*inputs[turn % len(inputs)])


def training_step(
    setting: Setting, dim: int, optimizer: str, batches: Sequence[Tensor], gradient: Tensor
) -> Callable[[int], object] | None:
    """Forward, backward and fused update; None if not installed.

    Args:
        setting: sizes.
        dim: D.
        optimizer: one of `OPTIMIZERS`.
        batches: int64 ``(B, T)`` each.
        gradient: float32 ``(B, T, D)``.
    """
    ops = _module("split_table_batched_embeddings_ops_training")
    if ops is None:
        return None
    table = (setting.rows, dim, ops.EmbeddingLocation.HOST, ops.ComputeDevice.CPU)
    kind = getattr(ops.OptimType, OPTIMIZERS[optimizer])
    tables = ops.SplitTableBatchedEmbeddingBagsCodegen([table] * setting.tables, optimizer=kind, learning_rate=0.01)
    inputs = [_table_major(ids) for ids in batches]
    flat = gradient.flatten(1)
    return lambda turn: tables(*inputs[turn % len(inputs)]).backward(flat)


def _table_major(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids table by table, and the offsets of bags of one id."""
    return ids.t().reshape(-1).contiguous(), torch.arange(ids.numel() + 1, dtype=ids.dtype)


def _module(name: str) -> ModuleType | Any:
    try:
        return importlib.import_module(f"fbgemm_gpu.{name}")
    except (ImportError, OSError):  # OSError: a build for another torch
        return None
