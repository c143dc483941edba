"""Rows as FBGEMM's inference kernels read them: the very codes of row-quantized tables, beside float16 scales.

Shapes: ``V`` ids, ``D`` dimension, ``n`` bytes of the codes of a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from embcomp._checkpoint import digest_of, sealed, write_tensors
from embcomp.config import strategy_of
from embcomp.errors import ExportError, did_you_mean
from embcomp.integrations.export.fbgemm_file import (
    BITS,
    DIGEST,
    FLOATS,
    FORMAT,
    FORMAT_VERSION,
    QuantizedTable,
    read_tables,
)
from embcomp.integrations.export.files import Exported, whole_file
from embcomp.integrations.export.subjects import check_final
from embcomp.mixed import MixedTables
from embcomp.storage import packing
from embcomp.storage.dense import DenseRows
from embcomp.storage.packed import PackedRows
from embcomp.tables import CHUNK, EmbeddingTables

if TYPE_CHECKING:
    from embcomp.integrations.export.quantized import QuantizedTables


def export_fbgemm(
    tables: EmbeddingTables, path: str | Path, *, table: str | int | None = None, overwrite: bool = False
) -> Exported:
    """Write rows for FBGEMM's inference kernels and TorchRec's quantized collections; `load_fbgemm` reads them.

    For tables whose vectors are stored rows: ``int8:row``, ``int4:row`` and ``int2:row`` keep their codes, float32 and
    float16 rows their values. FBGEMM has float16 scales: ours are float16 below 8 bits, so vectors are the same bit for
    bit; at 8 bits ours are rounded, and vectors differ by at most 2⁻⁹ of the row's largest value, or 1e-5 where that is
    more. The file takes 4 bytes per row less than ours there. Rows of ``unseen="zero"`` tables get a zero row behind
    them.

    Args:
        tables: finalized.
        path: ends with ``.safetensors``: for each table ``<name>.codes`` uint8 ``(rows, n)``, the first code of a byte
            in its low bits, and ``<name>.scale_bias`` float16 ``(rows, 2)``; or ``<name>.rows`` of floats.
        table: the only one to export; None for all.
        overwrite: whether a file that is there may be replaced.

    Raises:
        ExportError: if the tables are not finalized, their vectors are no stored rows of these formats, codes do not
            fill whole bytes, scales are too large for float16, or the file can't be written.
        InputError: if there is no such table.
    """
    check_final([tables])
    chosen = range(tables.num_tables) if table is None else [tables.index_of(table)]
    state: dict[str, Tensor] = {}
    described = []
    for index in chosen:
        data_type, own = _rows_of(tables, index)
        spec = tables.specs[index]
        described.append(
            QuantizedTable(spec.name, spec.num_embeddings, spec.embedding_dim, data_type, spec.padding_idx)
        )
        state |= {f"{spec.name}.{part}": tensor.contiguous() for part, tensor in own.items()}
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "unseen": tables.config.unseen,
        "seed": tables.config.seed,
        "tables": [asdict(one) for one in described],
        DIGEST: digest_of(state),
    }
    with whole_file(path, ".safetensors", overwrite) as unfinished:
        write_tensors(unfinished, state, {"format": "pt", FORMAT: json.dumps(sealed(content))})
    path, names = Path(path), tuple(one.name for one in described)
    served = tables.memory().serve_bytes
    return Exported("fbgemm", path, path.stat().st_size, served, names, (), tables.config.unseen)


def load_fbgemm(
    path: str | Path,
    features: Mapping[str, Sequence[str]] | None = None,
    *,
    tables: Sequence[str] | None = None,
    pooling: str | Mapping[str, str] = "sum",
    is_weighted: bool = False,
    device: torch.device | str = "cpu",
) -> QuantizedTables:
    """Make a TorchRec quantized collection of a file that `export_fbgemm` wrote.

    Args:
        path: the file.
        features: table name -> names of the features that look it up; None for a feature of each table's name.
        tables: names of those that are wanted, such as those of one of a model's collections; None for all.
        pooling: ``"sum"`` or ``"mean"``, of all tables or of each by name, for an ``EmbeddingBagCollection``;
            ``"none"`` for an ``EmbeddingCollection``, with a vector per id.
        is_weighted: whether bags have weights.
        device: ``"cpu"``, where rows lie without a gap, or CUDA, where FBGEMM wants them at multiples of 16 bytes.

    Raises:
        IncompatibleStateError: if the file is missing, corrupt, foreign or from the future: its SHA-256 digests, which
            older files lack, and the names, dtypes and shapes of its tensors are checked before anything is built.
        ExportError: if ``pooling`` is ``"mean"`` and the table has padding, which FBGEMM would count, tables,
            features or poolings are of no table, or there are weights without pooling.
        MissingDependencyError: without TorchRec.
    """
    from embcomp.integrations.export.quantized import QuantizedTables

    content, found, state = read_tables(Path(path))
    names = [table.name for table in found]
    for name in tables or ():
        if name not in names:
            raise ExportError(f"{path} has no table {name!r}; {did_you_mean(name, names)}")
    chosen = [table for table in found if tables is None or table.name in tables]
    if not chosen:
        raise ExportError(f"tables=[] chooses none of {', '.join(names)}")
    unseen, seed = content["unseen"], content["seed"]
    return QuantizedTables(chosen, state, unseen, seed, features, pooling, is_weighted, torch.device(device))


def _rows_of(tables: EmbeddingTables, index: int) -> tuple[str, dict[str, Tensor]]:
    """The data type and the tensors of a table, a row for unseen ids included where one is needed."""
    store, rows = _stored(tables, index)
    if isinstance(store, DenseRows) and store.weight.dtype in FLOATS:
        data_type, own = FLOATS[store.weight.dtype], {"rows": store.weight.detach()[rows].cpu()}
    elif isinstance(store, PackedRows) and store.row_format.granularity == "row" and store.bits in BITS:
        data_type, own = f"INT{store.bits}", _codes(store, rows, tables.names[index])
    else:
        raise ExportError(
            f"table {tables.names[index]!r} has rows={_format_of(store)!r}, which FBGEMM's kernels have not: they have "
            "'int8:row', 'int4:row', 'int2:row', 'float16' and 'float32'; or export to 'pt2'"
        )
    if tables.config.unseen == "zero":
        own = {name: torch.cat([tensor, tensor.new_zeros(1, tensor.shape[1])]) for name, tensor in own.items()}
    if (padding := tables.specs[index].padding_idx) is not None:
        for tensor in own.values():
            tensor[padding] = 0
    return data_type, own


def _stored(tables: EmbeddingTables, index: int) -> tuple[nn.Module, Tensor]:
    """The store of a table's rows, and which they are, int64 ``(num_ids,)``."""
    name, ids = tables.names[index], torch.arange(tables.num_ids[index], device=tables.get_buffer("_sizes").device)
    owner: tuple[EmbeddingTables, int] | None = (tables, index)
    while owner is not None and isinstance(owner[0], MixedTables):
        owner = owner[0].part_of(owner[1])
    found = None if owner is None else owner[0].stored_rows(ids, owner[1])
    strategy = strategy_of(tables.config).name
    if found is None:
        raise ExportError(
            f"strategy {strategy!r} composes the vectors of table {name!r}, and FBGEMM's kernels only read rows: use "
            "'pt2', 'aoti' or 'onnx', or strategy 'quantize'"
        )
    if len(found[1].unique()) < len(ids):
        raise ExportError(
            f"strategy {strategy!r} shares rows between ids of table {name!r}, and FBGEMM's kernels do not hash: use "
            "'pt2', 'aoti' or 'onnx', or strategy 'quantize'"
        )
    return found


def _codes(store: PackedRows, rows: Tensor, name: str) -> dict[str, Tensor]:
    if store.dim * store.bits % 8:
        raise ExportError(
            f"table {name!r}: {store.dim} values of {store.bits} bits do not fill whole bytes, as FBGEMM wants: use "
            "'pt2', or a dimension that is a multiple of "
            f"{8 // store.bits}"
        )
    codes = [packing.pack(store.codes_of(chunk), store.bits).view(len(chunk), -1).cpu() for chunk in rows.split(CHUNK)]
    scale_bias = torch.cat(store.row_grids_of(rows), dim=1).cpu().to(torch.float16)
    if not scale_bias.isfinite().all():
        raise ExportError(
            f"table {name!r} has values beyond 65504, which FBGEMM's float16 scales can't hold: use 'pt2'"
        )
    return {"codes": torch.cat(codes), "scale_bias": scale_bias}


def _format_of(store: nn.Module) -> str:
    if isinstance(store, PackedRows):
        return str(store.row_format)
    return str(store.weight.dtype).removeprefix("torch.") if isinstance(store, DenseRows) else type(store).__name__
