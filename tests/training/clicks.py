"""A plain click model with something to learn, its batches, and its compression by ``optembed``."""

import torch

import embcomp
from tests.examples.optembed_loop import ClickModel

SIZES = {"user": 300, "movie": 60, "hour": 7}
OPTIONS = {"generations": 5, "mutations": 5, "crossovers": 5, "parents": 6}


class WideModel(ClickModel):
    """With first-order weights: a second group of tables, of dimension 1."""

    def __init__(self, sizes, dim=8, hidden=16):
        super().__init__(sizes, dim, hidden)
        self.linear = torch.nn.ModuleDict({name: torch.nn.Embedding(size, 1) for name, size in sizes.items()})

    def forward(self, inputs):
        return super().forward(inputs) + sum(layer(inputs[name]) for name, layer in self.linear.items()).squeeze(-1)


def batches(number, size=128, seed=0):
    """Frequent ids are the small ones; every id pulls towards a click or away from it."""
    generator, found = torch.Generator().manual_seed(seed), []
    worth = {name: torch.randn(n, generator=torch.Generator().manual_seed(n)) * 3 for name, n in SIZES.items()}
    for _ in range(number):
        inputs = {name: (torch.rand(size, generator=generator) ** 2 * n).long() for name, n in SIZES.items()}
        odds = sum(worth[name][ids] for name, ids in inputs.items())
        found.append((inputs, (torch.rand(size, generator=generator) < odds.sigmoid()).float()))
    return found


def compressed(kind=ClickModel, budget="25%", strategy="optembed", **options):
    """The same model at every call, and what `compress_` returned."""
    torch.manual_seed(7)
    model = kind(SIZES)
    config = embcomp.make_config(strategy, **{**OPTIONS, **options} if strategy == "optembed" else options)
    return model, embcomp.compress_(model, config, budget, verbose=False)
