"""The precision policy: which dtype evaluates, which stores, and how the adjoint is scaled."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from rampde_fx.errors import PolicyError, refuse
from rampde_fx.schedules import Schedule, schedule_of

DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
STORAGE_DTYPES = {**DTYPES, "float8_e4m3fn": torch.float8_e4m3fn}
LOOPS = ("auto", "scan", "unroll")
ACCUMULATIONS = ("plain", "compensated")
STORAGE_SCALINGS = (None, "dynamic", "none")
MONITORED = "monitored "  # before a policy on a marker: a monitor is open
CHECKPOINTS = ("step", "sqrt", "none")


@dataclass(frozen=True)
class AdjointScaling:
    """Dynamic power-of-two scaling of the adjoint, one scale per velocity VJP.

    Before each VJP the cotangent v is multiplied by S = 2^ceil(log2(target / max|v|)) in the accumulation dtype, cast
    down, pulled back, widened and divided by S. S is a power of two, so scaling and unscaling are exact.

    Args:
        target: Magnitude that the largest cotangent is brought to, a positive power of two. Small targets leave room
            for what grows in a pullback, large ones for small entries of the cotangent. Where None, 1, or as much
            less as a sum over many entries in float16 needs (the weight gradient of a convolution).
        max_attempts: How often the reverse loop may run in one backward. After an overflow it runs again with the
            target divided by 2^8; after the last attempt the overflowed gradients are returned as they are.

    Raises:
        PolicyError: if target is no positive power of two, or max_attempts is not a positive int.

    Source: arXiv 2510.23498, dynamic adjoint scaling.
    """

    target: float | None = None
    max_attempts: int = 3

    def __post_init__(self) -> None:
        _refuse(_wrong_scaling(self.target, self.max_attempts))


# Found, required, fix; empty where nothing is wrong.
_Problem = tuple[str, ...]


def _refuse(problem: _Problem) -> None:
    if problem:
        refuse(PolicyError, problem[0], required=problem[1], fix=problem[2])


@torch.compiler.assume_constant_result  # a policy that is made in compiled code is a constant
def _wrong_scaling(target: float | None, max_attempts: int) -> _Problem:
    """What is wrong with the fields of an AdjointScaling."""
    is_number = isinstance(target, (int, float))
    if target is not None and not (is_number and target > 0 and math.frexp(target)[0] == 0.5):
        return (
            f"AdjointScaling(target={target!r})",
            "a positive power of two, so that scaling is exact, or None",
            "leave it out, or use a value such as 1.0 or 2.0**-4",
        )
    if type(max_attempts) is not int or max_attempts < 1:
        return f"AdjointScaling(max_attempts={max_attempts!r})", "an int of at least 1", "use the default, 3"
    return ()


@dataclass(frozen=True)
class PrecisionPolicy:
    """How a marked loop is rewritten. The accumulation dtype is always the dtype of the user's state.

    Args:
        velocity: Dtype of the velocity evaluations: float16, bfloat16, float32 or float64.
        storage: Dtype in which the states that the backward re-reads are stored; as velocity where None. Also
            float8_e4m3fn. A state that is narrower than the storage dtype is stored as it is.
        storage_scaling: "dynamic" stores each step's state in float16 or float8 with a power-of-two scale of its own,
            so that its range is that of the state; "none" does not; where None, dynamic for float8_e4m3fn alone,
            which ends at 448 and is never stored without.
        scaling: "dynamic", "none" or an AdjointScaling; where None, dynamic for float16 and none for the others,
            whose exponent range is that of the state.
        accumulation: "plain", or "compensated": the sums over the steps (states, adjoints and the gradients of the
            parameters) carry what rounding lost, so that their error does not grow with the number of steps. Updates
            must then have the form y = y + increment.
        loop: "scan" (one compiled step, compile time constant in the number of steps), "unroll" (every step
            compiled; not for a step_size or adaptive steps of odeint, whose number is not known), or "auto" (unroll
            loops of at most two steps).
        checkpoint: What the forward stores and the backward recomputes. "step": each step's state is stored, and the
            backward recomputes one step at a time. An int K: every K-th state is stored, and the backward recomputes
            the states between two of them from the first one, rounded as it was stored, one segment at a time;
            "sqrt": K = ceil(sqrt(N)) for N steps, so that 2 sqrt(N) states are held at most (not for a step_size
            of odeint, where N is not known). "none": nothing of the velocity is recomputed; what its derivatives read
            is stored for each step, in the dtype it has.

    Raises:
        PolicyError: naming the field that is wrong.

    Source: arXiv 2510.23498.

    >>> PrecisionPolicy(torch.float16).adjoint_scaling
    AdjointScaling(target=None, max_attempts=3)
    >>> PrecisionPolicy(torch.bfloat16).adjoint_scaling is None
    True
    """

    velocity: torch.dtype = torch.float16
    storage: torch.dtype | None = None
    storage_scaling: str | None = None
    scaling: str | AdjointScaling | None = None
    accumulation: str = "plain"
    loop: str = "auto"
    checkpoint: str | int = "step"
    # The policy as one string, the form in which it travels through a captured graph; made here, where Dynamo is not.
    encoded: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        scaling: Any = self.scaling
        if isinstance(scaling, AdjointScaling):
            scaling = (scaling.target, scaling.max_attempts)
        elif isinstance(scaling, tuple):  # which stands for an AdjointScaling below
            scaling = str(scaling)
        fields = (self.velocity, self.storage, self.storage_scaling, self.accumulation, self.loop, self.checkpoint)
        _refuse(_wrong_policy(scaling, *fields))
        object.__setattr__(self, "encoded", _encode(scaling, *fields))

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype in which a wide state is stored for the backward."""
        return self.velocity if self.storage is None else self.storage

    @property
    def scales_storage(self) -> bool:
        """Whether a state that is stored in a dtype of less range has a scale of its own at each step."""
        return self.storage_dtype is torch.float8_e4m3fn or self.storage_scaling == "dynamic"

    @property
    def adjoint_scaling(self) -> AdjointScaling | None:
        """The scaling in force, None where the adjoint is not scaled."""
        if isinstance(self.scaling, AdjointScaling):
            return self.scaling
        if self.scaling == "dynamic" or (self.scaling is None and self.velocity is torch.float16):
            return AdjointScaling()
        return None

    @property
    def schedule(self) -> Schedule:
        """What the forward stores and the backward recomputes."""
        return schedule_of(self.checkpoint)

    def unrolls(self, steps: int | torch.SymInt) -> bool:
        """Whether a loop of this many equal steps is emitted step by step rather than as a scan."""
        return self.loop == "unroll" or (self.loop == "auto" and isinstance(steps, int) and steps <= 2)

    @classmethod
    def decode(cls, text: str) -> PrecisionPolicy:
        """The policy that was encoded, with its defaults filled in."""
        fields = json.loads(text)
        scaling = fields["scaling"]
        return cls(
            velocity=DTYPES[fields["velocity"]],
            storage=STORAGE_DTYPES[fields["storage"]],
            storage_scaling=fields["storage_scaling"],
            scaling=scaling if scaling == "none" else AdjointScaling(*scaling),
            accumulation=fields["accumulation"],
            loop=fields["loop"],
            checkpoint=fields["checkpoint"],
        )


@torch.compiler.assume_constant_result
def _wrong_policy(
    scaling: Any,
    velocity: Any,
    storage: Any,
    storage_scaling: Any,
    accumulation: Any,
    loop: Any,
    checkpoint: Any,
) -> _Problem:
    """What is wrong with the fields of a policy; an AdjointScaling comes as the tuple of its fields."""
    for name, dtype, allowed in (("velocity", velocity, DTYPES), ("storage", storage, STORAGE_DTYPES)):
        if dtype not in allowed.values() and not (name == "storage" and dtype is None):
            required = "one of " + ", ".join(map(str, allowed.values()))
            return f"PrecisionPolicy({name}={dtype!r})", required, "use torch.float16 or torch.bfloat16"
    if not (scaling in (None, "dynamic", "none") or isinstance(scaling, tuple)):
        return (
            f"PrecisionPolicy(scaling={scaling!r})",
            '"dynamic", "none" or an AdjointScaling',
            "leave it out: float16 is then scaled and the other dtypes are not",
        )
    if storage is torch.float8_e4m3fn and storage_scaling == "none":
        return (
            'PrecisionPolicy(storage=torch.float8_e4m3fn, storage_scaling="none")',
            "scaling: float8_e4m3fn ends at 448",
            "leave storage_scaling out",
        )
    if checkpoint not in CHECKPOINTS and not (type(checkpoint) is int and checkpoint >= 1):
        return (
            f"PrecisionPolicy(checkpoint={checkpoint!r})",
            f"one of {CHECKPOINTS}, or an int of at least 1",
            "use the default, 'step', or \"sqrt\" to save memory",
        )
    choices = (
        ("storage_scaling", storage_scaling, STORAGE_SCALINGS),
        ("accumulation", accumulation, ACCUMULATIONS),
        ("loop", loop, LOOPS),
    )
    for name, value, options in choices:
        if value not in options:
            return f"PrecisionPolicy({name}={value!r})", f"one of {options}", f"use the default, {options[0]!r}"
    return ()


@torch.compiler.assume_constant_result
def _encode(
    scaling: Any,
    velocity: torch.dtype,
    storage: torch.dtype | None,
    storage_scaling: str | None,
    accumulation: str,
    loop: str,
    checkpoint: str | int,
) -> str:
    """A policy as one string, its defaults filled in."""
    storage = velocity if storage is None else storage
    if scaling == "dynamic" or (scaling is None and velocity is torch.float16):
        default = AdjointScaling()
        scaling = (default.target, default.max_attempts)
    scales_storage = storage is torch.float8_e4m3fn or storage_scaling == "dynamic"
    fields = {
        "velocity": str(velocity).removeprefix("torch."),
        "storage": str(storage).removeprefix("torch."),
        "storage_scaling": "dynamic" if scales_storage else "none",
        "scaling": list(scaling) if isinstance(scaling, tuple) else "none",
        "accumulation": accumulation,
        "loop": loop,
        "checkpoint": checkpoint,
    }
    return json.dumps(fields)
