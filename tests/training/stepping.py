"""Tables that replace the training step: by one on perturbed rows, as sharpness-aware minimization does."""

import torch

from embcomp.strategies.full import FullTables
from embcomp.training import Phase

RADIUS = 0.5


class SharpnessAware(FullTables):
    """The gradient is that of rows at a distance of `RADIUS`, in the direction in which the loss rises."""

    offset = None

    def lookup(self, ids, table):
        vectors = super().lookup(ids, table)
        return vectors if self.offset is None else vectors + self.offset[ids + self.pick(self._starts, table)]

    def training_loss(self, phase, step, predict, loss):
        [gradient] = torch.autograd.grad(step(predict, loss), [self.rows.weight])
        self.offset = RADIUS * gradient / gradient.norm()
        try:
            return step(predict, loss)
        finally:
            self.offset = None


class TwiceAlike(FullTables):
    """The mean of two steps, and how far apart their logits are: for dropout, which draws anew."""

    def training_loss(self, phase, step, predict, loss):
        seen = []

        def noting():
            seen.append(predict())
            return seen[-1]

        total = (step(noting, loss) + step(noting, loss)) / 2
        return total + (seen[0] - seen[-1]).square().mean()


class Silencing(FullTables):
    """Forgets the step that it is given."""

    def training_loss(self, phase, step, predict, loss):
        return loss(predict())


class Penalized(FullTables):
    """Has passes, a penalty, and no step of its own."""

    def phases(self):
        return (Phase("train", passes=("full", "half")),)

    def set_pass_(self, name):
        self.factor = {"full": 1.0, "half": 0.5}[name]

    def lookup(self, ids, table):
        return super().lookup(ids, table) * self.factor

    def penalty(self):
        return self.rows.weight.square().sum()
