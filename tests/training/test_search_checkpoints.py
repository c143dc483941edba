"""Searches that are killed and go on from a file, or from what they remember, and files that are not theirs."""

import contextlib
import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import embcomp
from embcomp._checkpoint import SEAL, sealed
from embcomp.errors import IncompatibleStateError, InputError, WriteError
from embcomp.training import Evolution, Phases
from embcomp.training.greedy import GreedyCut
from tests.examples.optembed_loop import ClickModel
from tests.training.clicks import SIZES, WideModel, batches, compressed
from tests.training.searched import Model, Sometimes, entered, value_of, whole_search

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


@pytest.mark.parametrize(
    "changed", [{"budget": "10%"}, {"constraint": "reject"}, {"score": "norm"}, {"seed": 9}, "weights"], ids=str
)
def test_bug_a_search_of_another_config_or_other_weights_is_refused(changed, tmp_path):
    def searching(**options):
        model, _ = compressed(**options)
        phases = Phases(model)
        phases.enter_(phases.phases[0])
        phases.leave_(phases.phases[0])
        phases.enter_(phases.phases[1])
        return phases

    file, rounds = tmp_path / "search.json", []

    def dying(*_):
        rounds.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searching().search_(lambda: 0.5, checkpoint=file, report=dying)
    options = {} if changed == "weights" else changed
    other = searching(**options)
    if changed == "weights":
        with torch.no_grad():
            next(other.model.mlp.parameters()).add_(1.0)
    with pytest.raises(IncompatibleStateError, match=r"search\.json holds no state of this search.*other weights"):
        other.search_(lambda: pytest.fail("evaluated"), checkpoint=file)
    assert searching().search_(lambda: 0.5, checkpoint=file).num_evaluated > 10


def test_bug_a_file_that_cannot_be_is_refused_before_anything_is_evaluated_and_folders_are_made(tmp_path):
    (tmp_path / "file").touch()
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "search.json", "its folder can't be made")):
        with pytest.raises(InputError, match=message) as error:
            entered().search_(lambda: pytest.fail("evaluated"), checkpoint=path)
        assert repr(str(path)) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    phases = entered()
    assert phases.search_(phases.model.value, checkpoint=tmp_path / "a" / "b" / "search.json") == whole_search()[0]


def test_a_file_that_is_kept_has_what_was_found_and_nothing_is_evaluated_again(tmp_path):
    file, phases = tmp_path / "search.json", entered()
    finalists = {}

    def evaluate():
        return finalists.setdefault(phases.model.tables.shown[0], float(len(finalists)))  # the last one wins

    found = phases.search_(evaluate, lambda number: [0.5] * number, checkpoint=file, keep_checkpoint=True)
    whole = file.read_text()
    for best in ([[0, 0, 0, 0], 0.5], [], 3, [found.candidate, "x"], [found.candidate, float("nan")]):
        file.write_text(json.dumps(sealed(json.loads(whole) | {"best": best}, allow_nan=True)))
        with pytest.raises(IncompatibleStateError, match="holds no state of this search"):
            entered().search_(lambda: pytest.fail("evaluated"), checkpoint=file)
    file.write_text(whole)
    assert (found.candidate, found.value, len(finalists)) == (list(finalists)[-1], 4.0, 5)
    again = entered()
    assert again.search_(lambda: pytest.fail("evaluated"), checkpoint=file) == found
    assert again.model.tables.adopted == found.candidate
    assert list(tmp_path.iterdir()) == []


# ---- damage --------------------------------------------------------------------------------------------------------


class Cut(Model):
    """A model whose search cuts greedily."""

    def __init__(self):
        super().__init__()
        self.tables.make_search = lambda: GreedyCut([(30, 9, 4, 0)] * 4, sum, limit=20)


def stopped(file, kind):
    """The text of a search that was stopped in its third round."""

    def report(*_, rounds=[]):  # noqa: B006
        rounds.append(1)
        if len(rounds) == 3:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        phases = entered(kind())
        phases.search_(phases.model.value, checkpoint=file, report=report)
    return file.read_text()


def searched(kind, file=None):
    """What a search found, and all that it knows in the end."""
    phases = entered(kind())
    search = phases.model.tables.make_search()
    phases.model.tables.make_search = lambda: search
    return phases.search_(phases.model.value, checkpoint=file), search.known


def is_as_if_whole_or_refused(file, kind):
    """Go on from a file, and say whether it was refused; what is found must be what the whole search finds."""
    try:
        found = searched(kind, file)
    except IncompatibleStateError:
        return False
    assert found == searched(kind)
    return True


@pytest.mark.parametrize("kind", [Model, Cut])
def test_bug_a_character_changed_anywhere_in_the_file_of_a_search_is_noticed(kind, tmp_path):
    """One digit more or less was gone on with, to a wrong front, or was an error from inside of the search."""
    file = tmp_path / "search.json"
    text = stopped(file, kind)
    assert is_as_if_whole_or_refused(file, kind)
    refused = 0
    for place in range(0, len(text), 7):
        file.write_text(text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :])
        refused += not is_as_if_whole_or_refused(file, kind)
    assert refused > 0.9 * len(text) / 7  # the last of 17 digits may change, and the name of the digest


@pytest.mark.parametrize("kind", [Model, Cut])
def test_files_from_before_there_was_a_digest_are_gone_on_with(kind, tmp_path):
    file = tmp_path / "search.json"
    state = json.loads(stopped(file, kind))
    del state[SEAL]
    file.write_text(json.dumps(state))
    assert is_as_if_whole_or_refused(file, kind)


ODD = (None, True, -1, 3, 10**30, 1.5, float("nan"), "x", [], {}, [[]], [[9, 9, 9, 9]])


def places(value, path=()):
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def put(value, path, new):
    if not path:
        return new
    changed = value.copy()
    changed[path[0]] = put(value[path[0]], path[1:], new)
    return changed


@pytest.mark.parametrize("new", ODD, ids=str)
@pytest.mark.parametrize("kind", [Model, Cut])
def test_bug_states_that_are_none_are_refused_and_nothing_else(kind, new, tmp_path):
    """A candidate that is none was a ValueError or KeyError from inside of the search, rounds later."""
    file, search, other = tmp_path / "search.json", kind().tables.make_search(), kind().tables.make_search()
    state = json.loads(stopped(file, kind))
    for path in list(places(state))[1:]:
        before = json.dumps(other.state())
        try:
            other.load(put(state, path, new))
        except (ValueError, KeyError, TypeError, ArithmeticError):
            assert json.dumps(other.state()) == before
            continue
        while candidates := other.ask():
            other.tell([value_of(candidate) for candidate in candidates])
        assert other.finalists(1)[0] in other.known
        other = kind().tables.make_search()
    search.load(state)


def test_bug_files_that_are_deeply_nested_are_refused(tmp_path):
    """They were a RecursionError."""
    file = tmp_path / "search.json"
    file.write_text("[" * 100_000)
    assert not is_as_if_whole_or_refused(file, Model)


# ---- real models ---------------------------------------------------------------------------------------------------


def after_a_supernet(kind, **options):
    """A model whose thresholds prune something, in its search phase, as a process that starts anew builds it."""
    model, handle = compressed(kind, **options)
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
    for kill_at in range(1, expected[2] + 1, 2 * number - 1 if fresh else 4):
        file, phases = tmp_path / "search.json", after_a_supernet(kind)
        with pytest.raises(KeyboardInterrupt):
            run_search(phases, kill_at, file)
        phases = after_a_supernet(kind) if fresh else phases
        assert run_search(phases, checkpoint=file)[:2] == expected[:2]
        assert list(tmp_path.iterdir()) == []


def shuffled(model, kill_at=0):
    """Recalibration on batches in an order of its own at every call; one of which is interrupted."""
    train, calls, random = batches(6, seed=6), [], np.random.default_rng()

    def recalibrate():
        calls.append(1)
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        for place in random.permutation(len(train)):
            model(train[place][0])

    return recalibrate, calls


def search_shuffled(phases, kill_at=0, checkpoint=None):
    """How often it evaluated, and how often it recalibrated."""
    evaluate, evaluated = log_loss_of(phases.model)
    recalibrate, recalibrated = shuffled(phases.model, kill_at)
    phases.search_(lambda: evaluate()[0], evaluate, recalibrate, checkpoint=checkpoint)
    return len(evaluated), len(recalibrated)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("kind", [ClickModel, WideModel])
def test_bug_a_search_interrupted_in_any_recalibration_goes_on_from_its_file(kind, fresh, tmp_path):
    (every, number), file = search_shuffled(after_a_supernet(kind)), tmp_path / "search.json"
    for kill_at in range(1, number + 1):
        phases = after_a_supernet(kind)
        with pytest.raises(KeyboardInterrupt):
            search_shuffled(phases, kill_at, file)
        phases = after_a_supernet(kind) if fresh else phases
        evaluated, _ = search_shuffled(phases, checkpoint=file)
        assert evaluated < every / 2  # no round again, finalists alone
        assert all(tables.memory().serve_bytes <= tables.config.limit_bytes for tables in phases.groups)
        assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_loses_no_round(tmp_path, monkeypatch):
    phases, (expected, calls) = entered(), whole_search()
    evaluate = Sometimes(phases.model, 0, None)

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("embcomp.training.searching.os.replace", full)
        with pytest.raises(WriteError, match=r"search\.json.*can't be written.*no space left"):
            phases.search_(evaluate, checkpoint=tmp_path / "search.json")
    assert phases.search_(evaluate, checkpoint=tmp_path / "search.json") == expected
    assert evaluate.calls == calls


def during_a_cut():
    """A trained-like ``nested`` model in its search phase."""
    model, _ = compressed(strategy="nested", budget="40%")
    phases = Phases(model)
    phases.enter_(phases.phases[1])
    return phases


@pytest.mark.parametrize("begun", [lambda: after_a_supernet(ClickModel), during_a_cut], ids=["optembed", "nested"])
def test_bug_a_search_that_raises_shows_no_candidates_any_more(begun):
    phases, seen = begun(), []
    model, (tables,) = phases.model.eval(), phases.groups
    before = {name: buffer.clone() for name, buffer in tables.named_buffers()}
    inputs = {name: torch.arange(8) % 7 for name in SIZES}

    def fail(number):
        if number == 1:  # of a cut, the largest form
            return [0.5]
        assert number == 8
        seen.append(model({name: ids.repeat(8) for name, ids in inputs.items()}))
        raise RuntimeError("out of memory")

    wanted = model(inputs)
    with pytest.raises(RuntimeError, match="out of memory"):
        phases.search_(lambda: 0.5, fail)
    assert seen[0].shape == (64,)
    torch.testing.assert_close(model(inputs), wanted, rtol=0, atol=0)
    assert model({name: ids[:3] for name, ids in inputs.items()}).shape == (3,)
    for name, buffer in tables.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0, msg=name)
    phases.release_()
    embcomp.finalize_(model)
    assert model({name: ids[:3] for name, ids in inputs.items()}).shape == (3,)
    assert float(tables.penalty()) == 0.0


def test_what_was_finalized_while_candidates_were_shown_is_served():
    tables = after_a_supernet(ClickModel).groups[0]
    ids = torch.arange(7)[:, None].expand(7, 3)
    shown, fixed = copy.deepcopy(tables), copy.deepcopy(tables)
    shown.show_([(8, 8, 8), (1, 2, 3)])
    fixed.leave_phase_(fixed.phases()[1])
    torch.testing.assert_close(shown.finalize_()(ids), fixed.finalize_()(ids), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"budget": "25%"}, {"budget": None}, {"budget": "25%", "rows": "int8"}], ids=str)
def test_reports_have_the_bytes_of_the_form_that_would_be_chosen(options):
    phases, reports = after_a_supernet(ClickModel, **options), []
    tables = phases.groups[0]
    evaluate, _ = log_loss_of(phases.model)
    phases.search_(lambda: evaluate()[0], report=lambda *told: reports.append(told))
    _, _, value, size = reports[-1]
    assert value == max(told[2] for told in reports)
    row = max(part.serve_bytes for part in tables.memory().parts) // 20
    assert tables.memory().serve_bytes - row <= size <= (tables.config.limit_bytes or size)
    if options["budget"] is None:
        assert size == tables.memory().serve_bytes


def test_reports_of_a_cut_follow_the_way_down():
    phases, reports = during_a_cut(), []
    evaluate, _ = log_loss_of(phases.model)
    phases.search_(lambda: evaluate()[0], report=lambda *told: reports.append(told))
    front, limit = phases.groups[0].pareto(), phases.groups[0].config.limit_bytes
    told = [(size, value) for _, _, value, size in reports]
    assert set(told) <= {(point.bytes, point.value) for point in front}
    assert told[-1][0] == max(point.bytes for point in front if point.bytes <= limit)


def test_while_one_group_is_searched_the_others_show_what_they_have_learned():
    phases = after_a_supernet(WideModel, projection="none")
    wide, narrow = phases.groups
    assert (wide.embedding_dim, narrow.embedding_dim) == (8, 1)
    ids, seen = torch.arange(300), []
    with torch.no_grad():
        rows = narrow.rows.weight[ids]
        shared = narrow.rows.weight[300]
        learned = torch.where(rows.abs() > narrow.thresholds[0], rows, shared)

    def evaluate():
        seen.append(narrow.eval()(ids, 0).detach())
        return 0.5

    phases.search_(evaluate)
    torch.testing.assert_close(seen[0], learned)


def test_groups_whose_search_is_over_are_not_evaluated_again(monkeypatch):
    phases = after_a_supernet(WideModel)
    wide, narrow = phases.groups
    alone = len(run_search_of(phases, narrow))
    phases = after_a_supernet(WideModel)
    wide, narrow = phases.groups
    monkeypatch.setattr(narrow, "show_", lambda candidates: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_search(phases)
    found = wide.config
    monkeypatch.undo()
    monkeypatch.setattr(wide, "show_", lambda candidates: pytest.fail("it was searched already"))
    assert run_search(phases)[2] == alone
    assert wide.config == found


def run_search_of(phases, tables):
    """The candidates of one of the groups that a search showed."""
    shown, show = [], tables.show_
    tables.show_ = lambda candidates: shown.append(candidates) or show(candidates)
    run_search(phases)
    return shown
