"""Raw 64-bit ids, strings and growing vocabularies through whole tables: an id keeps its vector, whatever follows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embcomp import TableSpec, UnseenIdError, build_tables, config_from_dict, config_to_dict, list_strategies, plan
from embcomp.config import make_config
from embcomp.hashing import hash_strings

ROOT = Path(__file__).resolve().parents[1]
RAW_IDS = torch.tensor([0, 1, -1, 2**31, -(2**31), 2**53 + 1, 2**62, 2**63 - 2, 2**63 - 1, -(2**63), -(2**63) + 1])


def make_specs(*sizes, **options):
    return [TableSpec(f"t{index}", size, 8, **options) for index, size in enumerate(sizes)]


@pytest.fixture(params=[name for name in ("hash", "unified") if name in list_strategies()])
def strategy(request):
    return request.param


@pytest.fixture
def tables(strategy):
    """Two tables that are hashed, and a small one between them that keeps a row per id."""
    return build_tables(make_specs(20000, 10, 50000), make_config(strategy, unseen="hash"), budget="10%")


def test_every_64_bit_integer_is_an_id(tables):
    vectors = tables(RAW_IDS.unsqueeze(1).expand(-1, 3))
    assert torch.isfinite(vectors).all()
    assert (vectors.abs().sum(-1) > 0).all()
    for index in range(3):
        torch.testing.assert_close(tables(RAW_IDS, index), vectors[:, index], rtol=0, atol=0)
        torch.testing.assert_close(tables(RAW_IDS, torch.tensor([index])), vectors[:, index], rtol=0, atol=0)
    large = vectors[:, [0, 2]].flatten(1)  # 2000 and 5000 rows: these few ids share one in neither table, or in one
    assert len(large.unique(dim=0)) == len(RAW_IDS)


def test_unseen_ids_spread_over_all_rows_of_a_small_table(tables):
    known = tables.materialize("t1").detach()
    ids = torch.randint(10, 2**62, (4000,), generator=torch.Generator().manual_seed(0))
    same = (tables(torch.cat([ids, -ids]), "t1").detach().unsqueeze(1) == known).all(-1)
    assert same.any(1).all(), "an unseen id uses a row of the table"
    uses = same.sum(0)
    assert ((uses - 800).abs() < 5 * 800**0.5).all(), "all rows alike"


def test_an_id_of_a_batch_is_looked_up_like_an_id_alone(tables):
    alone = torch.stack([tables(value, 0) for value in RAW_IDS])
    torch.testing.assert_close(tables(RAW_IDS, 0), alone, rtol=0, atol=0)
    torch.testing.assert_close(tables(RAW_IDS.flip(0).reshape(1, -1), 0)[0].flip(0), alone, rtol=0, atol=0)


def test_raw_ids_are_trained(tables):
    before = tables(RAW_IDS, 0).detach().clone()
    optimizer = torch.optim.SGD(tables.parameters(), lr=0.1)
    (tables(RAW_IDS, 0) - 1.0).square().sum().backward()
    optimizer.step()
    after = tables(RAW_IDS, 0).detach()
    assert ((after - 1).square().sum(1) < (before - 1).square().sum(1)).all()


def test_strings_are_ids(tables):
    words = ["", "a", "b", "ab", "ba", "Zürich", "東京", "x" * 1000]
    vectors = tables(hash_strings(words), 0).detach()
    assert len(vectors.unique(dim=0)) == len(words)
    later = tables(hash_strings(["new", *reversed(words), "newer"]), 0).detach()
    torch.testing.assert_close(later[1:-1].flip(0), vectors, rtol=0, atol=0)


STRINGS = """
from embcomp import TableSpec, build_tables
from embcomp.config import make_config
from embcomp.hashing import hash_strings

def vectors(strategy):
    tables = build_tables([TableSpec("city", 1000, 4)], make_config(strategy, unseen="hash"), budget="10%")
    return tables(hash_strings(["Zürich", "東京", ""])).tolist()
"""


def test_strings_have_the_same_vectors_in_another_process(strategy):
    here = {}
    exec(STRINGS, here)
    code = f"{STRINGS}\nprint(vectors({strategy!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert json.loads(found.stdout) == here["vectors"](strategy)


def test_ids_keep_their_vectors_while_a_vocabulary_grows(tables):
    """Train on day one, meet new ids on day two: nobody moves, old or new."""
    first_day = torch.arange(0, 10**12, 10**12 // 500)
    second_day = torch.cat([first_day, torch.arange(10**15, 10**15 + 500)])
    before = tables(first_day, 2).detach().clone()
    after = tables(second_day, 2).detach()
    torch.testing.assert_close(after[:500], before, rtol=0, atol=0)
    tables(second_day, 2)
    torch.testing.assert_close(tables(second_day, 2).detach(), after, rtol=0, atol=0)


def test_a_larger_vocabulary_takes_over_the_rows_of_a_smaller_one(strategy):
    """Rebuilt for ten times the ids with the same sizes, hashed tables read a checkpoint and give the same vectors."""
    options = {"exempt": "none"} if strategy == "unified" else {"exempt_share": 0.0}
    config = plan(make_specs(3000, 8000), make_config(strategy, unseen="hash", **options), budget="10%").config
    small = build_tables(make_specs(3000, 8000), config)
    large = build_tables(make_specs(30000, 80000), config)
    large.load_state_dict(small.state_dict())
    for index, size in enumerate((3000, 8000)):
        ids = torch.cat([torch.arange(size), RAW_IDS])
        torch.testing.assert_close(large(ids, index), small(ids, index), rtol=0, atol=0)


def test_a_saved_config_and_state_give_raw_ids_the_same_vectors(tables):
    again = build_tables(tables.specs, config_from_dict(config_to_dict(tables.config)))
    again.load_state_dict(tables.state_dict())
    torch.testing.assert_close(again(RAW_IDS, 0), tables(RAW_IDS, 0), rtol=0, atol=0)
    final = tables.finalize()
    torch.testing.assert_close(final(RAW_IDS, 0), tables(RAW_IDS, 0).detach(), rtol=0, atol=0)


def test_padding_is_zero_among_raw_ids(strategy):
    specs = make_specs(5000, 10, padding_idx=3)
    tables = build_tables(specs, make_config(strategy, unseen="hash"), budget="10%")
    for index in range(2):
        vectors = tables(torch.tensor([3, -(2**63), 2**63 - 1, -1]), index)
        assert (vectors[0] == 0).all()
        assert (vectors[1:].abs().sum(1) > 0).all()


def test_bags_of_raw_ids_pool_their_vectors(tables):
    ids, offsets = torch.cat([RAW_IDS, RAW_IDS]), torch.tensor([0, 3, 3, 11])
    vectors = tables(ids, 0)
    expected = torch.stack([vectors[:3].sum(0), vectors[:0].sum(0), vectors[3:11].sum(0), vectors[11:].sum(0)])
    torch.testing.assert_close(tables.bag(ids, offsets, 0), expected)


def test_raw_ids_need_the_policy(strategy):
    tables = build_tables(make_specs(5000), make_config(strategy), budget="10%")
    with pytest.raises(UnseenIdError, match="'hash'"):
        tables(RAW_IDS)
