"""Files that are whole or not there, and what is told of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from embcomp._checkpoint import EXPORTING, sync
from embcomp.errors import ExportError


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        kind: ``"pt2"``, ``"aoti"``, ``"onnx"``, ``"fbgemm"``, ``"npy"`` or ``"parquet"``.
        path: the file.
        file_bytes: its size.
        serve_bytes: what the tables in it take to serve by their memory report; of a whole group, where only some of
            its tables are looked up.
        inputs: names of the inputs, or of the columns of the file.
        outputs: names of the outputs; none where the file is data.
        unseen: the policy that ids outside ``[0, V)`` follow in the file; of several groups, those of all.
    """

    kind: str
    path: Path
    file_bytes: int
    serve_bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    unseen: str


@contextmanager
def whole_file(path: str | Path, suffix: str, overwrite: bool) -> Iterator[Path]:
    """Give a place to write to, which takes its own place once all is written; a failure leaves nothing.

    Args:
        path: of the file; its folder is made if it is not there.
        suffix: that the file must end with, as readers go by it.
        overwrite: whether a file that is there may be replaced.

    Raises:
        ExportError: if the path has another suffix, is there already, or can't be written.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise ExportError(f"{path}: the file must end with {suffix!r}, by which it is recognised")
    if path.is_dir():
        raise ExportError(f"{path} is a folder: give the path of a file")
    if path.exists() and not overwrite:
        raise ExportError(
            f"{path} is there already: choose another path, or overwrite it (overwrite=True, --overwrite)"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=EXPORTING, dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            yield unfinished
            sync(unfinished)
            os.replace(unfinished, path)
            sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} can't be written ({error}): choose a folder that can") from error
