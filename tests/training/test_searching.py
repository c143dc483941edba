"""Searches through `Phases.search_`: bad evaluations, interruptions, checkpoints, and batch norms of the finalists."""

import json

import pytest
import torch
from torch import nn

import embcomp
from embcomp.errors import IncompatibleStateError, InputError
from embcomp.strategies.full import FullConfig, FullTables
from embcomp.training import Evolution, Phase, Phases
from tests.examples.optembed_loop import ClickModel
from tests.training.clicks import WideModel, batches, compressed

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
    assert [done for done, _, _ in reports] == [1, 2, 3, 4, 5, 6]
    assert {most for _, most, _ in reports} == {GENERATIONS}
    assert [best for _, _, best in reports] == sorted(best for _, _, best in reports)


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

BAD = [float("nan"), float("inf"), -float("inf"), "0.5", None, True, [0.5], torch.tensor(0.5), 1j]


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


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_killed_in_the_third_generation_and_started_again_ends_the_same(tmp_path):
    expected, calls = whole_search()
    file, killed = tmp_path / "search.json", entered()
    with pytest.raises(KeyboardInterrupt):
        killed.search_(Sometimes(killed.model, 2 * 9 + 4, KeyboardInterrupt()), checkpoint=file)
    assert json.loads(file.read_text())["generation"] == 2
    assert list(tmp_path.iterdir()) == [file]
    again = entered()
    evaluate = Sometimes(again.model, 0, None)
    assert again.search_(evaluate, checkpoint=file) == expected
    assert evaluate.calls == calls - 2 * 9
    assert list(tmp_path.iterdir()) == []


def foreign_states():
    other = Evolution([1] * 3, [30] * 3)
    other.tell([0.5] * len(other.ask()))
    return {
        "another search": json.dumps(other.state()),
        "other values": json.dumps(Evolution([1] * 4, [8] * 4).state()),
        "another kind of search": json.dumps({"known": [], "path": [], "slopes": []}),
        "half a file": json.dumps(other.state())[:100],
        "an empty file": "",
        "a list": "[1, 2]",
        "a number": "3",
        "bytes": "\udc80\udc81",
    }


@pytest.mark.parametrize("what", foreign_states())
def test_a_file_that_is_no_state_of_this_search_is_refused(what, tmp_path):
    file, phases = tmp_path / "search.json", entered()
    file.write_text(foreign_states()[what], errors="surrogateescape")
    with pytest.raises(IncompatibleStateError, match=r"search\.json holds no state of this search.*: delete it"):
        phases.search_(phases.model.value, checkpoint=file)
    file.unlink()
    assert phases.search_(phases.model.value, checkpoint=file) == whole_search()[0]


# ---- batch norms ---------------------------------------------------------------------------------------------------


def test_bug_stale_batch_norm_statistics_finalists_have_their_own_and_the_models_come_back():
    phases, finalists = entered(), {}
    model = phases.model
    for number in (3.0, 5.0, 8.0):
        model.norm(torch.full((4, 1), number))
    before = {name: b.clone() for name, b in model.named_buffers()}
    modes = {name: module.training for name, module in model.named_modules()}

    def same():
        return all(torch.equal(b, before[name]) for name, b in model.named_buffers())

    def recalibrate():
        for offset in (-1.0, 3.0):  # the mean over all batches, not a moving average
            model.norm(torch.full((4, 1), model.tables.shown[0][0] + offset))

    def evaluate():
        candidate = model.tables.shown[0]
        assert not model.training
        assert not model.norm.training
        assert model.norm.running_mean.item() == pytest.approx(candidate[0] + 1)
        assert torch.equal(model.frozen.running_mean, torch.zeros(1))
        finalists[candidate] = -float(model.norm.running_mean)
        return finalists[candidate]

    def evaluate_many(number):
        assert same()
        return [value_of(candidate) for candidate in model.tables.shown]

    result = phases.search_(evaluate, evaluate_many, recalibrate, num_finalists=4)
    assert len(finalists) == 4
    assert result.candidate == max(finalists, key=finalists.get)
    assert same()
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


# ---- real models ---------------------------------------------------------------------------------------------------


def after_a_supernet(kind):
    """A model whose thresholds prune something, in its search phase, as a process that starts anew builds it."""
    model, handle = compressed(kind, decay=0.01)
    phases = Phases(model)
    phases.enter_(phases.phases[0])
    torch.manual_seed(3)
    with torch.no_grad():
        for tables in handle.tables:
            norms = tables.rows.weight.abs().sum(1)
            tables.thresholds.fill_(norms.median().item())
    phases.leave_(phases.phases[0])
    phases.enter_(phases.phases[1])
    return phases


def log_loss_of(model, kill_at=0):
    data, calls = batches(2, seed=5), []

    def evaluate(number=1):
        calls.append(number)
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        model.eval()
        found = torch.zeros(number)
        with torch.no_grad():
            for inputs, labels in data:
                logits = model({name: ids.repeat(number) for name, ids in inputs.items()}).view(number, -1)
                found -= nn.functional.binary_cross_entropy_with_logits(
                    logits, labels.expand_as(logits), reduction="none"
                ).mean(1)
        return found.tolist()

    return evaluate, calls


def run_search(phases, kill_at=0, checkpoint=None):
    evaluate, calls = log_loss_of(phases.model, kill_at)
    train = batches(2, seed=6)
    result = phases.search_(
        lambda: evaluate()[0], evaluate, lambda: [phases.model(inputs) for inputs, _ in train], checkpoint=checkpoint
    )
    return result, [tables.config for tables in phases.groups], len(calls)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(("kind", "number"), [(ClickModel, 1), (WideModel, 2)])
def test_a_search_killed_anywhere_ends_as_if_it_had_not_been(kind, number, fresh, tmp_path):
    expected = run_search(after_a_supernet(kind))
    assert any(sum(c.num_kept.values()) < 367 for c in expected[1])
    for kill_at in range(1, expected[2] + 1, 1 if number == 1 else 3):
        file, phases = tmp_path / "search.json", after_a_supernet(kind)
        with pytest.raises(KeyboardInterrupt):
            run_search(phases, kill_at, file)
        phases = after_a_supernet(kind) if fresh else phases
        assert run_search(phases, checkpoint=file)[:2] == expected[:2]
        assert list(tmp_path.iterdir()) == []


def test_while_one_group_is_searched_the_others_show_what_they_have_learned():
    phases = after_a_supernet(WideModel)
    narrow, wide = sorted(phases.groups, key=lambda tables: tables.embedding_dim)
    ids, seen = torch.arange(300), []
    with torch.no_grad():
        rows = narrow.rows.weight[ids]
        shared = narrow.rows.weight[300]
        learned = torch.where(rows.abs() > narrow.thresholds[0], rows, shared)

    def evaluate():
        seen.append(narrow.eval()(ids, 0).detach())
        return 0.5

    first = phases.groups[0] is wide
    phases.search_(evaluate)
    assert first
    torch.testing.assert_close(seen[0], learned)
