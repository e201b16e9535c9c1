"""Speed and memory of a training step, side by side with other packages.

python -m tests.benchmarks --device cpu --quick             # five minutes on two cores
python -m tests.benchmarks --device cpu --readme            # the four rows of the README, small and large, ten minutes
python -m tests.benchmarks --device cuda --jobs 4           # the cases of a GPU
python -m tests.benchmarks --device cpu --scaling           # time and memory against steps, batch and width, drawn

Every contender on a case has a process of its own. It compiles, with empty caches; then all of them train in turns, so
that what else the machine does falls on all alike. A table holds medians, quartiles, and ratios to a baseline, taken
within each round of turns. The results are written as JSON and as Markdown. The reference package (rampde) and
torchdiffeq take part where they can be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rampde_fx.torch_private import kernels
from tests.benchmarks import scaling, tables
from tests.benchmarks.cases import FULL, README, resized
from tests.benchmarks.cases import QUICK as QUICK_CASES
from tests.benchmarks.contenders import ALL, BASELINE, taking_part
from tests.benchmarks.turns import run_case

PACKAGES = ("torch", "torchdiffeq", "rampde", "triton", "numpy")


def surroundings(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else _processor(),
        "versions": versions,
        "settings": {
            "threads": options.threads,
            "rounds": options.rounds,
            "seconds of a turn": options.turn,
            "compiled at a time": options.jobs,
            "TF32": options.tf32,
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} cores, {_arithmetic()}"


def _arithmetic() -> str:
    """The low dtypes in which the CPU multiplies."""
    has = {"bfloat16": kernels.cpu_has_bfloat16(), "float16": kernels.cpu_multiplies(torch.float16)}
    found = [dtype for dtype, supported in has.items() if supported]
    return f"arithmetic for {' and '.join(found)}" if found else "no arithmetic for bfloat16 or float16"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="small cases, fewer contenders")
    parser.add_argument("--readme", action="store_true", help="one flow, small and large, the contenders of the README")
    parser.add_argument("--scaling", action="store_true", help="sweep steps, batch and width instead")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="by name; default all")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="by name; default all, or the quick ones")
    parser.add_argument("--batch", type=int, help="another batch than that of the cases")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender, default %(default)s")
    parser.add_argument("--turn", type=float, metavar="S", help="seconds of a turn, default 0.5, quick 0.2")
    parser.add_argument("--jobs", type=int, help="how many contenders compile at a time, default 1, quick 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, default %(default)s")
    parser.add_argument("--longest-unrolled", type=int, metavar="N", default=32, help="default %(default)s steps")
    parser.add_argument("--tf32", action="store_true", help="let float32 products use TF32")
    parser.add_argument("--out", type=Path, default=Path("examples/out/benchmarks"), help="default %(default)s")
    parser.add_argument("--list", action="store_true", help="list cases and contenders")
    options = parser.parse_args(arguments)
    options.turn = options.turn or (0.2 if options.quick else 0.5)
    options.jobs = options.jobs or (2 if options.quick else 1)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    # Sweeps on a CPU begin at the sizes of the small cases.
    options.known = QUICK_CASES if options.quick or (options.scaling and options.device == "cpu") else FULL
    options.known = README if options.readme else options.known
    known = [case.name for case in options.known]
    names = [contender.name for contender in ALL]
    for option, given, allowed in (("cases", options.cases, known), ("contenders", options.contenders, names)):
        if wrong := [name for name in given or [] if name not in allowed]:
            parser.error(f"--{option}: no {', '.join(wrong)}; there are {', '.join(allowed)}")
    return options


def main() -> None:
    """Run, print and write."""
    options = parse()
    cases = [resized(c, batch=options.batch) for c in options.known if c.name in (options.cases or c.name)]
    if options.list:
        print("\n".join([*(f"case {c.name}: {c.what()}" for c in cases), *(f"contender {c.name}" for c in ALL)]))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    report = surroundings(options)
    kinds = [kind for kind in ("quick", "readme", "scaling") if getattr(options, kind)]
    name = "-".join([options.device, *kinds])
    if options.scaling:
        report |= scaling.sweep(options, cases)
        scaling.draw(report, options.out / f"{name}.png")
        text = scaling.table(report)
    else:
        chosen = [
            taking_part(case, quick=options.quick, readme=options.readme, names=options.contenders) for case in cases
        ]
        with tqdm(total=sum(map(len, chosen)), unit="contender", disable=None) as progress:
            report["baseline"] = BASELINE
            report["cases"] = [
                run_case(case, some, options, progress) for case, some in zip(cases, chosen, strict=True)
            ]
        text = tables.report(report)
    (options.out / f"{name}.json").write_text(json.dumps(report, indent=1))
    (options.out / f"{name}.md").write_text(text)
    print(text)
    print(f"written: {options.out}/{name}.json and .md", file=sys.stderr)


if __name__ == "__main__":
    main()
