"""Compressed tables in several processes: their rows lie in TorchRec's collections, which TorchRec shards.

    handle = embcomp.compress_(model, "hash", budget="10%")
    print(plan_sharding(model, world_size=4))              # before anything is started: bytes of each rank
    model = distribute(model, "rowwise_adagrad", 0.02)     # in every process, after init_process_group
    ...                                                    # train; an optimizer of dense_parameters(model) beside it
    save_sharded(model, folder)                            # in every process; load_pretrained_ loads it anywhere

Rows are updated in the backward pass. What else a strategy trains (projections, scales of rows) is small, is in every
process, and is averaged by ``DistributedDataParallel`` as the rest of the model is.
"""

from __future__ import annotations

from embcomp.integrations.versions import torchrec_error, warn_of_versions

try:
    from embcomp.integrations.sharding.plans import REPLICATED, SHARDINGS, Shard, ShardingReport, plan_sharding
    from embcomp.integrations.sharding.rows import ShardableRows, shardable_, stored_tables
    from embcomp.integrations.sharding.running import (
        OPTIMIZERS,
        dense_parameters,
        distribute,
        load_optimizers_,
        save_sharded,
    )
except (ImportError, OSError) as error:
    raise torchrec_error(error) from error
warn_of_versions()

__all__ = [
    "OPTIMIZERS",
    "REPLICATED",
    "SHARDINGS",
    "Shard",
    "ShardableRows",
    "ShardingReport",
    "dense_parameters",
    "distribute",
    "load_optimizers_",
    "plan_sharding",
    "save_sharded",
    "shardable_",
    "stored_tables",
]
