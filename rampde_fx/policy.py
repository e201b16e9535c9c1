"""The precision policy: which dtype evaluates, which stores, and how the adjoint is scaled."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import torch

from rampde_fx.errors import PolicyError

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
        is_number = isinstance(self.target, (int, float))
        if self.target is not None and not (is_number and self.target > 0 and math.frexp(self.target)[0] == 0.5):
            raise PolicyError(
                f"AdjointScaling(target={self.target!r})",
                required="a positive power of two, so that scaling is exact, or None",
                fix="leave it out, or use a value such as 1.0 or 2.0**-4",
            )
        if type(self.max_attempts) is not int or self.max_attempts < 1:
            raise PolicyError(
                f"AdjointScaling(max_attempts={self.max_attempts!r})",
                required="an int of at least 1",
                fix="use the default, 3",
            )


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
        for name in ("velocity", "storage"):
            dtype = getattr(self, name)
            allowed = DTYPES if name == "velocity" else STORAGE_DTYPES
            if dtype not in allowed.values() and not (name == "storage" and dtype is None):
                raise PolicyError(
                    f"PrecisionPolicy({name}={dtype!r})",
                    required="one of " + ", ".join(map(str, allowed.values())),
                    fix="use torch.float16 or torch.bfloat16",
                )
        if not (self.scaling in (None, "dynamic", "none") or isinstance(self.scaling, AdjointScaling)):
            raise PolicyError(
                f"PrecisionPolicy(scaling={self.scaling!r})",
                required='"dynamic", "none" or an AdjointScaling',
                fix="leave it out: float16 is then scaled and the other dtypes are not",
            )
        if self.storage is torch.float8_e4m3fn and self.storage_scaling == "none":
            raise PolicyError(
                'PrecisionPolicy(storage=torch.float8_e4m3fn, storage_scaling="none")',
                required="scaling: float8_e4m3fn ends at 448",
                fix="leave storage_scaling out",
            )
        if self.checkpoint not in CHECKPOINTS and not (type(self.checkpoint) is int and self.checkpoint >= 1):
            raise PolicyError(
                f"PrecisionPolicy(checkpoint={self.checkpoint!r})",
                required=f"one of {CHECKPOINTS}, or an int of at least 1",
                fix="use the default, 'step', or \"sqrt\" to save memory",
            )
        choices = {"storage_scaling": STORAGE_SCALINGS, "accumulation": ACCUMULATIONS, "loop": LOOPS}
        for name, options in choices.items():
            if getattr(self, name) not in options:
                raise PolicyError(
                    f"PrecisionPolicy({name}={getattr(self, name)!r})",
                    required=f"one of {options}",
                    fix=f"use the default, {options[0]!r}",
                )
        object.__setattr__(self, "encoded", self._encode())

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype in which a wide state is stored for the backward."""
        return self.storage or self.velocity

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

    def unrolls(self, steps: int | torch.SymInt) -> bool:
        """Whether a loop of this many equal steps is emitted step by step rather than as a scan."""
        return self.loop == "unroll" or (self.loop == "auto" and isinstance(steps, int) and steps <= 2)

    def _encode(self) -> str:
        scaling = self.adjoint_scaling
        fields = {
            "velocity": str(self.velocity).removeprefix("torch."),
            "storage": str(self.storage_dtype).removeprefix("torch."),
            "storage_scaling": "dynamic" if self.scales_storage else "none",
            "scaling": [scaling.target, scaling.max_attempts] if scaling else "none",
            "accumulation": self.accumulation,
            "loop": self.loop,
            "checkpoint": self.checkpoint,
        }
        return json.dumps(fields)

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
