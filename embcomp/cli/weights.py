"""Trained tables in files, mapped into memory and read some rows at a time: nothing is unpickled but tensors."""

from __future__ import annotations

import fnmatch
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from embcomp._checkpoint import CONFIG, get, read_config
from embcomp.cli.progress import BYTES, progress_bar
from embcomp.errors import IncompatibleStateError, SpecError, did_you_mean
from embcomp.row_source import Index, RowSource

HELP = (
    ".safetensors, .npy, or what torch.save has written of tensors since torch 1.6 (.pt, .pth, .bin): a state dict of "
    "tables, of a TorchRec collection, or of a whole model"
)
RULE = (
    "names or patterns such as 'tables.*' of the matrices that are tables. Without it: those of TorchRec collections, "
    "if there are some, else all, if the file has nothing but float matrices. '*' takes every float matrix"
)
_TORCHREC = re.compile(r"(?:.*\.)?(?:embedding_bags|embeddings)\.[^.]+\.weight")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which checkpoints of training loops have the state dict."""
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    EOFError,
    SafetensorError,
    UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch.save began before there was an archive in them: a number, as a pickle."""
_PIECE = 1 << 20
_EXPORTS = {
    ".pt2": "a graph of torch.export or AOTInductor",
    ".onnx": "a graph of ONNX",
    ".parquet": "a file of vectors for other programs",
}


@dataclass(frozen=True)
class Weights:
    """What is in a file.

    Attributes:
        tables: name -> rows; names end with no ``.weight``, so they are those of the modules.
        left_out: name of a tensor -> why it is no table.
    """

    tables: dict[str, RowSource]
    left_out: dict[str, str]


def read_weights(path: Path, patterns: Sequence[str]) -> Weights:
    """Open a file of trained tables; of those that have checksums, all is read once and checked, of others nothing yet.

    Args:
        path: see `HELP`.
        patterns: which matrices are tables, see `RULE`.

    Raises:
        SpecError: if the file can't be read or is corrupt, or it is not clear which of its tensors are tables.
    """
    found = _open(path)
    left_out = _left_out(found)
    chosen = _chosen(path, found, left_out, patterns)
    left_out |= {name: "not chosen" for name in found if name not in chosen.values() and name not in left_out}
    if _OPENERS[path.suffix.lower()] is _open_torch:
        _check_archive(path)
    return Weights({table: found[name].source for table, name in chosen.items()}, left_out)


def watched(source: RowSource, watch: Callable[[int], None]) -> RowSource:
    """The same rows; ``watch`` is told the bytes of all that is read, as float32."""

    def read(index: Index) -> Tensor:
        rows = source[index]
        watch(rows.nbytes)
        return rows

    return RowSource(read, *source.shape)


def table_shapes(path: Path, patterns: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Shapes of the tables in a file, by the rule of `read_weights`: name -> ``(V, D)``; nothing else of it is read.

    Raises:
        SpecError: as `read_weights`.
    """
    found = _open(path)
    chosen = _chosen(path, found, _left_out(found), patterns)
    return {table: found[name].source.shape for table, name in chosen.items()}


def matrices(path: Path) -> dict[str, tuple[int, int]]:
    """Shapes of the float matrices in a file: name -> ``(V, D)``; nothing else of it is read.

    Raises:
        SpecError: if the file can't be read, or has none.
    """
    found = _open(path)
    shapes = {name: own.source.shape for name, own in found.items() if own.problem() is None}
    if not shapes:
        raise SpecError(f"{path} has no float matrix (V, D); it has {', '.join(found) or 'nothing'}")
    return shapes


def read_counts(path: Path, names: list[str]) -> dict[str, Tensor]:
    """Read how often ids occur: a vector per table in .safetensors, or one in .npy, where there is one table.

    Names may end with ``.weight``, as those of the weights may.

    Raises:
        SpecError: if the file can't be read, or has counts of no table; `Knowledge.of` checks the rest.
    """
    try:
        if path.suffix == ".npy":
            if len(names) != 1:
                raise SpecError(f"{path} holds counts of one table, of {len(names)}: write a .safetensors file")
            return {names[0]: torch.from_numpy(np.load(path, allow_pickle=False))}
        with safe_open(path, "pt") as file:
            keys = {key: key if key in names else key.removesuffix(".weight") for key in file.keys()}  # noqa: SIM118
            if len(set(keys.values())) < len(keys):
                raise SpecError(f"{path}: of {', '.join(keys)} two are one table's, named with and without '.weight'")
            return {name: file.get_tensor(key) for key, name in keys.items()}
    except SpecError:
        raise
    except _UNREADABLE as error:
        raise SpecError(f"{path} can't be read: {error}; counts come from .safetensors or .npy") from error


@dataclass(frozen=True)
class _Found:
    """A tensor of a file: its shape, its kind, and where its rows are read if it is a float matrix."""

    shape: tuple[int, ...]
    is_float: bool
    read: Callable[[Index], Tensor]

    def problem(self) -> str | None:
        """Why it is no table."""
        if len(self.shape) != 2:
            return f"no matrix, its shape is {self.shape}"
        if not all(self.shape):
            return "empty"
        return None if self.is_float else "no dense matrix of floats"

    @property
    def source(self) -> RowSource:
        return RowSource(self.read, self.shape[0], self.shape[1])


def _open(path: Path) -> dict[str, _Found]:
    """The tensors of a file, by name."""
    opener = _opener_of(path)
    try:
        return opener(path)
    except SpecError:
        raise
    except _UNREADABLE as error:
        raise SpecError(f"{path} can't be read: {error}; trained tables come from {HELP}") from error


def _opener_of(path: Path) -> Callable[[Path], dict[str, _Found]]:
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise SpecError(f"{path} {what}; trained tables come from {HELP}")
    suffix = path.suffix.lower()
    if suffix in _EXPORTS:
        raise SpecError(
            f"{path} is an export, {_EXPORTS[suffix]}: give the checkpoint that it was made of, or weights: {HELP}"
        )
    if suffix not in _OPENERS:
        raise SpecError(f"{path}: files that end with {path.suffix!r} are not known; trained tables come from {HELP}")
    if path.stat().st_size == 0:
        raise SpecError(f"{path} is empty; trained tables come from {HELP}")
    if _is_of_checkpoint(path):
        raise SpecError(
            f"{path} holds the rows of the checkpoint {path.parent}, which are no tables by themselves: give the "
            "folder to plan, inspect or export; what compress takes are trained tables"
        )
    return _OPENERS[suffix]


def _is_of_checkpoint(path: Path) -> bool:
    """Whether the config of a checkpoint is beside a file, and names it."""
    file = path.parent / CONFIG
    if not file.is_file():
        return False
    try:
        return get(get(read_config(file), "weights", dict, file), "file", str, file) == path.name
    except IncompatibleStateError:
        return False


def _left_out(found: Mapping[str, _Found]) -> dict[str, str]:
    return {name: problem for name, own in found.items() if (problem := own.problem())}


def _chosen(
    path: Path, found: Mapping[str, _Found], left_out: Mapping[str, str], patterns: Sequence[str]
) -> dict[str, str]:
    """Name of a table -> of its matrix, by `RULE`."""
    names = _matching(path, found, left_out, patterns)
    chosen = {name.removesuffix(".weight"): name for name in names}
    if len(chosen) < len(names):
        raise SpecError(f"{path}: of {', '.join(names)} two are one table's, named with and without '.weight'")
    return chosen


def _matching(
    path: Path, found: Mapping[str, _Found], left_out: Mapping[str, str], patterns: Sequence[str]
) -> list[str]:
    usable = [name for name in found if name not in left_out]
    if not usable:
        reasons = ", ".join(f"{name} ({why})" for name, why in left_out.items()) or "nothing"
        raise SpecError(f"{path} has no float matrix (V, D); it has {reasons}")
    if patterns:
        for pattern in patterns:
            if not any(_fits(name, pattern) for name in usable):
                why = next((f": {left_out[name]}" for name in left_out if _fits(name, pattern)), "")
                raise SpecError(f"{path}: --table {pattern!r} is no float matrix{why}; {did_you_mean(pattern, usable)}")
        return [name for name in usable if any(_fits(name, pattern) for pattern in patterns)]
    collections = [name for name in usable if _TORCHREC.fullmatch(name)]
    if not collections and left_out:
        raise SpecError(
            f"{path} looks like the state of a whole model: say which of its matrices are tables, by --table NAME or "
            f"--table 'tables.*': {', '.join(usable)}"
        )
    return collections or usable


def _fits(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(own, pattern) for own in (name, name.removesuffix(".weight")))


def _check_archive(path: Path) -> None:
    """Compare the members of an archive of torch.save with their checksums, which torch.load does not."""
    where = "its list of members"
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save writes 0 where it was told to compute no checksums
            members = [member for member in archive.infolist() if member.CRC]
            with progress_bar("checking", total=sum(member.file_size for member in members), **BYTES) as watch:
                for member in members:
                    where = member.filename
                    with archive.open(member) as stream:
                        while piece := stream.read(_PIECE):
                            watch(len(piece))
    except _UNREADABLE as error:
        raise SpecError(
            f"{path} is corrupt: {where} is not what was saved ({error}): copy the file again from where it was made"
        ) from error


def _open_npy(path: Path) -> dict[str, _Found]:
    matrix = np.load(path, mmap_mode="r", allow_pickle=False)

    def read(index: Index) -> Tensor:
        return torch.from_numpy(np.array(matrix[index if isinstance(index, slice) else index.numpy()], np.float32))

    return {path.stem: _Found(matrix.shape, matrix.dtype.kind == "f", read)}


def _open_safetensors(path: Path) -> dict[str, _Found]:
    with safe_open(path, "pt") as file:
        return {name: _of_tensor(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def _open_torch(path: Path) -> dict[str, _Found]:
    if not zipfile.is_zipfile(path):
        _refuse_other_format(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:  # torch's own text says how to load it all the same
        found = _GLOBAL.search(str(error))
        what = f"it holds {found[1]}, which is no tensor" if found else "it is no file of tensors"
        raise SpecError(
            f"{path} can't be read: {what}, and embcomp unpickles nothing but tensors. Where it was made, write "
            "the tables alone: torch.save(model.state_dict(), path), or safetensors.torch.save_file"
        ) from error
    if isinstance(state, Tensor):
        return {path.stem: _of_tensor(state)}
    if not isinstance(state, Mapping):
        raise SpecError(f"{path} holds a {type(state).__name__}, no state dict")
    state = next((state[key] for key in _NESTED if isinstance(state.get(key), Mapping)), state)
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise SpecError(
            f"{path} has no tensor, nor a state dict under {', '.join(map(repr, _NESTED))}; its keys are "
            f"{', '.join(map(repr, list(state)[:5])) or 'none'}: write torch.save(model.state_dict(), path)"
        )
    return {str(name): _of_tensor(value) for name, value in state.items() if isinstance(value, Tensor)}


def _refuse_other_format(path: Path) -> NoReturn:
    with path.open("rb") as file:
        if file.read(len(_LEGACY)) == _LEGACY:
            raise SpecError(
                f"{path} can't be read: it has the format that torch.save wrote before torch 1.6, of which no part can "
                "be read by itself. Write it again: torch.save(torch.load(path, weights_only=True), path)"
            )
    raise SpecError(
        f"{path} can't be read: torch.save has not written it, or not all of it; trained tables come from {HELP}"
    )


def _of_tensor(tensor: Tensor) -> _Found:
    is_dense = tensor.layout is torch.strided and not tensor.is_meta
    return _Found(tuple(tensor.shape), is_dense and tensor.is_floating_point(), tensor.detach().__getitem__)


_OPENERS: dict[str, Callable[[Path], dict[str, _Found]]] = {
    ".npy": _open_npy,
    ".safetensors": _open_safetensors,
    ".pt": _open_torch,
    ".pth": _open_torch,
    ".bin": _open_torch,
}

SUFFIXES = tuple(_OPENERS)
