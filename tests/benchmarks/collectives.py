"""What processes send each other in a training step with a rewritten loop: collective operations and bytes, no times.

Run it as `python -m tests.benchmarks.collectives --processes 2 4`. Each process trains on its part of a batch, on CPUs,
with gloo: under DistributedDataParallel, whose buckets a hook counts, and with parameters sharded by fully_shard, whose
operations torch's profiler records. One step is counted, after two others.
"""

import argparse
import itertools
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rampde_fx
from tests.processes import run_in_processes

WIDTH = 64
KINDS = ("all-reduce", "all-gather", "reduce-scatter")
# The operators of shards: the kind, and which of the tensors has the whole of what is exchanged.
OPERATORS = {"c10d::_allgather_base_": ("all-gather", 0), "c10d::_reduce_scatter_base_": ("reduce-scatter", 1)}


class Model(nn.Module):
    """A state of 64 numbers, a velocity of two layers, a layer behind."""

    def __init__(self) -> None:
        super().__init__()
        self.velocity = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.head(rampde_fx.odeint(lambda t, y: self.velocity(y), y, t, method="rk4")[-1])


def wrapped(how: str, count: int, found: Counter[str]) -> nn.Module:
    """The model, compiled, its parameters kept by every process or in shards; buckets are counted in found."""
    model: nn.Module = rampde_fx.mixed_precision(Model(), dtype=torch.bfloat16)
    if how == "fully_shard":
        fully_shard(model, mesh=init_device_mesh("cpu", (count,)))
    else:
        model = DistributedDataParallel(model)
        model.register_comm_hook(found, count_bucket)
    return torch.compile(model, backend="rampde_fx", options={"compiler": "aot_eager"})


def count_bucket(found: Counter[str], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    count(found, "all-reduce", bucket.buffer().nbytes)
    return allreduce_hook(dist.group.WORLD, bucket)


def count(found: Counter[str], kind: str, size: int) -> None:
    found[kind] += 1
    found[f"{kind}, bytes"] += size


def counted(how: str, processes: int, steps: int) -> Counter[str]:
    """The collective operations of a training step by name, and the bytes of the whole that each kind exchanges."""
    found: Counter[str] = Counter()
    function, y, t = wrapped(how, processes, found), torch.randn(8, WIDTH), torch.linspace(0, 1, steps + 1)
    for _ in range(2):
        function(y, t).square().mean().backward()
    found.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function(y, t).square().mean().backward()
    for event in profile.events():
        if event.name in OPERATORS:
            kind, place = OPERATORS[event.name]
            count(found, kind, 4 * math.prod(event.input_shapes[place]))
    return found


def work(rank: int, folder: str, processes: int, steps: list[int]) -> None:
    for how, number in itertools.product(("DistributedDataParallel", "fully_shard"), steps):
        torch._dynamo.reset()
        torch.manual_seed(0)
        found = counted(how, processes, number)
        if rank == 0:
            cells = [f"{found[kind]} ({found[f'{kind}, bytes']:,})" for kind in KINDS]
            print(f"| {processes} | {how} | {number} | {' | '.join(cells)} |", flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 64])
    given = parser.parse_args(arguments)
    parameters = sum(parameter.numel() for parameter in Model().parameters())
    print(
        f"{parameters:,} parameters, {4 * parameters:,} bytes in float32; number of operations (bytes of the whole)\n"
    )
    print(f"| processes | parameters | steps | {' | '.join(KINDS)} |\n|---|---|---|---|---|---|", flush=True)
    for count in given.processes:
        with tempfile.TemporaryDirectory() as folder:
            run_in_processes(work, Path(folder), count, given.steps)


if __name__ == "__main__":
    main(sys.argv[1:])
