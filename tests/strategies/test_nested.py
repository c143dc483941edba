"""The mathematics of ``nested``: what passes show, what the cut chooses, and where a budget stops it."""

import pytest
import torch

from embcomp import (
    BudgetError,
    ConfigError,
    IncompatibleStateError,
    NestedConfig,
    TableSpec,
    build_tables,
    load_tables,
    plan,
    save_pretrained,
)
from embcomp.strategies._layouts import layout_bytes, parse_layout
from embcomp.training import Phases

SPECS = [TableSpec("user", 300, 8, init_std=1.0), TableSpec("item", 40, 8, init_std=1.0), TableSpec("flag", 3, 8)]
COUNTS = {spec.name: torch.arange(spec.num_embeddings, 0, -1) for spec in SPECS}
ZIPF = {spec.name: (10**4 / (1 + torch.arange(spec.num_embeddings))).long() + 1 for spec in SPECS}


def build(budget=None, counts=COUNTS, specs=SPECS, **options):
    return plan(specs, NestedConfig(**options), budget, counts).build()


def ids(rows=64):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(spec.num_embeddings, (rows,), generator=generator) for spec in SPECS], 1)


class Model(torch.nn.Module):
    def __init__(self, tables):
        super().__init__()
        self.tables = tables
        self.last = torch.nn.Linear(24, 1)

    def forward(self, ids):
        return self.last(self.tables(ids).flatten(1)).squeeze(1)


def cut(tables, worth=(1.0, 1.0, 1.0), evaluate=None):
    """Go through the phases, with an evaluation that likes the tables' first values best, or another one."""
    model = Model(tables)
    phases = Phases(model)
    weights = torch.tensor(worth)

    def values_shown():
        shown = tables.rows.weight.new_tensor(0.0)
        with torch.no_grad():
            vectors = tables(ids())
            shown = (vectors.square().sum(-1) * weights).sum()
        return float(shown)

    for phase in phases:
        phases.enter_(phase)
        if phase.is_search:
            phases.search_(evaluate or values_shown)
        phases.leave_(phase)
    return tables


# ---- passes ----------------------------------------------------------------------------------------------------------


def in_training(**options):
    tables = build(projection="none", **options)
    tables.enter_phase_(tables.phases()[0])
    return tables.train()


def test_passes_are_those_of_the_sandwich_rule():
    tables = build()
    assert tables.phases()[0].passes == ("full", "random", "narrow")
    assert [phase.name for phase in tables.phases()] == ["train", "cut"]
    assert [phase.rewind for phase in build(retrain="initial").phases()] == [False, False, True]


def test_the_full_pass_shows_whole_rows_and_the_narrow_one_the_first_value():
    tables = in_training()
    rows = tables.rows(ids() + tables._starts, None)
    tables.set_pass_("full")
    assert torch.equal(tables(ids()), rows)
    tables.set_pass_("narrow")
    narrow = tables(ids())
    assert torch.equal(narrow[..., 0], rows[..., 0])
    assert not narrow[..., 1:].any()


def test_random_passes_draw_one_width_per_table_and_batch_from_the_ladder():
    tables, seen = in_training(ladder="2,4,8"), [set(), set(), set()]
    torch.manual_seed(0)
    for _ in range(60):
        tables.set_pass_("random")
        widths = (tables(ids()) != 0).sum(-1)
        for table in range(3):
            assert len(widths[:, table].unique()) == 1
            seen[table].add(int(widths[0, table]))
    assert seen == [{0, 2, 4, 8}] * 3


def test_evaluation_in_training_shows_whole_rows():
    tables = in_training(budget="30%").eval()
    assert (tables(ids()) != 0).all()


def test_narrow_rows_are_brought_to_all_dimensions_by_the_first_rows_of_the_matrix():
    tables = build()
    tables.enter_phase_(tables.phases()[0])
    tables.train().set_pass_("narrow")
    first = tables.rows(ids() + tables._starts, None)[..., :1]
    wanted = first * tables.projection.weight[:, 0]
    torch.testing.assert_close(tables(ids()), wanted)


# ---- the cut ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["50%", "20%", "6%", "3%"])
@pytest.mark.parametrize("rows", ["float32", "int8:column"])
def test_the_budget_is_used_to_within_a_row_where_ids_are_ordered(budget, rows):
    tables = cut(build(budget, rows=rows))
    limit = tables.config.limit_bytes
    final = tables.finalize()
    size = sum(tensor.nbytes for tensor in final.state_dict().values())
    assert size == tables.memory().serve_bytes == final.memory().serve_bytes
    matrix = 4 * 8 * 8  # a split may keep a matrix wider than the rest of the table needs
    assert min(limit, build(rows=rows).memory().serve_bytes) - matrix <= size <= limit
    torch.testing.assert_close(final(ids()), tables.eval()(ids()))


@pytest.mark.parametrize("budget", ["70%", "30%", "12%", "5%", "2%"])
@pytest.mark.parametrize("worth", [(1.0, 1.0, 1.0), (0.01, 1.0, 1.0), (1.0, 0.0, 0.0)])
def test_tables_of_unordered_ids_are_cut_as_a_whole_and_nothing_more_would_fit(budget, worth):
    generator = torch.Generator().manual_seed(1)
    counts = {name: count[torch.randperm(len(count), generator=generator)] for name, count in COUNTS.items()}
    tables = cut(build(budget, counts=counts), worth)
    layout = [parse_layout(name, text) for name, text in tables.config.layout.items()]
    assert all(len(own) == 1 for own in layout)
    assert layout_bytes(layout, SPECS, tables.config) == tables.memory().serve_bytes <= tables.config.limit_bytes
    for table, (part,) in enumerate(layout):
        if part.width < 8:
            next_width = {0: 1, 1: 2, 2: 4, 4: 8}[part.width]
            wider = [*layout[:table], [part._replace(width=next_width)], *layout[table + 1 :]]
            assert layout_bytes(wider, SPECS, tables.config) > tables.config.limit_bytes


def test_what_matters_most_keeps_its_width():
    tables = cut(build("25%", projection="none"), worth=(1000.0, 0.001, 0.001))
    widths = {name: parse_layout(name, text)[0].width for name, text in tables.config.layout.items()}
    assert widths["item"] == widths["flag"] == 0
    assert widths["user"] > 0


def test_frequency_tiers_have_widths_of_their_own():
    tables = build("12%", counts=ZIPF, tiers=3, projection="none")

    def evaluate():
        return float(tables.materialize("user")[6:44].detach().square().sum())  # only the second tier matters

    cut(tables, evaluate=evaluate)
    widths = tables.widths_of("user")
    assert widths[6:44].tolist() == [8] * 38
    assert max(widths[:6].max(), widths[44:].max()) < 8
    assert 0 < tables.memory().serve_bytes <= tables.config.limit_bytes


@pytest.mark.parametrize("tiers", [1, 3])
def test_each_tier_is_a_part_of_the_layout(tiers):
    tables = cut(build(counts=ZIPF, tiers=tiers))
    assert {name: len(text.split()) for name, text in tables.config.layout.items()} == {
        "user": tiers,
        "item": tiers,
        "flag": tiers,
    }


def test_tables_that_tiers_cannot_divide_are_named(caplog):
    counts = {"user": ZIPF["user"].flip(0), "item": ZIPF["item"]}
    with caplog.at_level("INFO", logger="embcomp"):
        build(counts=counts)
        build(counts=ZIPF, tiers=3)
        assert not caplog.records
        build(counts=counts, tiers=3)
    missing, unordered = caplog.records
    assert missing.levelname == "INFO"
    assert "no counts of tables flag" in missing.getMessage()
    assert unordered.levelname == "WARNING"
    assert "ids of tables user are not numbered by falling frequency" in unordered.getMessage()


def test_one_training_has_a_front_of_all_sizes():
    tables = cut(build())
    front = tables.pareto()
    assert [point.bytes for point in front] == sorted((point.bytes for point in front), reverse=True)
    assert front[0].bytes == sum(spec.full_bytes for spec in SPECS)
    for budget in ("40%", "10%", "70%"):
        tables.cut_(budget)
        assert 0.8 < tables.memory().ratio / (float(budget[:-1]) / 100) <= 1
    with pytest.raises(BudgetError, match="smallest form takes"):
        cut(build(unseen="oov_row")).cut_("1B")


def test_a_cut_of_finalized_tables_is_refused_and_changes_nothing():
    final = cut(build("30%")).finalize()
    widths, config, vectors = final.widths_of("user"), final.config, final(ids())
    for budget in ("5%", "60%"):
        with pytest.raises(ConfigError, match=r"user, item, flag are finalized.* cut before finalize_"):
            final.cut_(budget)
    assert torch.equal(final.widths_of("user"), widths)
    assert final.config == config
    assert torch.equal(final(ids()), vectors)


@pytest.mark.parametrize("retrain", ["finetune", "initial"])
def test_bug_a_retraining_ends_the_front_whose_values_are_of_the_weights_before(retrain):
    tables = build("40%", retrain=retrain)
    cut(tables)
    for ask in (tables.pareto, lambda: tables.cut_("60%")):
        with pytest.raises(ConfigError, match="no front before the cut, or after a retraining"):
            ask()
    assert tables.memory().serve_bytes <= tables.config.limit_bytes


def test_a_front_needs_a_cut():
    with pytest.raises(ConfigError, match="before the cut"):
        build().pareto()
    with pytest.raises(ConfigError, match="'full' has no front"):
        build_tables(SPECS, "full").cut_("10%")


def test_the_form_is_saved_and_found_again(tmp_path):
    tables = cut(build("15%"))
    fresh = build("15%")
    fresh.load_state_dict(tables.state_dict())
    assert fresh.config.layout == tables.config.layout
    assert torch.equal(fresh.eval()(ids()), tables.eval()(ids()))
    (loaded,) = load_tables(save_pretrained(tables.finalize(), tmp_path))
    assert torch.equal(loaded(ids()), tables.finalize()(ids()))


@pytest.mark.parametrize("options", [{}, {"counts": ZIPF, "tiers": 3, "unseen": "oov_row"}])
def test_the_front_is_saved_with_the_training_form(tmp_path, options):
    tables = cut(build("30%", **options))
    (loaded,) = load_tables(save_pretrained(tables, tmp_path))
    assert loaded.pareto() == tables.pareto()
    for budget in ("8%", "50%"):
        tables.cut_(budget)
        loaded.cut_(budget)
        assert loaded.config == tables.config
        assert torch.equal(loaded.eval()(ids()), tables.eval()(ids()))
    (served,) = load_tables(save_pretrained(loaded.finalize(), tmp_path))
    with pytest.raises(ConfigError, match="load the training form"):
        served.pareto()


def test_a_front_of_other_tables_is_refused(tmp_path, monkeypatch):
    tables = cut(build("30%"))
    state = tables.front_state()
    for wrong in (
        {**state, "tiers": state["tiers"][1:]},
        {**state, "ordered": [True]},
        {**state, "front": [[[3, 8, 8], 1.0]]},
        {**state, "front": [[[8, 8], 1.0]]},
        {**state, "front": []},
    ):
        with pytest.raises(ValueError, match="not of tables user, item, flag"):
            build("30%").load_front_(wrong)
    for wrong in ({**state, "ordered": []}, {"tiers": state["tiers"]}):
        monkeypatch.setattr(tables, "front_state", lambda wrong=wrong: wrong)
        with pytest.raises(IncompatibleStateError, match="describes tables that can't be built"):
            load_tables(save_pretrained(tables, tmp_path))


def test_layout_bytes_are_those_of_the_values():
    config = NestedConfig(projection="none")
    layout = [parse_layout("user", "100<8 300<2"), parse_layout("item", "40<8"), parse_layout("flag", "3<8")]
    assert layout_bytes(layout, SPECS, config) == 4 * (100 * 8 + 200 * 2 + 40 * 8 + 3 * 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ladder": "4,2"}, "must rise"),
        ({"ladder": "2,16"}, "at most D = 8"),
        ({"ladder": "a"}, "write rising widths"),
        ({"layout": {"user": "300<8"}}, "item, flag"),
        ({"layout": {"user": "10<8", "item": "40<8", "flag": "3<8"}}, "must end at 300"),
        ({"layout": {"user": "300x8"}}, "stop<width"),
        ({"rows": "int8:group4"}, "groups of rows"),
        ({"retrain": "never"}, "initial"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_widths_of_ids_are_those_of_the_layout():
    tables = build(layout={"user": "100<8 300<2", "item": "40<8", "flag": "3<0"})
    for form in (tables, tables.finalize()):
        assert form.widths_of("user").tolist() == [8] * 100 + [2] * 200
        assert form.widths_of(2).tolist() == [0] * 3
    assert build_tables(SPECS, "full").widths_of("flag").tolist() == [8] * 3
    assert build_tables(SPECS, "hash", budget="50%").widths_of("user") is None
