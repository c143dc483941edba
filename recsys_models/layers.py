"""Building blocks that click models and session models share."""

from __future__ import annotations

from torch import nn

from embcomp.errors import ConfigError, did_you_mean

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}


def linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """A linear layer with Xavier-normal weights and zero biases, as BARS starts them."""
    layer = nn.Linear(in_features, out_features, bias)
    nn.init.xavier_normal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def activation_of(name: str) -> nn.Module:
    """Make an activation by name.

    Raises:
        ConfigError: if there is none of that name.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"no activation {name!r}; {did_you_mean(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def check_sizes(**sizes: int | None) -> None:
    """Raise `ConfigError` unless numbers of layers and widths are ints of at least 1, or None."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ConfigError(f"{name}={size!r}: must be an int of at least 1")


def check_dropout(dropout: float) -> float:
    """Return a probability of dropping units.

    Raises:
        ConfigError: if it is not in ``[0, 1)``.
    """
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout={dropout!r} must be in [0, 1)")
    return dropout
