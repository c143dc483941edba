"""Running a search: candidates are shown by the tables, evaluated by the user's callbacks, and the best is adopted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Rational, Real
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from embcomp._checkpoint import SEAL, digest_of, sealed, sync
from embcomp.errors import IncompatibleStateError, InputError, WriteError
from embcomp.specs import as_int
from embcomp.training.batch_norms import recalibrate_, recalibrated
from embcomp.training.search import Candidate, Search, number_of

Evaluate = Callable[[], float]
EvaluateMany = Callable[[int], Sequence[float]]
Report = Callable[[int, int, float, int | None], None]


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Attributes:
        candidate: the form that was adopted.
        value: its value, by ``evaluate``; strategies that then give back what still fits, as ``nested``, serve a little
            more than that.
        num_evaluated: candidates that were evaluated.
    """

    candidate: Candidate
    value: float
    num_evaluated: int


class Searched(Protocol):
    """What is searched: a group of tables, or several that are searched together; see `embcomp.EmbeddingTables`."""

    built_config: Any

    def show_(self, candidates: Sequence[Candidate]) -> None:
        """Let lookups show candidates."""

    def hide_(self) -> None:
        """Show no candidates any more."""

    def candidate_bytes(self, candidate: Candidate) -> int | None:
        """Serve bytes of a candidate."""

    def adopt_(self, candidate: Candidate) -> None:
        """Take the form that was chosen."""


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

    def __post_init__(self) -> None:
        for name in ("at_once", "num_finalists"):
            value = as_int(getattr(self, name))
            if value is None or value < 1:
                raise InputError(f"search_({name}={getattr(self, name)!r}): must be an integer of at least 1")

    def run(self, tables: Searched, search: Search, checkpoint: Path | None = None) -> SearchResult:
        """Drive a search to its end, and let the tables adopt what it found."""
        owner = "" if checkpoint is None else _owner(self.model, tables)
        best = None if checkpoint is None or not checkpoint.is_file() else _load(search, checkpoint, owner)
        try:
            while candidates := search.ask():
                search.tell(self._values(tables, candidates))
                _save(search, checkpoint, owner)
                self._tell(tables, search)
                best = None
            chosen, value = best or self._best(tables, search)
            _save(search, checkpoint, owner, (chosen, value))
        finally:
            tables.hide_()
        tables.adopt_(chosen)
        if self.recalibrate is not None:  # what is adopted may be served as it is
            recalibrate_(self.model, self.recalibrate)
        return SearchResult(chosen, value, len(search.known))

    def _tell(self, tables: Searched, search: Search) -> None:
        if self.report is not None:
            [chosen] = search.finalists(1)
            self.report(*search.progress, search.known[chosen], tables.candidate_bytes(chosen))

    def _values(self, tables: Searched, candidates: Sequence[Candidate]) -> list[float]:
        values: list[float] = []
        size = 1 if self.evaluate_many is None else self.at_once
        for start in range(0, len(candidates), size):
            shown = candidates[start : start + size]
            tables.show_(shown)
            found = [self.evaluate()] if self.evaluate_many is None else self.evaluate_many(len(shown))
            values += _checked(found, shown)
        return values

    def _best(self, tables: Searched, search: Search) -> tuple[Candidate, float]:
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
        if type(value) is bool or not isinstance(value, Real) or not _is_finite(value):
            raise InputError(
                f"evaluate returned {_shortened(value)} for candidate {candidate}: return a finite number, higher "
                "being better. Finished rounds are kept: call search_ again to go on"
            )
    return [float(value) for value in values]


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer or a fraction beyond float64
        return False


def _shortened(value: Any) -> str:
    """A value for a message; of integers that are too long to be written out, that they are."""
    if isinstance(value, Rational) and not _is_finite(value):
        return f"{'a negative' if value < 0 else 'a'} number beyond float64"
    return repr(value)


# ---- files of searches -----------------------------------------------------------------------------------------------


def search_files(checkpoint: str | Path, number: int) -> list[Path]:
    """The files that searches of several groups are saved to, each beside the first, ``checkpoint``."""
    path = Path(checkpoint)
    return [path, *(path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(1, number))]


def make_folder(checkpoint: Path) -> None:
    """Make the folder of a search's file.

    Raises:
        InputError: if that can't be, or a folder is where the file should be.
    """
    if checkpoint.is_dir():
        raise InputError(f"search_(checkpoint={str(checkpoint)!r}) is a folder: give the name of a file in it")
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"search_(checkpoint={str(checkpoint)!r}): its folder can't be made ({error})") from error


def _owner(model: nn.Module, tables: Searched) -> str:
    """Digest of what values of candidates depend on: the parameters, and the config of the tables.

    Not of buffers: a search changes them, the statistics of batch norms too.
    """
    weights = digest_of({name: tensor.detach().cpu() for name, tensor in model.named_parameters()})
    return hashlib.sha256(f"{tables.built_config!r} {weights}".encode()).hexdigest()


def _save(search: Search, path: Path | None, owner: str, best: tuple[Candidate, float] | None = None) -> None:
    """Write a search's state whole; when it is over, also the best, so that finalists are not compared again.

    Raises:
        WriteError: if it can't be written; what was written before is whole then.
    """
    if path is None:
        return
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        state = {**search.state(), "owner": owner, "best": best}
        temporary.write_text(json.dumps(sealed(state, allow_nan=True)))  # what a step costs may be infinite
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise WriteError(
            f"search_(checkpoint={str(path)!r}) can't be written ({error}): make room, or give another file; rounds so "
            "far are kept in memory: call search_ again to go on"
        ) from error


def _load(search: Search, path: Path, owner: str) -> tuple[Candidate, float] | None:
    """Go on from a file; return the best candidate and its value, if the search is over."""
    try:
        state = json.loads(path.read_text())
        if SEAL in state and sealed(state, allow_nan=True)[SEAL] != state[SEAL]:  # older files have none
            raise ValueError("it was changed since it was written")
        if state["owner"] != owner:
            raise ValueError("it is of other weights, or of another config of the tables")
        search.load(state)
        best = state.get("best")
        if best is None:
            return None
        genes, value = best
        finalists = search.finalists(len(search.known)) if search.known else []
        chosen, value = finalists[finalists.index(tuple(genes))], number_of(value)
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise IncompatibleStateError(f"{path} holds no state of this search ({error!r}): delete it") from error
    return chosen, value
