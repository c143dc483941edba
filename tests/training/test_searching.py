"""Searches through `Phases.search_`: what is evaluated, evaluations that go wrong, and batch norms of the finalists."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from embcomp.errors import InputError
from tests.training.searched import GENERATIONS, Sometimes, entered, value_of, whole_search

# ---- a search ------------------------------------------------------------------------------------------------------


def test_what_is_found_is_the_best_of_all_that_was_shown_and_is_adopted():
    phases, seen, reports = entered(), {}, []

    def evaluate():
        (candidate,) = phases.model.tables.shown
        assert candidate not in seen
        seen[candidate] = phases.model.value()
        return seen[candidate]

    result = phases.search_(evaluate, report=lambda *values: reports.append(values))
    assert result.candidate == phases.model.tables.adopted == max(seen, key=seen.get)
    assert (result.value, result.num_evaluated) == (max(seen.values()), len(seen))
    assert [done for done, _, _, _ in reports] == [1, 2, 3, 4, 5, 6]
    assert {most for _, most, _, _ in reports} == {GENERATIONS}
    assert [best for _, _, best, _ in reports] == sorted(best for _, _, best, _ in reports)
    assert [size for _, _, _, size in reports] == [None] * 6  # these tables do not know


def test_many_at_once_are_at_most_as_many_as_said_and_finalists_are_compared_by_the_full_evaluation():
    phases, numbers, finalists = entered(), [], []

    def evaluate_many(number):
        assert number == len(phases.model.tables.shown)
        numbers.append(number)
        return [value_of(candidate) for candidate in phases.model.tables.shown]

    def evaluate():
        finalists.append(phases.model.tables.shown[0])
        return float(len(finalists))  # the last of them wins

    result = phases.search_(evaluate, evaluate_many, at_once=4, num_finalists=3)
    assert max(numbers) == 4
    assert sum(numbers) == result.num_evaluated
    assert len(finalists) == 3
    assert (result.candidate, result.value) == (finalists[-1], 3.0)
    assert result.candidate == phases.model.tables.adopted


# ---- evaluations that go wrong -------------------------------------------------------------------------------------

BAD = [float("nan"), float("inf"), -float("inf"), "0.5", None, True, [0.5], torch.ones(2), 1j]
TOO_LARGE = [(10**400, "a number"), (-(10**5000), "a negative number"), (Fraction(10**5000, 3), "a number")]


@pytest.mark.parametrize("kind", [torch.tensor, lambda value: torch.tensor([value]), np.float32])
def test_values_may_be_tensors_of_one_number(kind):
    def evaluate_with(kind):
        phases = entered()
        return phases.search_(lambda: kind(phases.model.value()))

    assert evaluate_with(kind) == evaluate_with(lambda value: float(np.float32(value)))


@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.parametrize("at", [1, 25])
def test_a_value_that_is_no_number_is_named_with_its_candidate_and_loses_nothing(bad, at):
    expected, phases = whole_search()[0], entered()
    evaluate = Sometimes(phases.model, at, bad)
    with pytest.raises(InputError, match="return a finite number") as error:
        phases.search_(evaluate)
    assert repr(bad) in str(error.value)
    assert str(evaluate.wrong) in str(error.value)
    assert phases.search_(evaluate) == expected


@pytest.mark.parametrize(("bad", "told"), TOO_LARGE, ids=["10**400", "-(10**5000)", "10**5000 / 3"])
def test_bug_a_value_beyond_float64_is_no_finite_number(bad, told):
    expected, phases = whole_search()[0], entered()
    evaluate = Sometimes(phases.model, 5, bad)
    with pytest.raises(InputError, match=f"evaluate returned {told} beyond float64 for candidate"):
        phases.search_(evaluate)
    assert phases.search_(evaluate) == expected


@pytest.mark.parametrize("name", ["at_once", "num_finalists"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "3"], ids=repr)
def test_bug_numbers_of_a_search_below_one_are_refused_before_anything_is_evaluated(name, value):
    with pytest.raises(InputError, match=rf"search_\({name}={value!r}\): must be an integer of at least 1"):
        entered().search_(lambda: pytest.fail("evaluated"), **{name: value})


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", [1, 25])
def test_an_evaluation_that_raises_loses_nothing_but_its_round(error, at):
    expected, calls = whole_search()
    phases = entered()
    evaluate = Sometimes(phases.model, at, error)
    with pytest.raises(type(error)):
        phases.search_(evaluate)
    assert not hasattr(phases.model.tables, "adopted")
    assert phases.search_(evaluate) == expected
    assert evaluate.calls <= calls + 9  # a round is of nine


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda values: values[:-1], ["8 values", "9 candidates"]),
        (lambda values: [*values, 0.5], ["10 values", "9 candidates"]),
        (lambda values: None, ["returned None"]),
        (lambda values: 0.5, ["returned 0.5"]),
        (lambda values: [*values[:-1], float("nan")], ["nan"]),
        (lambda values: ["0.5"] * len(values), ["'0.5'"]),
    ],
)
def test_many_values_that_are_no_list_of_numbers_are_named_and_lose_nothing(bad, words):
    phases, calls = entered(), []

    def good(number):
        return [value_of(candidate) for candidate in phases.model.tables.shown]

    def evaluate_many(number):
        calls.append(number)
        return bad(good(number)) if len(calls) == 3 else good(number)

    expected = entered().search_(lambda: 0.5, lambda number: [0.5] * number, at_once=9)
    with pytest.raises(InputError) as error:
        phases.search_(phases.model.value, evaluate_many, at_once=9)
    assert all(word in str(error.value) for word in words)
    result = phases.search_(phases.model.value, evaluate_many, at_once=9)
    assert result == whole_search()[0]
    assert result.num_evaluated >= expected.num_evaluated


def test_a_finalist_whose_evaluation_fails_loses_nothing():
    phases, calls = entered(), []

    def evaluate():
        calls.append(phases.model.tables.shown[0])
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return phases.model.value()

    def evaluate_many(number):
        return [value_of(candidate) for candidate in phases.model.tables.shown]

    with pytest.raises(RuntimeError):
        phases.search_(evaluate, evaluate_many)
    assert phases.search_(evaluate, lambda number: pytest.fail("all were evaluated")) == whole_search()[0]


# ---- batch norms ---------------------------------------------------------------------------------------------------


def test_bug_stale_batch_norm_statistics_finalists_have_their_own_and_the_models_come_back():
    phases, finalists = entered(), {}
    model = phases.model
    for number in (3.0, 5.0, 8.0):
        model.norm(torch.full((4, 1), number))
    model.frozen.running_mean.fill_(7.0)
    before = {name: b.clone() for name, b in model.named_buffers()}
    modes = {name: module.training for name, module in model.named_modules()}

    def same():
        return all(torch.equal(b, before[name]) for name, b in model.named_buffers())

    def recalibrate():
        for offset in (-1.0, 3.0):  # the mean over all batches, not a moving average
            model.norm(torch.full((4, 1), model.tables.shown[0][0] + offset))
            model.frozen(torch.full((4, 1), offset))

    def evaluate():
        candidate = model.tables.shown[0]
        assert not model.training
        assert not model.norm.training
        assert model.norm.running_mean.item() == pytest.approx(candidate[0] + 1)
        assert model.frozen.running_mean.item() == 7.0
        finalists[candidate] = -float(model.norm.running_mean)
        return finalists[candidate]

    def evaluate_many(number):
        assert same()
        return [value_of(candidate) for candidate in model.tables.shown]

    result = phases.search_(evaluate, evaluate_many, recalibrate, num_finalists=4)
    assert len(finalists) == 4
    assert result.candidate == max(finalists, key=finalists.get)
    assert model.norm.running_mean.item() == pytest.approx(result.candidate[0] + 1)  # what is adopted is served
    assert model.frozen.running_mean.item() == 7.0
    assert model.norm.momentum == 0.1
    assert modes == {name: module.training for name, module in model.named_modules()}


def test_a_recalibration_that_fails_leaves_the_models_statistics():
    phases = entered()
    model = phases.model
    model.norm(torch.full((4, 1), 3.0))
    before = {name: b.clone() for name, b in model.named_buffers()}

    def recalibrate():
        model.norm(torch.full((4, 1), 8.0))
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        phases.search_(model.value, recalibrate=recalibrate)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert model.training
    assert model.norm.training
    assert not model.frozen.training
