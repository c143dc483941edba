"""Compressed tables in several processes: the losses of one process, whatever the way of sharding."""

import pytest

import embcomp
from embcomp import ConfigError, TableSpec
from tests.integrations.workers import run_workers

pytest.importorskip("torchrec", reason="needs torchrec")

from embcomp.integrations import sharding
from tests.integrations.sharded import CASES, alone, train

pytestmark = pytest.mark.torchrec


@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_are_those_of_one_process(world_size):
    kinds = ["row_wise", "table_wise", "column_wise", "data_parallel", None]
    plans = [("hash", optimizer, kind, 8) for optimizer in ("sgd", "rowwise_adagrad") for kind in kinds]
    plans.remove(("hash", "rowwise_adagrad", "column_wise", 8))  # each part of a row has its own accumulator
    plans += [(case, "rowwise_adagrad", "row_wise", 6) for case in CASES]
    ranks = run_workers(train, world_size, plans, timeout=120)
    wrong = []
    for plan, *losses in zip(plans, *ranks, strict=True):
        wanted = alone(plan[0], plan[1], plan[3])
        off = max(abs(sum(own) / world_size - one) for own, one in zip(zip(*losses, strict=True), wanted, strict=True))
        if off > 1e-5:
            wrong.append((*plan, off))
    assert not wrong


def test_what_cannot_be_sharded_says_so_by_name():
    for strategy in ("optembed", "magnitude", "nested"):
        tables = embcomp.build_tables([TableSpec("user", 50, 8)], strategy, "60%")
        with pytest.raises(ConfigError, match=strategy):
            sharding.plan_sharding(tables, 2)
