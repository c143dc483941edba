"""Sizes of the files that finalized tables are exported to, for the cells that ask for them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embcomp import EmbeddingTables
from embcomp.errors import ConfigError, ExportError, did_you_mean


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise `ConfigError` if there is no such kind of file."""
    if kinds:
        from embcomp.integrations.export import SERVED  # torch's exporters take seconds to import

        for kind in kinds:
            if kind not in SERVED:
                raise ConfigError(f"exports: no kind of file {kind!r}; {did_you_mean(kind, list(SERVED))}")


def exported_files(tables: EmbeddingTables, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Export finalized tables.

    Args:
        tables: finalized.
        kinds: of files, see `embcomp.integrations.export.SERVED`.

    Returns:
        kind -> ``file_bytes``, and ``refused``, why there is no such file; the other of the two is None.
    """
    found: dict[str, dict[str, Any]] = {}
    if not kinds:
        return found
    from embcomp.integrations.export import SERVED, SUFFIXES

    with tempfile.TemporaryDirectory(prefix="embcomp-") as folder:
        for kind in kinds:
            try:
                told = SERVED[kind](tables, Path(folder) / f"{kind}{SUFFIXES[kind]}")
                found[kind] = {"file_bytes": told.file_bytes, "refused": None}
            except ExportError as error:
                found[kind] = {"file_bytes": None, "refused": str(error)}
    return found
