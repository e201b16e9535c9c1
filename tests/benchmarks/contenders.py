"""Who takes part in the benchmarks: ways to solve the same neural ODE, and to train through the solution."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

import rampde_fx
from rampde_fx import PrecisionPolicy
from tests.benchmarks.cases import Case, Solve

SHORT = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def solve_by_loop(velocity: nn.Module, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The classical Runge-Kutta method in a marked loop, which is plain torch code under any other backend."""
    for i, (t_i, dt) in enumerate(rampde_fx.steps(t)):
        f = velocity[i] if isinstance(velocity, nn.ModuleList) else velocity
        k1 = f(t_i, y)
        k2 = f(t_i + dt / 2, y + dt / 2 * k1)
        k3 = f(t_i + dt / 2, y + dt / 2 * k2)
        k4 = f(t_i + dt, y + dt * k3)
        y = y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


def solve_by_odeint(velocity: nn.Module, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The same, captured once; a loop where every step has weights of its own."""
    if isinstance(velocity, nn.ModuleList):
        return solve_by_loop(velocity, y, t)
    end: torch.Tensor = rampde_fx.odeint(velocity, y, t, method="rk4")[-1]
    return end


def solver_of(module: str, function: str) -> Solve:
    """The solver of another package, called once for each step where the weights change."""

    def solve(velocity: nn.Module, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        odeint = getattr(importlib.import_module(module), function)
        if not isinstance(velocity, nn.ModuleList):
            end: torch.Tensor = odeint(velocity, y, t, method="rk4")[-1]
            return end
        for i, f in enumerate(velocity):
            y = odeint(f, y, t[i : i + 2], method="rk4")[-1]
        return y

    return solve


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Attributes:
        name: As the tables show it.
        solve: How the ODE is solved.
        backend: Of torch.compile, None for uncompiled.
        policy: For the rampde_fx backend.
        autocast: The dtype of an autocast region round the model, None without.
        package: What must be importable.
        unrolled: Whether the time to compile grows with the number of steps.
        cpp_wrapper: Whether Inductor writes what calls its kernels in C++ instead of Python.
        mode: Of torch.compile.
    """

    name: str
    solve: Solve
    backend: str | None = None
    policy: PrecisionPolicy | None = None
    autocast: torch.dtype | None = None
    package: str = "torch"
    unrolled: bool = False
    cpp_wrapper: bool = False
    mode: str | None = None

    def absent(self, case: Case, device: str, longest_unrolled: int) -> str:
        """Why it does not take part, or an empty string."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.unrolled and case.steps > longest_unrolled:
            return f"more than {longest_unrolled} unrolled steps (--longest-unrolled)"
        if self.package == "rampde" and self.autocast is not None and device != "cuda":
            return "its low precision is CUDA's autocast"
        if self.mode is not None and device != "cuda":
            return "CUDA graphs need a GPU"
        return ""

    def prepare(self, case: Case, device: torch.device) -> tuple[Callable[[], torch.Tensor], nn.Module]:
        """A function that computes the loss, and the Module with the parameters; nothing is compiled yet."""
        importlib.import_module(self.package)  # not part of the first step
        model, x, t = case.build(self.solve, device)
        function: Callable[..., torch.Tensor] = model
        if self.policy is not None:
            function = rampde_fx.mixed_precision(model, policy=self.policy)
        if self.backend is not None:
            how = {"mode": self.mode} if self.mode else {"options": {"cpp_wrapper": True}} if self.cpp_wrapper else {}
            function = torch.compile(function, backend=self.backend, fullgraph=True, dynamic=False, **how)

        def loss() -> torch.Tensor:
            region = torch.autocast(device.type, self.autocast) if self.autocast else contextlib.nullcontext()
            with region:
                return function(x, t)

        return loss, model


def _rampde_fx(dtype: torch.dtype, loop: str) -> Contender:
    policy = PrecisionPolicy(velocity=dtype, loop=loop)
    name = f"rampde_fx {SHORT[dtype]}, {loop}"
    if loop == "unroll":
        return Contender(name, solve_by_loop, "rampde_fx", policy, unrolled=True)
    return Contender(name, solve_by_odeint, "rampde_fx", policy)


def _kept(dtype: torch.dtype) -> Contender:
    policy = PrecisionPolicy(velocity=dtype, loop="scan", checkpoint="none")
    return Contender(f'rampde_fx {SHORT[dtype]}, scan, checkpoint="none"', solve_by_odeint, "rampde_fx", policy)


def _replayed(contender: Contender) -> Contender:
    return replace(contender, name=f"{contender.name}, CUDA graph", mode="reduce-overhead")


LOW = (torch.bfloat16, torch.float16)
BASELINE = "rampde_fx float32, scan"
ALL = (
    _rampde_fx(torch.float32, "scan"),
    *(_rampde_fx(dtype, "scan") for dtype in LOW),
    *(_kept(dtype) for dtype in (torch.float32, *LOW)),
    *(_rampde_fx(dtype, "unroll") for dtype in (torch.float32, *LOW)),
    *(_replayed(_rampde_fx(dtype, "scan")) for dtype in (torch.float32, *LOW)),
    replace(_rampde_fx(torch.float32, "scan"), name=f"{BASELINE}, cpp_wrapper", cpp_wrapper=True),
    Contender("eager float32", solve_by_loop),
    *(Contender(f"eager autocast {SHORT[d]}", solve_by_loop, autocast=d) for d in LOW),
    Contender("torch.compile float32", solve_by_loop, "inductor", unrolled=True),
    _replayed(Contender("torch.compile float32", solve_by_loop, "inductor", unrolled=True)),
    Contender("torch.compile float32, cpp_wrapper", solve_by_loop, "inductor", unrolled=True, cpp_wrapper=True),
    *(
        Contender(f"torch.compile autocast {SHORT[d]}", solve_by_loop, "inductor", autocast=d, unrolled=True)
        for d in LOW
    ),
    Contender("torchdiffeq odeint", solver_of("torchdiffeq", "odeint"), package="torchdiffeq"),
    Contender("torchdiffeq odeint_adjoint", solver_of("torchdiffeq", "odeint_adjoint"), package="torchdiffeq"),
    Contender("rampde float32", solver_of("rampde", "odeint"), package="rampde"),
    *(Contender(f"rampde {SHORT[d]}", solver_of("rampde", "odeint"), autocast=d, package="rampde") for d in LOW),
)
# What five minutes on two cores allow.
QUICK = {
    BASELINE,
    "rampde_fx bfloat16, scan",
    "eager float32",
    "torchdiffeq odeint",
    "torchdiffeq odeint_adjoint",
    "rampde float32",
}
QUICK_MORE = {"cnf": {"rampde_fx float16, scan", "torch.compile float32"}, "otflow": {"rampde_fx float16, scan"}}
# Ours by default, at its fastest, and the peer that keeps everything: the table of the README.
README = {
    BASELINE,
    "rampde_fx bfloat16, scan",
    'rampde_fx bfloat16, scan, checkpoint="none"',
    "torch.compile autocast bfloat16",
}


def taking_part(case: Case, *, quick: bool, readme: bool = False, names: list[str] | None = None) -> list[Contender]:
    """The contenders of a case, the baseline first."""
    own = QUICK | QUICK_MORE.get(case.name, set()) if quick else {contender.name for contender in ALL}
    own = README if readme else own
    return [contender for contender in ALL if contender.name in (names or own)]
