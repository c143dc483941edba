"""Searches over a table group's form: they ask for candidates to be evaluated, and are told how good those are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

Candidate = tuple[int, ...]
"""A form that tables may take: one int per gene, such as the width of each field."""


class FrontPoint(NamedTuple):
    """A form on the way from the largest to the smallest.

    Attributes:
        candidate: the form.
        bytes: that it takes to serve.
        value: of the evaluation, higher being better.
    """

    candidate: Candidate
    bytes: int
    value: float


def candidate_of(genes: Iterable[Any], values: Sequence[Container[int]]) -> Candidate:
    """A candidate from a file.

    Raises:
        ValueError: if it has other genes than there are, or one has none of its values.
    """
    candidate = tuple(genes)
    if not all(type(gene) is int and gene in own for gene, own in zip(candidate, values, strict=True)):
        raise ValueError(f"{candidate} is no candidate of this search")
    return candidate


def number_of(value: Any) -> float:
    """The value of a candidate from a file.

    Raises:
        ValueError: if it is no finite number.
    """
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is the value of no candidate")
    return float(value)


class Search(ABC):
    """A search that a loop can drive, stop and resume: ``while candidates := search.ask(): search.tell(values)``.

    `ask` returns the same candidates until they are told of, so nothing is lost where an evaluation raises. Every
    candidate is asked for once.

    Attributes:
        known: candidate -> its value, higher being better, of all that were evaluated.
    """

    def __init__(self) -> None:
        self.known: dict[Candidate, float] = {}

    @abstractmethod
    def ask(self) -> list[Candidate]:
        """The candidates to evaluate next; none when the search is over."""

    @abstractmethod
    def tell(self, values: Sequence[float]) -> None:
        """Take the values of the candidates that `ask` returned, in order."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that is needed to go on, as JSON values."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            ValueError: if it is none of this search, which is as it was then; or `KeyError`, `TypeError` or
                `ArithmeticError`.
        """

    @property
    @abstractmethod
    def progress(self) -> tuple[int, int]:
        """Rounds done, and rounds there will be at most."""

    def best(self, number: int = 1) -> list[Candidate]:
        """The best candidates so far, best first; of equally good ones those that came first."""
        return sorted(self.known, key=lambda candidate: -self.known[candidate])[:number]

    def finalists(self, number: int) -> list[Candidate]:
        """The candidates that one is chosen from in the end, at most ``number``, the likeliest first."""
        return self.best(number)
