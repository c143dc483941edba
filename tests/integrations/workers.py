"""Processes of a gloo group on this machine, for tests of what is distributed."""

import os
import socket
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_workers(work, world_size, *given, timeout=60):
    """Run ``work(rank, world_size, *given)`` in processes of one group; return what each returned.

    Raises:
        RuntimeError: with the traceback of the first that failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_worker, args=(work, rank, world_size, port, timeout, queue, given), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found = {}
    while len(found) < world_size:
        if queue.empty():
            gone = [process for process in processes if not process.is_alive()]
            if len(gone) > len(found) and queue.empty():
                raise RuntimeError(f"a worker died: exit codes {[process.exitcode for process in processes]}")
            time.sleep(0.02)
            continue
        rank, result = queue.get()
        found[rank] = result
    for process in processes:
        process.join()
    failed = [text for result, text in found.values() if text]
    if failed:
        raise RuntimeError(failed[0])
    return [found[rank][0] for rank in range(world_size)]


def _worker(work, rank, world_size, port, timeout, queue, given):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world_size)}
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
        result, text = work(rank, world_size, *given), ""
        dist.destroy_process_group()
    except BaseException:
        result, text = None, traceback.format_exc()
    queue.put((rank, (result, text)))
