"""compress_: what it finds, what it leaves, what it refuses, and that a refusal leaves the model as it was."""

import copy
import sys
import types

import pytest
import torch
from torch import nn

import embcomp
from embcomp.errors import ConfigError
from embcomp.sites import GROUPS, LEAST_STD, find_groups
from embcomp.training import Phases, recalibrate_


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.user = nn.Embedding(200, 8, padding_idx=0)
        self.towers = nn.ModuleDict({"item": nn.Embedding(300, 8), "one": nn.Embedding(1, 8)})
        self.bags = nn.ModuleList([nn.EmbeddingBag(100, 4, mode="sum")])
        self.dense = nn.Linear(8, 4)

    def forward(self, ids):
        return self.dense(self.user(ids) + self.towers["item"](ids) + self.towers["one"](ids * 0)) + self.bags[0](
            ids[:, None]
        )


IDS = torch.tensor([1, 5, 0, 99])
EVERY = ["user", "towers.item", "towers.one", "bags.0"]


def quiet(model, config="hash", budget="50%", **options):
    return embcomp.compress_(model, config, budget, verbose=False, **options)


def names(handle):
    return [name for tables in handle.tables for name in tables.names]


def same_state(model, other):
    mine, others = model.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


class TestFinds:
    def test_tables_everywhere_and_groups_them_by_dimension(self):
        model = Model()
        handle = quiet(model)
        assert [tables.names for tables in handle.tables] == [("user", "towers.item", "towers.one"), ("bags.0",)]
        assert handle.model is model
        assert [spec.padding_idx for spec in handle.tables[0].specs] == [0, None, None]
        assert model(IDS).shape == (4, 4)
        assert len(dict(model.named_parameters())) == 4  # two stores, and the dense layer
        assert all(name.startswith((GROUPS, "dense")) for name in model.state_dict())

    def test_one_module_at_two_names_and_one_weight_in_two_modules(self):
        model = Model()
        model.again = model.user
        model.twin = nn.Embedding(300, 8)
        model.twin.weight = model.towers["item"].weight
        handle = quiet(model)
        assert names(handle) == EVERY
        assert model.again is model.user
        assert model.twin is not model.towers["item"]
        assert torch.equal(model.twin(IDS), model.towers["item"](IDS))
        assert "user: also at again" in handle.report()
        assert "towers.item: also at twin" in handle.report()

    def test_the_root(self, capsys):
        plain = nn.Embedding(100, 4, padding_idx=3)
        handle = embcomp.compress_(plain, "hash", "50%")
        assert handle.model(IDS).shape == (4, 4)
        assert isinstance(plain, nn.Embedding)
        assert names(handle) == ["embedding"]
        assert list(handle.model.parameters())
        assert "go on with handle.model" in capsys.readouterr().out

    def test_a_container_as_root_gets_no_member_more(self):
        model = nn.Sequential(nn.EmbeddingBag(100, 4), nn.Linear(4, 1))
        quiet(model)
        assert len(model) == 2
        assert model(IDS[:, None]).shape == (4, 1)
        assert len(list(model.parameters())) == 3
        model.append(nn.Embedding(10, 4))
        quiet(model)
        assert len(list(model.parameters())) == 4

    def test_torchrec_collections(self):
        torchrec = pytest.importorskip("torchrec", reason="needs torchrec")
        tables = [
            torchrec.EmbeddingBagConfig(name=f"t{i}", embedding_dim=4, num_embeddings=50, feature_names=[f"f{i}"])
            for i in range(2)
        ]
        collection = torchrec.EmbeddingBagCollection(tables=tables)
        features = torchrec.KeyedJaggedTensor(["f0", "f1"], torch.tensor([1, 2, 3]), lengths=torch.tensor([2, 0, 0, 1]))
        expected = collection(features).values()
        quiet(collection, "full", None, init="trained")
        torch.testing.assert_close(collection(features).values(), expected)


class TestSelects:
    def test_by_filter(self):
        model = Model()
        handle = quiet(model, filter_fn=lambda module, name: module.num_embeddings > 100 and name != "user")
        assert names(handle) == ["towers.item"]
        assert isinstance(model.user, nn.Embedding)

    def test_by_pattern_the_first_wins_and_none_leaves_alone(self):
        model = Model()
        patterns = {"user": "full", "re:towers\\.(one|two)": None, "towers.*": embcomp.make_config("hash"), "*": "full"}
        handle = quiet(model, patterns, "90%")
        assert [(t.names, type(t).__name__) for t in handle.tables] == [
            (("user",), "FullTables"),
            (("towers.item",), "HashTables"),
            (("bags.0",), "FullTables"),
        ]
        assert isinstance(model.towers["one"], nn.Embedding)

    def test_later_calls_take_what_is_left(self):
        model = Model()
        first = quiet(model, {"user": "hash"})
        second = quiet(model, "full", None)
        assert names(second) == EVERY[1:]
        assert list(getattr(model, GROUPS)) == [*first.tables, *second.tables]
        with pytest.raises(embcomp.NoMatchingTableError, match="compressed already"):
            quiet(model)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"config": {"usr": "hash", "*": "full"}}, embcomp.NoMatchingTableError, "pattern 'usr' fits no table"),
            ({"config": {"re:x.*": "hash"}}, embcomp.NoMatchingTableError, "pattern 're:x"),
            ({"config": {"re:(": "hash"}}, embcomp.ConfigError, "not a regular expression"),
            ({"config": {"*": "hash", "user": "full"}}, embcomp.ConfigError, "'user' is never reached"),
            ({"config": {"*": None}}, embcomp.NoMatchingTableError, "None"),
            ({"config": "hsh"}, embcomp.ConfigError, "did you mean 'hash'"),
            ({"filter_fn": lambda module, name: False}, embcomp.NoMatchingTableError, "user, towers.item"),
            ({"init": "zeros"}, embcomp.ConfigError, "init='zeros'"),
            ({"budget": "0.001%"}, embcomp.BudgetError, "smallest feasible budget"),
            ({"counts": {"usr": [1]}}, embcomp.SpecError, "did you mean 'user'"),
            ({"counts": {"user": [1]}}, embcomp.SpecError, r"need \(200,\)"),
            ({"fused": {"usr": [100, 100]}}, embcomp.NoMatchingTableError, "did you mean 'user'"),
            ({"fused": {"user": [100, 99]}}, embcomp.SpecError, "199 ids together, its weight 200"),
            ({"fused": {"user": [200, 0]}}, embcomp.SpecError, "at least 1"),
        ],
    )
    def test_mistakes_are_named_and_leave_the_model_as_it_was(self, options, error, message):
        model = Model()
        before = copy.deepcopy(model)
        with pytest.raises(error, match=message):
            quiet(model, **options)
        assert same_state(model, before)
        assert repr(model) == repr(before)

    def test_a_model_without_tables(self):
        with pytest.raises(embcomp.NoMatchingTableError, match=r"no nn\.Embedding"):
            quiet(nn.Linear(2, 2))


class Scaled(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 2


class TestRefuses:
    @pytest.mark.parametrize(
        ("table", "message"),
        [
            (nn.Embedding(10, 4, max_norm=1.0), "max_norm"),
            (nn.Embedding(10, 4, scale_grad_by_freq=True), "scale_grad_by_freq"),
            (nn.EmbeddingBag(10, 4, max_norm=1.0), "max_norm"),
            (Scaled(10, 4), "Scaled has a forward of its own"),
            (nn.utils.parametrizations.weight_norm(nn.Embedding(10, 4)), "parametrization"),
        ],
    )
    def test_what_it_could_not_keep(self, table, message):
        model = Model()
        model.odd = table
        with pytest.raises(embcomp.SpecError, match=rf"'odd'.*{message}.*filter_fn"):
            quiet(model)
        assert isinstance(model.user, nn.Embedding)
        assert "odd" not in names(quiet(model, filter_fn=lambda module, name: name != "odd"))

    def test_hooks(self):
        model = Model()
        model.user.register_forward_hook(lambda *args: None)
        with pytest.raises(embcomp.SpecError, match=r"'user'.*hooks"):
            quiet(model)

    def test_a_weight_that_something_unknown_holds_too(self):
        model = Model()
        model.raw = model.user.weight
        with pytest.raises(embcomp.SpecError, match=r"parameter 'raw' of 'the model'.*user\.scores"):
            quiet(model)

    def test_one_weight_with_two_paddings(self):
        model = Model()
        model.twin = nn.Embedding(200, 8)
        model.twin.weight = model.user.weight
        with pytest.raises(embcomp.SpecError, match="padding_idx=None here and 0 at 'user'"):
            quiet(model)

    def test_an_attribute_in_the_way(self):
        model = Model()
        setattr(model, GROUPS, "mine")
        with pytest.raises(embcomp.SpecError, match=GROUPS):
            quiet(model)
        assert isinstance(model.user, nn.Embedding)

    def test_random_weights_for_a_frozen_table(self):
        model = Model()
        model.user.requires_grad_(False)
        with pytest.raises(embcomp.SpecError, match="'user' is frozen"):
            quiet(model)

    def test_fitting_to_weights_on_meta(self):
        with pytest.raises(embcomp.SpecError, match="'embedding' is on meta"):
            quiet(nn.Embedding(10, 4, device="meta"), init="trained")


class TestWeights:
    def test_trained_ones_are_fitted_and_the_optimum_is_exact_where_nothing_is_compressed(self):
        model = Model()
        expected = model(IDS)
        handle = quiet(model, "full", None, init="trained")
        torch.testing.assert_close(model(IDS), expected)
        assert {name: tuple(rows.shape) for name, rows in handle.to_dense().items()} == {
            "user": (200, 8),
            "towers.item": (300, 8),
            "towers.one": (1, 8),
            "bags.0": (100, 4),
        }

    def test_random_ones_have_the_deviation_that_the_table_had(self):
        model = Model()
        nn.init.normal_(model.towers["item"].weight, std=0.05)
        nn.init.zeros_(model.bags[0].weight)
        handle = quiet(model, "full", None)
        stds = {spec.name: spec.init_std for tables in handle.tables for spec in tables.specs}
        assert stds["user"] == pytest.approx(1.0, rel=0.1)
        assert stds["towers.item"] == pytest.approx(0.05, rel=0.1)
        assert stds["bags.0"] == LEAST_STD
        assert handle.to_dense()["towers.item"].std() == pytest.approx(0.05, rel=0.1)

    def test_counts_weigh_the_fit(self):
        errors = {}
        for often in (slice(0, 100), slice(100, 200)):
            torch.manual_seed(0)
            model, counts = nn.ModuleList([nn.Embedding(200, 8)]), torch.ones(200)
            counts[often] = 10_000
            target = model[0].weight.detach().clone()
            handle = quiet(model, "reduced_dim", counts={"0": counts}, init="trained")
            errors[often.start] = (handle.to_dense()["0"] - target)[:100].pow(2).mean()
        assert errors[0] < errors[100]

    def test_frozen_tables_stay_frozen_in_a_group_of_their_own(self):
        model = Model()
        model.user.requires_grad_(False)
        handle = quiet(model, "full", None, init="trained")
        assert [tables.names for tables in handle.tables] == [("user",), ("towers.item", "towers.one"), ("bags.0",)]
        assert not any(p.requires_grad for p in handle.tables[0].parameters())
        assert "frozen, as before: user" in handle.report()

    def test_dtype_and_mode_are_kept(self):
        model = Model().to(torch.bfloat16).eval()
        assert model(IDS).dtype == torch.bfloat16
        quiet(model)
        assert model(IDS).dtype == torch.bfloat16
        assert not any(module.training for module in model.modules())

    def test_a_table_too_big_to_exist_is_built_beside_the_rest_of_the_model(self):
        model = nn.Module()
        model.huge, model.dense = nn.Embedding(10**9, 16, device="meta"), nn.Linear(16, 1)
        handle = quiet(model, budget="1MiB")
        assert model.dense(model.huge(torch.tensor([10**9 - 1]))).shape == (1, 1)
        assert 0.98 * 2**20 < handle.memory().serve_bytes <= 2**20

    def test_meta_models_stay_on_meta_unless_a_device_is_given(self):
        handle = quiet(nn.Embedding(100, 4, device="meta"))
        assert all(p.is_meta for p in handle.parameters())
        handle = quiet(nn.Embedding(100, 4, device="meta"), device="cpu")
        assert handle.model(IDS).shape == (4, 4)

    @pytest.mark.cuda
    def test_tables_go_where_the_replaced_ones_were(self):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        model = Model().cuda()
        expected = model(IDS.cuda())
        quiet(model, "full", None, init="trained")
        torch.testing.assert_close(model(IDS.cuda()), expected)


FIELDS = {"city": 20, "one": 1, "shop": 79}


class TestFused:
    def test_fields_become_tables(self):
        model = nn.Sequential(nn.Embedding(100, 4, padding_idx=25))
        expected = model[0].weight.detach().clone()
        expected[25] = 0
        handle = quiet(model, "full", None, fused={"0": FIELDS}, init="trained")
        specs = handle.tables[0].specs
        assert {s.name: (s.num_embeddings, s.padding_idx) for s in specs} == {
            "0.city": (20, None),
            "0.one": (1, None),
            "0.shop": (79, 4),
        }
        assert torch.equal(model[0](torch.arange(100)), expected)
        assert "0: 3 fields, addressed by offsets" in handle.report()

    def test_counts_come_by_field_or_for_the_whole(self):
        counts = torch.arange(100)
        for given in ({"0": counts}, {"0.city": counts[:20], "0.one": counts[20:21], "0.shop": counts[21:]}):
            handle = quiet(nn.Sequential(nn.Embedding(100, 4)), counts=given, fused={"0": FIELDS})
            assert torch.equal(handle.plans[0].counts["0.shop"], counts[21:])
        with pytest.raises(embcomp.SpecError, match=r"'0' have shape \(5,\), not \(100,\)"):
            quiet(nn.Sequential(nn.Embedding(100, 4)), counts={"0": torch.ones(5)}, fused={"0": FIELDS})


class TestLife:
    def test_prints_once_what_it_did(self, capsys):
        handle = embcomp.compress_(Model(), "hash", "50%")
        printed = capsys.readouterr().out
        assert printed == handle.report() + "\n" == str(handle) + "\n"
        assert "4 tables of Model in 2 groups" in printed
        row = next(line for line in printed.splitlines() if "towers.item" in line)
        assert all(text in row for text in ("300", " 8 ", "hash", "9.38 KiB", "rows "))
        embcomp.compress_(Model(), "hash", "50%", verbose=False)
        assert capsys.readouterr().out == ""

    def test_budget_is_a_share_of_all_tables_together(self):
        memory = quiet(Model(), budget="50%").memory()
        assert memory.full_bytes == 4 * (501 * 8 + 100 * 4)
        assert 0.49 * memory.full_bytes < memory.serve_bytes <= 0.5 * memory.full_bytes

    def test_finalized_models_give_the_same_and_train_no_more(self):
        model = Model()
        handle = quiet(model)
        assert handle.penalty().shape == ()
        expected = model.eval()(IDS)
        assert embcomp.finalize_(model) is model
        torch.testing.assert_close(model(IDS), expected)
        assert not any(p.requires_grad for p in handle.parameters())
        served = sum(tensor.nbytes for tables in handle.tables for tensor in tables.state_dict().values())
        assert served == handle.memory().serve_bytes
        assert embcomp.to_dense(model).keys() == set(EVERY)

    def test_a_plain_model_has_nothing_to_finalize(self):
        for act in (embcomp.finalize_, embcomp.to_dense):
            with pytest.raises(embcomp.NoMatchingTableError, match="compress_ first"):
                act(Model())

    def test_a_copy_trains_alone(self):
        model = Model()
        quiet(model)
        other = copy.deepcopy(model)
        torch.optim.SGD(other.parameters(), lr=1.0).zero_grad()
        other(IDS).sum().backward()
        assert all(p.grad is None for p in model.parameters())
        assert any(p.grad is not None for p in getattr(other, GROUPS).parameters())


def test_a_front_of_sizes_is_on_the_handle():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(8, 1))
    handle = embcomp.compress_(model, "nested", verbose=False)
    ids = torch.arange(50)[:, None]
    with pytest.raises(ConfigError, match="before the cut"):
        handle.pareto()
    phases = Phases(model)
    for phase in phases:
        phases.enter_(phase)
        if phase.is_search:
            phases.search_(lambda: float(model(ids).detach().square().mean()))
        phases.leave_(phase)
    sizes = [point.bytes for point in handle.pareto()]
    assert sizes == sorted(sizes, reverse=True)
    assert handle.cut_("30%").memory().serve_bytes <= 0.3 * 50 * 8 * 4
    assert handle.finalize_().memory().serve_bytes <= 0.3 * 50 * 8 * 4


def test_bug_stale_batch_norm_statistics_a_cut_takes_those_of_the_form_it_goes_to():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 1))
    handle = embcomp.compress_(model, "nested", verbose=False)
    ids = torch.arange(50)[:, None]

    def run():
        model(ids)

    phases = Phases(model)
    for phase in phases:
        phases.enter_(phase)
        if phase.is_search:
            phases.search_(lambda: float(model[0](ids).detach().square().mean()), recalibrate=run)
        phases.leave_(phase)
    before = model[2].running_var.clone()
    assert handle.cut_("10%", recalibrate=run) is handle
    vectors = model[1](model[0](ids)).detach()
    torch.testing.assert_close(model[2].running_mean, vectors.mean(0))
    torch.testing.assert_close(model[2].running_var, vectors.var(0))
    assert not torch.allclose(model[2].running_var, before, rtol=0.1)
    assert all(module.training for module in model.modules())


def test_groups_that_were_not_cut_together_have_a_front_each():
    model = nn.ModuleList([nn.Embedding(50, 8), nn.Embedding(50, 4)])
    handle = embcomp.compress_(model, "nested", verbose=False)
    for tables in handle.tables:
        alone = nn.ModuleList([tables])
        phases = Phases(alone)
        phases.enter_(phases.phases[1])
        phases.search_(lambda tables=tables: float(tables(torch.arange(50), 0).detach().square().mean()))
        phases.leave_(phases.phases[1])
    for act in (handle.pareto, lambda: handle.cut_("10%")):
        with pytest.raises(ConfigError, match=r"the 2 groups .* were not cut together.* tables in handle.tables"):
            act()
    handle.tables[0].cut_("10%")
    assert handle.tables[0].memory().ratio <= 0.1


def test_bug_the_report_says_what_trains_in_phases():
    for strategy, told in (("optembed", "supernet, search, retrain"), ("nested", "train, cut"), ("hash", None)):
        report = quiet(Model(), strategy).report()
        assert ("trains in phases" in report) == (told is not None)
        if told is not None:
            assert f"  trains in phases, {told}: take the model through them by embcomp.training.Phases" in report


def test_groups_are_cut_together_and_keep_their_fronts_in_files(tmp_path):
    def plain():
        return nn.ModuleList([nn.Embedding(50, 8), nn.Embedding(50, 4), nn.BatchNorm1d(8)])

    model, ids = plain(), torch.arange(50)
    handle = embcomp.compress_(model, "nested", verbose=False)
    phases = Phases(model)
    for phase in phases:
        phases.enter_(phase)
        if phase.is_search:
            phases.search_(lambda: sum(float(model[i](ids).detach().square().mean()) for i in range(2)))
        phases.leave_(phase)
    front = handle.pareto()
    assert front[0].bytes == handle.memory().full_bytes
    assert [len(point.candidate) for point in front] == [2] * len(front)
    for budget in ("60%", "10%", "30%"):
        handle.cut_(budget)
        assert handle.memory().ratio <= float(budget[:-1]) / 100
    for tables, budget in zip(handle.tables, ("10%", "30%"), strict=True):
        tables.cut_(budget)
        assert tables.memory().ratio <= float(budget[:-1]) / 100
    recalibrate_(model, lambda: model[2](model[0](ids)))
    torch.testing.assert_close(model[2].running_var, model[0](ids).detach().var(0))
    folder = embcomp.save_pretrained(model, tmp_path)
    same = copy.deepcopy(model)
    for tables in find_groups(same).values():
        tables.load_front_(None)
    for other in (plain(), same):
        loaded = embcomp.load_pretrained_(other, folder, verbose=False)
        for own, tables in zip(loaded.tables, handle.tables, strict=True):
            assert own.pareto() == tables.pareto()
            own.cut_("50%")
        assert loaded.pareto() == front
        assert loaded.cut_("20%").finalize_().memory().ratio <= 0.2
        with pytest.raises(ConfigError, match="are finalized, and have lost what was cut"):
            loaded.cut_("10%")


def test_bug_a_torchrec_that_cannot_be_imported_is_nobodys_business(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchrec", types.ModuleType("torchrec"))
    monkeypatch.delitem(sys.modules, "embcomp.integrations.torchrec", raising=False)
    assert quiet(Model()).memory().ratio <= 0.5
