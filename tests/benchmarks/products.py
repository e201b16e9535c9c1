"""What one product of small matrices costs on this CPU: in float32, in low precision, and as rampde_fx emulates it.

python -m tests.benchmarks.products [--dtype bfloat16] [--repetitions 2000]

Each number is the least time of many calls, in microseconds, on one thread: what the machine does beside it does not
count. "emulated" is the operator of rampde_fx/emit/cpu_products.py, which a CPU without arithmetic for the dtype takes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from rampde_fx.emit import cpu_products
from tests.benchmarks.tables import markdown

SIZES = ((128, 4, 16), (128, 16, 16), (128, 32, 32), (128, 64, 64), (256, 128, 128), (512, 256, 256))
WAYS = {"as torch has it": torch.ops.aten.mm.default, "emulated": torch.ops.rampde_fx.mm.default}
assert torch.ops.aten.mm.default in cpu_products.PRODUCTS  # defines the operator


def least(function: Callable[[], Any], repetitions: int) -> float:
    """The least time of a call in microseconds."""
    found = []
    for _ in range(repetitions):
        begin = time.perf_counter_ns()
        function()
        found.append(time.perf_counter_ns() - begin)
    return min(found) / 1e3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=2000, help="default %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for m, k, n in SIZES:
        a, b = torch.randn(m, k), torch.randn(k, n)
        low = [factor.to(getattr(torch, options.dtype)) for factor in (a, b)]
        times = [least(lambda a=a, b=b: torch.ops.aten.mm.default(a, b), options.repetitions)]
        times += [least(lambda low=low, way=way: way(*low), options.repetitions) for way in WAYS.values()]
        rows.append([f"{m} x {k} x {n}", *(f"{number:.1f}" for number in times)])
    print(markdown(["product", "float32", *(f"{options.dtype}, {way}" for way in WAYS)], rows))


if __name__ == "__main__":
    main()
