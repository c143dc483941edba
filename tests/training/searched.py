"""Tables that only remember what a search asks of them, in a model whose value is theirs."""

from torch import nn

import embcomp
from embcomp.strategies.full import FullConfig, FullTables
from embcomp.training import Evolution, Phase, Phases

GENERATIONS = 6


class Searched(FullTables):
    """Tables that remember what they are asked to show."""

    def phases(self):
        return (Phase("search", kind="search"),)

    def make_search(self):
        return Evolution([1] * 4, [30] * 4, GENERATIONS, num_mutations=5, num_crossovers=4)

    def show_(self, candidates):
        self.shown = list(candidates)

    def adopt_(self, candidate):
        self.adopted = candidate


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = Searched([embcomp.TableSpec("user", 5, 4)], FullConfig())
        self.norm, self.frozen = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
        self.train()
        self.frozen.eval()

    def value(self):
        """Higher for candidates near to (9, 18, 27, 4); none equals another by chance."""
        return value_of(self.tables.shown[0])


def value_of(candidate):
    return -sum((gene - wanted) ** 2 + gene / 100 for gene, wanted in zip(candidate, (9, 18, 27, 4), strict=True))


def entered(model=None):
    phases = Phases(model or Model())
    phases.enter_(phases.phases[0])
    return phases


def whole_search():
    phases, calls = entered(), []
    result = phases.search_(lambda: calls.append(1) or phases.model.value())
    return result, len(calls)


class Sometimes:
    """An evaluation that goes wrong once."""

    def __init__(self, model, at, bad):
        self.model, self.at, self.bad, self.calls = model, at, bad, 0

    def __call__(self):
        self.calls += 1
        if self.calls == self.at:
            self.wrong = self.model.tables.shown[0]
            if isinstance(self.bad, BaseException):
                raise self.bad
            return self.bad
        return self.model.value()
