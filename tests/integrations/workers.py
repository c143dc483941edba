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
    found, codes = outcomes(work, world_size, *given, timeout=timeout)
    failed = [text for result, text in found.values() if text]
    if len(found) < world_size:
        raise RuntimeError("\n".join([f"a worker died: exit codes {codes}", *failed]))
    if failed:
        raise RuntimeError(failed[0])
    return [found[rank][0] for rank in range(world_size)]


def outcomes(work, world_size, *given, timeout=60):
    """Run as `run_workers`, and wait for those that outlive others, but no longer than they wait for each other.

    Returns:
        rank -> what it returned and its traceback or "", of those that told; and exit codes, None of those that hung.
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
    found, deadline = {}, None
    while len(found) < world_size:
        gone = sum(not process.is_alive() for process in processes)  # before the queue is looked at: they tell, then go
        if not queue.empty():
            rank, result = queue.get()
            found[rank] = result
            continue
        if gone > len(found):
            deadline = deadline or time.monotonic() + 2 * timeout
        if gone == world_size or (deadline and time.monotonic() > deadline):
            break
        time.sleep(0.02)
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return found, codes


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
    os._exit(0)  # all is told; threads of a group that broke may abort a process that ends in the usual way
