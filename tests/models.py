"""Neural ODEs as users write them, one per spelling of the update that must work."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

import rampde_fx


class Velocity(nn.Module):
    """A multilayer perceptron of (t, y)."""

    def __init__(self, dim: int = 5, width: int = 7, layers: int = 2) -> None:
        super().__init__()
        sizes = [dim + 1, *[width] * (layers - 1), dim]
        self.linear = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = torch.cat([y, t.expand(y.shape[0], 1)], 1)
        for layer in self.linear[:-1]:
            x = torch.tanh(layer(x))
        return self.linear[-1](x)


class Flow(nn.Module):
    """A model with one velocity; subclasses say how it is integrated."""

    dim = 5

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.dim = sizes.get("dim", self.dim)
        self.velocity = Velocity(**sizes)


class Solved(nn.Module):
    """A velocity, and an odeint over it."""

    def __init__(self, velocity=None, **arguments):
        super().__init__()
        self.velocity = Velocity() if velocity is None else velocity
        self.arguments = {"method": "rk4", **arguments}

    def forward(self, y, t):
        return rampde_fx.odeint(self.velocity, y, t, **self.arguments)


class Euler(Flow):
    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * self.velocity(t_i, y)
        return y


class Midpoint(Flow):
    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            k1 = self.velocity(t_i, y)
            k2 = self.velocity(t_i + dt / 2, y + dt / 2 * k1)
            y = y + dt * k2
        return y


class RK4(Flow):
    def forward(self, y, t):
        for t_i, h in rampde_fx.steps(t):
            k1 = self.velocity(t_i, y)
            k2 = self.velocity(t_i + h / 2, y + h / 2 * k1)
            k3 = self.velocity(t_i + h / 2, y + h / 2 * k2)
            k4 = self.velocity(t_i + h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y


class InPlace(Flow):
    def forward(self, y, t):
        y = y * 1.0
        for t_i, dt in rampde_fx.steps(t):
            k = self.velocity(t_i, y)
            y += dt * k
        return y


class MutatedArgument(Flow):
    """The caller's tensor is updated in place, as eager does."""

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y += dt * self.velocity(t_i, y)
        return 2 * y


class Slices(Flow):
    """A state updated by slices, in place."""

    def forward(self, y, t):
        y = y.clone()
        for t_i, dt in rampde_fx.steps(t):
            k = self.velocity(t_i, y)
            y[:, :2] += dt * k[:, :2]
            y[:, 2:] += 2 * dt * k[:, 2:]
        return y


class LogDensity(Flow):
    """State and log-density together, the divergence estimated by torch.func.vjp (Hutchinson)."""

    def forward(self, z, t):
        e = torch.ones_like(z)
        logp = torch.zeros(z.shape[0], device=z.device)
        for t_i, dt in rampde_fx.steps(t):
            dz, vjp = torch.func.vjp(lambda z, t_i=t_i: self.velocity(t_i, z), z)
            logp -= dt * (vjp(e)[0] * e).sum(1)
            z = z + dt * dz
        return z, logp


class Symplectic(nn.Module):
    """Position and momentum, leapfrog on a learned potential, its gradient by torch.func.grad."""

    dim = 5

    def __init__(self) -> None:
        super().__init__()
        self.potential = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
        self.mass = nn.Parameter(torch.rand(5) + 1)

    def forward(self, q, t):
        p = torch.ones_like(q)
        force = torch.func.grad(lambda q: -self.potential(q).sum())
        for _, dt in rampde_fx.steps(t):
            p = p + dt / 2 * force(q)
            q = q + dt * p / self.mass
            p = p + dt / 2 * force(q)
        return q, p


class Trajectory(Flow):
    def forward(self, y, t):
        states = [y]
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * self.velocity(t_i, y)
            states.append(y)
        return torch.stack(states)


class Collected(Flow):
    """States read one by one after the loop, with the times."""

    def forward(self, y, t):
        states, times = [], []
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * self.velocity(t_i, y)
            states.append(y.square().sum(1))
            times.append(t_i)
        return y, sum(states[1:], states[0]) * torch.stack(times).sum(), states[1]


class Context(Flow):
    """Tensors from outside: a context computed before the loop, the initial state itself, a plain constant."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 5)

    def forward(self, y, t):
        context, y0 = torch.relu(self.embed(y)), y
        weight = torch.tensor(0.5)
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * (self.velocity(t_i, y + weight * context) - 0.1 * y0)
        return y


class TwoLoops(nn.Module):
    """Two loops in submodules with an ordinary layer between them."""

    dim = 5

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Midpoint(), Euler()
        self.between = nn.Linear(5, 5)

    def forward(self, y, t):
        return self.second(torch.relu(self.between(self.first(y, t))), t).sum(1)


class PerStepWeights(nn.Module):
    """A layer of its own for every step, and a schedule indexed by the step."""

    dim = 5

    def __init__(self, steps: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(steps))
        self.gain = nn.Parameter(torch.rand(steps, 5))

    def forward(self, y, t):
        for i, (_, dt) in enumerate(rampde_fx.steps(t)):
            y = y + dt * torch.tanh(self.layers[i](y)) * self.gain[i]
        return y


class WeightNorm(nn.Module):
    """Parameters from which the loop computes its weight, the same in every step."""

    dim = 5

    def __init__(self) -> None:
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.rand(5, 1))

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            weight = self.g * self.v / self.v.norm(dim=1, keepdim=True)
            y = y + dt * torch.sin(y @ weight.T + t_i)
        return y


class AdamsBashforth(Flow):
    """A two-step method: the velocity of the step before is carried; the first step is another one."""

    def forward(self, y, t):
        before = None
        for t_i, dt in rampde_fx.steps(t):
            k = self.velocity(t_i, y)
            y = y + dt * k if before is None else y + dt * (1.5 * k - 0.5 * before)
            before = k
        return y


class ThreeStep(Flow):
    """Velocities of two steps before, started from outside."""

    def forward(self, y, t):
        oldest = self.velocity(t[0], y)
        older = 0.5 * oldest
        for t_i, dt in rampde_fx.steps(t):
            k = self.velocity(t_i, y)
            y = y + dt / 12 * (23 * k - 16 * older + 5 * oldest)
            oldest, older = older, k
        return y


class Decay(Flow):
    """An exponential integrator: the state is scaled by a learned decay."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.rand(()))

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y = torch.exp(-self.rate * dt) * y + dt * self.velocity(t_i, y)
        return y


class Tableau(Flow):
    """Stages collected in a list, the combination as a sum over them (SSPRK3 by its Shu-Osher form)."""

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y1 = y + dt * self.velocity(t_i, y)
            y2 = 3 / 4 * y + 1 / 4 * (y1 + dt * self.velocity(t_i + dt, y1))
            y = (y + 2 * (y2 + dt * self.velocity(t_i + dt / 2, y2))) / 3
        return y


class Uneven(Flow):
    """Iterations that differ: another activation every second step."""

    def forward(self, y, t):
        for i, (t_i, dt) in enumerate(rampde_fx.steps(t)):
            k = self.velocity(t_i, y)
            y = y + dt * (torch.sin(k) if i % 2 else k)
        return y


class Norms(nn.Module):
    """Layer norm, softmax attention and a residual inside the velocity."""

    dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)

    def velocity(self, y):
        x = self.norm(y).reshape(-1, 3, 2)
        q, k, v = self.qkv(x.flatten(1)).reshape(-1, 3, 3, 2).unbind(1)
        weights = torch.softmax(q @ k.transpose(1, 2), -1)
        return self.out((x + weights @ v).flatten(1))

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * self.velocity(y)
        return y


class Augmented(Flow):
    """State and an integral in one tensor, split and joined in every step."""

    def forward(self, y, t):
        u = torch.cat([y, y.new_zeros(y.shape[0], 1)], 1)
        for t_i, dt in rampde_fx.steps(t):
            k = self.velocity(t_i, u[:, :-1])
            cost = k.square().sum(1, keepdim=True)
            u = u + dt * torch.cat([k, cost], 1)
        return u


class Heun(Flow):
    """The velocity as a plain function that closes over a parameter."""

    def forward(self, y, t):
        first = self.velocity.linear[0].weight[:, :5]

        def field(y):
            return torch.tanh(y @ first.T) @ first

        for _, dt in rampde_fx.steps(t):
            k = field(y)
            y = y + (k + field(y + dt * k)) * dt / 2
        return y


FORMS = [
    Euler, Midpoint, RK4, InPlace, Slices, LogDensity, Symplectic, Trajectory, Collected, Context, TwoLoops,
    PerStepWeights, WeightNorm, AdamsBashforth, ThreeStep, Decay, Tableau, Uneven, Norms, Augmented, Heun,
]  # fmt: skip
