"""The vectors of a table as a file, for indexes of nearest neighbours and whatever else reads matrices."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embcomp.errors import ExportError, MissingDependencyError
from embcomp.integrations.export.files import Exported, whole_file
from embcomp.integrations.export.subjects import check_final
from embcomp.tables import CHUNK, EmbeddingTables

Progress = Callable[[int], None]
"""Is told how many more vectors are written."""


def dump_vectors(
    tables: EmbeddingTables,
    table: str | int,
    path: str | Path,
    *,
    ids: Tensor | None = None,
    names: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write the vectors of a table, chunk by chunk: never all of them in memory.

    A ``.npy`` file is float32 ``(V, D)``, and ``np.load(path, mmap_mode="r")`` reads it. A ``.parquet`` file has the
    columns ``id`` int64, ``name`` string where names are given, and ``vector``, a list of D float32; a row group has
    65,536 rows.

    Args:
        tables: finalized.
        table: whose vectors.
        path: ends with ``.npy`` or ``.parquet``.
        ids: int64 ``(n,)``, which vectors in which order; None for those of ids 0 to V - 1.
        names: what each of these ids is called outside, for ``.parquet``.
        overwrite: whether a file that is there may be replaced.
        progress: is told of every chunk.

    Raises:
        ExportError: if the tables are not finalized, ids or names do not fit, or the file can't be written.
        InputError: if there is no such table.
        UnseenIdError: if an id is outside the table and ``unseen="error"``.
        MissingDependencyError: for ``.parquet`` without ``embcomp[serve]``.
    """
    path = Path(path)
    check_final([tables])
    index = tables.index_of(table)
    number = _number_of(tables, index, ids)
    writer = _WRITERS.get(path.suffix)
    if writer is None:
        raise ExportError(f"{path}: vectors are written to .npy or .parquet, not {path.suffix!r}")
    if names is not None and (path.suffix == ".npy" or len(names) != number):
        raise ExportError(f"names: {len(names)} of them for {number} vectors; a .parquet file has a name for each")
    if not all(isinstance(name, str) for name in names or ()):
        raise ExportError("names must be strings: convert others yourself, as numbers have no one spelling")
    chunks = _chunks(tables, index, number, ids, progress)
    with whole_file(path, path.suffix, overwrite) as unfinished, torch.no_grad():
        columns = writer(unfinished, chunks, (number, tables.embedding_dim), names)
    served = tables.memory().serve_bytes
    return Exported(path.suffix[1:], path, path.stat().st_size, served, columns, (), tables.config.unseen)


def _number_of(tables: EmbeddingTables, index: int, ids: Tensor | None) -> int:
    if ids is None:
        return tables.specs[index].num_embeddings
    if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
        told = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ExportError(f"ids must be an int64 tensor (n,), not {told}")
    return len(ids)


def _chunks(
    tables: EmbeddingTables, index: int, number: int, ids: Tensor | None, progress: Progress | None
) -> Iterator[tuple[slice, NDArray[np.int64], NDArray[np.float32]]]:
    """Places in the file, ids ``(n,)`` and vectors ``(n, D)`` of every chunk."""
    device = tables.get_buffer("_sizes").device
    for start in range(0, number, CHUNK):
        place = slice(start, min(start + CHUNK, number))
        chunk = torch.arange(place.start, place.stop) if ids is None else ids[place].long().cpu()
        vectors = tables(chunk.to(device), index).cpu().numpy()
        yield place, chunk.numpy(), vectors
        if progress is not None:
            progress(place.stop - place.start)


def _write_npy(
    path: Path, chunks: Iterator[tuple[slice, NDArray, NDArray]], shape: tuple[int, int], names: Sequence[str] | None
) -> tuple[str, ...]:
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for _, _, vectors in chunks:
            file.write(np.ascontiguousarray(vectors, dtype="<f4").data)
    return ("vector",)


def _write_parquet(
    path: Path, chunks: Iterator[tuple[slice, NDArray, NDArray]], shape: tuple[int, int], names: Sequence[str] | None
) -> tuple[str, ...]:
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingDependencyError(
            f"{path}: .parquet needs pyarrow: pip install embcomp[serve]; or use .npy"
        ) from error
    fields = [("id", arrow.int64()), ("vector", arrow.list_(arrow.float32(), shape[1]))]
    if names is not None:
        fields.insert(1, ("name", arrow.string()))
    with parquet.ParquetWriter(path, arrow.schema(fields), use_dictionary=False) as file:  # no value comes twice
        for place, ids, vectors in chunks:
            columns = [ids, arrow.FixedSizeListArray.from_arrays(vectors.reshape(-1), shape[1])]
            if names is not None:
                columns.insert(1, list(names[place]))
            file.write_table(arrow.table(columns, schema=arrow.schema(fields)), row_group_size=CHUNK)
    return tuple(name for name, _ in fields)


_WRITERS = {".npy": _write_npy, ".parquet": _write_parquet}
