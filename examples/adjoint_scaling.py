"""The adjoint-scaling problem: gradients far below float16's smallest number, with and without scaling.

    y' = p(t) y,  p(t) = -(a t^2 + b t + c),  a = 8, b = -10, c = 2^-16,  y(0) = 65504 / 180,  L = y(T)^2 / 2,  T = 2.65

by classical RK4 on 400 time points. y rises to nearly 5000 and falls to 2e-4; dL/dy(t) runs through 1e-11. With
P = a T^3/3 + b T^2/2 + c T the solution is y(T) = y0 exp(-P), and the gradients are

    dL/dy0 = y(T)^2 / y0,  dL/da = -y(T)^2 T^3/3,  dL/db = -y(T)^2 T^2/2,  dL/dc = -y(T)^2 T.

A velocity evaluation rounds twice: y at the cast, and the product p y; p itself depends on no state and stays fp32.
A relative error eps of the velocity at time t changes y(T) by the relative amount dt p(t) eps to first order, times the
weight w of the RK4 stage. With |eps| <= u for each rounding and u the unit roundoff of the velocity dtype,

    |dy/y| <= 2u sum dt w |p|                     at worst, and
    |dy/y| about u sqrt(2 / (8 ln 2) sum (dt w p)^2)  in the mean square,

if the errors are independent: u^2 / (8 ln 2) is the mean square of a relative rounding error when the significand is
distributed logarithmically. dL/dy0 = y(T) dy(T)/dy0 has the errors of two sweeps: twice at worst, sqrt(2) in the mean.
Source: arXiv 2510.23498.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, compiled, markdown, positive, progress, rk4, save, unit_roundoff, write_csv
from matplotlib.figure import Figure
from torch import Tensor, fx, nn

import rampde_fx
from rampde_fx import PrecisionPolicy

A, B, C = 8.0, -10.0, 2.0**-16
END, START = 2.65, 65504 / 180
QUANTITIES = ("y(T)", "dL/dy0", "dL/da", "dL/db", "dL/dc")
# Further initial values, over one octave: every significand once. The errors of one start are one draw.
STARTS = 256


class Decay(nn.Module):
    """y' = -(a t^2 + b t + c) y, by RK4."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(value)) for value in (A, B, C))

    def velocity(self, t: Tensor, y: Tensor) -> Tensor:
        """The right-hand side."""
        return -(self.a * t**2 + self.b * t + self.c) * y

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        """Integrates y (starts,) over the time points t."""
        for t_i, dt in rampde_fx.steps(t):
            y = rk4(self.velocity, t_i, dt, y)
        return y


def initial_values() -> Tensor:
    """(STARTS,): the problem's own first, the others below it within one octave."""
    return START * torch.exp2(-torch.arange(STARTS) / STARTS)


def closed_form(y0: Tensor) -> Tensor:
    """(5, starts): the QUANTITIES for each initial value, in fp64."""
    y0 = y0.double()
    y = y0 * math.exp(-(A * END**3 / 3 + B * END**2 / 2 + C * END))
    return torch.stack([y, y**2 / y0, -(y**2) * END**3 / 3, -(y**2) * END**2 / 2, -(y**2) * END])


@dataclass
class Measured:
    """One row of the table.

    Attributes:
        values: (5,) the QUANTITIES of the problem itself.
        final: (STARTS,) y(T) of every initial value.
        gradient: (STARTS,) dL/dy0 of every initial value.
        seconds: Duration, with capture and compilation.
    """

    values: Tensor
    final: Tensor
    gradient: Tensor
    seconds: float


def measure(model: Any, parameters: list[Tensor], y0: Tensor, t: Tensor) -> Measured:
    """Runs a model, compiled or not. One shape serves both the problem itself and its further initial values."""
    begin = time.perf_counter()
    leaf = y0.detach().requires_grad_()
    final = model(leaf, t)
    # The other starts get the cotangent zero, and add nothing to the parameters' gradients.
    own = torch.autograd.grad(final[0] ** 2 / 2, [leaf, *parameters])
    (gradient,) = torch.autograd.grad((model(leaf, t) ** 2).sum() / 2, leaf)
    values = torch.stack([final[0].double(), own[0][0].double(), *(g.double() for g in own[1:])])
    return Measured(values.detach(), final.detach().double(), gradient.double(), time.perf_counter() - begin)


def bounds(t: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Relative error of y(T) from rounding the velocity: at worst, and in the mean square."""
    t = t.double()
    dt = t.diff()
    stages = [(1 / 6, t[:-1]), (1 / 3, t[:-1] + dt / 2), (1 / 3, t[:-1] + dt / 2), (1 / 6, t[1:])]
    terms = torch.stack([weight * dt * (A * s**2 + B * s + C) for weight, s in stages])
    u = unit_roundoff(dtype)
    return 2 * u * terms.abs().sum().item(), u * math.sqrt(2 / (8 * math.log(2)) * terms.square().sum().item())


@torch.no_grad()
def rounded(y: Tensor, t: Tensor, dtype: torch.dtype, cast: bool, product: bool) -> Tensor:
    """y(T) by plain fp32 code in which the velocity rounds its state, its product or both to the dtype."""
    decay = Decay()

    def velocity(time: Tensor, state: Tensor) -> Tensor:
        k = decay.velocity(time, state.to(dtype).float() if cast else state)
        return k.to(dtype).float() if product else k

    for i in range(len(t) - 1):
        y = rk4(velocity, t[i], t[i + 1] - t[i], y)
    return y.double()


@dataclass
class Trajectory:
    """The rewritten step and its adjoint, run step by step.

    Attributes:
        states: (points,) y.
        adjoints: (points,) dL/dy.
        scales: (steps, 4) the scale of each VJP, from the last stage to the first; empty without scaling.
    """

    states: Tensor
    adjoints: Tensor
    scales: Tensor


class ScaleRecorder(fx.Interpreter):
    """Runs an adjoint and keeps the scales that it chooses."""

    def __init__(self, adjoint: fx.GraphModule) -> None:
        super().__init__(adjoint)
        self.scales: list[Tensor] = []

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As the base class does it; a call of an adjoint_scale submodule returns (scale,)."""
        results = super().call_module(target, args, kwargs)
        if target.startswith("adjoint_scale"):
            self.scales.append(results[0])
        return results


@torch.no_grad()
def trajectory(policy: PrecisionPolicy, t: Tensor) -> Trajectory:
    """Runs the graphs that the rewrite generates for the policy over all of t, outside of the compiled loop."""
    decay = rampde_fx.mixed_precision(Decay(), policy=policy)
    y = torch.full((1,), START)
    with torch.enable_grad():  # else there is no adjoint
        loop = rampde_fx.explain(decay, y.clone().requires_grad_(), t[:4]).loops[0]
    target = torch.tensor(1.0 if loop.target is None else loop.target)
    known = {"a": decay.a, "b": decay.b, "c": decay.c, "target": target}
    known |= {f"total_{name}": torch.zeros(()) for name in "abc"}  # of the parameters' gradients, not drawn

    def inputs(graph: fx.GraphModule, i: int, **values: Tensor) -> list[Tensor]:
        values = {**known, "t": t[i], "dt": t[i + 1] - t[i], **values}
        return [values[node.name] for node in graph.graph.find_nodes(op="placeholder")]

    states = [y]
    for i in range(len(t) - 1):
        states.append(loop.step(*inputs(loop.step, i, y=states[-1]))[0])
    adjoints, scales = [states[-1]], []  # dL/dy(T) = y(T)
    for i in reversed(range(len(t) - 1)):
        recorder = ScaleRecorder(loop.adjoint)
        stored = states[i].to(loop.policy.storage_dtype)
        adjoints.append(recorder.run(*inputs(loop.adjoint, i, y=stored, adjoint_y=adjoints[-1]))[0])
        scales.append(recorder.scales)
    rows = [torch.stack(row) for row in reversed(scales) if row]
    return Trajectory(
        torch.cat(states), torch.cat(adjoints[::-1]), torch.stack(rows) if rows else torch.empty(0, len(t) - 1)
    )


def draw(t: Tensor, scaled: Trajectory, unscaled: Trajectory, errors: dict[str, list[float]], path: Path) -> None:
    """Draws solution, adjoint and scales in float16 over time, and the errors (5,) of every row."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    (state, error), (adjoint, scale) = figure.subplots(2, 2)
    low = torch.finfo(torch.float16)
    y = scaled.states
    p = (A * t**2 + B * t + C).abs()
    state.plot(t, y, label="|y|")
    state.plot(t, p * y, linewidth=1, label="|velocity|")
    state.axhline(low.max, color="gray", linewidth=0.8, linestyle=":")
    state.annotate("largest float16", (0, low.max), (2, -9), textcoords="offset points", fontsize=8, color="gray")
    state.set(title="solution and velocity", yscale="log", ylim=(1e-5, 3e5))

    exact = closed_form(torch.tensor([START]))[0] ** 2 / START
    growth = torch.exp(A * t.double() ** 3 / 3 + B * t.double() ** 2 / 2 + C * t.double())
    adjoint.plot(t, exact * growth, color="black", linewidth=3, alpha=0.25, label="closed form")
    adjoint.plot(t, scaled.adjoints.abs(), label="float16, scaled")
    adjoint.plot(t, unscaled.adjoints.abs(), "--", label="float16, not scaled")
    tiny = low.smallest_normal * low.eps
    adjoint.axhline(tiny, color="gray", linewidth=0.8, linestyle=":")
    adjoint.annotate("smallest float16", (0, tiny), (2, 3), textcoords="offset points", fontsize=8, color="gray")
    adjoint.set(title="adjoint |dL/dy(t)|", yscale="log")

    for column, name in ((0, "last stage, cotangent of dt/6 dL/dy"), (1, "third stage, of dt/3 dL/dy")):
        scale.step(t[:-1], scaled.scales[:, column].log2(), where="post", linewidth=1.2, label=name)
    scale.set(title="scale of the VJP, power of two", ylabel="log2 of the scale")

    positions = torch.arange(len(QUANTITIES))
    for i, (marker, (name, values)) in enumerate(zip("osD^vP*Xh", errors.items(), strict=False)):
        shift = 0.08 * (i - (len(errors) - 1) / 2)
        error.plot(positions + shift, values, marker, markersize=5, label=name)
    error.set(title="relative error against the closed form", yscale="log", ylim=(1e-6, 1e11))
    error.set_xticks(positions, QUANTITIES)
    for axes in (state, adjoint, scale):
        axes.set(xlabel="t", xlim=(0, END))
    for axes in (state, adjoint, scale, error):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, ncols=2 if axes is error else 1)
    save(figure, path)


def rows(dtypes: list[str]) -> dict[str, PrecisionPolicy]:
    """The policies to measure, by the name of their row."""
    found = {}
    for name in dtypes:
        for scaling in ("dynamic", "none"):
            label = f"{name}, {'scaled' if scaling == 'dynamic' else 'not scaled'}"
            found[label] = PrecisionPolicy(velocity=DTYPES[name], scaling=scaling)
        if name != "float32":
            found[f"{name}, scaled, states in float32"] = PrecisionPolicy(
                velocity=DTYPES[name], storage=torch.float32, scaling="dynamic"
            )
    return found


def print_bounds(dtypes: list[str], measured: dict[str, Measured], t: Tensor) -> None:
    """Prints what rounding the velocity costs: bounds, the errors of all initial values, and where they come from."""
    y0 = initial_values()
    exact = torch.stack([measured["RK4 in float64"].final, measured["RK4 in float64"].gradient])
    lines = []
    for name in dtypes:
        worst, mean = bounds(t, DTYPES[name])
        found = measured[f"{name}, scaled"]
        errors = torch.stack([found.final, found.gradient]) / exact - 1
        for i, factor in ((0, 1.0), (1, 2.0)):
            error = errors[i]
            numbers = [error[0].abs(), error.square().mean().sqrt(), error.abs().max()]
            expected = [math.sqrt(factor) * mean, factor * worst]
            lines.append([f"{name}, {QUANTITIES[i]}", *(f"{x:.1e}" for x in [*numbers, *expected])])
    header = ["against RK4 in float64", "this problem", "rms", "largest", "expected rms", "worst case"]
    print(f"\nAll {STARTS} initial values in one octave, and the a-priori bounds\n\n{markdown(header, lines)}")

    lines = []
    for name in dtypes:
        for label, cast, product in (("y alone", True, False), ("p y alone", False, True), ("both", True, True)):
            error = rounded(y0, t, DTYPES[name], cast, product) / exact[0] - 1
            lines.append([f"{name}: {label}", f"{error.square().mean().sqrt():.1e}", f"{error.abs().max():.1e}"])
    print(f"\nWhat the velocity rounds, in y(T)\n\n{markdown(['rounded', 'rms', 'largest'], lines)}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="The adjoint-scaling problem: gradients of 1e-10 in float16 and bfloat16 against the closed form.",
        epilog="Writes adjoint_scaling.csv and adjoint_scaling.png to --out, and prints the tables as Markdown. Most "
        "of the time goes into Dynamo's capture of the loop, step by step; --points 100 gives a quick look.",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        metavar="DTYPE",
        choices=DTYPES,
        default=list(DTYPES),
        help="of the velocity evaluations, default all: float32 bfloat16 float16",
    )
    parser.add_argument("--points", metavar="N", type=positive, default=400, help="time points, default %(default)s")
    parser.add_argument(
        "--compiler",
        choices=["inductor", "aot_eager"],
        default="aot_eager",
        help="what compiles the rewritten graph, default %(default)s",
    )
    out = Path("examples/out/adjoint_scaling")
    parser.add_argument("--out", metavar="DIR", type=Path, default=out, help="output folder, default %(default)s")
    parsed = parser.parse_args(arguments)
    if parsed.points < 5:
        parser.error("--points must be at least 5")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Runs the example and returns its exit status."""
    options = parse_arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # on tensors this small, threads wait for each other
    t, y0 = torch.linspace(0, END, options.points), initial_values()

    reference = Decay().double()
    measured = {"RK4 in float64": measure(reference, list(reference.parameters()), y0.double(), t.double())}
    policies = rows(options.dtypes)
    bar = progress(len(policies), "", "policy")
    for name, policy in policies.items():
        bar.set_description(f"{name}: {options.points - 1} steps")
        model = Decay()
        function = compiled(model, policy, options.compiler)
        measured[name] = measure(function, list(model.parameters()), y0, t)
        bar.update()
    bar.close()

    errors = {}
    for against, exact in (("the closed form", closed_form(y0)[:, 0]), ("RK4 in float64", None)):
        found = {
            name: (m.values / (measured["RK4 in float64"].values if exact is None else exact) - 1).abs().tolist()
            for name, m in measured.items()
        }
        errors[against] = found
        lines = [[name, *(f"{value:.1e}" for value in values)] for name, values in found.items()]
        print(f"\nRelative errors against {against}\n\n{markdown(['velocity', *QUANTITIES], lines)}")
    # In float32 the accumulation rounds as much as the velocity, and the bounds do not count it.
    low = [name for name in options.dtypes if name != "float32"]
    if low:
        print_bounds(low, measured, t)

    write_csv(
        options.out / "adjoint_scaling.csv",
        ["row", "against", *QUANTITIES, "seconds"],
        [
            [name, against, *values, measured[name].seconds]
            for against, found in errors.items()
            for name, values in found.items()
        ],
    )
    scaled, unscaled = (
        trajectory(PrecisionPolicy(torch.float16, scaling=scaling), t) for scaling in ("dynamic", "none")
    )
    draw(t, scaled, unscaled, errors["the closed form"], options.out / "adjoint_scaling.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
