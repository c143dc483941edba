"""Optimizers that are made of others."""

import torch


class Wrapping(torch.optim.Optimizer):
    """Hands steps on to another optimizer, where the state is, and which knows of it."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = [inner]
        inner.outer = self

    def step(self):
        self.inner[0].step()
