"""The precision policy: which dtype evaluates, which stores, and how the adjoint is scaled."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

import torch

from rampde_fx.errors import PolicyError
from rampde_fx.policy_text import changed, number_of, text_of, word_of, words_of
from rampde_fx.schedules import SHARE, Checkpoint, MemoryBudget, Schedule, schedule_of
from rampde_fx.torch_private import dynamo, kernels
from rampde_fx.torch_private.refusals import refuse

DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
# The dtypes that a field of a policy takes, by their names.
DTYPES_OF: dict[str, dict[str, Any]] = {
    "velocity": {**DTYPES, "auto": "auto"},
    "storage": {**DTYPES, "float8_e4m3fn": torch.float8_e4m3fn},
}
ALWAYS_SCALED = {torch.float8_e4m3fn}  # of one byte: few operations know them, and scaled states travel as bytes
MONITORED = "monitored "  # before a policy on a marker: a monitor is open

Scaling = Literal["dynamic", "none"]
Auto = Literal["auto"]
Accumulation = Literal["plain", "compensated"]
LoopForm = Literal["auto", "scan", "unroll"]


@dataclass(frozen=True)
class AdjointScaling:
    """Dynamic power-of-two scaling of the adjoint, one scale for each output of a velocity.

    Before each VJP the cotangent v of an output is multiplied by S = 2^ceil(log2(target / max|v|)) in the accumulation
    dtype, and cast down. Each gradient of the VJP is widened, and divided by a scale of its own: the least S of the
    cotangents that it follows from, times what makes up for small factors on its way. All scales are powers of two, so
    that scaling and unscaling are exact.

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

    def __str__(self) -> str:
        return text_of(self)


# What a field of a policy may be that has fields of its own.
_NESTED: dict[str, tuple[type[Any], ...]] = {"scaling": (AdjointScaling,), "checkpoint": (MemoryBudget,)}
# Found, required, fix; empty where nothing is wrong.
_Problem = tuple[str, ...]


def _refuse(problem: _Problem) -> None:
    if problem:
        refuse(PolicyError, problem[0], required=problem[1], fix=problem[2])


@dynamo.constant  # a policy that is made in compiled code is a constant
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


class _Encoded:
    """What a policy has besides its fields.

    Attributes:
        encoded: The policy as text, the form in which it travels through a captured graph. It is made with the policy,
            where Dynamo is not.
    """

    encoded: str


def _in_parts(value: Any, kinds: tuple[type[Any], ...]) -> Any:
    """A value of one of the kinds as a tuple, its class and its fields, a constant to Dynamo; others as they are."""
    for kind in kinds:
        if isinstance(value, kind):
            return (kind, *[getattr(value, field.name) for field in fields(value)])  # of the class Dynamo gives none
    return str(value) if isinstance(value, tuple) else value  # a tuple of the user's is no value of any field


@dataclass(frozen=True)
class PrecisionPolicy(_Encoded):
    """How a marked loop is rewritten. The accumulation dtype is always the dtype of the user's state.

    Args:
        velocity: Dtype of the velocity evaluations: float16, bfloat16, float32, float64, or "auto". That is chosen when
            the loop is compiled, by its device: bfloat16 on a CPU that multiplies in it, float32 on any other CPU,
            float16 on CUDA. explain() says which, and so does the log.
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
            is stored for each step, in the dtype it has. "auto": as much of that as fits into half of the memory that
            is free, or into a MemoryBudget; the rest is recomputed as by "step" (all of it for a step_size and
            adaptive steps of odeint, where N is not known).

    Raises:
        PolicyError: naming the field that is wrong.

    Source: arXiv 2510.23498.

    >>> PrecisionPolicy(torch.float16).adjoint_scaling == AdjointScaling()
    True
    >>> PrecisionPolicy(torch.bfloat16).adjoint_scaling is None
    True
    >>> print(PrecisionPolicy(checkpoint="none"), "|", PrecisionPolicy().chosen_for("cuda"))
    auto, checkpoint=none | float16

    As text a policy is its velocity dtype and the fields that are not as they are by default; parse reads it back.

    >>> print(PrecisionPolicy(torch.bfloat16, storage=torch.float8_e4m3fn, checkpoint="sqrt"))
    bfloat16, storage=float8_e4m3fn, checkpoint=sqrt
    """

    velocity: torch.dtype | Auto = "auto"
    storage: torch.dtype | None = None
    storage_scaling: Scaling | None = None
    scaling: Scaling | AdjointScaling | None = None
    accumulation: Accumulation = "plain"
    loop: LoopForm = "auto"
    checkpoint: Checkpoint | int | MemoryBudget = "step"

    def __post_init__(self) -> None:
        in_order = [_in_parts(getattr(self, field.name), _NESTED.get(field.name, ())) for field in fields(self)]
        _refuse(_wrong_policy(*in_order))
        object.__setattr__(self, "encoded", _encode(*in_order))

    def __str__(self) -> str:
        return self.encoded

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the velocity evaluations, of a policy that leaves it to nobody.

        Raises:
            PolicyError: of "auto".
        """
        if not isinstance(self.velocity, torch.dtype):
            raise PolicyError(
                f'the dtype of a policy of velocity="auto" was asked for ({self})',
                required="a device: the dtype is chosen when a loop is compiled",
                fix='write policy.chosen_for("cpu").dtype, or give the policy a dtype',
            )
        return self.velocity

    def chosen_for(self, device: str) -> PrecisionPolicy:
        """The policy for loops on a type of device, whose dtype is chosen if it is "auto".

        Raises:
            PolicyError: of "auto", for a device about whose arithmetic nothing is known.
        """
        if self.velocity != "auto":
            return self
        if device == "cuda":
            return replace(self, velocity=torch.float16)
        if device == "cpu":
            return replace(self, velocity=torch.bfloat16 if kernels.cpu_has_bfloat16() else torch.float32)
        raise PolicyError(
            f'dtype="auto" for a loop on a device of type {device!r}',
            required='a CPU or a CUDA device, for which "auto" knows the dtype that is fast',
            fix="name the dtype: mixed_precision(dtype=torch.bfloat16), or torch.float16",
        )

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype in which a wide state is stored for the backward."""
        return self.dtype if self.storage is None else self.storage

    @property
    def scales_storage(self) -> bool:
        """Whether a state that is stored in a dtype of less range has a scale of its own at each step."""
        return self.storage_dtype in ALWAYS_SCALED or self.storage_scaling == "dynamic"

    @property
    def adjoint_scaling(self) -> AdjointScaling | None:
        """The scaling in force, None where the adjoint is not scaled."""
        if isinstance(self.scaling, AdjointScaling):
            return self.scaling
        if self.scaling == "dynamic" or (self.scaling is None and self.dtype is torch.float16):
            return AdjointScaling()
        return None

    @property
    def schedule(self) -> Schedule:
        """What the forward stores and the backward recomputes."""
        return schedule_of(self.checkpoint)

    def filled_in(self) -> PrecisionPolicy:
        """The policy of the same effect that leaves nothing to storage, storage_scaling and scaling of None.

        Where the dtype is "auto" they follow it, and are left as they are.
        """
        if self.velocity == "auto":
            return self
        scaling: Scaling | AdjointScaling | None = self.adjoint_scaling
        if scaling is None or scaling == AdjointScaling():
            scaling = "none" if scaling is None else "dynamic"
        storage_scaling: Scaling = "dynamic" if self.scales_storage else "none"
        by_default = self.checkpoint in (MemoryBudget(), MemoryBudget(share=SHARE))
        checkpoint = "auto" if by_default else self.checkpoint
        return replace(
            self, storage=self.storage_dtype, storage_scaling=storage_scaling, scaling=scaling, checkpoint=checkpoint
        )

    def unrolls(self, steps: int | torch.SymInt) -> bool:
        """Whether a loop of this many equal steps is emitted step by step rather than as a scan."""
        return self.loop == "unroll" or (self.loop == "auto" and isinstance(steps, int) and steps <= 2)

    @classmethod
    def parse(cls, text: str) -> PrecisionPolicy:
        """Read a policy that is written as text, such as an option of a command line: argparse takes it as a type.

        Args:
            text: The arguments of PrecisionPolicy, without quotes and without "torch.": the velocity dtype, then
                FIELD=VALUE with commas between. AdjointScaling and MemoryBudget have their arguments in parentheses.

        Returns:
            The policy. For every policy, PrecisionPolicy.parse(str(policy)) == policy.

        Raises:
            PolicyError: naming what it cannot read, or the field that is wrong.

        >>> PrecisionPolicy.parse("float16, storage=float8_e4m3fn, checkpoint=sqrt").storage
        torch.float8_e4m3fn
        >>> PrecisionPolicy.parse("bfloat16, scaling=AdjointScaling(target=0.5), checkpoint=8").scaling.target
        0.5
        """
        first, *others = re.split(r",(?![^(]*\))", text)  # at commas outside of parentheses
        words = words_of(cls, [first if "=" in first else f"velocity={first}", *others])
        return cls(**{name: _value(name, word) for name, word in words.items()})


@dynamo.constant
def _wrong_policy(
    velocity: Any,
    storage: Any,
    storage_scaling: Any,
    scaling: Any,
    accumulation: Any,
    loop: Any,
    checkpoint: Any,
) -> _Problem:
    """What is wrong with the fields of a policy; those of a class in _NESTED come as tuples (_in_parts)."""
    for name, dtype in (("velocity", velocity), ("storage", storage)):
        allowed = DTYPES_OF[name].values()
        if dtype not in allowed and not (name == "storage" and dtype is None):
            required = "one of " + ", ".join(map(str, allowed))
            return f"PrecisionPolicy({name}={dtype!r})", required, "use torch.float16 or torch.bfloat16"
    if not (scaling in (None, *get_args(Scaling)) or isinstance(scaling, tuple)):
        return (
            f"PrecisionPolicy(scaling={scaling!r})",
            f"one of {get_args(Scaling)}, or an AdjointScaling",
            "leave it out: float16 is then scaled and the other dtypes are not",
        )
    if storage in ALWAYS_SCALED and storage_scaling == "none":
        return (
            f'PrecisionPolicy(storage={storage}, storage_scaling="none")',
            f"scaling: {word_of(storage)} is never stored without",
            "leave storage_scaling out",
        )
    is_length = type(checkpoint) is int and checkpoint >= 1
    if not (checkpoint in get_args(Checkpoint) or is_length or isinstance(checkpoint, tuple)):
        return (
            f"PrecisionPolicy(checkpoint={checkpoint!r})",
            f"one of {get_args(Checkpoint)}, an int of at least 1, or a MemoryBudget",
            "use the default, 'step', or \"sqrt\" to save memory",
        )
    choices = (
        ("storage_scaling", storage_scaling, (None, *get_args(Scaling))),
        ("accumulation", accumulation, get_args(Accumulation)),
        ("loop", loop, get_args(LoopForm)),
    )
    for name, value, options in choices:
        if value not in options:
            return f"PrecisionPolicy({name}={value!r})", f"one of {options}", f"use the default, {options[0]!r}"
    return ()


@dynamo.constant
def _encode(*in_order: Any) -> str:
    """The fields of a policy as text; those of a class in _NESTED come as tuples (_in_parts)."""
    velocity, *others = (value[0](*value[1:]) if isinstance(value, tuple) else value for value in in_order)
    return ", ".join([word_of(velocity), *changed(fields(PrecisionPolicy)[1:], others)])


def _value(name: str, word: str) -> Any:
    """What a word stands for in a field of a policy; whether the field takes it, the policy itself says."""
    if name in DTYPES_OF:
        dtypes = DTYPES_OF[name]
        if word not in dtypes:
            nearest = get_close_matches(word, dtypes, n=1) or list(dtypes)
            required = f"one of {', '.join(dtypes)}"
            raise PolicyError(f"PrecisionPolicy({name}={word!r})", required=required, fix=f"write {nearest[0]}")
        return dtypes[word]
    for kind in _NESTED.get(name, ()):
        if given := re.fullmatch(rf"{kind.__name__}\((.*)\)", word):
            words = words_of(kind, given[1].split(",") if given[1].strip() else ())
            return kind(**{field: number_of(text) for field, text in words.items()})
    return number_of(word)
