"""DLRM on compressed tables in several processes.

    torchrun --nproc-per-node 2 -m benchmarks.train_dlrm_distributed --strategy hash --budget 10%

Every process sees its part of the same batches, so that the losses are those of one process. On GPUs it is
``--backend nccl``, which gives each process one of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from embcomp import build_tables, load_pretrained_
from embcomp.integrations import sharding
from recsys_models.ctr import DLRM
from recsys_models.data import Batch, ClickLog, load_dataset


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print losses, bytes and speed from the first process.

    Args:
        arguments: of the command line; None for the process's own.
    """
    given = _parser().parse_args(arguments)
    if given.backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # else all processes of a machine use its first GPU
    dist.init_process_group(given.backend)
    _run(given)
    gc.collect()  # a model that is left holds threads of the group, which abort the process if they outlive Python
    dist.destroy_process_group()


def _run(given: argparse.Namespace) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if given.backend == "nccl" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(given.threads)
    log = load_dataset(given.data, given.root, given.cache)

    model = build(log, given.dim, given.strategy, given.budget)
    if given.resume:
        load_pretrained_(model, given.resume, verbose=False)
    model = model.to(device)
    report = sharding.plan_sharding(model, world_size, given.sharding, device.type)
    model = sharding.distribute(model, given.optimizer, given.learning_rate, given.sharding, device)
    dense = torch.optim.SGD(sharding.dense_parameters(model), lr=given.learning_rate)
    if given.resume:
        sharding.load_optimizers_(model, given.resume, [dense])

    losses, seconds = [], []
    every = batches(log, given.batch_size, given.skip + given.steps, rank, world_size, device, given.order)
    for batch in islice(every, given.skip, None):
        started = time.perf_counter()
        loss = train_step(model, dense, batch, given.batch_size)
        dist.all_reduce(loss)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    if given.save:
        sharding.save_sharded(model, given.save, optimizers=[dense])
    if rank == 0:
        typical = sorted(seconds)[len(seconds) // 2]
        found = {
            "processes": world_size,
            "bytes_per_rank": report.bytes_per_rank,
            "rows_per_second": round(given.batch_size / typical),
            "losses": losses,
        }
        print(f"{report}\nlosses {losses[0]:.6f} ... {losses[-1]:.6f}, {found['rows_per_second']:,} rows/s")
        if given.output:
            given.output.write_text(json.dumps(found) + "\n", encoding="utf-8")


def build(log: ClickLog, dim: int, strategy: str, budget: str | None) -> DLRM:
    """The same model in every process."""
    torch.manual_seed(0)
    counts = {field.name: torch.from_numpy(field.counts) for field in log.fields}
    tables = build_tables(DLRM.table_specs(log.fields, dim, 0.05), strategy, budget, counts)
    return DLRM(tables, len(log.dense_names), bottom_units=(64,), hidden_units=(128, 64))


def batches(
    log: ClickLog,
    batch_size: int,
    steps: int,
    rank: int,
    world_size: int,
    device: torch.device,
    order: int | None = None,
) -> Iterator[Batch]:
    """This process's rows of each batch, which is ``batch_size`` rows of all processes together.

    With ``order``, a seed, the rows of each batch are in another order: then sums are rounded otherwise, and no more.
    """
    stream = log.train.batches(batch_size, shuffle=True, drop_last=True, device=device)
    every = chain.from_iterable(stream.epoch(epoch) for epoch in count())
    generator = torch.Generator().manual_seed(order or 0)
    for whole in islice(every, steps):
        if order is not None:
            places = torch.randperm(len(whole.labels), generator=generator).to(device)
            whole = Batch(*(part[places] for part in whole))
        yield Batch(*(part.tensor_split(world_size)[rank] for part in whole))


def train_step(model: nn.Module, dense: torch.optim.Optimizer, batch: Batch, batch_size: int) -> Tensor:
    """Update rows and network; returns this process's share of the mean loss."""
    share = len(batch.labels) * dist.get_world_size() / batch_size
    loss = F.binary_cross_entropy_with_logits(model(batch.ids, batch.dense), batch.labels) * share
    dense.zero_grad()
    loss.backward()
    dense.step()
    return loss.detach() / dist.get_world_size()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.train_dlrm_distributed", description="Started by torchrun.")
    parser.add_argument("--data", default="synthetic_criteo", help="criteo, or another click log; default: %(default)s")
    parser.add_argument("--root", help="folder of data sets; default: EMBCOMP_DATA")
    parser.add_argument("--cache", help="folder of encoded data")
    parser.add_argument("--strategy", default="hash")
    parser.add_argument("--budget", help="such as 10%%; default: none")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument(
        "--sharding",
        choices=sharding.SHARDINGS,
        help="data_parallel: copies, which are trained as the network is, by SGD; default: what the planner chooses",
    )
    parser.add_argument("--optimizer", choices=sharding.OPTIMIZERS, default="rowwise_adagrad")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--batch-size", type=int, default=4096, help="rows of a step, of all processes together")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--order", type=int, metavar="SEED", help="shuffle the rows of each batch; default: not")
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--threads", type=int, default=1, help="of each process on a CPU")
    parser.add_argument("--save", type=Path, help="folder to save model and optimizers in")
    parser.add_argument("--resume", type=Path, help="folder of an earlier --save, to go on with")
    parser.add_argument(
        "--skip", type=int, default=0, metavar="STEPS", help="batches to leave out first; default: none"
    )
    parser.add_argument("--output", type=Path, help="JSON file of losses, bytes and speed")
    return parser


if __name__ == "__main__":
    main()
