"""Time and memory as the steps, the batch and the width grow, with the roofline.

The roofline is the time that the matrix products of the scheme take (forward, recomputation and backward) at the rate
that the best square product of the dtype reaches on the same device.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.benchmarks import measure
from tests.benchmarks.cases import Case, resized
from tests.benchmarks.contenders import ALL, BASELINE, Contender, solve_by_loop
from tests.benchmarks.tables import markdown, surroundings
from tests.benchmarks.turns import run_case

CONTENDERS = (
    BASELINE,
    "rampde_fx bfloat16, scan",
    "rampde_fx float16, scan",
    f"{BASELINE}, CUDA graph",
    "rampde_fx float16, scan, CUDA graph",
    "eager float32",
    "torchdiffeq odeint",
    "torchdiffeq odeint_adjoint",
    "rampde float32",
    "rampde bfloat16",
    "rampde float16",
)
ONLY_GPU = re.compile("float16|CUDA")
# What grows, and to what: on a CPU and on a GPU.
SWEEPS = {
    "cpu": {"steps": (8, 32, 128, 512, 2048), "batch": (16, 64, 256, 1024), "width": (16, 64, 256)},
    "cuda": {"steps": (8, 32, 128, 512, 2048), "batch": (64, 1024, 16384, 131072), "width": (64, 256, 1024, 4096)},
}
QUICK = {"steps": (8, 32), "batch": (16, 64)}
COUNTED = 2  # steps whose operations are counted; those of N steps are N / 2 times as many


def sweep(options: argparse.Namespace, cases: list[Case]) -> dict[str, Any]:
    """The results of every size of every case, and the rates of the device."""
    device = torch.device(options.device)
    names = options.contenders or [n for n in CONTENDERS if options.device == "cuda" or not ONLY_GPU.search(n)]
    contenders = [contender for contender in ALL if contender.name in names]
    rates = {str(d).removeprefix("torch."): measure.product_rate(d, device) for d in _dtypes(contenders)}
    sizes = QUICK if options.quick else SWEEPS[options.device]
    points = [(c, what, value) for c in cases[:1] for what, values in sizes.items() for value in values]
    found = []
    with tqdm(total=len(points) * len(contenders), unit="contender", disable=None) as progress:
        for case, what, value in points:
            sized = resized(case, **{what: value})
            result = run_case(sized, contenders, options, progress)
            found.append({**result, "sweep": what, "value": value, "flops": flops(sized, device)})
    return {"rates": rates, "points": found}


def _dtypes(contenders: list[Contender]) -> list[torch.dtype]:
    found = [contender.policy.velocity for contender in contenders if contender.policy is not None]
    return list(dict.fromkeys([torch.float32, *found]))


def flops(case: Case, device: torch.device) -> float:
    """Floating-point operations of the products and convolutions of a training step by the scheme."""
    short = case if case.per_step else resized(case, steps=COUNTED)
    model, x, t = short.build(solve_by_loop, device)
    return measure.scheme_flops(lambda: model(x, t), model) * case.steps / short.steps


def dtype_of(contender: str) -> str:
    """The dtype in a contender's name."""
    return next((name for name in ("bfloat16", "float16") if name in contender), "float32")


def roofline(point: dict[str, Any], dtype: str, report: dict[str, Any]) -> float:
    """Seconds that the products alone take at the measured rate."""
    seconds: float = point["flops"] / report["rates"].get(dtype, report["rates"]["float32"])
    return seconds


def table(report: dict[str, Any]) -> str:
    """One row for each size and contender."""
    rows = []
    for point in report["points"]:
        for name, result in point["results"].items():
            share = roofline(point, dtype_of(name), report) / result["seconds"]
            row = [f"{point['sweep']} {point['value']}", name, f"{1e3 * result['seconds']:.3g}", f"{share:.0%}"]
            mib = (f"{result[which] / measure.MIB:.3g}" for which in ("saved_bytes", "peak_bytes"))
            rows.append([*row, *mib, f"{result['first_step']:.1f}"])
    head = ["size", "contender", "training step (ms)", "of the roofline", "saved (MiB)", "peak (MiB)", "first step (s)"]
    rates = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in report["rates"].items())
    skipped = [
        f"- {point['sweep']} {point['value']}, {name}: {reason}"
        for point in report["points"]
        for name, reason in point["skipped"].items()
    ]
    parts = [surroundings(report), f"Best matrix products: {rates}.", markdown(head, rows)]
    return "\n\n".join([*parts, *(["Not run:\n" + "\n".join(skipped)] if skipped else [])]) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """A column for each sweep: the time of a training step above, the bytes saved for its backward below."""
    from matplotlib.figure import Figure

    sweeps = list(dict.fromkeys(point["sweep"] for point in report["points"]))
    figure = Figure(figsize=(4.6 * len(sweeps), 8), layout="constrained")
    panels = figure.subplots(2, len(sweeps), sharey="row", squeeze=False)
    names = list(dict.fromkeys(name for point in report["points"] for name in point["results"]))
    for what, (upper, lower) in zip(sweeps, panels.T, strict=True):
        points = [point for point in report["points"] if point["sweep"] == what]
        for i, name in enumerate(names):
            own = [point for point in points if name in point["results"]]
            # Lines that coincide show all of their markers.
            style: dict[str, Any] = {"marker": "o", "markersize": 4 + 3 * (len(names) - 1 - i), "fillstyle": "none"}
            style |= {"linewidth": 1.2, "label": name, "color": f"C{i}"}
            values = [point["value"] for point in own]
            upper.loglog(values, [1e3 * point["results"][name]["seconds"] for point in own], **style)
            saved = [point["results"][name]["saved_bytes"] / measure.MIB for point in own]
            lower.loglog(values, saved, **style)
        values = [point["value"] for point in points]
        for dtype, dash in zip(report["rates"], ("--", "-.", ":"), strict=False):
            bound = [1e3 * roofline(point, dtype, report) for point in points]
            upper.loglog(values, bound, dash, color="black", linewidth=1, label=f"roofline, {dtype}")
        lower.set_xlabel(what)
        for axes in (upper, lower):
            axes.grid(alpha=0.2)
            axes.set_xticks(values, [f"{value:,}" for value in values])
            axes.minorticks_off()
    panels[0][0].set_ylabel("training step (ms)")
    panels[1][0].set_ylabel("saved for the backward (MiB)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=120)
