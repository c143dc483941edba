"""Tables that grow: trained rows stay, bit for bit, or an error says why they can't."""

import copy

import pytest
import torch
from torch import nn

import embcomp
from embcomp import (
    BudgetError,
    ConfigError,
    DynamicConfig,
    FrequencyCutConfig,
    HashConfig,
    IncompatibleStateError,
    NoMatchingTableError,
    QuantizeConfig,
    ReducedDimConfig,
    SpecError,
    TableSpec,
    build_tables,
    resize_,
)
from embcomp.testing._cases import backward, every_vector

SIZES = {"user": 60, "item": 40, "flag": 2}
GROWN = {"user": 75, "flag": 3}


def make_specs(dim=8, sizes=None):
    return [TableSpec(n, v, dim, 1 if n == "item" else None, 1.0) for n, v in (sizes or SIZES).items()]


def falling(sizes=None):
    return {name: torch.arange(size, 0, -1) for name, size in (sizes or SIZES).items()}


def shuffled():
    generator = torch.Generator().manual_seed(0)
    return {name: count[torch.randperm(len(count), generator=generator)] for name, count in falling().items()}


def trained(strategy, budget=None, counts=None, steps=2):
    tables = build_tables(make_specs(), strategy, budget, counts)
    optimizer = torch.optim.SGD(tables.parameters(), lr=0.1)
    for _ in range(steps):
        backward(tables)
        optimizer.step()
        optimizer.zero_grad()
        tables.step_()
    return tables


CASES = {
    "full": lambda unseen: trained(embcomp.FullConfig(unseen=unseen)),
    "full-int8:row": lambda unseen: trained(embcomp.FullConfig(unseen=unseen, rows="int8:row")),
    "full-int2:column": lambda unseen: trained(embcomp.FullConfig(unseen=unseen, rows="int2:column:offset")),
    "full-int4:after": lambda unseen: trained(embcomp.FullConfig(unseen=unseen, rows="int4:after")),
    "hash": lambda unseen: trained(HashConfig(unseen=unseen), "40%"),
    "hash-concat": lambda unseen: trained(HashConfig(num_hashes=2, combine="concat", unseen=unseen), "40%"),
    "hash-mean": lambda unseen: trained(HashConfig(num_hashes=2, combine="mean", unseen=unseen), "40%"),
    "hash-weighted": lambda unseen: trained(HashConfig(num_hashes=2, combine="weighted", unseen=unseen), "20%"),
    "frequency_cut": lambda unseen: trained(FrequencyCutConfig(unseen=unseen, tail="hash"), "40%"),
    "frequency_cut-remap": lambda unseen: trained(FrequencyCutConfig(unseen=unseen), "40%", shuffled()),
    "frequency_cut-zero": lambda unseen: trained(FrequencyCutConfig(unseen=unseen, tail="zero"), "40%"),
    "quantize": lambda unseen: trained(QuantizeConfig(bits=4, granularity="column", unseen=unseen)),
    "reduced_dim": lambda unseen: trained(ReducedDimConfig(dim=3, unseen=unseen)),
    "reduced_dim-none": lambda unseen: trained(ReducedDimConfig(dim=3, projection="none", unseen=unseen)),
    "dynamic": lambda unseen: trained(DynamicConfig(interval=1, unseen=unseen), "40%"),
    "dynamic-int2": lambda unseen: trained(DynamicConfig(interval=1, unseen=unseen, rows="int2:column"), "20%"),
}
OOV_MOVES = ("hash", "frequency_cut")  # where the OOV id is hashed as number V


@pytest.mark.parametrize("unseen", ["error", "oov_row", "hash"])
@pytest.mark.parametrize("name", CASES)
def test_old_ids_keep_their_vectors_bit_for_bit(name, unseen):
    tables = CASES[name](unseen).eval()
    old, oov = every_vector(tables), None
    if unseen == "oov_row":
        oov = tables(torch.full((3,), -1)).detach()
    (planned,) = resize_(tables, GROWN)
    sizes = SIZES | GROWN
    assert {spec.name: spec.num_embeddings for spec in tables.specs} == sizes
    assert planned.report.serve_bytes == tables.memory().serve_bytes
    kept = [tables.materialize(table)[: SIZES[table]].detach() for table in SIZES]
    assert torch.equal(torch.cat(kept), old)
    if oov is not None and not name.startswith(OOV_MOVES):
        assert torch.equal(tables(torch.full((3,), -1)).detach(), oov)
    if unseen == "error":
        with pytest.raises(embcomp.UnseenIdError, match=r"\[0, 75\)"):
            tables(torch.tensor([75]), "user")
    assert not tables.training
    backward(tables.train())
    assert tables(torch.tensor([74]), "user").isfinite().all()
    assert sum(t.nbytes for t in tables.finalize().state_dict().values()) == tables.memory().serve_bytes


def test_new_ids_of_plain_tables_have_rows_of_their_own_and_learn():
    tables = trained("full")
    resize_(tables, {"user": 75})
    new = tables(torch.arange(60, 75), "user").detach()
    assert len(new.unique(dim=0)) == 15
    assert 0.5 < new.std().item() < 1.5
    optimizer = torch.optim.SGD(tables.parameters(), lr=1.0)
    tables(torch.tensor([70]), "user").sum().backward()
    optimizer.step()
    after = tables(torch.arange(60, 75), "user").detach()
    assert (after != new).any(1).nonzero().flatten().tolist() == [10]


def test_what_rounding_was_switched_off_for_stays_so():
    tables = trained(embcomp.FullConfig(rows="int2:column")).set_rounding_(False)
    old = every_vector(tables)
    resize_(tables, {"user": 61})
    assert torch.equal(tables.materialize("item").detach(), old[60:100])
    assert not tables.rows.rounding


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(60, 8), nn.Embedding(40, 8, padding_idx=0)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.item.weight

    def forward(self, users, items):
        return self.head(self.user(users) + self.item(items))


def test_a_model_and_its_views_grow(tmp_path):
    model = Model()
    handle = embcomp.compress_(model, embcomp.FullConfig(), verbose=False)
    users, items = torch.arange(5), torch.arange(5)
    before = model(users, items).detach()
    handle = handle.resize_({"item": 50})
    assert handle.tables[0] is model.embcomp_tables[0]
    assert (model.item.num_embeddings, model.head.out_features, model.user.num_embeddings) == (50, 50, 60)
    assert model.item.weight.shape == (50, 8)
    after = model(users, items)
    assert after.shape == (5, 50)
    torch.testing.assert_close(after[:, :40].detach(), before)
    assert "50" in str(handle)
    assert handle.plans[0].report.serve_bytes == handle.memory().serve_bytes == 4 * 8 * 110
    model(users, torch.tensor([45, 46, 47, 48, 49])).sum().backward()
    embcomp.save_pretrained(model, tmp_path)
    (loaded,) = embcomp.load_tables(tmp_path)
    assert torch.equal(loaded.materialize("item"), model.item.weight.detach())


def test_the_module_that_is_compressed_may_be_the_table_itself():
    handle = embcomp.compress_(nn.Embedding(30, 4), "full", verbose=False)
    handle = handle.resize_({"embedding": 33})
    assert handle.model(torch.tensor([32])).shape == (1, 4)
    assert handle.model.num_embeddings == 33


# ---- slots ---------------------------------------------------------------------------------------------------------


def streaming(**options):
    config = DynamicConfig(num_slots={"user": 20, "flag": 2}, unseen="hash", interval=4, policy="lfu", **options)
    tables = build_tables(make_specs(sizes={"user": 1000, "flag": 2}), config)
    generator = torch.Generator().manual_seed(3)
    for step in range(22):
        ids = torch.rand(16, generator=generator).square().mul(40).long() * 10**15
        tables(torch.stack([ids, torch.full_like(ids, step % 2)], dim=1)).sum().backward()
        tables.step_()
    return tables


@pytest.mark.parametrize("slots", [5, 20, 31])
def test_more_and_fewer_slots(slots):
    tables = streaming()
    places, asked = tables.residents.map, torch.arange(40) * 10**15
    counts = dict(zip(places.ids[:20].tolist(), places.counts[:20].tolist(), strict=True))
    old, before = tables(asked, "user").detach(), copy.deepcopy(tables)
    resize_(tables, num_slots={"user": slots})
    kept = tables.residents_of("user").tolist()
    best = sorted(counts, key=lambda value: (-counts[value], value))[: min(slots, 20)]
    assert kept == sorted(best)
    rows = torch.isin(asked, torch.tensor(kept)) | ~torch.isin(asked, before.residents_of("user"))
    assert torch.equal(tables(asked, "user")[rows].detach(), old[rows])
    assert int(tables.residents.clock) == 22
    assert tables.memory().serve_bytes == before.memory().serve_bytes + (slots - 20) * 40
    for group in (tables, before):  # and both go on alike where nothing was lost
        group(torch.stack([asked, torch.zeros_like(asked)], dim=1)).sum().backward()
        group.compete_()
    if slots == 20:
        assert torch.equal(tables.residents_of("user"), before.residents_of("user"))


def test_bug_of_living_residents_those_keep_their_slots_that_were_looked_up_more_often():
    """With a time to live all that live score alike, and the smallest ids stayed."""
    specs, ids = [TableSpec("u", 1000, 4)], torch.tensor([5, 10, 20, 100, 200, 300])
    config = DynamicConfig(num_slots={"u": 6}, num_fallback={"u": 1}, policy="ttl", ttl=100, interval=1, unseen="hash")
    tables = embcomp.build_tables(specs, config)
    for step in range(9):
        tables(ids if step % 3 == 0 else ids[3:]).sum().backward()
        tables.step_()
    resize_(tables, num_slots={"u": 3})
    assert tables.residents_of("u").tolist() == [100, 200, 300]


def test_a_budget_chooses_the_number_of_slots():
    tables = streaming()
    residents = tables.residents_of("user").tolist()
    for budget in ("25%", "1%", "60%"):
        (planned,) = resize_(tables, budget=budget)
        assert 0 <= planned.budget_bytes - tables.memory().serve_bytes < 40  # a slot takes 40 B
        assert set(tables.residents_of("user").tolist()) <= set(residents)
    with pytest.raises(BudgetError, match="smallest feasible"):
        resize_(tables, budget="30B")


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["unified", "compositional", "low_rank", "compact", "magnitude", "mixed_dim", "nested"]
)
def test_other_strategies_are_refused_by_name_and_stay_as_they_were(name):
    tables = build_tables(make_specs(16), name, "80%")
    state = {key: tensor.clone() for key, tensor in tables.state_dict().items()}
    with pytest.raises(ConfigError, match=rf"'{name}'.*can't be kept.*load_dense_"):
        resize_(tables, {"user": 75})
    assert tables.specs[0].num_embeddings == 60
    assert all(torch.equal(tables.state_dict()[key], tensor) for key, tensor in state.items())


def test_a_table_that_would_be_kept_in_another_way():
    tables = trained(ReducedDimConfig(dim=3))
    assert len(tables.parts) == 2  # flag is kept whole
    with pytest.raises(ConfigError, match=r"'reduced_dim'.*keeps 'flag' in another way with 500 ids"):
        resize_(tables, {"flag": 500})
    assert tables(torch.tensor([1]), "flag").shape == (1, 8)


def test_wrong_requests_change_nothing():
    tables = trained("full")
    wrong = [
        ({"sizes": {"user": 59}}, SpecError, "has 60 ids and can't have 59"),
        ({"sizes": {"user": 70.5}}, SpecError, "can't have 70.5"),
        ({"sizes": {"user": float("nan")}}, SpecError, "nan"),
        ({"sizes": {"usr": 70}}, NoMatchingTableError, "did you mean 'user'"),
        ({}, ConfigError, "told nothing"),
        ({"num_slots": {"user": 5}}, ConfigError, "'full' have no slots"),
        ({"num_slots": {"user": 5}, "budget": "10%"}, ConfigError, "not both"),
        ({"sizes": {"user": 70}, "budget": "50%"}, BudgetError, "smallest feasible"),
    ]
    for arguments, error, message in wrong:
        with pytest.raises(error, match=message):
            resize_(tables, **arguments)
    assert tables.specs == tuple(make_specs())
    with pytest.raises(NoMatchingTableError, match="compress_ first"):
        resize_(nn.Linear(2, 2), {"user": 3})
    with pytest.raises(IncompatibleStateError, match="finalized"):
        resize_(tables.finalize(), {"user": 70})
    with pytest.raises(ConfigError, match="'flag' keeps a row for every id"):
        resize_(trained("dynamic", "40%"), num_slots={"flag": 1})
    with pytest.raises(ConfigError, match="'user': 0"):
        resize_(streaming(), num_slots={"user": 0})


def test_groups_of_rows_and_importance_weights_that_growth_would_change():
    with pytest.raises(ConfigError, match="groups of rows"):
        resize_(trained(embcomp.FullConfig(rows="int4:group8")), {"user": 61})
    config = HashConfig(num_rows={"user": 20, "item": 10, "flag": 2}, num_hashes=2, combine="weighted")
    with pytest.raises(ConfigError, match="importance weights for each id of 'user'"):
        resize_(trained(config), {"user": 90})


def test_fields_behind_offsets_and_biases_of_tied_layers():
    model = nn.ModuleDict({"all": nn.Embedding(10, 4)})
    handle = embcomp.compress_(model, "full", fused={"all": {"a": 4, "b": 6}}, verbose=False)
    with pytest.raises(SpecError, match="offsets"):
        handle.resize_({"all.a": 5})
    model = Model()
    model.head = nn.Linear(8, 40)
    model.head.weight = model.item.weight
    handle = embcomp.compress_(model, "full", verbose=False)
    with pytest.raises(SpecError, match="bias per id"):
        handle.resize_({"item": 41})
