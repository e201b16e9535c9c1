"""Random neural ODEs: a Problem is plain data, simplest by default: model, data and policy."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

import rampde_fx

T = TypeVar("T")
Choose = Callable[[Sequence[T]], T]

NAMES = ("float8_e4m3fn", "float16", "bfloat16", "float32", "float64")
DTYPES = {name: getattr(torch, name) for name in NAMES}
SHAPES = {
    "vector": lambda b, d: (b, d),
    "scalar": lambda b, d: (),
    "point": lambda b, d: (d,),
    "sequence": lambda b, d: (b, 3, d),
    "signal": lambda b, d: (b, d, 5),
    "image": lambda b, d: (b, d, 4, 3),
}


@dataclass(frozen=True)
class Problem:
    """One random neural ODE, its data and its policy. The defaults are the simplest choices."""

    seed: int = 0  # of the parameters and the data
    space: str = "vector"
    batch: int = 4
    width: int = 4
    layers: tuple[str, ...] = ("linear", "tanh")
    time: str = "none"
    weights: str = "shared"
    a: tuple[tuple[float, ...], ...] = ((),)  # the strictly lower triangle of the tableau, row by row
    b: tuple[float, ...] = (1.0,)
    c: tuple[float, ...] = (0.0,)
    update: str = "sum"
    decay: str = "none"
    carries: str = "state"
    outside: str = "none"
    gradient: str = "whole"
    output: str = "final"
    around: str = "none"
    layout: str = "contiguous"
    grid: str = "uniform"
    start: float = 0.0
    span: float = 1.0
    steps: int = 3
    wanted: str = "all"
    loss_scale: float = 1.0
    state_dtype: str = "float32"
    time_dtype: str = "same"
    velocity: str = "float32"
    storage: str = "same"
    scaling: str | float = "default"
    accumulation: str = "plain"
    loop: str = "auto"
    checkpoint: str | int = "step"  # a number of bytes as "auto N"
    magnitude: float = 1.0  # of the initial state
    second_weight: float = 1.0  # of the second output in the loss
    parameters: str = "same"  # dtype of the velocity's own parameters
    form: str = "enumerate"
    compiler: str = "aot_eager"

    def __repr__(self) -> str:
        fields = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)]
        return f"Problem({', '.join(f'{name}={value!r}' for name, value, default in fields if value != default)})"

    def shape(self) -> tuple[int, ...]:
        """The shape of the state."""
        return SHAPES[self.space](self.batch, self.width)

    def policy(self) -> rampde_fx.PrecisionPolicy:
        """The precision policy."""
        scaling: Any = self.scaling
        checkpoint: Any = self.checkpoint
        if isinstance(scaling, float):
            scaling = rampde_fx.AdjointScaling(target=scaling)
        if isinstance(checkpoint, str) and checkpoint.startswith("auto "):
            checkpoint = rampde_fx.MemoryBudget(max_bytes=int(checkpoint.removeprefix("auto ")))
        return rampde_fx.PrecisionPolicy(
            velocity=DTYPES[self.velocity],
            storage=None if self.storage == "same" else DTYPES[self.storage.removeprefix("scaled ")],
            storage_scaling="dynamic" if self.storage.startswith("scaled ") else None,
            scaling=None if scaling == "default" else scaling,
            accumulation=self.accumulation,
            loop=self.loop,
            checkpoint=checkpoint,
        )


def written(x: torch.Tensor) -> torch.Tensor:
    """Values written in place."""
    z = torch.sin(x)
    z.mul_(0.5).add_(x)
    return z


def no_grad_part(x: torch.Tensor) -> torch.Tensor:
    """A factor without a gradient."""
    with torch.no_grad():
        factor = torch.cos(x)
    return x * factor


def out_write(x: torch.Tensor) -> torch.Tensor:
    """Written through out=, which autograd takes without a gradient alone; read before and after."""
    with torch.no_grad():
        kept = torch.zeros_like(x, memory_format=torch.contiguous_format)  # Dynamo takes no other
        before = kept + 1
        torch.sin(x, out=kept)
    return x * kept + before


def _indices(x: torch.Tensor) -> torch.Tensor:
    """Indices along the last dimension, the first one more than once."""
    return torch.arange(x.shape[-1]).clamp(max=max(x.shape[-1] - 2, 0)).flip(0).expand(x.shape)


def overwritten(x: torch.Tensor) -> torch.Tensor:
    """A copy whose first column is overwritten."""
    z = x.clone()
    z[..., 0] = 0.5 * torch.tanh(z[..., -1])
    return z


ELEMENTWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "sin": torch.sin,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "softplus": F.softplus,
    "elu": F.elu,
    "mish": F.mish,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "hardtanh": F.hardtanh,
    "square": lambda x: 0.5 * x * x,
    "power": lambda x: 0.3 * x**3,
    "root": lambda x: torch.sqrt(1 + x.square()),
    "gauss": lambda x: torch.exp(-x.square()),
    "log": lambda x: torch.log1p(x.square()),
    "reciprocal": lambda x: 1 / (1 + x.square()),
    "gated": lambda x: x * torch.sigmoid(x + 1),
    "where": lambda x: torch.where(x > 0, x, 0.1 * torch.sin(x)),
    "clamped": lambda x: x.clamp(-1.5, 1.5),
    "residual": lambda x: x + 0.5 * torch.tanh(x),
    "negated": lambda x: -x,
    "normalized": lambda x: x / (1 + x.norm()),
    "mean_field": lambda x: x - x.mean(),
    "atan": torch.atan,
    "dropout_off": lambda x: F.dropout(x, 0.5, training=False),
    "written": written,
    "no_grad_part": no_grad_part,
    "out_write": out_write,
    "complex_square": lambda x: (torch.complex(x, 0.5 * torch.sin(x)) ** 2).imag,
    "own_gradient": torch.func.grad(lambda z: torch.cos(z).sum()),
}
ALONG_LAST: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "logsumexp": lambda x: x - torch.logsumexp(x, -1, keepdim=True),
    "cumsum": lambda x: 0.5 * x.cumsum(-1),
    "centred": lambda x: x - x.mean(-1, keepdim=True),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1),
    "unit": lambda x: F.normalize(x, dim=-1, eps=0.1),
    "spectral": lambda x: torch.fft.irfft(torch.fft.rfft(x) * (0.5 + 0.5j), n=x.shape[-1]),
    "gather": lambda x: 0.5 * x.gather(-1, _indices(x)) + x[..., [0]],
    "scatter": lambda x: torch.zeros_like(x).scatter_add(-1, _indices(x), torch.tanh(x)),
    "index_put": lambda x: x.index_add(-1, torch.zeros(x.shape[-1], dtype=torch.int64), 0.3 * torch.sin(x)),
    "overwritten": overwritten,
    "moment": lambda x: x * x.square().mean(-1, keepdim=True),
}


class Linear(nn.Module):
    """A linear layer along the last dimension; its weight may come from outside."""

    def __init__(self, width: int, weight_norm: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        if weight_norm:
            nn.utils.parametrizations.weight_norm(self.linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Attention(nn.Module):
    """Attention over the second dimension."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.qkv, self.out, self.kind = nn.Linear(width, 3 * width), nn.Linear(width, width), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.kind == "softmax_attention":
            mixed = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), -1) @ v
        elif self.kind == "einsum_attention":
            mixed = torch.einsum("bij,bjd->bid", torch.softmax(torch.einsum("bid,bjd->bij", q, k), -1), v)
        else:
            heads = (tensor[:, None] for tensor in (q, k, v))
            mixed = F.scaled_dot_product_attention(*heads, is_causal=self.kind == "causal_attention")[:, 0]
        return self.out(mixed)


class LowRank(nn.Module):
    """x @ V^T @ V, one parameter used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(2, width) / math.sqrt(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.v.T) @ self.v


class Gain(nn.Module):
    """Elementwise weights along the last dimension."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.rand(size) + 0.5), nn.Parameter(torch.randn(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.bias, x, self.gain)


class Gated(nn.Module):
    """A gated linear unit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.glu(self.linear(x), -1)


class Pool(nn.Module):
    """Coarsen and refine again."""

    def __init__(self, one: bool) -> None:
        super().__init__()
        self.one = one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.one:
            return x + F.interpolate(F.avg_pool1d(x, 2, ceil_mode=True), size=x.shape[-1])
        return x + F.interpolate(F.avg_pool2d(x, 2, ceil_mode=True), size=x.shape[-2:])


FEATURES_LAST: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda d: Linear(d, False),
    "weight_norm": lambda d: Linear(d, True),
    "low_rank": LowRank,
    "gain": Gain,
    "glu": Gated,
    "layer_norm": nn.LayerNorm,
    "plain_layer_norm": lambda d: nn.LayerNorm(d, elementwise_affine=False),
    "rms_norm": nn.RMSNorm,
    "prelu": lambda d: nn.PReLU(),
    "mlp": lambda d: nn.Sequential(nn.Linear(d, d + 1), nn.SiLU(), nn.Linear(d + 1, d, bias=False)),
}
ATTENTION = ("softmax_attention", "sdpa", "causal_attention", "einsum_attention")
SIGNAL: dict[str, Callable[[int], nn.Module]] = {
    "conv": lambda d: nn.Conv1d(d, d, 3, padding=1),
    "circular": lambda d: nn.Conv1d(d, d, 3, padding=1, padding_mode="circular"),
    "depthwise": lambda d: nn.Conv1d(d, d, 3, padding="same", groups=d, bias=False),
    # No transposed convolution: torch's CPU kernel sums its terms in the dtype of the operands.
    "group_norm": lambda d: nn.GroupNorm(1, d),
    "instance_norm": lambda d: nn.InstanceNorm1d(d, affine=True),
    "pool": lambda d: Pool(True),
}
IMAGE: dict[str, Callable[[int], nn.Module]] = {
    "conv": lambda d: nn.Conv2d(d, d, 3, padding=1),
    "reflect": lambda d: nn.Conv2d(d, d, 3, padding=1, padding_mode="reflect"),
    "pointwise": lambda d: nn.Conv2d(d, d, 1, bias=False),
    "depthwise": lambda d: nn.Conv2d(d, d, (3, 1), padding="same", groups=d),
    "dilated": lambda d: nn.Conv2d(d, d, 3, padding=2, dilation=2),
    "group_norm": lambda d: nn.GroupNorm(d, d),
    "instance_norm": nn.InstanceNorm2d,
    "pool": lambda d: Pool(False),
    "batch_norm_off": lambda d: nn.BatchNorm2d(d).eval(),
}
LEARNED: dict[str, dict[str, Any]] = {
    "vector": FEATURES_LAST,
    "point": FEATURES_LAST,
    "sequence": {**FEATURES_LAST, **{kind: lambda d, kind=kind: Attention(d, kind) for kind in ATTENTION}},
    "scalar": {"gain": lambda d: Gain(1), "prelu": lambda d: nn.PReLU()},
    "signal": SIGNAL,
    "image": IMAGE,
}


def layer_names(space: str) -> list[str]:
    """What a velocity on the space may be made of; what is learned comes twice."""
    names = [*LEARNED[space], *LEARNED[space], *ELEMENTWISE]
    return names if space == "scalar" else [*names, *ALONG_LAST]


class Net(nn.Module):
    """The layers of a velocity, one after the other."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.names = problem.layers
        made = {name: LEARNED[problem.space][name] for name in problem.layers if name in LEARNED[problem.space]}
        self.learned = nn.ModuleList(made[name](problem.width) for name in problem.layers if name in made)
        self.scalar = problem.space == "scalar"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        learned = iter(self.learned)
        for name in self.names:
            if name in ELEMENTWISE:
                x = ELEMENTWISE[name](x)
            elif name in ALONG_LAST:
                x = ALONG_LAST[name](x)
            else:
                x = next(learned)(x.reshape(1)).reshape(()) if self.scalar else next(learned)(x)
        return x


class RandomODE(nn.Module):
    """A Problem's model.

    What a step computes of time alone stands in `context`, the velocity in `evaluate`; so that roundings can be
    emulated where the rewrite makes them.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = p = problem
        count = p.steps if p.weights == "per_step" else 1
        self.nets = nn.ModuleList(Net(p) for _ in range(count))
        size = p.shape()[-1] if p.space != "scalar" else 1
        if p.time == "concat":
            self.join = nn.Linear(size + 1, size)
        if p.time == "embedding":
            self.frequency, self.embed = nn.Parameter(torch.randn(3)), nn.Linear(3, size)
        if p.time == "hyper":
            self.hyper = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, size * size))
        if p.weights == "schedule":
            self.schedule = nn.Parameter(torch.rand(p.steps, size) + 0.5)
        if p.decay == "learned":
            self.rate = nn.Parameter(torch.rand(()))
        if p.outside == "context":
            self.encoder = nn.Linear(size, size)
        if p.around == "layers":
            self.before, self.after = nn.Linear(size, size), nn.Linear(size, size)

    def context(self, t: torch.Tensor, i: int) -> tuple[torch.Tensor, ...]:
        """What a velocity reads of time and step."""
        kind, found = self.problem.time, []
        if kind in ("concat", "add", "scale"):
            found.append(t)
        elif kind == "phase":
            found.append(torch.sin(300 * t))  # low precision in t would be seen here
        elif kind == "embedding":
            found.append(self.embed(torch.cos(self.frequency * t)))
        elif kind == "hyper":
            weight = self.hyper(t.reshape(1))
            found.append(weight.reshape(math.isqrt(weight.numel()), -1))
        if self.problem.weights == "schedule":
            found.append(self.schedule[i])
        return tuple(found)

    def evaluate(
        self, net: int, context: tuple[torch.Tensor, ...], y: torch.Tensor, *extra: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The velocity of the state, and what the other carries integrate."""
        p = self.problem
        if p.carries == "density":
            probe = torch.ones_like(y)
            k, vjp = torch.func.vjp(lambda z: self.velocity(net, context, z, *extra), y)
            divergence = (vjp(probe)[0] * probe).flatten(1).sum(1)
            return k, divergence
        k = self.velocity(net, context, y, *extra)
        if p.gradient == "straight_through":
            k = k + (torch.sin(k) - k).detach()
        if p.carries == "momentum":
            return k, y - extra[0].tanh()
        return (k, k.square().sum()) if p.carries == "energy" else (k,)

    def velocity(
        self, net: int, context: tuple[torch.Tensor, ...], y: torch.Tensor, *extra: torch.Tensor
    ) -> torch.Tensor:
        """The velocity at a state."""
        kind, values, x = self.problem.time, list(context), y
        if kind == "concat":
            x = self.join(torch.cat([x, values.pop(0).expand(*x.shape[:-1], 1)], -1))
        elif kind in ("add", "phase", "embedding"):
            shift = values.pop(0)
            x = x + (shift.reshape(x.shape) if self.problem.space == "scalar" and shift.ndim else shift)
        elif kind == "scale":
            x = x * values.pop(0)
        elif kind == "hyper":
            x = x @ values.pop(0).T
        for other in extra:
            x = x + 0.5 * other
        k = self.evaluated(self.nets[net], x)
        if self.problem.weights == "schedule":
            gain = values.pop(0)
            k = k * (gain.reshape(()) if self.problem.space == "scalar" else gain)
        return k

    def evaluated(self, net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The net, its parameters cast to the dtype of x where they have another."""
        if self.problem.parameters == "same":
            return net(x)
        return torch.func.functional_call(net, {name: p.to(x.dtype) for name, p in net.named_parameters()}, (x,))

    def numbered_steps(self, t: torch.Tensor) -> Any:
        """The steps with their numbers, in the spelling of the problem."""
        if self.problem.form == "zip":
            return ((i, step) for step, i in zip(rampde_fx.steps(t), range(self.problem.steps), strict=True))
        if self.problem.form == "zip_slices":
            return ((i, step) for i, (step, _) in enumerate(zip(rampde_fx.steps(t), t[:-1].unbind(), strict=True)))
        if self.problem.form == "plain":  # of which some iterations stand for all
            return ((0, step) for step in rampde_fx.steps(t))
        return enumerate(rampde_fx.steps(t))

    def stage(self, y: torch.Tensor, dt: torch.Tensor, weights: Sequence[float], ks: list[torch.Tensor]) -> Any:
        """y + dt * sum(weights * ks), in the spelling of the problem."""
        update = self.problem.update
        pairs = [(w, k) for w, k in zip(weights, ks, strict=True) if w != 0 or update == "stacked"]
        if not pairs:
            return y
        if update == "terms":
            for w, k in pairs:
                y = y + dt * w * k
            return y
        if update == "reversed":
            return dt * sum(w * k for w, k in pairs) + y
        if update == "subtracted":
            return y - (-dt) * sum(w * k for w, k in pairs)
        if update == "addcmul":
            for w, k in pairs:
                y = torch.addcmul(y, k, dt, value=w)
            return y
        if update == "alpha":
            for w, k in pairs:
                y = torch.add(y, dt * k, alpha=w)
            return y
        if update == "stacked":
            return y + dt * torch.tensordot(
                torch.tensor([w for w, _ in pairs], dtype=y.dtype), torch.stack([k for _, k in pairs]), 1
            )
        if update == "divided":
            return y + sum(w * k for w, k in pairs) / (1 / dt)
        if update == "lerp":
            for w, k in pairs:
                y = torch.lerp(y, y + k, w * dt)
            return y
        return y + dt * sum(w * k for w, k in pairs)

    def propagated(self, y: torch.Tensor, dt: torch.Tensor) -> torch.Tensor:
        """The state as the step's linear part carries it on."""
        if self.problem.decay == "learned":
            return torch.exp(-self.rate * dt) * y
        return 0.9 * y if self.problem.decay == "number" else y

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> Any:
        p, y0 = self.problem, y
        if p.around == "layers":
            y = self.before(y.reshape(1)).reshape(()) if p.space == "scalar" else self.before(y)
        extra: tuple[torch.Tensor, ...] = ()
        if p.outside == "initial":  # of one step that is the state that is stored
            extra = (self.stored(y0, None)[0] if p.steps == 1 else y0,)
        elif p.outside == "context":
            extra = (torch.tanh(self.encoder(y0.reshape(1)).reshape(()) if p.space == "scalar" else self.encoder(y0)),)
        in_place = p.update == "in_place"
        y = y.clone() if in_place else y
        second = self.second_state(y)
        previous = None
        states, seconds, times = [y.clone() if in_place else y], [], []
        for i, (t_i, dt) in self.numbered_steps(t):
            y, second = self.stored(y, second)
            net = i if p.weights == "per_step" else 0
            ks: list[torch.Tensor] = []
            rates: list[torch.Tensor] = []
            for row, c in zip(p.a, p.c, strict=True):
                u = self.stage(y, dt, row, ks)
                u = u.clone() if in_place else u  # the velocity may save what it reads
                u = u.detach() if p.gradient == "argument_detached" else u
                inputs = (u, second) if p.carries == "momentum" else (u,)
                k, *rate = self.evaluate(net, self.context(t_i + c * dt, i), *inputs, *extra)
                ks.append(k)
                rates += rate
            if rates:
                second = self.second_update(second, dt, rates)
            elif p.carries == "average":
                second = 0.75 * second + 0.25 * y
            if p.carries == "two_step":
                first = ks[0]
                ks[0] = ks[0] if previous is None else 1.5 * ks[0] - 0.5 * previous
                previous = first
            y = y.detach() if p.gradient == "state_detached" else y
            if in_place:
                if p.decay == "number":
                    y *= 0.9
                for w, k in zip(p.b, ks, strict=True):
                    y += dt * w * k
            else:
                y = self.stage(self.propagated(y, dt), dt, p.b, ks)
            y = torch.relu(y) + 0.1 * y if p.decay == "rectified" else y
            states.append(y.clone() if in_place else y)
            times.append(t_i)
            if second is not None:
                seconds.append(second)
        if p.around == "layers":
            y = self.after(y.reshape(1)).reshape(()) if p.space == "scalar" else self.after(y)
        if p.output == "trajectory":
            return torch.stack(states)
        if p.output == "later_states":
            return torch.stack(states[1:], 1 if y.ndim else 0), second
        if p.output == "collected":
            return y, sum(state.square() for state in states[1:]), *seconds[:1]
        if p.output == "with_times":
            return y, torch.stack(times) * 2, states[1]
        if p.output == "increments":
            return y, torch.stack([b - a for a, b in itertools.pairwise(states)])
        return (y, second) if second is not None else y

    def stored(self, y: torch.Tensor, second: Any) -> tuple[torch.Tensor, Any]:
        """The states that a backward re-reads; a place for an emulation to round them."""
        return y, second

    def second_state(self, y: torch.Tensor) -> Any:
        """The initial value of the second carry, or None."""
        kind = self.problem.carries
        if kind == "energy":
            return torch.zeros((), dtype=y.dtype)
        if kind == "density":
            return torch.zeros(y.shape[0], dtype=y.dtype)
        if kind == "momentum":
            return torch.ones_like(y)
        return y * 0.5 if kind == "average" else None

    def second_update(self, second: torch.Tensor, dt: torch.Tensor, rates: list[torch.Tensor]) -> torch.Tensor:
        for w, rate in zip(self.problem.b, rates, strict=True):
            second = second - dt * w * rate
        return second


def data(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The initial state in its layout, and the time grid."""
    generator = torch.Generator().manual_seed(problem.seed)
    shape, dtype = problem.shape(), DTYPES[problem.state_dtype]

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32).to(dtype)

    layout = problem.layout if shape else "contiguous"
    if layout == "transposed":
        y = draw(*reversed(shape)).permute(*reversed(range(len(shape))))
    elif layout == "strided":
        y = draw(*shape[:-1], 2 * shape[-1])[..., ::2]
    elif layout == "expanded":
        y = draw(1, *shape[1:]).expand(shape)
    elif layout == "offset":
        y = draw(shape[0] + 2, *shape[1:])[1:-1]
    else:
        y = draw(*shape)
    y = y * problem.magnitude if problem.magnitude != 1.0 else y
    n = problem.steps
    parts = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    if problem.grid in ("nonuniform", "nonuniform_backward"):
        parts = parts**2
    if problem.grid == "repeated" and n > 1:
        parts[1] = parts[0]
    if problem.grid in ("backward", "nonuniform_backward"):
        parts = 1 - parts
    t = problem.start + problem.span * parts
    return y, t.to(dtype if problem.time_dtype == "same" else DTYPES[problem.time_dtype])


# The layers that need a feature.
def random_problem(choose: Choose[Any], *, inductor: bool = False) -> Problem:
    """A problem from a source of choices; earlier options are simpler.

    Args:
        choose: Takes options and gives one of them.
        inductor: Whether a small share is compiled by Inductor.
    """

    def mostly(default: Any, *others: Any) -> Any:
        return default if choose((True, True, False)) else choose(others)

    space = choose(["vector"] * 4 + ["sequence", "sequence", "image", "signal", "point", "scalar"])
    batch = mostly(4, 1, 3, 0)
    names = list(layer_names(space))
    heavy = list(LEARNED[space])
    layers = [choose(heavy)] + [choose(names) for _ in range(choose((1, 1, 0, 2, 2, 3)))]
    stages = choose((1, 1, 1, 2, 2, 2, 3, 4))
    numbers = (1.0, 0.5, 0.25, -0.5, 1 / 3, 0.0, 0.75)
    a = tuple(tuple(choose(numbers) for _ in range(i)) for i in range(stages))
    b = tuple(choose(numbers) for _ in range(stages))
    b = b if any(b) else (*b[:-1], 1.0)
    c = tuple(mostly(sum(row), 0.0, 1.0, 0.3) for row in a)
    times = ["none", "add", "scale", "phase", "embedding"]
    times += ["concat", "concat", "hyper"] if space in ("vector", "sequence") else []
    carried = ["energy", "momentum", "average", "two_step"]
    carried += ["density"] if space in ("vector", "sequence") else []
    time = choose(times)
    carries = mostly("state", *carried)
    # A 0-d state and a 0-d fp64 time make an fp64 state; a layer takes one dtype.
    takes_wide_time = time in ("none", "add", "scale", "phase") and space != "scalar" and carries != "energy"
    velocity = choose(("float16", "float16", "bfloat16", "float32", "float64"))
    storages = ["float16", "bfloat16", "float32", "float8_e4m3fn", "scaled float16"]
    update = choose("sum sum terms reversed subtracted addcmul alpha stacked divided lerp in_place".split())
    # A state that is updated in place and then replaced by another tensor is refused.
    decays = ["learned", "number"] if update == "in_place" else ["learned", "number", "rectified"]
    decay = mostly("none", *decays)
    detached = ["argument_detached", "straight_through"]
    detached += [] if update == "in_place" else ["state_detached"]  # a write through a detached name is refused
    storage = mostly("same", *storages)
    checkpoint = mostly("step", "sqrt", "none", 2, "auto", f"auto {choose((0, 100, 1000, 10000))}")
    low_parameters = velocity in ("float16", "bfloat16")
    # Compensation is for updates of the form y = y + increment.
    compensable = decay == "none" and update in ("sum", "terms", "alpha") and carries in ("state", "energy")
    return Problem(
        seed=choose(range(1000)),
        space=space,
        batch=batch,
        width=choose((4, 1, 3, 5)),
        layers=tuple(layers),
        time=time,
        weights=mostly("shared", "per_step", "schedule"),
        a=a,
        b=b,
        c=c,
        update=update,
        decay=decay,
        carries=carries,
        outside=mostly("none", "initial", "context"),
        gradient=mostly("whole", mostly(*detached), "whole"),
        output=mostly("final", "trajectory", "later_states", "collected", "with_times", "increments"),
        around=mostly("none", "layers"),
        layout=mostly("contiguous", "transposed", "strided", "expanded", "offset"),
        grid=mostly("uniform", "nonuniform", "backward", "nonuniform_backward", "repeated"),
        start=mostly(0.0, 1.0, -2.0),
        span=mostly(1.0, 0.01, 0.3),
        steps=choose((3, 1, 2, 2, 3, 3, 4, 5, 12, 12)),
        wanted=mostly("all", "parameters", "state", "time", "some_parameters", "nothing", "no_grad"),
        loss_scale=mostly(1.0, 1e-6, 1e3),
        state_dtype=mostly("float32", mostly("float32", "float64")),
        time_dtype=mostly("same", "float64") if takes_wide_time else "same",
        velocity=velocity,
        storage=storage,
        scaling=mostly("default", "dynamic", "none", 2.0**-6, 2.0**6),
        accumulation=mostly("plain", "compensated") if compensable else "plain",
        loop=mostly("auto", "scan", "unroll"),
        checkpoint=checkpoint,
        magnitude=mostly(1.0, 1e-6, 1e-3, 1e2, 1e4),
        second_weight=mostly(1.0, 1e-3, 1e-6),
        parameters=mostly("same", "bfloat16") if low_parameters else "same",
        form=mostly("enumerate", "plain", "plain", "zip", "zip_slices"),
        compiler=choose(["eager"] * 20 + ["aot_eager"] * 5 + (["inductor"] if inductor else ["aot_eager"])),
    )
