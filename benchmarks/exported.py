"""Sizes of the files that finalized tables are exported to, for the cells that ask for them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embcomp import EmbeddingTables, TableSpec, build_tables
from embcomp.errors import ConfigError, ExportError, did_you_mean


@functools.cache
def check_kind(kind: str) -> None:
    """Export a small table once per process, so that what is missing is told before anything is trained.

    Raises:
        ConfigError: if there is no such kind of file.
        MissingDependencyError: if a package that it needs is not there.
        ExportError: if a tool that it needs is not there.
    """
    from embcomp.integrations.export import SERVED  # torch's exporters take seconds to import

    if kind not in SERVED:
        raise ConfigError(f"exports: no kind of file {kind!r}; {did_you_mean(kind, list(SERVED))}")
    _export(build_tables([TableSpec("trial", 4, 4)]).finalize_(), kind)


def exported_files(tables: EmbeddingTables, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Export finalized tables.

    Args:
        tables: finalized.
        kinds: of files, see `embcomp.integrations.export.SERVED`.

    Returns:
        kind -> ``file_bytes``, and ``refused``, why there is no such file; the other of the two is None.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        try:
            found[kind] = {"file_bytes": _export(tables, kind), "refused": None}
        except ExportError as error:
            found[kind] = {"file_bytes": None, "refused": str(error)}
    return found


def _export(tables: EmbeddingTables, kind: str) -> int:
    from embcomp.integrations.export import SERVED, SUFFIXES

    with tempfile.TemporaryDirectory(prefix="embcomp-") as folder:
        return SERVED[kind](tables, Path(folder) / f"{kind}{SUFFIXES[kind]}").file_bytes
