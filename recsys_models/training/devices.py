"""Where training takes place."""

from __future__ import annotations

import torch

from embcomp.errors import ConfigError


def device_named(name: str) -> torch.device:
    """The device of a config.

    Raises:
        ConfigError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"TrainingConfig(device={name!r}): write 'auto', 'cpu', 'cuda' or 'cuda:1'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"TrainingConfig(device={name!r}): no CUDA device is there; write 'auto' or 'cpu'")
    return device
