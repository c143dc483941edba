"""Trained tables in files, mapped into memory and read some rows at a time: nothing is unpickled but tensors."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from embcomp.errors import SpecError, did_you_mean
from embcomp.row_source import Index, RowSource

HELP = (
    ".safetensors, .npy, or what torch.save has written of tensors (.pt, .pth, .bin): a state dict of tables, of a "
    "TorchRec collection, or of a whole model"
)
RULE = (
    "names or patterns such as 'tables.*' of the matrices that are tables. Without it: those of TorchRec collections, "
    "if there are some, else all, if the file has nothing but float matrices. '*' takes every float matrix"
)
_TORCHREC = re.compile(r"(?:.*\.)?(?:embedding_bags|embeddings)\.[^.]+\.weight")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_NESTED = ("state_dict", "model_state_dict")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, SafetensorError, UnpicklingError)
_Watch = Callable[[int], None]


@dataclass(frozen=True)
class Weights:
    """What is in a file.

    Attributes:
        tables: name -> rows; names end with no ``.weight``, so they are those of the modules.
        left_out: name of a tensor -> why it is no table.
    """

    tables: dict[str, RowSource]
    left_out: dict[str, str]


def read_weights(path: Path, patterns: Sequence[str], watch: _Watch = lambda size: None) -> Weights:
    """Open a file of trained tables; nothing of them is read yet.

    Args:
        path: see `HELP`.
        patterns: which matrices are tables, see `RULE`.
        watch: told the bytes of all that is read later.

    Raises:
        SpecError: if the file can't be read, or it is not clear which of its tensors are tables.
    """
    found = _open(path)
    left_out = _left_out(found)
    chosen = _chosen(path, found, left_out, patterns)
    left_out |= {name: "not chosen" for name in found if name not in chosen.values() and name not in left_out}
    return Weights({table: _watched(found[name].source, watch) for table, name in chosen.items()}, left_out)


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

    Raises:
        SpecError: if the file can't be read, or has counts of no table; `Knowledge.of` checks the rest.
    """
    try:
        if path.suffix == ".npy":
            if len(names) != 1:
                raise SpecError(f"{path} holds counts of one table, of {len(names)}: write a .safetensors file")
            return {names[0]: torch.from_numpy(np.load(path, allow_pickle=False))}
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
    if not path.is_file():
        raise SpecError(f"{path} is no file; trained tables come from {HELP}")
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        raise SpecError(f"{path}: files that end with {path.suffix!r} are not known; trained tables come from {HELP}")
    try:
        return opener(path)
    except SpecError:
        raise
    except _UNREADABLE as error:
        raise SpecError(f"{path} can't be read: {error}; trained tables come from {HELP}") from error


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


def _watched(source: RowSource, watch: _Watch) -> RowSource:
    def read(index: Index) -> Tensor:
        rows = source[index]
        watch(rows.nbytes)
        return rows

    return RowSource(read, *source.shape)


def _open_npy(path: Path) -> dict[str, _Found]:
    matrix = np.load(path, mmap_mode="r", allow_pickle=False)

    def read(index: Index) -> Tensor:
        return torch.from_numpy(np.array(matrix[index if isinstance(index, slice) else index.numpy()], np.float32))

    return {path.stem: _Found(matrix.shape, matrix.dtype.kind == "f", read)}


def _open_safetensors(path: Path) -> dict[str, _Found]:
    with safe_open(path, "pt") as file:
        return {name: _of_tensor(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def _open_torch(path: Path) -> dict[str, _Found]:
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
    return {str(name): _of_tensor(value) for name, value in state.items() if isinstance(value, Tensor)}


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
