"""Training checkpoints: one safetensors file, tensors plus JSON in its header, replaced as a whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from embcomp._checkpoint import digest_of, sync, write_tensors
from embcomp.errors import IncompatibleStateError, WriteError

FILE_NAME = "checkpoint.safetensors"
VERSION = 1


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write a checkpoint; whenever the process dies, ``path`` holds the old one or the new one, complete.

    Args:
        path: of the file; its folder is created.
        tensors: by name, on any device.
        info: JSON values.

    Raises:
        WriteError: if it can't be written; the old one is whole then.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    copies, text = {name: to_cpu(tensor) for name, tensor in tensors.items()}, json.dumps(info)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(temporary, copies, {"version": str(VERSION), "info": text, "sha256": _digest(copies, text)})
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise WriteError(
            f"{path} can't be written ({error}): make room, or give another checkpoint_dir; training goes on from the "
            "last one that was"
        ) from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint.

    Returns:
        Tensors by name, on the CPU, and the JSON values.

    Raises:
        IncompatibleStateError: if the file is damaged or not a checkpoint of this version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise IncompatibleStateError(f"{path} is no readable checkpoint ({error}): delete it to start anew") from error
    if metadata.get("version") != str(VERSION) or "info" not in metadata:
        raise IncompatibleStateError(
            f"{path} is no training checkpoint of version {VERSION} (version {metadata.get('version')!r}): "
            "give another checkpoint_dir, or delete it to start anew"
        )
    if "sha256" in metadata and metadata["sha256"] != _digest(tensors, metadata["info"]):  # since it is written
        raise IncompatibleStateError(f"{path} is damaged: its SHA-256 is another. Delete it to start anew")
    return tensors, json.loads(metadata["info"])


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    return hashlib.sha256(f"{digest_of(tensors)} {text}".encode()).hexdigest()


def to_cpu(tensor: Tensor) -> Tensor:
    """An independent, contiguous copy on the CPU."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put ``prefix`` before every name."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the names that begin with ``prefix``, and take it off."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Turn nested dicts, lists and tensors into JSON values; tensors go to ``tensors``, under names below ``name``."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[key, pack(member, f"{name}.{key}", tensors)] for key, member in value.items()]}
    if isinstance(value, list | tuple):
        return [pack(member, f"{name}.{index}", tensors) for index, member in enumerate(value)]
    return value


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `pack`; tuples come back as lists."""
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {key: unpack(member, tensors) for key, member in value["items"]}
    if isinstance(value, list):
        return [unpack(member, tensors) for member in value]
    return value


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's global generators that training on ``device`` draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Undo `random_state`."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
