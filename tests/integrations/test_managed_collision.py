"""``dynamic`` and TorchRec's own managed collision modules: the same residents on the same stream, and the way back."""

import pytest
import torch

import embcomp
from embcomp import ConfigError, DynamicConfig, IncompatibleStateError, InputError, SpecError, TableSpec, build_tables
from embcomp.training import reset_rows_

pytest.importorskip("torchrec")

from embcomp.integrations.managed_collision import ManagedCollisionTables, make_collection, to_tables

SLOTS = {"a.user": 12, "item": 5}


def make_specs(**options):
    return [TableSpec(name, 1000, 4, init_std=1.0, **options) for name in SLOTS]


def make_config(**options):
    options = {"num_slots": SLOTS, "num_fallback": dict.fromkeys(SLOTS, 1), "unseen": "hash", "interval": 3, **options}
    return DynamicConfig(**options)


def stream(steps, seed=0):
    """Raw ids, negative ones too, whose frequent ones drift: int64 ``(B, T)`` each."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rank = torch.rand(11, 2, generator=generator).pow(2).mul(25).long()
        yield (rank + step // 4) * 7_046_029_254_386_353 - 2**60


def train(tables, ids, optimizer):
    tables(ids).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    tables.step_()
    reset_rows_([tables], optimizer)


@pytest.mark.parametrize(
    ("policy", "decay"), [("lfu", 1.0), ("lru", 1.0), ("distance_lfu", 1.0), ("distance_lfu", 0.5)]
)
def test_residents_are_torchrecs_after_every_step(policy, decay):
    config = make_config(policy=policy, decay=decay, history=50.0)
    ours, theirs = build_tables(make_specs(), config), ManagedCollisionTables(make_specs(), config)
    optimizers = [torch.optim.SGD(tables.parameters(), lr=0.01) for tables in (ours, theirs)]
    seen = set()
    for ids in stream(90):
        for tables, optimizer in zip((ours, theirs), optimizers, strict=True):
            train(tables, ids, optimizer)
        for name in SLOTS:
            assert ours.residents_of(name).tolist() == theirs.residents_of(name).tolist()
        seen.update(theirs.residents_of("item").tolist())
    assert len(seen) > 3 * SLOTS["item"] or policy == "lfu"


def test_rows_begin_as_ours_and_lookups_take_all_forms_of_tables():
    ours, theirs = build_tables(make_specs(), make_config()).eval(), ManagedCollisionTables(make_specs(), make_config())
    theirs.eval()
    ids = torch.tensor([[3, -4], [2**62, 5]])
    assert torch.equal(theirs(ids), ours(ids))
    assert torch.equal(theirs(ids[:, 1], "item"), ours(ids)[:, 1])
    assert torch.equal(theirs(ids.T, torch.tensor([[0], [1]])), ours(ids).transpose(0, 1))
    assert torch.equal(theirs(ids[0, 0], 0), ours(ids)[0, 0])
    wrong = [torch.tensor(table) for table in ([0, 7], [-1, 0], [0.0, 1.0])]  # the first two gave vectors of others
    for bad, table in ((ids.float(), None), (ids[:, :1], None), (ids, "usr"), (ids, 7), *((ids, own) for own in wrong)):
        with pytest.raises(InputError):
            theirs(bad, table)


def test_slots_that_changed_hands_begin_anew_and_so_does_their_optimizer_state():
    theirs = ManagedCollisionTables(make_specs(), make_config(policy="lru", interval=2))
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.1)
    sevens, others = torch.full((12, 2), 7), torch.arange(100, 112)[:, None].expand(-1, 2)
    for _ in range(3):
        train(theirs, sevens, optimizer)
    before = theirs.state_dict()["collection._embedding_module.embeddings.item.weight"].clone()
    train(theirs, others, optimizer)
    assert theirs.residents_of("item").tolist() == [100, 101, 102, 103, 104]
    weight = theirs.state_dict()["collection._embedding_module.embeddings.item.weight"]
    assert (weight != before).all()
    for parameter in theirs.parameters():
        moments = optimizer.state[parameter]["exp_avg"]
        assert moments[:-1].eq(0).all()
        assert moments[-1].ne(0).all()  # of the fallback row, which nobody takes
    assert theirs.reassigned_() == []


@pytest.mark.parametrize("policy", ["lfu", "lru", "distance_lfu"])
def test_back_to_tables_that_embcomp_serves(tmp_path, policy):
    config = make_config(policy=policy, history=50.0)
    theirs = ManagedCollisionTables(make_specs(), config)
    optimizer = torch.optim.Adagrad(theirs.parameters(), lr=0.1)
    batches = list(stream(60))
    for ids in batches[:30]:
        train(theirs, ids, optimizer)
    tables, asked = theirs.to_tables(), torch.cat(batches)
    assert torch.equal(tables.eval()(asked), theirs.eval()(asked))
    embcomp.save_pretrained(tables.finalize(), tmp_path)
    assert torch.equal(embcomp.from_pretrained(tmp_path)(asked), theirs(asked))
    ours, again = torch.optim.Adagrad(tables.train().parameters()), torch.optim.Adagrad(theirs.train().parameters())
    for ids in batches[30:]:  # an interval begins, so both go on alike
        train(tables, ids, ours)
        train(theirs, ids, again)
        assert tables.residents_of("item").tolist() == theirs.residents_of("item").tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "ttl"}, "hours"),
        ({"admission": "count"}, "admission='always' alone"),
        ({"rows": "int8"}, "rows='float32' alone"),
        ({"unseen": "error"}, "unseen='hash' alone"),
        ({"start": "fallback"}, "start='random' alone"),
        ({"num_fallback": dict.fromkeys(SLOTS, 2)}, "num_fallback=1"),
        ({"num_slots": None, "num_fallback": None}, "needs num_slots"),
    ],
)
def test_rules_that_torchrec_does_not_have(options, message):
    with pytest.raises(ConfigError, match=message):
        make_collection(make_specs(), make_config(**options))


def test_bug_a_table_without_ids_in_the_first_lookup_gets_residents_later():
    """TorchRec gave its history no room, and no id of it a slot, ever."""
    tables = ManagedCollisionTables(make_specs(), make_config())
    optimizer = torch.optim.SGD(tables.parameters(), lr=0.01)
    tables(torch.arange(3), "a.user").sum().backward()
    tables.step_()
    for _ in range(6):
        train(tables, torch.tensor([[7, 8], [9, 8]]), optimizer)
    assert tables.residents_of("item").tolist() == [8]
    assert {7, 9} <= set(tables.residents_of("a.user").tolist())


def test_tables_that_torchrec_does_not_know():
    with pytest.raises(SpecError, match="padding_idx"):
        make_collection(make_specs(padding_idx=0), make_config())
    specs = [TableSpec("a.b", 10, 4), TableSpec("a_b", 10, 4)]
    config = DynamicConfig(num_slots={"a.b": 2, "a_b": 2}, num_fallback={"a.b": 1, "a_b": 1}, unseen="hash")
    with pytest.raises(SpecError, match="must differ"):
        make_collection(specs, config)
    collection = make_collection(make_specs(), make_config())
    with pytest.raises(IncompatibleStateError, match="13 slots"):
        to_tables(collection, make_specs(), make_config(num_slots={"a.user": 13, "item": 5}))
