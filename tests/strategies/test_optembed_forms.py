"""``optembed``: what its search shows, adopts, saves and serves, within a budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcomp import BudgetError, ConfigError, OptEmbedConfig, TableSpec, from_pretrained, plan, save_pretrained
from embcomp.errors import InputError
from tests.strategies.test_optembed import make_tables, searching, some_ids

WIDE = {"user": 1000, "movie": 200, "flag": 7}
FORMS = [
    {"pruned": "zero"},
    {"pruned": "oov", "unseen": "oov_row"},
    {"pruned": "zero", "unseen": "oov_row", "rows": "int8:row"},
    {"pruned": "oov", "projection": "linear"},
    {"pruned": "zero", "projection": "linear", "rows": "int4:column"},
    {"search_dims": False},
    {"prune_rows": False},
]
candidates = st.tuples(*[st.integers(1, 8)] * 3)


def wide_tables(budget="25%", **options):
    return make_tables(WIDE, budget, dim=8, **options)


def serve_bytes(tables):
    return tables.memory().serve_bytes


def file_bytes(folder):
    """Bytes of the tensors in the file, without its header."""
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def falling_tables(budget, **options):
    """Tables whose ids are numbered by falling frequency, many of them equally rare."""
    sizes = {"user": 4000, "movie": 300, "flag": 7}
    counts = {name: (size / (1 + torch.arange(size))).long() + 1 for name, size in sizes.items()}
    return make_tables(sizes, budget, dim=16, counts=counts, **options)


# ---- candidates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, "8%", "25%"])
@pytest.mark.parametrize("form", [*FORMS[:2], FORMS[3]], ids=str)
@pytest.mark.parametrize("how", ["columns", "index", "tensor", "tensor of one row"])
def test_candidates_shown_on_copies_of_a_batch_are_what_each_is_when_adopted(budget, form, how):
    shown = [(8, 8, 8), (1, 1, 1), (2, 8, 5), (7, 1, 3)]
    tables = wide_tables(budget, **form)
    searching(tables, [0.5, 0.4, 0.3])
    ids = some_ids(tables, 300)
    if how == "index":
        ids = ids[:, 1]
    batches, table = torch.cat([ids] * len(shown)), {"columns": None, "index": 1}.get(how)
    if how.startswith("tensor"):
        table = torch.arange(3).expand_as(batches) if how == "tensor" else torch.arange(3)[None]
    tables.eval().show_(shown)
    together = tables(batches, table)
    for candidate, vectors in zip(shown, together.chunk(len(shown)), strict=True):
        alone = wide_tables(budget, **form).eval()
        searching(alone, [0.5, 0.4, 0.3])
        alone.adopt_(candidate)
        torch.testing.assert_close(vectors, alone(ids, 1 if how == "index" else None))
    with pytest.raises(InputError, match="4 candidates are shown"):
        tables(batches[:-1], table[:-1] if how == "tensor" else table)


@settings(deadline=None, max_examples=40)
@given(candidates, st.integers(7, 90), st.sampled_from(FORMS[:5]))
def test_what_is_adopted_fits_the_budget_and_uses_98_percent_of_it_where_something_is_left_out(widths, share, form):
    tables = wide_tables(f"{share}%", **form)
    searching(tables, [0.0, 0.0, 0.0])
    tables.adopt_(widths)
    allowed, used = tables.config.limit_bytes, serve_bytes(tables)
    assert used <= allowed
    opening = 4 * 8 * 8 + 12 * 16 if 0 in tables.config.num_kept.values() else 0  # a matrix and a remap for one row
    assert bool(tables.kept.all()) or used >= 0.98 * allowed - opening
    assert tables.config.dims == dict(zip(WIDE, widths, strict=True))


@pytest.mark.parametrize("budget", ["0.4%", "1%", "5%", "30%"])
@pytest.mark.parametrize("score", ["auto", "norm", "frequency"])
def test_bug_bits_for_ids_that_fall_in_frequency_take_a_small_budget(budget, score):
    tables = falling_tables(budget, score=score)
    searching(tables, [0.0, 0.0, 0.0])
    tables.adopt_((16, 16, 16))
    allowed = tables.config.limit_bytes
    assert 0.9 * allowed - 64 < serve_bytes(tables) <= allowed
    if budget in ("0.4%", "1%") and score != "norm":
        assert not any(tables.config.remapped.values())


@pytest.mark.parametrize("budget", ["5%", "30%"])
def test_bug_rows_of_equal_score_are_adopted_as_they_were_shown(budget):
    shown, ids = [(16, 16, 16), (4, 8, 16)], torch.arange(4000)
    tables = falling_tables(budget, score="frequency")
    searching(tables, [0.0, 0.0, 0.0])
    tables.eval().show_(shown)
    sizes = [tables.candidate_bytes(candidate) for candidate in shown]
    together = tables(torch.cat([ids] * 2), 0)
    for candidate, size, vectors in zip(shown, sizes, together.chunk(2), strict=True):
        alone = falling_tables(budget, score="frequency").eval()
        searching(alone, [0.0, 0.0, 0.0])
        alone.adopt_(candidate)
        assert serve_bytes(alone) == size
        torch.testing.assert_close(vectors, alone(ids, 0))


def test_bug_a_whole_table_that_is_looked_up_is_taken_for_copies_of_a_batch():
    tables = wide_tables("25%")
    searching(tables, [0.5, 0.4, 0.3])
    tables.show_([(8, 8, 8)] * 4)
    with pytest.raises(
        InputError, match=r"not as many copies of the same ones; look 4 copies.*leave evaluate_many out"
    ):
        tables(torch.arange(1000), 0)


@pytest.mark.parametrize("number", [1, 4, 8])
def test_rows_are_read_once_for_all_candidates(number):
    tables, read = wide_tables("25%"), []
    searching(tables, [0.5, 0.4, 0.3])
    tables.eval().show_([(8, 8, width) for width in range(1, number + 1)])
    tables.rows.register_forward_hook(lambda store, given, out: read.append(out.numel()))
    tables(torch.cat([some_ids(tables, 300)] * number))
    assert max(read) == 300 * 3 * 8
    assert sum(read) <= 300 * 3 * 8 + 3 * 8  # and shared rows


@pytest.mark.parametrize("constraint", ["shrink", "reject"])
@pytest.mark.parametrize("pruning", [True, False])
def test_constrained_searches_ask_for_widths_at_which_all_rows_that_the_supernet_keeps_can_stay(constraint, pruning):
    tables = wide_tables("40%", constraint=constraint, prune_rows=pruning, generations=3, projection="none")
    phases = searching(tables, [0.5, 0.4, 0.3] if pruning else None)
    norms = [part[:-1] for part in tables.rows.weight.abs().sum(1).split(tables.rows.segments)]
    thresholds = (0.5, 0.4, 0.3) if pruning else (0.0, 0.0, 0.0)
    wanted = [int((part > threshold).sum()) for part, threshold in zip(norms, thresholds, strict=True)]
    seen = []

    def evaluate():
        seen.append(tables._shown[0][0].tolist())
        return float(sum(seen[-1]))

    result = phases.search_(evaluate)
    per_row = [sum(w * n * 4 for w, n in zip(widths, wanted, strict=True)) for widths in seen]
    assert max(per_row) <= 0.4 * 4 * 8 * 1207
    assert result.num_evaluated == len(seen) > 5
    assert serve_bytes(tables) <= tables.config.limit_bytes
    if not pruning:
        assert bool(tables.kept.all())


def test_where_no_draw_fits_a_rejecting_search_begins_with_the_narrowest_fields():
    tables = wide_tables("8%", constraint="reject", generations=4, projection="none")
    result = searching(tables, [0.0, 0.0, 0.0]).search_(lambda: 0.5)
    assert result.candidate == (1, 1, 1)
    assert serve_bytes(tables) <= tables.config.limit_bytes


def test_a_search_that_begins_again_judges_rows_as_they_are_then():
    tables = wide_tables("25%")
    phases = searching(tables, [0.5, 0.4, 0.3])
    tables.show_([(8, 8, 8)])
    phases.enter_(phases.phases[0])  # broken off, and trained on
    with torch.no_grad():
        tables.rows.weight.copy_(tables.rows.weight.flip(0))
        tables.thresholds.fill_(0.2)
    phases.leave_(phases.phases[0])
    phases.enter_(phases.phases[1])
    tables.adopt_((8, 8, 8))
    norms = tables.rows.weight.abs().sum(1)[:1000]
    kept = tables.kept[:1000]
    assert 0 < kept.sum() < 1000
    assert norms[kept].min() >= norms[~kept].max()


# ---- serving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS[:5], ids=str)
@pytest.mark.parametrize("budget", [None, "100%", "60%"])
def test_bug_where_nothing_is_left_out_the_shared_rows_were_served_and_not_reported(form, budget, tmp_path):
    tables = wide_tables(budget, **form)
    ids, reported = some_ids(tables, 400), serve_bytes(tables)
    assert budget is None or reported <= tables.config.limit_bytes
    shown = tables.eval()(ids)
    served = tables.finalize()
    torch.testing.assert_close(served(ids), shown, atol=2e-5, rtol=1e-4)
    save_pretrained(served, tmp_path)
    assert file_bytes(tmp_path) == serve_bytes(served) == reported


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("budget", [None, "25%"])
def test_the_saved_file_has_as_many_bytes_as_reported_and_serves_what_evaluation_shows(form, budget, tmp_path):
    tables = wide_tables(budget, **form)
    phases = searching(tables, [0.5, 0.4, 0.3] if tables.config.prune_rows else None)
    if phases.phase.is_search:
        tables.adopt_((5, 3, 8) if tables.config.prune_rows else (2, 2, 2))
        tables.leave_phase_(phases.phase)
    ids, reported = some_ids(tables, 400), serve_bytes(tables)
    shown = tables.eval()(ids)
    assert budget is None or reported <= tables.config.limit_bytes
    served = tables.finalize()
    assert serve_bytes(served) == reported
    torch.testing.assert_close(served(ids), shown, atol=2e-5, rtol=1e-4)
    save_pretrained(served, tmp_path)
    assert file_bytes(tmp_path) == reported
    assert torch.equal(from_pretrained(tmp_path)(ids), served(ids))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_training_form_is_rebuilt_from_its_files_and_from_its_state_in_tables_of_the_first_plan(form, tmp_path):
    tables = wide_tables(**form)
    phases = searching(tables, [0.5, 0.4, 0.3] if tables.config.prune_rows else None)
    if phases.phase.is_search:
        tables.adopt_((5, 3, 8) if tables.config.prune_rows else (2, 2, 2))
        tables.leave_phase_(phases.phase)
    tables.eval()
    ids = some_ids(tables, 400)
    save_pretrained(tables, tmp_path)
    loaded, fresh = from_pretrained(tmp_path).eval(), wide_tables(**form).eval()
    assert fresh.config != tables.config
    fresh.load_state_dict(tables.state_dict())
    for other in (loaded, fresh):
        assert other.config == tables.config
        assert torch.equal(other(ids), tables(ids))
        assert serve_bytes(other) == serve_bytes(tables)
        torch.testing.assert_close(other.finalize()(ids), tables.finalize()(ids))


# ---- small budgets and small tables --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS[:4], ids=str)
def test_a_budget_below_the_smallest_form_says_what_the_smallest_is(form):
    specs = [TableSpec(name, size, 8) for name, size in WIDE.items()]
    config = OptEmbedConfig(**form)
    with pytest.raises(BudgetError) as error:
        plan(specs, config, "4B")
    smallest = plan(specs, config, f"{error.value.minimum_bytes}B")
    assert smallest.report.serve_bytes <= error.value.minimum_bytes
    with pytest.raises(BudgetError):
        plan(specs, config, f"{error.value.minimum_bytes - 1}B")


@pytest.mark.parametrize("form", FORMS[:4], ids=str)
@pytest.mark.parametrize("dim", [1, 3])
def test_fields_of_one_id_and_tables_of_one_dimension_go_all_the_way(form, dim):
    tables = make_tables({"one": 1, "user": 40, "two": 1}, "60%", dim=dim, generations=3, **form)
    phases = searching(tables, [0.1, 0.1, 0.1])
    values = iter(range(1000))
    result = phases.search_(lambda: float(next(values)))
    phases.leave_(phases.phase)
    assert all(1 <= width <= dim for width in result.candidate)
    assert serve_bytes(tables) <= tables.config.limit_bytes
    ids = torch.stack([torch.zeros(40, dtype=torch.long), torch.arange(40), torch.zeros(40, dtype=torch.long)], 1)
    torch.testing.assert_close(tables.finalize()(ids), tables.eval()(ids), atol=2e-5, rtol=1e-4)


def test_without_pruning_a_budget_below_one_value_per_row_is_refused_before_training():
    specs = [TableSpec(name, size, 8) for name, size in WIDE.items()]
    config = OptEmbedConfig(prune_rows=False, projection="none")
    assert set(plan(specs, config, "45%").config.dims.values()) == {3}
    with pytest.raises(BudgetError) as error:
        plan(specs, config, "12%")
    assert error.value.minimum_bytes - 4 * 1207 in range(29)  # spare values behind the last row
    tables = plan(specs, config, f"{error.value.minimum_bytes}B").build()
    tables_kept = tables.kept.clone()
    assert searching(tables).search_(lambda: 0.5).candidate == (1, 1, 1)
    assert torch.equal(tables.kept, tables_kept)
    assert bool(tables.kept.all())


def test_a_table_whose_rows_are_all_pruned_serves_zeros_or_its_shared_row():
    for pruned in ("zero", "oov"):
        tables = wide_tables(None, pruned=pruned)
        searching(tables, [99.0, 0.0, 0.0])
        tables.adopt_((8, 8, 8))
        vectors = tables.finalize()(torch.arange(1000), "user")
        shared = torch.zeros(8) if pruned == "zero" else tables.rows.weight[1000]
        assert torch.equal(vectors, shared.expand(1000, 8))
        assert tables.config.num_kept["user"] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm": 3}, "must be 1 or 2"),
        ({"mutation_probability": 0.0}, "above 0 and at most 1"),
        ({"decay": 1.0}, "must be below 1"),
        ({"generations": 0}, "generations=0"),
        ({"score": "nrm"}, "did you mean 'norm'"),
        ({"constraint": "prunes"}, "did you mean 'prune'"),
        ({"retrain_from": "zero"}, "initial"),
        ({"pruned": "oof"}, "did you mean 'oov'"),
        ({"rows": "int4:group8"}, "break up groups"),
    ],
)
def test_what_a_config_cannot_say(values, message):
    with pytest.raises(ConfigError, match=message):
        wide_tables(**values)


@pytest.mark.parametrize("budget", [None, "30%"])
def test_widths_of_ids_say_which_have_a_row_before_and_after_finalizing(budget):
    specs = [TableSpec("user", 200, 8), TableSpec("item", 30, 8)]
    counts = {"user": torch.arange(200) % 7, "item": torch.arange(30, 0, -1)}
    tables = plan(specs, OptEmbedConfig(), budget, counts).build()
    for name in tables.names:
        widths = tables.widths_of(name)
        assert torch.equal(tables.finalize().widths_of(name), widths)
        assert int((widths > 0).sum()) == tables.config.num_kept[name]
        assert set(widths.tolist()) <= {0, 8}
