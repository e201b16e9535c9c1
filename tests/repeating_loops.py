"""Programs with a marked loop whose Python does more than the method: what repeats, and what only seems to.

Each takes (model, y, t). ONCE are those of which a few iterations stand for all, WHOLE those that differ from iteration
to iteration, or that nobody can know to be equal.
"""

# ruff: noqa: B007, B023, E731, PLW0603, SIM113, UP028

from __future__ import annotations

import builtins
import collections
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import nn

from rampde_fx import steps

ONCE: dict[str, Any] = {}
WHOLE: dict[str, Any] = {}
LOG: list[Any] = []
CALLS = 0
ALL_LOCALS, VARIABLES = builtins.locals, builtins.vars


def once(function):
    ONCE[function.__name__] = function
    return function


def whole(function):
    WHOLE[function.__name__] = function
    return function


class Keeper:
    """A plain object that the loop changes."""

    def __init__(self):
        self.calls, self.last, self.seen = 0, None, []


class Model(nn.Module):
    """A velocity, and what programs read and change."""

    def __init__(self, program):
        super().__init__()
        self.program = program
        self.linear, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(40))
        self.gain, self.shift = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mean", torch.zeros(4))
        self.last = None
        self.keeper = Keeper()

    def field(self, t, y):
        return torch.tanh(self.linear(y) + t)

    def forward(self, y, t):
        return self.program(self, y, t)

    def effects(self):
        """What a program has left in Python, and in buffers."""
        return [
            len(LOG),
            CALLS,
            self.keeper.calls,
            len(self.keeper.seen),
            self.keeper.last,
            self.last,
            self.mean,
            self.norm.running_mean,
        ]


def forget():
    """Before another run: what programs keep in globals."""
    global CALLS
    CALLS = 0
    LOG.clear()


# --- what repeats -----------------------------------------------------------------------------------------------------


@once
def euler(m, y, t):
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
    return y


@once
def heun_by_a_helper(m, y, t):
    def advance(t_i, dt, y):
        k = m.field(t_i, y)
        return y + dt / 2 * (k + m.field(t_i + dt, y + dt * k))

    for t_i, dt in steps(t):
        y = advance(t_i, dt, y)
    return y


@once
def times_in_a_closure(m, y, t):
    for t_i, dt in steps(t):
        force = lambda z: m.field(t_i, z)
        y = y + dt * force(y)
    return y


@once
def counter_that_is_returned(m, y, t):
    n = 0
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        n += 1
    return y / n


@once
def two_counters(m, y, t):
    n, evaluations = 5, 0
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        n = n + 3
        evaluations += 2
    return y * n, evaluations * y


@once
def counter_that_counts_sometimes(m, y, t):
    n = 0
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        if y.shape[1] == 4:
            n += 1
        else:
            n += 100
    return y * n


@once
def index_without_use(m, y, t):
    for _, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
    return y


@once
def index_behind_the_loop(m, y, t):
    for i, (t_i, dt) in enumerate(steps(t), start=2):
        y = y + dt * m.field(t_i, y)
    return y * i


@once
def flag_of_the_first_step(m, y, t):
    first = True
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y) * (0.5 if first else 1.0)
        first = False
    return y


@once
def everything_behind_the_loop(m, y, t):
    for t_i, dt in steps(t):
        before = y
        k = m.field(t_i, y)
        z = y + dt * k
        y = z
    return y + 2 * before + 3 * k + t_i * 4 + dt * 5 + z


@once
def value_of_the_first_step(m, y, t):
    kept = None
    for t_i, dt in steps(t):
        k = m.field(t_i, y)
        kept = k if kept is None else kept
        y = y + dt * k
    return y + kept


@once
def value_of_the_first_step_in_each(m, y, t):
    kept = None
    for t_i, dt in steps(t):
        k = m.field(t_i, y)
        kept = k if kept is None else kept
        y = y + dt * (k + 0.1 * kept)
    return y


@once
def values_of_two_steps(m, y, t):
    a = b = None
    for t_i, dt in steps(t):
        k = m.field(t_i, y)
        a, b = (k, b) if a is None else (a, k if b is None else b)
        y = y + dt * k
    return y + a - 3 * b


@once
def two_step_method(m, y, t):
    older = None
    for t_i, dt in steps(t):
        k = m.field(t_i, y)
        y = y + dt * (k if older is None else 1.5 * k - 0.5 * older)
        older = k
    return y + older


@once
def leapfrog_from_two_states(m, y, t):
    old, now = y, y + 0.01 * m.field(t[0], y)
    for t_i, dt in steps(t):
        old, now = now, old + 2 * dt * m.field(t_i, now)
    return now - old


@once
def four_step_method(m, y, t):
    history = [m.field(t[0], y)] * 3
    for t_i, dt in steps(t):
        history = [m.field(t_i, y), *history[:3]]
        y = y + dt / 24 * (55 * history[0] - 59 * history[1] + 37 * history[2] - 9 * history[3])
    return y + history[2]


@once
def queue(m, y, t):
    queue = collections.deque([y, 2 * y], maxlen=2)
    for t_i, dt in steps(t):
        queue.append(queue[1] + dt * m.field(t_i, queue[0]))
    return queue[0] * queue[1]


@once
def pushed_and_popped(m, y, t):
    stages = [y, y]
    for t_i, dt in steps(t):
        stages.insert(0, stages[0] + dt * m.field(t_i, stages[1]))
        stages.pop()
    return stages[0] - stages[1]


@once
def state_in_a_dict(m, y, t):
    state = {"y": y}
    for t_i, dt in steps(t):
        state["k"] = m.field(t_i, state["y"])
        state["y"] = state["y"] + dt * state["k"]
    return state["y"] - state["k"]


@once
def state_in_a_tuple(m, y, t):
    state = (y, y.new_zeros(y.shape[0]))
    for t_i, dt in steps(t):
        k = m.field(t_i, state[0])
        state = state[0] + dt * k, state[1] + dt * k.square().sum(1)
    return state


class State(NamedTuple):
    y: torch.Tensor
    cost: torch.Tensor


@once
def state_in_a_named_tuple(m, y, t):
    state = State(y, y.sum(1))
    for t_i, dt in steps(t):
        k = m.field(t_i, state.y)
        state = State(state.y + dt * k, cost=state.cost + dt * k.sum(1))
    return state.y * state.cost[:, None]


@dataclasses.dataclass
class Particle:
    y: torch.Tensor
    v: torch.Tensor
    name: str = "p"


@once
def state_in_a_dataclass(m, y, t):
    p = Particle(y, torch.zeros_like(y))
    for t_i, dt in steps(t):
        p = Particle(p.y + dt * p.v, p.v + dt * m.field(t_i, p.y), p.name)
    return p.y + p.v


@once
def dataclass_that_is_updated(m, y, t):
    p = Particle(y, torch.zeros_like(y))
    for t_i, dt in steps(t):
        p.v = p.v + dt * m.field(t_i, p.y)
        p.y = p.y + dt * p.v
    return p.y - p.v


@once
def state_in_a_closure(m, y, t):
    now = y

    def advance(t_i, dt):
        nonlocal now
        now = now + dt * m.field(t_i, now)

    for t_i, dt in steps(t):
        advance(t_i, dt)
    return now


@once
def state_in_the_module(m, y, t):
    m.last = y
    for t_i, dt in steps(t):
        m.last = m.last + dt * m.field(t_i, m.last)
    return m.last * 1.0


@once
def last_value_in_an_object(m, y, t):
    for t_i, dt in steps(t):
        m.keeper.last = m.field(t_i, y)
        y = y + dt * m.keeper.last
    return y + m.keeper.last


@once
def trajectory(m, y, t):
    states = [y]
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        states.append(y)
    return torch.stack(states)


@once
def trajectory_along_another_dimension(m, y, t):
    states = []
    for t_i, dt in steps(t):
        states.append(y)
        y = y + dt * m.field(t_i, y)
    return torch.stack(states, dim=-1), y


@once
def trajectory_item_by_item(m, y, t):
    states = [y, 2 * y]
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        states.append(y)
    return sum(states), states[-1], states[2] * states[-2], len(states) * y


@once
def trajectory_as_a_list(m, y, t):
    states = []
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        states.append(y.sum(1))
    return states


@once
def trajectory_that_goes_on(m, y, t):
    states = [y]
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        states.append(y)
    states.append(-y)
    return torch.stack(states), torch.stack(states[1:])


@once
def two_values_in_one_list(m, y, t):
    states = [y]
    for t_i, dt in steps(t):
        k = m.field(t_i, y)
        states.append(k)
        y = y + dt * k
        states.append(y)
    return torch.stack(states), y


@once
def two_lists(m, y, t):
    states, norms = [y], []
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        states.append(y)
        norms.append(y.norm(dim=1))
    return torch.stack(states), torch.stack(norms, 1), norms[0]


@once
def times_in_a_list(m, y, t):
    times, sizes = [], []
    for t_i, dt in steps(t):
        times.append(t_i)
        sizes.append(dt)
        y = y + dt * m.field(t_i, y)
    return y, torch.stack(times) * torch.stack(sizes)


@once
def list_of_what_was_before(m, y, t):
    states, older = [], y
    for t_i, dt in steps(t):
        states.append(older)
        older = y
        y = y + dt * m.field(t_i, y)
    return torch.stack(states), older


@once
def list_begun_in_the_second_step(m, y, t):
    states, before = [], None
    for t_i, dt in steps(t):
        k = m.field(t_i, y)
        if before is not None:
            states.append(k - before)
        before = k
        y = y + dt * k
    return y, torch.stack(states)


@once
def integral_in_another_dtype(m, y, t):
    total, n = y.new_zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        total, n = total + (dt * y.mean()).double(), n + 1
    return y, total, n


@once
def in_place(m, y, t):
    y = y * 1.0
    for t_i, dt in steps(t):
        y += dt * m.field(t_i, 1.0 * y)
    return y


@once
def buffer_in_place(m, y, t):
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        m.mean.mul_(0.9).add_(0.1 * y.detach().mean(0))
    return y


@once
def batch_norm(m, y, t):
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, m.norm(y))
    return y


@once
def part_without_gradients(m, y, t):
    for t_i, dt in steps(t):
        with torch.no_grad():
            weight = m.field(t_i, y)
        y = y + dt * weight * m.second(y)
    return y


@once
def detached(m, y, t):
    for t_i, dt in steps(t):
        k = m.field(t_i, y)
        y = (y + dt * k).detach() + 0.5 * (y - y.detach())
    return y


@once
def continue_in_the_body(m, y, t):
    for t_i, dt in steps(t):
        k = m.field(t_i, y)
        if y.shape[1] != 4:
            y = y - dt * k
            continue
        y = y + dt * k
    y = 2 * y
    return y


@once
def caught_exception(m, y, t):
    table = {}
    for t_i, dt in steps(t):
        try:
            scale = table["missing"]
        except KeyError:
            scale = 0.5
        y = y + scale * dt * m.field(t_i, y)
    return y


@once
def loop_inside_the_body(m, y, t):
    for t_i, dt in steps(t):
        z = y
        for _ in range(3):
            z = y + dt * m.field(t_i + dt, z)
        y = z
    return y


@once
def comprehension_in_the_body(m, y, t):
    for t_i, dt in steps(t):
        stages = [m.field(t_i + c * dt, y) for c in (0.0, 0.5, 1.0)]
        y = y + dt * sum(k / 3 for k in stages)
    return y


@once
def vjp_in_the_body(m, y, t):
    e = torch.ones_like(y)
    density = y.new_zeros(y.shape[0])
    for t_i, dt in steps(t):
        k, vjp = torch.func.vjp(lambda z: m.field(t_i, z), y)
        density = density - dt * (vjp(e)[0] * e).sum(1)
        y = y + dt * k
    return y, density


@once
def dropout_of_nothing(m, y, t):
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y) + 0 * torch.rand_like(y) + 0 * torch.nn.functional.dropout(y, 0.5)
    return y


@once
def two_loops_in_a_row(m, y, t):
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
    z = m.second(y)
    for _, dt in steps(2 * t):
        z = z - dt * torch.sin(z) * y
    return z


@once
def loop_in_a_loop(m, y, t):
    for sign in (1.0, -2.0):
        for t_i, dt in steps(t):
            y = y + sign * dt * m.field(t_i, y)
    return y


@once
def grid_that_is_computed(m, y, t):
    grid = t.square()
    for t_i, dt in steps(grid):
        y = y + dt * m.field(t_i, y) * grid[-1]
    return y + grid[0]


@once
def checkpointed_loop(m, y, t):
    def integrate(y):
        for t_i, dt in steps(t):
            y = y + dt * m.field(t_i, y)
        return y

    return torch.utils.checkpoint.checkpoint(integrate, y, use_reentrant=False)


@once
def generator_around_the_steps(m, y, t):
    def midpoints():
        for t_i, dt in steps(t):
            yield t_i + dt / 2, dt

    for middle, dt in midpoints():
        y = y + dt * m.field(middle, y)
    return y


@once
def generator_that_goes_on(m, y, t):
    def padded():
        yield from ((t[0], t[0] * 0 + 0.1) for _ in range(1))
        for t_i, dt in steps(t):
            yield t_i, dt
        yield t[-1], t[0] * 0 + 0.2

    for t_i, dt in padded():
        y = y + dt * m.field(t_i, y)
    return y


@once
def object_made_in_each_step(m, y, t):
    class Stage:
        def __init__(self, k):
            self.k = k

    stage = Stage(y)
    for t_i, dt in steps(t):
        stage = Stage(m.field(t_i, y) + 0.1 * stage.k)
        y = y + dt * stage.k
    return y + stage.k


@once
def function_made_in_each_step(m, y, t):
    push = lambda z: z
    for t_i, dt in steps(t):
        k = m.field(t_i, y)
        y = push(y + dt * k)
        push = functools.partial(lambda k, z: z + 0.01 * k, k)
    return push(y)


@once
def strings_up_to_a_length(m, y, t):
    word = ""
    for t_i, dt in steps(t):
        word = (word + "x")[:2]
        y = y + dt * m.field(t_i, y) * len(word)
    return y


@once
def transposed_in_each_step(m, y, t):
    for t_i, dt in steps(t):
        y = (y + dt * m.field(t_i, y)).t().contiguous().t()
    return y


@once
def write_behind_the_loop(m, y, t):
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
    y += 1
    return y * 2


@once
def write_to_a_collected_value(m, y, t):
    states = []
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        states.append(y.clone())
    return torch.stack(states), y.mul_(2)


@once
def size_of_the_grid(m, y, t):
    n = t.shape[0] - 1
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y) / n
    return y


# --- what differs -----------------------------------------------------------------------------------------------------


@whole
def counter_that_is_compared(m, y, t):
    n = 0
    for t_i, dt in steps(t):
        n += 1
        y = y + dt * m.field(t_i, y) * (3.0 if n == 7 else 1.0)
    return y


@whole
def counter_that_is_reset(m, y, t):
    n = 0
    for t_i, dt in steps(t):
        n += 1
        if n == 4:
            y, n = -y, 0
        y = y + dt * m.field(t_i, y)
    return y


@whole
def counter_read_by_another(m, y, t):
    n = seen = 0
    for t_i, dt in steps(t):
        n += 1
        seen = n // 5
        y = y + dt * m.field(t_i, y)
    return y * seen


@whole
def index_that_is_compared(m, y, t):
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * (m.field(t_i, y) if i < 6 else m.second(y))
    return y


@whole
def index_in_a_pair(m, y, t):
    for pair in enumerate(steps(t)):
        y = y + pair[1][1] * m.field(pair[1][0], y) * (1 + pair[0])
    return y


@whole
def layers_by_index(m, y, t):
    for i, (_, dt) in enumerate(steps(t)):
        y = y + dt * torch.tanh(m.layers[i](y))
    return y


@whole
def layers_by_zip(m, y, t):
    for (_, dt), layer in zip(steps(t), m.layers, strict=False):
        y = y + dt * torch.tanh(layer(y))
    return y


@whole
def factor_that_decays(m, y, t):
    factor = 1.0
    for t_i, dt in steps(t):
        y = y + factor * dt * m.field(t_i, y)
        factor *= 0.9
    return y


@whole
def factor_that_settles_late(m, y, t):
    factor = 1
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y) * max(factor, 10)
        factor = min(factor * 2, 4096)
    return y * factor


@whole
def sign_that_alternates(m, y, t):
    sign = 1
    for t_i, dt in steps(t):
        y, sign = y + sign * dt * m.field(t_i, y), -sign
    return y


@whole
def parameters_that_take_turns(m, y, t):
    a, b = m.gain, m.shift
    for t_i, dt in steps(t):
        y = y + dt * a * m.field(t_i, y)
        a, b = b, a
    return y


@whole
def parameters_that_take_turns_unused(m, y, t):
    a, b = m.gain, m.shift
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        a, b = b, a
    return y * a


@whole
def cycle_of_factors(m, y, t):
    factors = itertools.cycle([1.0, 0.5, 0.25])
    for t_i, dt in steps(t):
        y = y + next(factors) * dt * m.field(t_i, y)
    return y


@whole
def itertools_count(m, y, t):
    numbers = itertools.count(1)
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y) / next(numbers)
    return y


@whole
def factors_from_a_generator(m, y, t):
    def factors():
        for n in range(100):
            yield 2.0 if n == 5 else 1.0

    source = factors()
    for t_i, dt in steps(t):
        y = y + next(source) * dt * m.field(t_i, y)
    return y


@whole
def iterator_of_a_list(m, y, t):
    factors = iter([1.0] * 8 + [2.0] * 100)
    for t_i, dt in steps(t):
        y = y + next(factors) * dt * m.field(t_i, y)
    return y


@whole
def length_of_a_list(m, y, t):
    states = []
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y) * (2.0 if len(states) == 6 else 1.0)
        states.append(y)
    return torch.stack(states)


@whole
def list_with_two_names(m, y, t):
    states = []
    other = states
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y) * (2.0 if len(other) == 6 else 1.0)
        states.append(y)
    return torch.stack(states)


@whole
def list_in_a_closure(m, y, t):
    states = []

    def keep(y):
        states.append(y)
        return -y if len(states) == 5 else y

    for t_i, dt in steps(t):
        y = keep(y + dt * m.field(t_i, y))
    return torch.stack(states)


@whole
def list_of_the_module(m, y, t):
    for t_i, dt in steps(t):
        m.keeper.seen.append(1)
        y = y + dt * m.field(t_i, y) * (2.0 if len(m.keeper.seen) == 6 else 1.0)
    return y


@whole
def list_read_from_its_end(m, y, t):
    states = [y]
    for t_i, dt in steps(t):
        states.append(states[-1] + dt * m.field(t_i, states[-1]))
    return states[-1] * states[0]


@whole
def every_third_in_a_list(m, y, t):
    states, n = [], 0
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        n += 1
        if n % 3 == 1:
            states.append(y)
    return torch.stack(states)


@whole
def same_value_in_a_list(m, y, t):
    states, weight = [], 2 * m.gain
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        states.append(weight)
    return y, torch.stack(states)


@once
def pairs_in_a_list(m, y, t):
    states = []
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        states.append((t_i, y))
    return sum(a * b for a, b in states)


@whole
def bound_append(m, y, t):
    states = []
    keep = states.append
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        keep(y)
    return torch.stack(states)


@whole
def list_that_is_replaced(m, y, t):
    states = []
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        states = [*states, y]
    return torch.stack(states)


@whole
def dict_that_grows(m, y, t):
    states = {}
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        states[len(states)] = y
    return y + states[0]


@whole
def set_that_grows(m, y, t):
    seen = set()
    for t_i, dt in steps(t):
        seen.add(len(seen))
        y = y + dt * m.field(t_i, y) * (2.0 if 6 in seen else 1.0)
    return y


@once
def global_number(m, y, t):
    global CALLS
    for t_i, dt in steps(t):
        CALLS += 1
        y = y + dt * m.field(t_i, y)
    return y


@whole
def global_list(m, y, t):
    for t_i, dt in steps(t):
        LOG.append(len(LOG))
        y = y + dt * m.field(t_i, y)
    return y


@whole
def number_in_a_closure(m, y, t):
    n = 0

    def factor():
        nonlocal n
        n += 1
        return 2.0 if n == 6 else 1.0

    for t_i, dt in steps(t):
        y = y + factor() * dt * m.field(t_i, y)
    return y


@whole
def number_on_a_tensor(m, y, t):
    for t_i, dt in steps(t):
        age = getattr(y, "age", 0)
        y = y + dt * m.field(t_i, y) * (2.0 if age == 5 else 1.0)
        y.age = age + 1
    return y


@whole
def number_in_a_default(m, y, t):
    scale = lambda y, n=0: y * (1.0 + (n == 6))
    n = 0
    for t_i, dt in steps(t):
        y = scale(y + dt * m.field(t_i, y))
        n = n + 1
        scale = lambda y, n=n: y * (1.0 + (n == 6))
    return y


@whole
def nested_objects_that_grow(m, y, t):
    chain = None
    for t_i, dt in steps(t):
        k = m.field(t_i, y)
        chain = (k, chain)
        y = y + dt * k
    return y + chain[1][1][0]


@whole
def locals_of_the_function(m, y, t):
    for t_i, dt in steps(t):
        n = locals().get("n", 0) + 1
        y = y + dt * m.field(t_i, y) * (2.0 if n == 6 else 1.0)
    return y


@whole
def counter_among_the_locals(m, y, t):
    n = 0
    for t_i, dt in steps(t):
        n += 1
        y = y + dt * m.field(t_i, y) * (2.0 if locals()["n"] == 6 else 1.0)
    return y


@whole
def steps_as_a_list(m, y, t):
    pairs = list(steps(t))
    return y + sum(dt for _, dt in pairs) * m.field(t[0], y) + 0 * len(pairs)


@whole
def steps_by_next(m, y, t):
    source = steps(t)
    t_i, dt = next(source)
    y = y + 2 * dt * m.field(t_i, y)
    for t_i, dt in source:
        y = y + dt * m.field(t_i, y)
    return y


@whole
def steps_by_next_alone(m, y, t):
    source = steps(t)
    while True:
        try:
            t_i, dt = next(source)
        except StopIteration:
            return y
        y = y + dt * m.field(t_i, y)


@whole
def steps_in_a_comprehension(m, y, t):
    states = [y := y + dt * m.field(t_i, y) for t_i, dt in steps(t)]
    return states[-1] + states[0]


@whole
def steps_by_yield_from(m, y, t):
    def again():
        yield from steps(t)

    for t_i, dt in again():
        y = y + dt * m.field(t_i, y)
    return y


@whole
def generator_that_counts(m, y, t):
    def numbered():
        n = 0
        for t_i, dt in steps(t):
            n += 1
            yield n, t_i, dt

    for n, t_i, dt in numbered():
        y = y + dt * m.field(t_i, y) / n
    return y


@whole
def generator_that_is_made_a_list(m, y, t):
    def doubled():
        for t_i, dt in steps(t):
            yield 2 * t_i, dt

    pairs = list(doubled())
    return y + pairs[0][1] * m.field(pairs[-1][0], y) + 0 * len(pairs)


@once
def index_of_a_row(m, y, t):
    controls = torch.linspace(0, 1, 160).reshape(40, 4)
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y) + controls[i]
    return y


@once
def rows_by_zip(m, y, t):
    controls = torch.linspace(0, 1, 160).reshape(40, 4)
    for (t_i, dt), control in zip(steps(t), controls, strict=False):
        y = y + dt * m.field(t_i, y) + control
    return y


@once
def preallocated(m, y, t):
    states = y.new_zeros(41, *y.shape)
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
        states[i] = y
    return states


@whole
def state_written_under_two_names(m, y, t):
    states = []
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        states.append(y)
    y += 1
    return torch.stack(states)


@whole
def counter_read_by_locals_of_another_name(m, y, t):
    n = 0
    for t_i, dt in steps(t):
        n += 1
        y = y + dt * m.field(t_i, y) * (2.0 if ALL_LOCALS()["n"] == 6 else 1.0)
    return y


@whole
def counter_read_by_vars_behind_the_loop(m, y, t):
    n = 0
    for t_i, dt in steps(t):
        n += 1
        y = y + dt * m.field(t_i, y)
    return y * VARIABLES()["n"]


@whole
def index_read_by_locals_of_another_name(m, y, t):
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y) * (2.0 if ALL_LOCALS()["i"] == 6 else 1.0)
    return y


@whole
def dead_local_read_by_locals_that_are_looked_up(m, y, t):
    for t_i, dt in steps(t):
        n = getattr(builtins, "loc" + "als")().get("n", 0) + 1
        y = y + dt * m.field(t_i, y) * (2.0 if n == 6 else 1.0)
    return y


@whole
def list_read_by_locals_of_another_name(m, y, t):
    states = []
    for t_i, dt in steps(t):
        states.append(torch.sin(y))
        y = y + dt * ALL_LOCALS()["states"][-1] * (2.0 if len(ALL_LOCALS()["states"]) == 8 else m.gain)
    return y


@whole
def generator_that_reads_its_counter_by_locals(m, y, t):
    def weighted(pairs):
        n = 0
        for pair in pairs:
            n += 1
            yield pair, 2.0 if ALL_LOCALS()["n"] == 6 else 1.0

    for (t_i, dt), weight in weighted(steps(t)):
        y = y + dt * m.field(t_i, y) * weight
    return y
