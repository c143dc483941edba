"""Which ids of which tables are kept, against plain sets, and what it takes to say so."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcomp.strategies._kept_ids import KeptIds


@st.composite
def kept_sets(draw):
    """For each table: its ids, whether it is remapped, and the ids that it keeps, rising."""
    tables = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.one_of(st.integers(1, 200), st.sampled_from([63, 64, 65, 128])))
        flags = torch.rand(size, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1))))
        kept = (flags < draw(st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]))).nonzero()[:, 0].tolist()
        remapped = draw(st.booleans())
        tables.append((size, remapped, kept if remapped else list(range(len(kept)))))
    return tables


def make(tables):
    remap = KeptIds(
        [size for size, _, _ in tables], [len(kept) for _, _, kept in tables], [flag for _, flag, _ in tables]
    )
    for table, (_, remapped, kept) in enumerate(tables):
        if remapped:
            shuffled = torch.tensor(kept, dtype=torch.int64)[
                torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))
            ]
            remap.keep_(table, shuffled)
    return remap


def require(found, ids, owners, tables):
    """Found flags and rows are those of plain sets: of ids and owners that are broadcast together."""
    kept, rows = (part.flatten().tolist() for part in found)
    assert found[0].shape == found[1].shape == torch.broadcast_shapes(ids.shape, owners.shape)
    ids, owners = (part.flatten().tolist() for part in torch.broadcast_tensors(ids, owners))
    for flag, row, value, owner in zip(kept, rows, ids, owners, strict=True):
        members = tables[owner][2]
        assert flag == (value in members)
        assert not flag or row == members.index(value)


@settings(deadline=None, max_examples=150)
@given(tables=kept_sets(), seed=st.integers(0, 2**32 - 1))
def test_kept_ids_and_their_rows_are_those_of_plain_sets(tables, seed):
    remap, owners = make(tables), torch.arange(len(tables))
    for table, (size, _, _) in enumerate(tables):
        ids = torch.arange(size)
        require(remap(ids, table), ids, torch.tensor(table), tables)
        require(remap(ids[-1], table), ids[-1], torch.tensor(table), tables)
        require(remap(ids[None], torch.tensor(table)), ids[None], torch.tensor(table), tables)
    sizes = torch.tensor([size for size, _, _ in tables])
    noise = torch.rand(3, 7, len(tables), generator=torch.Generator().manual_seed(seed))
    ids = (noise * sizes).long()
    require(remap(ids, None), ids, owners, tables)
    require(remap(ids, owners), ids, owners, tables)
    require(remap(ids.mT, owners[:, None]), ids.mT, owners[:, None], tables)
    mixed = owners[torch.randint(0, len(tables), (21,), generator=torch.Generator().manual_seed(seed))]
    ids = (noise.flatten()[:21] * sizes[mixed]).long()
    require(remap(ids, mixed), ids, mixed, tables)


@settings(deadline=None)
@given(tables=kept_sets())
def test_only_remapped_tables_cost_bytes(tables):
    remap = make(tables)
    size = sum(12 * -(-size // 64) for size, remapped, _ in tables if remapped)
    assert sum(tensor.nbytes for tensor in remap.state_dict().values()) == size
    assert remap.state_dict().keys() == ({"bits", "ranks"} if size else set())
    assert not list(remap.parameters())


@settings(deadline=None)
@given(st.integers(3, 10**9))
def test_bits_take_no_more_than_an_int32_per_id(size):
    with torch.device("meta"):
        remap = KeptIds([size], [1], [True])
    assert sum(tensor.nbytes for tensor in remap.state_dict().values()) <= 4 * size


@settings(deadline=None, max_examples=30)
@given(tables=kept_sets())
def test_copied_and_loaded_ones_keep_the_same(tables):
    remap = make(tables)
    sizes, numbers, flags = zip(*((size, len(kept), flag) for size, flag, kept in tables), strict=True)
    plain = KeptIds(sizes, numbers, flags)
    plain.load_state_dict(remap.state_dict())
    with torch.device("meta"):
        loaded = KeptIds(sizes, numbers, flags)
    loaded.load_state_dict(remap.state_dict(), assign=True)
    for other in (plain, loaded, copy.deepcopy(remap)):
        for table, size in enumerate(sizes):
            require(other(torch.arange(size), table), torch.arange(size), torch.tensor(table), tables)


def test_a_remapped_table_keeps_nothing_until_it_is_told():
    remap, ids = KeptIds([70, 5, 70], [9, 2, 3], [True, False, True]), torch.arange(70)
    assert not remap(ids, 0)[0].any()
    assert remap(ids[:5], 1)[0].tolist() == [True, True, False, False, False]
    for kept in ([69, 0, 64], [63], []):  # the last word counts
        remap.keep_(2, torch.tensor(kept, dtype=torch.int64))
        assert remap(ids, 2)[0].nonzero()[:, 0].tolist() == sorted(kept)
        assert not remap(ids, 0)[0].any()


@pytest.mark.parametrize("table", [None, 0, 1])
@pytest.mark.parametrize("remapped", [(True, True), (True, False), (False, False)])
def test_compiled_and_exported_lookups_agree(table, remapped):
    remap = make([(200, flag, list(range(0, 200, 3)) if flag else list(range(50))) for flag in remapped])
    ids = torch.randint(0, 200, (9, 2))
    torch.compiler.reset()
    compiled = torch.compile(remap, fullgraph=True, backend="aot_eager")
    program = torch.export.export(remap, (ids[:4], table), dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    for other in (compiled, program.module()):
        for found, wanted in zip(other(ids, table), remap(ids, table), strict=True):
            assert torch.equal(found, wanted)
