"""The files of a checkpoint: written so that none is ever half there, and read with every doubt checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import reprlib
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from embcomp.errors import IncompatibleStateError, WriteError

logger = logging.getLogger(__name__)

CONFIG = "embcomp_config.json"
FORMAT = "embcomp"
FORMAT_VERSION = 3
"""Of checkpoints with the state of training; others are of version 2, which older readers know."""
SEAL = "config_sha256"
"""The key of the digest of all else in the config; there from format version 2 on."""
TEMPORARY = ".embcomp-"
EXPORTING = f"{TEMPORARY}export-"
"""What names of folders begin with in which exports are made."""
_WEIGHTS = re.compile(r"model-([0-9a-f]{16})\.safetensors")
_EXPORTING = re.compile(re.escape(EXPORTING) + r"[a-z0-9_]{8}")
_UNFINISHED = re.compile(re.escape(TEMPORARY) + r"[0-9]+-[0-9a-f]{8}")
_READS = 10
"""How often a checkpoint is read, while other processes replace it, before it is taken for one that lacks a file."""
LEFT_OVER = 3600
"""Seconds after which a file that no config names is taken for what a killed save left behind."""

_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Checkpoint:
    """What was read from a folder.

    Attributes:
        config_file: the JSON file.
        weights_file: the safetensors file.
        content: the JSON object.
        tensors: every tensor of the state dict, on the CPU; those that share memory are one object.
        training_tensors: those of optimizers and phases, by the names that the JSON object has for them.
    """

    config_file: Path
    weights_file: Path
    content: dict[str, Any]
    tensors: dict[str, Tensor]
    training_tensors: dict[str, Tensor]

    def get(self, key: str, kind: type[_Kind]) -> _Kind:
        """A value of the JSON object, of the right type."""
        return get(self.content, key, kind, self.config_file)

    @property
    def digest(self) -> str:
        """The SHA-256 of the config, which has that of the weights."""
        return sealed(self.content)[SEAL]


def write_checkpoint(folder: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> Path:
    """Write weights, then the config that names them, then the card.

    The config's replacement is the one moment at which the old checkpoint becomes the new one. The old one's card goes
    before that, so that no card is ever beside a checkpoint of which it does not speak.

    Raises:
        WriteError: if a file can't be written; the older checkpoint is there then, or the new one, whole.
    """
    from embcomp import __version__

    temporary = folder / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(temporary, tensors, {"format": "pt"})
        sync(temporary)
        digest, size = _digest(temporary), temporary.stat().st_size
        weights = folder / f"model-{digest[:16]}.safetensors"
        os.replace(temporary, weights)
        sync(folder)
        version = FORMAT_VERSION if "training" in content else FORMAT_VERSION - 1
        head = {"format": FORMAT, "format_version": version, "embcomp_version": __version__}
        named = {"weights": {"file": weights.name, "bytes": size, "sha256": digest}}
        text = json.dumps(sealed(head | named | dict(content)), indent=2, allow_nan=False)
        older = _named_weights(folder)
        _write_text(temporary, text + "\n")
        has_own_card = _make_room(folder / "README.md", card)
        _replace(folder / CONFIG, temporary)
        if has_own_card:
            _write_text(temporary, card)
            _replace(folder / "README.md", temporary)
        _remove_older(folder, weights.name, older)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{folder} can't be written ({error}): make room, or choose a folder that can") from error
    finally:
        with contextlib.suppress(OSError):  # where there is no folder, there is none to remove it from
            temporary.unlink()
    return folder


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that whoever may read other files of the folder can read.

    safetensors lets nobody but the owner read what it writes: who trains could not write for who serves.
    """
    file.touch()
    mode = file.stat().st_mode
    safetensors.torch.save_file(dict(tensors), file, dict(metadata))
    file.chmod(mode)


def sealed(content: Mapping[str, Any], allow_nan: bool = False) -> dict[str, Any]:
    """The content of a config, or of a file like it, with the digest that tells whether any of it was changed."""
    plain = {key: value for key, value in content.items() if key != SEAL}
    text = json.dumps(plain, separators=(",", ":"), allow_nan=allow_nan)
    return plain | {SEAL: hashlib.sha256(text.encode()).hexdigest()}


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and check a checkpoint.

    Another process that saves meanwhile removes the weights of the config that was read: then it is read again.

    Raises:
        IncompatibleStateError: if it is missing, corrupt, truncated, foreign or from the future.
    """
    config_file = folder / CONFIG
    for _ in range(_READS):
        content = read_config(config_file)
        file = _weights_file(config_file, content)
        try:
            return _read(config_file, file, content)
        except FileNotFoundError as error:
            missing = error
            if not file.is_file() and read_config(config_file) == content:
                break
    raise IncompatibleStateError(f"{file} is missing, which {CONFIG} beside it names: copy it too") from missing


def _weights_file(config_file: Path, content: Mapping[str, Any]) -> Path:
    name = get(get(content, "weights", dict, config_file), "file", str, config_file)
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise IncompatibleStateError(f"{config_file}: weights file {name!r} must be a .safetensors file of the folder")
    return config_file.parent / name


def _read(config_file: Path, file: Path, content: dict[str, Any]) -> Checkpoint:
    """Read the weights of a config; `FileNotFoundError` says that they are not there."""
    weights = get(content, "weights", dict, config_file)
    size, digest = get(weights, "bytes", int, config_file), get(weights, "sha256", str, config_file)
    try:
        _check_weights(file, size, digest)
        tensors = {name: _own_if_empty(tensor) for name, tensor in safetensors.torch.load_file(file).items()}
    except FileNotFoundError:
        raise
    except SafetensorError as error:
        raise IncompatibleStateError(f"{file} is not a safetensors file: {error}") from error
    except OSError as error:
        raise IncompatibleStateError(f"{file} can't be read: {error}") from error
    for name, same in get(content, "aliases", dict, config_file).items():
        if not isinstance(same, str) or same not in tensors:
            raise IncompatibleStateError(f"{config_file}: {name!r} is said to equal {same!r}, which {file} lacks")
        tensors[name] = tensors[same]
    kept = _training_tensors(config_file, content)
    if missing := kept - tensors.keys():
        raise IncompatibleStateError(f"{file} lacks {min(missing)!r}, state of training that {CONFIG} names")
    own = {name: tensor for name, tensor in tensors.items() if name not in kept}
    return Checkpoint(config_file, file, content, own, {name: tensors[name] for name in kept})


def _own_if_empty(tensor: Tensor) -> Tensor:
    """Empty tensors without an address: safetensors' storages have one, from which torch.export subtracts their 0."""
    return tensor if tensor.numel() else torch.empty(tensor.shape, dtype=tensor.dtype)


def _training_tensors(config_file: Path, content: dict[str, Any]) -> set[str]:
    """Names of the tensors that are none of the model's, but of its training."""
    training = get({"training": {"optimizers": []}} | content, "training", dict, config_file)
    places = [
        get(raw, "tensors", dict, config_file)
        for optimizer in get(training, "optimizers", list, config_file)
        for group in get(optimizer, "groups", list, config_file)
        for raw in get(group, "parameters", dict, config_file).values()
    ]
    if "phase" in training:
        places.append(get(training["phase"], "initial", dict, config_file))
    return {get(own, key, str, config_file) for own in places for key in own}


def get(content: Any, key: str, kind: type[_Kind], file: Path) -> _Kind:
    """A value of a JSON object.

    Raises:
        IncompatibleStateError: if it is not there or of another type.
    """
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise IncompatibleStateError(f"{file}: {key!r} must be a {kind.__name__}, found {reprlib.repr(value)}")
    return value


def read_config(file: Path) -> dict[str, Any]:
    """Read the JSON file of a checkpoint.

    Raises:
        IncompatibleStateError: if it is missing, corrupt, foreign or from the future.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IncompatibleStateError(
            f"{file} does not exist: give a folder that save_pretrained has written"
        ) from error
    except OSError as error:
        raise IncompatibleStateError(f"{file} can't be read: {error}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers of thousands of digits
        raise IncompatibleStateError(f"{file} is not JSON, so it is corrupt or foreign: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise IncompatibleStateError(f"{file} is foreign: the config of an embcomp checkpoint has 'format': {FORMAT!r}")
    version = get(content, "format_version", int, file)
    if not 1 <= version <= FORMAT_VERSION:
        raise IncompatibleStateError(
            f"{file} has format version {version}, written by embcomp {content.get('embcomp_version')}; this one reads "
            f"versions up to {FORMAT_VERSION}: upgrade embcomp"
        )
    if (version > 1 or SEAL in content) and sealed(content)[SEAL] != get(content, SEAL, str, file):
        raise IncompatibleStateError(f"{file} was changed since it was written: its {SEAL} is that of another content")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _check_weights(file: Path, size: int, digest: str) -> None:
    if not file.is_file():
        raise FileNotFoundError(file)
    found = file.stat().st_size
    if found != size:
        raise IncompatibleStateError(f"{file} is truncated or not the saved file: it has {found} B, expected {size} B")
    if (sha256 := _digest(file)) != digest:
        raise IncompatibleStateError(f"{file} is corrupt: its SHA-256 is {sha256}, expected {digest}")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors on the CPU, whatever their order: of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, last through a power cut."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows has no handle on folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    sync(file)


def _replace(file: Path, temporary: Path) -> None:
    os.replace(temporary, file)
    sync(file.parent)


def _make_room(file: Path, card: str) -> bool:
    """Remove the card of an older checkpoint; say whether a new one may be written: not over somebody else's README."""
    if not os.path.lexists(file):
        return True
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # a folder, a link to nowhere, or what may not be read
        return False
    if not text.startswith(card.split("\n", 1)[0]):
        return False
    file.unlink()
    sync(file.parent)
    return True


def _named_weights(folder: Path) -> str | None:
    """The weights file of the checkpoint that is about to be replaced."""
    try:
        return get(get(read_config(folder / CONFIG), "weights", dict, folder), "file", str, folder)
    except IncompatibleStateError:
        return None


def _remove_older(folder: Path, keep: str, older: str | None) -> None:
    """Remove the weights that were replaced, and what killed saves and exports left; a save never fails by it."""
    try:
        for path in folder.iterdir():
            if path.name != keep:
                _remove_own(path, is_replaced=path.name == older)
    except OSError as error:
        logger.warning("%s can't be cleaned of what killed saves may have left: %s", folder, error)


def _remove_own(path: Path, is_replaced: bool) -> None:
    """Remove a file or folder if it was made here beyond doubt, and no save or export can need it any more."""
    try:
        if not _is_own(path, is_replaced):
            return
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s is of no use any more, and can't be removed: %s", path, error)


def _is_own(path: Path, is_replaced: bool) -> bool:
    if path.is_symlink():
        return False
    if path.is_dir():
        return bool(_EXPORTING.fullmatch(path.name)) and all(map(_is_old, [path, *path.rglob("*")]))
    match = _WEIGHTS.fullmatch(path.name)
    if match is None:
        return bool(_UNFINISHED.fullmatch(path.name)) and _is_old(path)
    # Whatever else has such a name is not called after its own content.
    return is_replaced or (_is_old(path) and _digest(path).startswith(match[1]))


def _is_old(path: Path) -> bool:
    return path.lstat().st_mtime < time.time() - LEFT_OVER
