"""Building blocks of click models. Shapes: ``B`` batch, ``F`` fields, ``D`` embedding dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embcomp.errors import ConfigError
from recsys_models.layers import activation_of, check_dropout, linear


class MLP(nn.Sequential):
    """Hidden layers (linear, batch norm, activation, dropout), then a plain linear layer if ``out_features`` is given.

    Args:
        in_features: width of the input.
        hidden_units: widths of the hidden layers; may be empty.
        out_features: width of the last, linear layer; None for none.
        activation: one of `ACTIVATIONS`.
        dropout: probability in ``[0, 1)`` that a hidden unit is dropped.
        batch_norm: whether hidden layers are batch-normalized before the activation.

    Raises:
        ConfigError: if an option is out of range.
    """

    def __init__(
        self,
        in_features: int,
        hidden_units: Sequence[int],
        out_features: int | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        if any(units < 1 for units in hidden_units):
            raise ConfigError(f"hidden_units={list(hidden_units)}: every layer needs at least one unit")
        check_dropout(dropout)
        layers: list[nn.Module] = []
        for units in hidden_units:
            layers.append(linear(in_features, units))
            if batch_norm:
                layers.append(nn.BatchNorm1d(units))
            layers.append(activation_of(activation))
            if dropout:
                layers.append(nn.Dropout(dropout))
            in_features = units
        if out_features is not None:
            layers.append(linear(in_features, out_features))
            in_features = out_features
        super().__init__(*layers)
        self.out_features = in_features


class CrossNet(nn.Module):
    """Cross layers of DCN-V2 (arXiv 2008.13535): ``x_{l+1} = x_0 * (W_l x_l + b_l) + x_l``.

    Args:
        width: of input and output.
        num_layers: how many.
        rank: of the matrices, ``W_l = U_l V_l``; None for full.

    Raises:
        ConfigError: if there is no layer, or the rank is below 1 or above ``width``.
    """

    def __init__(self, width: int, num_layers: int, rank: int | None = None) -> None:
        super().__init__()
        if num_layers < 1:
            raise ConfigError(f"num_cross_layers={num_layers!r} must be at least 1")
        if rank is not None and not 1 <= rank <= width:
            raise ConfigError(f"cross_rank={rank!r} must be 1 to {width}, the width of the input, or None")
        self.layers = nn.ModuleList(
            linear(width, width)
            if rank is None
            else nn.Sequential(linear(width, rank, bias=False), linear(rank, width))
            for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Cross ``(B, width)`` to ``(B, width)``."""
        crossed = x
        for layer in self.layers:
            crossed = torch.addcmul(crossed, x, layer(crossed))
        return crossed


class DenseFactors(nn.Module):
    """Dense features as fields of a factorization machine: the vector of feature p is its value times a learned one.

    Args:
        num_dense: P.
        dim: width of the vectors.
    """

    def __init__(self, num_dense: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_dense, dim))
        nn.init.normal_(self.weight, 0.0, (2 / (1 + dim)) ** 0.5)  # Xavier, as for P linear layers from 1 to dim

    def forward(self, dense: Tensor) -> Tensor:
        """Turn ``(B, P)`` into ``(B, P, dim)``."""
        return dense.unsqueeze(-1) * self.weight


def pairwise_sum(factors: Tensor) -> Tensor:
    """Sum of the inner products of all pairs of fields, in O(F D).

    Args:
        factors: float ``(B, F, D)``.

    Returns:
        float ``(B,)``.
    """
    total = factors.sum(1)
    return 0.5 * ((total * total).sum(-1) - (factors * factors).sum((1, 2)))


class PairwiseDots(nn.Module):
    """Inner products of all pairs of fields: ``(B, F, D)`` to ``(B, F (F - 1) / 2)``, pairs in lexicographic order."""

    _pairs: Tensor

    def __init__(self, num_fields: int) -> None:
        super().__init__()
        first, second = torch.triu_indices(num_fields, num_fields, offset=1)
        self.register_buffer("_pairs", first * num_fields + second, persistent=False)
        self.out_features = num_fields * (num_fields - 1) // 2

    def forward(self, vectors: Tensor) -> Tensor:
        """Multiply every pair of fields."""
        return torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, self._pairs)
