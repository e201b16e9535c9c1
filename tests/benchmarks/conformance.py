"""The methods that torchdiffeq has too, with the same steps, against it: relative differences, in the Euclidean norm.

python -m tests.benchmarks.conformance [--loss weighted] [--compiler aot_eager]

Needs torchdiffeq (pip install torchdiffeq). Three problems: Linear and Sine of tests/problems.py, on ten times from 1
to 8, and a two-layer tanh network of (t, y) on ten times from 0 to 1. Either one step leads from each time to the next,
or the steps have a size of their own, and no step but the last ends at one of the times. torchdiffeq adapts the steps
of bosh3, dopri5 and dopri8; step_t and tolerances that are never missed make it take one step from each time to the
next. These steps are constants to it, so that the gradient of t is not compared. The loss is the mean of the squares of
the solution at all times, each with a random weight from [0, 1), or without. Whatever differs by more than 1e-6 in
float32 is listed below the table, beside the distance of either package from its own float64, and, for the gradient of
t, the cancellation in it: how much larger the products of adjoint and velocity are than their sums.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import rampde_fx
from tests.comparison import compiled
from tests.models import Velocity
from tests.problems import Linear, Sine, exact, times

FIXED = {"euler": "euler", "midpoint": "midpoint", "heun2": "heun2", "heun3": "heun3", "rk4": "rk4_38"}
ADAPTIVE = {name: name for name in ("bosh3", "dopri5", "dopri8")}
QUANTITIES = ("y", "y0", "t", "parameters")
CLAIM = 1e-6

Solver = Callable[..., torch.Tensor]
Found = list[torch.Tensor | None]


def problems() -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor, float]]:
    """Velocity, initial state, times and step size, in float64."""
    t = times()
    linear, sine, network = Linear().double(), Sine(), Velocity().double()
    return {
        "linear": (linear, exact(linear, t)[0], t, 0.11),
        "sine": (sine, exact(sine, t)[0], t, 0.11),
        "network": (network, torch.randn(16, 5, dtype=torch.float64), torch.linspace(0, 1, 10).double(), 0.03),
    }


def solved(
    solver: Solver, velocity: nn.Module, y0: torch.Tensor, t: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype
) -> Found:
    """The solution, and the gradients of y0, t and all parameters together, None where there are none."""
    y0, t = (value.to(dtype).requires_grad_() for value in (y0, t))
    y = solver(velocity, y0, t)
    parameters = tuple(velocity.parameters())
    of_y0, of_t, *others = torch.autograd.grad((weights.to(dtype) * y.square()).mean(), (y0, t, *parameters))
    return [y.detach(), of_y0, of_t, torch.cat([g.flatten() for g in others]) if others else None]


def differences(found: Found, wanted: Found) -> list[float | None]:
    """Relative to what is wanted, None where there is nothing to compare."""
    return [
        None if f is None or w is None else ((f.double() - w.double()).norm() / w.double().norm()).item()
        for f, w in zip(found, wanted, strict=True)
    ]


def steps_of(theirs: str, t: torch.Tensor, step_size: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What torchdiffeq and rampde_fx are given to take the same steps: of one size, or where None from time to time."""
    if theirs in ADAPTIVE:
        ends = {"step_t": t[1:], "first_step": float(t[-1] - t[0])}
        return {"rtol": 1e6, "atol": 1e6, "options": ends}, {"options": {"num_steps": 1}}
    fixed = {} if step_size is None else {"options": {"step_size": step_size}}
    return fixed, fixed


def cancellation(velocity: nn.Module, y0: torch.Tensor, t: torch.Tensor, found: Found) -> float:
    """The products in dL/dy0 f(t[0], y0), of which times' gradients consist, in magnitude over the norm of t's."""
    _, of_y0, of_t, _ = found
    with torch.no_grad():
        return ((of_y0 * velocity(t[0], y0)).abs().sum() / of_t.norm()).item()


def printed(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def largest(values: list[float | None]) -> str:
    return printed(max(value for value in values if value is not None))


def on_a_step(peer: Any) -> None:
    """The gradient of an output time at which a step ends, beside the difference quotients to either side."""
    t, delta = torch.linspace(0, 1, 5, dtype=torch.float64), 1e-6

    def loss(odeint: Solver, t: torch.Tensor) -> torch.Tensor:
        y0 = torch.ones((), dtype=torch.float64)
        y = odeint(lambda t, y: torch.cos(t) - 2 * y, y0, t, method="euler", options={"step_size": 0.125})
        return y.square().sum()

    gradients = []
    for odeint in (peer.odeint, rampde_fx.odeint):
        moved = t.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(odeint, moved), moved)[0])
    print("| gradient of the loss by | " + " | ".join(f"t = {value:g}" for value in t.tolist()) + " |")
    print("|---|" + "--:|" * len(t))
    shifts = delta * torch.eye(len(t), dtype=torch.float64)
    for name, values in (
        ("torchdiffeq", gradients[0]),
        ("rampde_fx", gradients[1]),
        ("difference to the left", [(loss(peer.odeint, t) - loss(peer.odeint, t - shift)) / delta for shift in shifts]),
        (
            "difference to the right",
            [(loss(peer.odeint, t + shift) - loss(peer.odeint, t)) / delta for shift in shifts],
        ),
    ):
        print(f"| {name} | " + " | ".join(f"{float(value):+.4f}" for value in values) + " |")


def main() -> None:
    """Print one row per method, problem and kind of steps, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", default="weighted", choices=["weighted", "unweighted"])
    parser.add_argument("--compiler", default="aot_eager", choices=["inductor", "aot_eager", "eager"])
    options = parser.parse_args()
    try:
        import torchdiffeq
    except ImportError:
        sys.exit("this comparison needs torchdiffeq: pip install torchdiffeq")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    single, double = torch.float32, torch.float64
    rows, notes = [], []
    chosen = problems()
    cases = [*product(FIXED.items(), chosen.items(), (False, True))]
    cases += product(ADAPTIVE.items(), chosen.items(), (False,))
    for (theirs, ours), (name, (velocity, y0, t, step_size)), by_size in tqdm(cases, unit="case", disable=None):
        torch.compiler.reset()
        given = steps_of(theirs, t, step_size if by_size else None)
        peer = partial(torchdiffeq.odeint, method=theirs, **given[0])
        own = partial(rampde_fx.odeint, method=ours, **given[1])
        narrow = copy.deepcopy(velocity).to(single)
        weights = torch.rand(len(t), *y0.shape).double() if options.loss == "weighted" else torch.ones(()).double()

        def rewritten(velocity: nn.Module, y0: torch.Tensor, t: torch.Tensor, own: Solver = own) -> torch.Tensor:
            return compiled(lambda y0, t: own(velocity, y0, t), torch.float32, options.compiler)(y0, t)

        wanted, found, after = (solved(run, narrow, y0, t, weights, single) for run in (peer, own, rewritten))
        wanted_double, found_double = (solved(run, velocity, y0, t, weights, double) for run in (peer, own))
        lost = [None, None, cancellation(velocity, y0, t, wanted_double), None]
        if theirs in ADAPTIVE:
            wanted[2] = wanted_double[2] = None
        plain, low = differences(found, wanted), differences(after, wanted)
        rounding = differences(wanted, wanted_double)
        case = f"{theirs if theirs == ours else f'{theirs}, {ours}'} | {name} | {step_size if by_size else 't'}"
        cells = [*map(printed, plain), *map(printed, low), largest(differences(found_double, wanted_double))]
        rows.append(f"| {case} | {' | '.join(cells)} | {largest(rounding)} |")
        own_rounding = differences(found, found_double), differences(after, found_double)
        for quantity, *values in zip(QUANTITIES, plain, low, rounding, *own_rounding, lost, strict=True):
            if not all(value is None or value <= CLAIM for value in values[:2]):
                notes.append(f"| {case} | {quantity} | {' | '.join(map(printed, values))} |")
    print(f"torchdiffeq {torchdiffeq.__version__}, torch {torch.__version__}, {options.loss}, {options.compiler}\n")
    groups = [f"{kind}: {quantity}" for kind in ("uncompiled", "compiled") for quantity in QUANTITIES]
    print(f"| method | problem | steps | {' | '.join(groups)} | float64, largest | rounding, largest |")
    print("|---|---|---|" + "--:|" * (len(groups) + 2))
    print("\n".join(rows))
    if notes:
        print(f"\n| above {CLAIM:g} | problem | steps | of | uncompiled | compiled ", end="")
        print("| rounding of torchdiffeq | of rampde_fx, uncompiled | of rampde_fx, compiled | cancellation |")
        print("|---|---|---|---|" + "--:|" * 6)
        print("\n".join(notes))
    print()
    on_a_step(torchdiffeq)


if __name__ == "__main__":
    main()
