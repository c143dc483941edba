"""TorchRec's collections as peers of exported tables, where TorchRec is installed."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embcomp import TableSpec

_DTYPES = {"int8": torch.qint8, "int4": torch.quint4x2}


def peers(specs: Sequence[TableSpec]) -> Iterator[tuple[str, int, Callable[[Tensor], Tensor]]]:
    """Name, bytes of the saved state dict and lookup of TorchRec's float32, int8 and int4 collections, if installed."""
    try:
        configs = importlib.import_module("torchrec.modules.embedding_configs")
        collections = importlib.import_module("torchrec.modules.embedding_modules")
        quantize = importlib.import_module("torchrec.inference.modules").quantize_embeddings
    except (ImportError, OSError):  # OSError: a build for another torch
        return
    tables = [
        configs.EmbeddingBagConfig(
            name=spec.name,
            embedding_dim=spec.embedding_dim,
            num_embeddings=spec.num_embeddings,
            feature_names=[spec.name],
        )
        for spec in specs
    ]
    names = [spec.name for spec in specs]
    plain = collections.EmbeddingBagCollection(tables).eval()
    yield "TorchRec, float32", _saved_bytes(plain), looking_up(plain, names)
    for name, dtype in _DTYPES.items():
        whole = nn.Sequential(collections.EmbeddingBagCollection(tables).eval())  # bare it stays as it is
        quantized: Any = quantize(whole, dtype, inplace=True)[0]
        yield f"TorchRec, {name}", _saved_bytes(quantized), looking_up(quantized, names)


def looking_up(collection: nn.Module, names: list[str]) -> Callable[[Tensor], Tensor]:
    """Make a collection take ids ``(B, T)``, one per table, and return ``(B, T, D)``; its input is made but once."""
    jagged = importlib.import_module("torchrec.sparse.jagged_tensor").KeyedJaggedTensor
    kept: dict[int, Any] = {}

    def look_up(ids: Tensor) -> Tensor:
        if id(ids) not in kept:
            lengths = torch.ones(ids.numel(), dtype=torch.int64)
            kept[id(ids)] = (ids, jagged(names, ids.t().reshape(-1), lengths=lengths))
        found: Tensor = collection(kept[id(ids)][1]).values()
        return found.view(len(ids), len(names), -1)

    return look_up


def _saved_bytes(module: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.getbuffer().nbytes
