"""Programs whose marked loop reads or writes by the number of the step, or numbers its steps in another way.

As in repeating_loops: ONCE are those of which a few iterations stand for all, WHOLE those that are captured in full.
"""

# ruff: noqa: SIM113, B905

from __future__ import annotations

from typing import Any

import torch

from rampde_fx import steps

ONCE: dict[str, Any] = {}
WHOLE: dict[str, Any] = {}


def once(function):
    ONCE[function.__name__] = function
    return function


def whole(function):
    WHOLE[function.__name__] = function
    return function


def controls_of(y, n=41):
    return torch.linspace(-1, 1, 4 * n, device=y.device).reshape(n, 4)


# --- preallocated trajectories ----------------------------------------------------------------------------------------


@once
def states_behind_the_first(m, y, t):
    out = y.new_zeros(t.shape[0], *y.shape)
    out[0] = y
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
        out[i + 1] = y
    return out


@once
def states_along_the_second_dimension(m, y, t):
    out = torch.empty(y.shape[0], t.shape[0], y.shape[1])
    out[:, 0] = y
    i = 0
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        i += 1
        out[:, i] = y
    return out, y


@once
def states_along_the_last_dimension(m, y, t):
    out = y.new_zeros(*y.shape, 80)
    for i, (t_i, dt) in enumerate(steps(t), 1):
        y = y + dt * m.field(t_i, y)
        out[..., 2 * i - 1] = y
    return out


@once
def states_read_from_the_trajectory(m, y, t):
    out = y.new_zeros(t.shape[0], *y.shape)
    out[0] = y
    for i, (t_i, dt) in enumerate(steps(t)):
        y = out[i].clone()  # which autograd asks for
        out[i + 1] = y + dt * m.field(t_i, y)
    return out


@once
def two_states_back_from_the_trajectory(m, y, t):
    out = y.new_zeros(t.shape[0] + 1, *y.shape)
    out[0], out[1] = y, 0.5 * y
    n = 1
    for t_i, dt in steps(t):
        out[n + 1] = out[n - 1] + 2 * dt * m.field(t_i, out[n].clone())
        n += 1
    return out[1:].clone(), out.sum(0)


@once
def parts_of_a_row(m, y, t):
    out = y.new_zeros(t.shape[0], 2, *y.shape)
    for i, (t_i, dt) in enumerate(steps(t)):
        k = m.field(t_i, y)
        y = y + dt * k
        out[i + 1, 0] = y
        out[i + 1, 1] = k
    return out


@once
def parts_that_follow_from_parts(m, y, t):
    out = y.new_zeros(t.shape[0], 2, *y.shape)
    out[0, 0], out[0, 1] = y, -y
    for i, (t_i, dt) in enumerate(steps(t)):
        out[i + 1, 0] = out[i, 0] + 0.1 * out[i, 1]
        out[i + 1, 1] = out[i, 1] + dt * m.field(t_i, out[i, 0].clone())
    return out


@once
def rows_that_are_numbers(m, y, t):
    cost, times = y.new_zeros(t.shape[0] - 1), torch.zeros(t.shape[0] - 1, dtype=torch.float64)
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
        cost[i] = y.square().mean()
        times[i] = t_i
    return y, cost, times


@once
def value_that_is_spread_over_a_row(m, y, t):
    out = y.new_zeros(41, *y.shape)
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
        out[i] = y.mean(0)
    return out


@once
def values_written_before_they_change(m, y, t):
    y, out = y.clone(), y.new_zeros(t.shape[0], *y.shape)
    for i, (t_i, dt) in enumerate(steps(t)):
        out[i] = y
        y += dt * m.field(t_i, 1.0 * y)
    return out, y


@once
def trajectory_of_the_module(m, y, t):
    m.last = y.new_zeros(t.shape[0], *y.shape)
    m.count = 0
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        m.last[m.count] = y.detach()
        m.count += 1
    return y * m.count


@once
def trajectory_by_a_helper(m, y, t):
    out = y.new_zeros(t.shape[0], *y.shape)

    def keep(k, value):
        out[k + 1] = value

    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
        keep(i, y)
    return out


@once
def two_trajectories_and_a_list(m, y, t):
    a, b, states = y.new_zeros(41, *y.shape), y.new_ones(3, 41, 4), []
    for i, (t_i, dt) in enumerate(steps(t)):
        k = m.field(t_i, y)
        y = y + dt * k
        a[i], b[:, i + 1] = y, k
        states.append(k)
    return a, b, torch.stack(states)


# --- what each step reads ---------------------------------------------------------------------------------------------


@once
def row_of_a_parameter(m, y, t):
    table = m.gain[:, None] * m.shift.repeat(10)[None]
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y) * table[:, i]
    return y


@once
def rows_before_and_behind(m, y, t):
    controls = controls_of(y, 60)
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y + controls[i] - 0.5 * controls[i + 1] + controls[3 * 2])
    return y


@once
def times_by_the_index(m, y, t):
    for i, _ in enumerate(steps(t)):
        h = t[i + 1] - t[i]
        y = y + h * m.field(t[i] + h / 2, y)
    return y


@once
def controls_by_zip(m, y, t):
    for (t_i, dt), control in zip(steps(t), controls_of(y)):
        y = y + dt * m.field(t_i, y + control)
    return y


@once
def controls_by_zip_and_enumerate(m, y, t):
    out, controls = y.new_zeros(t.shape[0], *y.shape), controls_of(y) * m.gain
    for i, ((t_i, dt), a, b) in enumerate(zip(steps(t), controls, 2 * controls[1:])):
        y = y + dt * m.field(t_i, y * a + b)
        out[i] = y
    return out


@once
def controls_of_the_length(m, y, t):
    for (t_i, dt), control in zip(steps(t), controls_of(y, t.shape[0] - 1), strict=True):
        y = y + dt * m.field(t_i, y + control)
    return y


# --- numbers that are compared ----------------------------------------------------------------------------------------


@once
def first_step_by_its_index(m, y, t):
    before = None
    for i, (t_i, dt) in enumerate(steps(t)):
        k = m.field(t_i, y)
        y = y + dt * k if i == 0 else y + dt * (1.5 * k - 0.5 * before)
        before = k
    return y


@once
def number_within_the_steps(m, y, t):
    n = 0
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y) if n < t.shape[0] and n >= 0 else -y
        n += 1
    return y * n


@once
def counters_in_all_places(m, y, t):
    m.count, down, pair = 0, 3, (0, y)

    def counts():
        nonlocal down
        down -= 2

    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        m.count += 4
        m.keeper.calls = m.count + 1
        counts()
        pair = (m.count + down, y)
    return y * m.count, y * down, pair[0] * pair[1]


@whole
def last_step_by_its_index(m, y, t):
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y) * (2.0 if i == t.shape[0] - 2 else 1.0)
    return y


@whole
def number_that_is_reached(m, y, t):
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y) * (2.0 if i > 7 else 1.0)
    return y


@whole
def every_other_row(m, y, t):
    out = y.new_zeros(41, *y.shape)
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
        if i % 2 == 0:
            out[i // 2] = y
    return out


@whole
def rows_from_the_end(m, y, t):
    out = y.new_zeros(41, *y.shape)
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
        out[-1 - i] = y
    return out


@whole
def rows_that_wrap_round(m, y, t):
    out = y.new_zeros(t.shape[0] + 3, *y.shape)
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
        out[i - 4] = y
    return out


@whole
def rows_up_to_a_number(m, y, t):
    out = y.new_zeros(41, *y.shape)
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
        out[: i + 1] = y
    return out


@whole
def history_as_a_whole(m, y, t):
    out = y.new_zeros(41, *y.shape)
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y) + 0.01 * out.sum(0)
        out[i] = y
    return out


@whole
def detached_row_of_what_is_written(m, y, t):
    out = y.new_zeros(41, *y.shape)
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
        out[i] = y
        y = y + 0.1 * out[3].detach()
    return out, y


@whole
def row_without_gradient_of_what_is_written(m, y, t):
    out = y.new_zeros(41, *y.shape)
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
        out[i] = y
        with torch.no_grad():
            row = out[3]
        y = y + 0.1 * row + 0.1 * row.t().detach().t()
    return out, y


@whole
def rows_written_twice(m, y, t):
    out = y.new_zeros(42, *y.shape)
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
        out[i] = y
        out[i + 1] = -y
    return out


@whole
def rows_that_are_added_to(m, y, t):
    out = y.new_ones(41, *y.shape)
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
        out[i] += y
    return out


@whole
def rows_of_a_view(m, y, t):
    out = y.new_ones(41, *y.shape)
    first = out[0]
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y) * first
        out[i] = y
    return out


@whole
def index_in_arithmetic(m, y, t):
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y) / (i + 1)
    return y


@whole
def index_in_a_string(m, y, t):
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y) * len(f"{i}")
    return y


@whole
def index_as_a_key(m, y, t):
    states = {}
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
        states[i] = y
    return states[3] + y


@whole
def index_as_a_truth_value(m, y, t):
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y) * (1.0 if i else 2.0) * (1.0 if not i or i is not None else 3.0)
    return y


@whole
def index_in_a_range(m, y, t):
    for i, (t_i, dt) in enumerate(steps(t)):
        for _ in range(i):
            y = y * 0.99
        y = y + dt * m.field(t_i, y)
    return y


@whole
def index_in_a_list(m, y, t):
    factors = [0.1 * k for k in range(41)]
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y) * factors[i]
    return y


@whole
def controls_that_end_first(m, y, t):
    for (t_i, dt), factor in zip(steps(t), [1.0, 2.0] * 20):
        y = y + dt * m.field(t_i, y) * factor
    return y


# --- lists of more than tensors ---------------------------------------------------------------------------------------


@once
def pairs_with_times(m, y, t):
    states = [(t[0], y)]
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        states.append((t_i + dt, y))
    return torch.stack([z for _, z in states]), sum(s * z for s, z in states), len(states) * y


@once
def dicts_in_a_list(m, y, t):
    log = []
    for t_i, dt in steps(t):
        k = m.field(t_i, y)
        y = y + dt * k
        log.append({"y": y, "more": (k, [t_i, 2]), "name": "step"})
    log[1]["y"] = log[2]["more"][0]
    return [entry["y"] for entry in log], log[-1]["more"][0], log[3]["more"][1]


@once
def numbers_in_a_list(m, y, t):
    states, n = [], 7
    for i, (t_i, dt) in enumerate(steps(t)):
        y = y + dt * m.field(t_i, y)
        n -= 2
        states.append((i, n, y, 5))
    return sum(i * n * z for i, n, z, _ in states)


@once
def two_items_of_different_kinds(m, y, t):
    log = []
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        log.append(y)
        log.append((t_i, None))
    return log[::2], [entry[0] for entry in log[1::2]]


@whole
def dict_with_a_second_name(m, y, t):
    log = []
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        entry = {"y": y}
        log.append(entry)
    entry["y"] = -y
    return [entry["y"] for entry in log]


@whole
def one_dict_again_and_again(m, y, t):
    log, entry = [], {}
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        entry["y"] = y
        log.append(entry)
    return [entry["y"] for entry in log]


@whole
def pairs_that_grow(m, y, t):
    log, words = [], ""
    for t_i, dt in steps(t):
        y = y + dt * m.field(t_i, y)
        words += "x"
        log.append((words, y))
    return sum(len(word) * z for word, z in log)
