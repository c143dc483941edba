"""A plain click model, and a loop of plain PyTorch that takes it through the phases of ``optembed``, or any strategy.

model = ClickModel({"user": 6040, "movie": 3706, "hour": 24})
embcomp.compress_(model, "optembed", budget="25%")
train(model, train_batches, validation)
embcomp.finalize_(model)
"""

from functools import partial
from itertools import cycle, starmap

import torch
import torch.nn.functional as F
from torch import nn

from embcomp.training import Phases


class ClickModel(nn.Module):
    def __init__(self, sizes, dim=8, hidden=16):
        super().__init__()
        self.embeddings = nn.ModuleDict({name: nn.Embedding(size, dim) for name, size in sizes.items()})
        for layer in self.embeddings.values():
            nn.init.normal_(layer.weight, std=0.1)
        width = len(sizes) * dim
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, inputs):
        return self.mlp(torch.cat([layer(inputs[name]) for name, layer in self.embeddings.items()], -1)).squeeze(-1)


def train(model, train_batches, validation_batches, epochs=3, learning_rate=0.02, checkpoint=None):
    """Batches are pairs of inputs and labels; ``checkpoint`` is a file that an interrupted search goes on from."""
    phases, validation = Phases(model), cycle(validation_batches)

    def parts(inputs, labels):
        return partial(model, inputs), partial(F.binary_cross_entropy_with_logits, target=labels)

    @torch.no_grad()
    def quality():
        model.eval()
        losses = [loss(predict()) for predict, loss in starmap(parts, validation_batches)]
        return -float(sum(losses))

    def run_on_train_batches():
        for inputs, _ in train_batches:
            model(inputs)

    for phase in phases:
        phases.enter_(phase)
        if phase.is_search:
            phases.search_(quality, recalibrate=run_on_train_batches, checkpoint=checkpoint)
        else:
            optimizer = torch.optim.Adam(phases.parameters(), learning_rate)
            for _ in range(phase.epochs or epochs):
                model.train()
                for batch in train_batches:
                    optimizer.zero_grad()
                    phases.loss(*parts(*batch)).backward()
                    optimizer.step()
                    phases.step_()
                    if phase.bilevel:
                        phases.architecture_step_(*parts(*next(validation)))
        phases.leave_(phase)
    return phases
