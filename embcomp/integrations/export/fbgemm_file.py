"""The file of rows for FBGEMM: what it says of its tables, and reading it, checked before anything is built.

Shapes: ``V`` ids, ``D`` dimension.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from embcomp._checkpoint import SEAL, digest_of, get, sealed
from embcomp.config import UNSEEN_POLICIES
from embcomp.errors import IncompatibleStateError, SpecError, did_you_mean
from embcomp.specs import TableSpec

FORMAT, FORMAT_VERSION = "embcomp-fbgemm", 1
FLOATS = {torch.float32: "FP32", torch.float16: "FP16"}
"""dtype -> what FBGEMM calls rows of it."""
BITS = (8, 4, 2)
"""Of packed rows."""
DIGEST = "tensors_sha256"
"""The key of the digest of all tensors; older files have none."""


@dataclass(frozen=True)
class QuantizedTable:
    """What FBGEMM is told of a table.

    Attributes:
        name: of the table.
        num_embeddings: V; there is one row more, for unseen ids, where the policy needs it.
        embedding_dim: D.
        data_type: ``"INT8"``, ``"INT4"``, ``"INT2"``, ``"FP16"`` or ``"FP32"``.
        padding_idx: whose row is zero.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    data_type: str
    padding_idx: int | None


def has_row_for_unseen(unseen: str) -> bool:
    """Whether tables of a policy have a row behind their own."""
    return unseen in ("zero", "oov_row")


def read_tables(path: Path) -> tuple[dict[str, Any], list[QuantizedTable], dict[str, Tensor]]:
    """Read what a file says of all its tables, each of them, and their tensors.

    Raises:
        IncompatibleStateError: see `embcomp.integrations.export.load_fbgemm`.
    """
    content, state = _read(path)
    unseen, _ = get(content, "unseen", str, path), get(content, "seed", int, path)
    if unseen not in UNSEEN_POLICIES:
        raise IncompatibleStateError(f"{path}: unseen={unseen!r}; {did_you_mean(unseen, UNSEEN_POLICIES)}")
    tables = [_described(one, state, unseen, path) for one in get(content, "tables", list, path)]
    names = [table.name for table in tables]
    if not names or len(set(names)) < len(names):
        raise IncompatibleStateError(f"{path}: 'tables' must be at least one, of different names; found {names}")
    return content, tables, state


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(FORMAT)
        state = safetensors.torch.load_file(path)
        content = json.loads(text) if text else None
    except (OSError, SafetensorError, ValueError) as error:
        raise IncompatibleStateError(f"{path} can't be read, so it is missing or corrupt: {error}") from error
    if not isinstance(content, dict):
        raise IncompatibleStateError(f"{path} is foreign: export_fbgemm did not write it")
    version = get(content, "format_version", int, path)
    if version != FORMAT_VERSION:
        raise IncompatibleStateError(f"{path} has format version {version}, this embcomp reads {FORMAT_VERSION}")
    if SEAL in content and sealed(content)[SEAL] != content[SEAL]:
        raise IncompatibleStateError(
            f"{path} is corrupt: its {SEAL} is that of another content; export the tables again"
        )
    if DIGEST in content and digest_of(state) != content[DIGEST]:
        raise IncompatibleStateError(
            f"{path} is corrupt: its {DIGEST} is that of other tensors; export the tables again"
        )
    return content, state


def _described(content: Any, state: Mapping[str, Tensor], unseen: str, path: Path) -> QuantizedTable:
    names = [field.name for field in fields(QuantizedTable)]
    if not isinstance(content, dict) or sorted(content) != sorted(names):
        raise IncompatibleStateError(f"{path}: a table is described by {', '.join(names)}, found {content!r}")
    table = QuantizedTable(**content)
    try:
        TableSpec(table.name, table.num_embeddings, table.embedding_dim, table.padding_idx)
    except SpecError as error:
        raise IncompatibleStateError(f"{path} is corrupt: {error}") from error
    for part, (dtype, shape) in _tensors_of(table, unseen, path).items():
        tensor = state.get(f"{table.name}.{part}")
        if tensor is None:
            raise IncompatibleStateError(f"{path} lacks {table.name}.{part}, so it is corrupt")
        if tensor.dtype != dtype or tensor.shape != shape:
            raise IncompatibleStateError(
                f"{path} is corrupt: {table.name}.{part} is {tensor.dtype} {tuple(tensor.shape)}, and "
                f"{table.data_type} rows of V={table.num_embeddings}, D={table.embedding_dim} with unseen={unseen!r} "
                f"need {dtype} {shape}"
            )
    return table


def _tensors_of(table: QuantizedTable, unseen: str, path: Path) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
    """Dtypes and shapes of a table's tensors, by what follows its name."""
    floats = {name: dtype for dtype, name in FLOATS.items()}
    packed = {f"INT{bits}": bits for bits in BITS}
    rows, dim = table.num_embeddings + has_row_for_unseen(unseen), table.embedding_dim
    data_type = str(table.data_type)
    if data_type in floats:
        return {"rows": (floats[data_type], (rows, dim))}
    if data_type not in packed:
        raise IncompatibleStateError(
            f"{path}: table {table.name!r} has data_type={table.data_type!r}; "
            f"{did_you_mean(data_type, [*floats, *packed])}"
        )
    if dim * packed[data_type] % 8:
        raise IncompatibleStateError(f"{path} is corrupt: {data_type} rows of D={dim} do not fill whole bytes")
    return {
        "codes": (torch.uint8, (rows, dim * packed[data_type] // 8)),
        "scale_bias": (torch.float16, (rows, 2)),
    }
