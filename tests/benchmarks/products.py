"""What one product of small matrices costs on this CPU: in float32, and in low precision as torch has it.

python -m tests.benchmarks.products [--dtype bfloat16] [--threads 1] [--repetitions 2000]

Each number is the least time of many calls, in microseconds: what the machine does beside it does not count. Below
so many multiplications as the last column says, rampde_fx/emit/cpu_products.py takes low products in float32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from rampde_fx.emit.cpu_products import FEW
from tests.benchmarks.tables import markdown

SIZES = ((128, 4, 64), (128, 32, 32), (128, 64, 64), (128, 96, 96), (128, 128, 128), (256, 128, 128), (512, 256, 256))


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
    parser.add_argument("--threads", type=int, default=1, help="default %(default)s")
    parser.add_argument("--repetitions", type=int, default=2000, help="default %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for m, k, n in SIZES:
        a, b = torch.randn(m, k), torch.randn(k, n)
        low = [factor.to(getattr(torch, options.dtype)) for factor in (a, b)]
        wide, narrow = (least(lambda pair=pair: torch.mm(*pair), options.repetitions) for pair in ((a, b), low))
        share = f"{m * k * n / FEW:.2f}"
        rows.append([f"{m} x {k} x {n}", f"{wide:.1f}", f"{narrow:.1f}", f"{narrow / wide:.2f}", share])
    print(markdown(["product", "float32", options.dtype, "ratio", f"times {FEW:,} multiplications"], rows))


if __name__ == "__main__":
    main()
