"""Several processes of one group, for what runs on many."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 500  # of a process that hangs, not of one that is slow


def run_in_processes(work: Callable[..., None], folder: Path, count: int, *others: Any) -> None:
    """Run work(rank, folder, count, *others) in so many processes of a gloo group; an error in one is an error here."""
    ranks = mp.spawn(_one, (work, str(folder), count, *others), count, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not ranks.join(timeout=1):
            assert time.monotonic() < deadline, f"{work.__name__} hangs"
    finally:
        for process in ranks.processes:
            process.kill()


def _one(rank: int, work: Callable[..., None], folder: str, count: int, *others: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    work(rank, folder, count, *others)
    dist.barrier()
    # torch 2.13 can wait for itself here: the reducer of DDP ends gloo's thread and holds the interpreter's lock, which
    # that thread needs to free the context of the last backward pass. So nothing is freed.
    os._exit(0)
