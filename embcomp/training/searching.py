"""Running a search: candidates are shown by the tables, evaluated by the user's callbacks, and the best is adopted."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from embcomp.errors import IncompatibleStateError, InputError
from embcomp.tables import EmbeddingTables
from embcomp.training.batch_norms import recalibrate_, recalibrated
from embcomp.training.search import Candidate, Search

Evaluate = Callable[[], float]
EvaluateMany = Callable[[int], Sequence[float]]
Report = Callable[[int, int, float], None]


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Attributes:
        candidate: the form that was adopted.
        value: its value, by ``evaluate``.
        num_evaluated: candidates that were evaluated.
    """

    candidate: Candidate
    value: float
    num_evaluated: int


@dataclass(frozen=True)
class SearchLoop:
    """How candidates are evaluated; arguments as those of `embcomp.training.Phases.search_`."""

    model: nn.Module
    evaluate: Evaluate
    evaluate_many: EvaluateMany | None = None
    recalibrate: Callable[[], None] | None = None
    at_once: int = 8
    num_finalists: int = 5
    report: Report | None = None

    def run(self, tables: EmbeddingTables, search: Search, checkpoint: Path | None = None) -> SearchResult:
        """Drive a search to its end, and let the tables adopt what it found."""
        if checkpoint is not None and checkpoint.is_file():
            _load(search, checkpoint)
        while candidates := search.ask():
            search.tell(self._values(tables, candidates))
            if checkpoint is not None:
                _save(search, checkpoint)
            if self.report is not None:
                self.report(*search.progress, max(search.known.values()))
        chosen, value = self._best(tables, search)
        tables.adopt_(chosen)
        if self.recalibrate is not None:  # what is adopted may be served as it is
            recalibrate_(self.model, self.recalibrate)
        return SearchResult(chosen, value, len(search.known))

    def _values(self, tables: EmbeddingTables, candidates: Sequence[Candidate]) -> list[float]:
        values: list[float] = []
        size = 1 if self.evaluate_many is None else self.at_once
        for start in range(0, len(candidates), size):
            shown = candidates[start : start + size]
            tables.show_(shown)
            found = [self.evaluate()] if self.evaluate_many is None else self.evaluate_many(len(shown))
            values += _checked(found, shown)
        return values

    def _best(self, tables: EmbeddingTables, search: Search) -> tuple[Candidate, float]:
        """The best of the finalists by the full evaluation, batch norms recalibrated for each."""
        if self.evaluate_many is None and self.recalibrate is None:
            chosen = search.finalists(1)[0]
            return chosen, search.known[chosen]
        values: dict[Candidate, float] = {}
        for candidate in search.finalists(self.num_finalists):
            tables.show_([candidate])
            with contextlib.nullcontext() if self.recalibrate is None else recalibrated(self.model, self.recalibrate):
                values.update(zip([candidate], _checked([self.evaluate()], [candidate]), strict=True))
        chosen = max(values, key=lambda candidate: values[candidate])
        return chosen, values[chosen]


def _checked(values: Any, candidates: Sequence[Candidate]) -> list[float]:
    try:
        values = list(values)
    except TypeError:
        raise InputError(f"evaluate_many returned {values!r}: return a list of a number for each candidate") from None
    if len(values) != len(candidates):
        raise InputError(
            f"evaluate_many returned {len(values)} values for the {len(candidates)} candidates from {candidates[0]} to "
            f"{candidates[-1]}: return a number for each of the copies of the batch that it is told of"
        )
    values = [value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for value in values]
    for value, candidate in zip(values, candidates, strict=True):
        if type(value) is bool or not isinstance(value, Real) or not math.isfinite(value):
            raise InputError(
                f"evaluate returned {value!r} for candidate {candidate}: return a finite number, higher being better. "
                "Finished rounds are kept: call search_ again to go on"
            )
    return [float(value) for value in values]


def _save(search: Search, path: Path) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(search.state()))
    os.replace(temporary, path)


def _load(search: Search, path: Path) -> None:
    try:
        search.load(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise IncompatibleStateError(f"{path} holds no state of this search ({error!r}): delete it") from error
