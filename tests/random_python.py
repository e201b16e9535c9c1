"""Random Python round a marked loop: statements that repeat, that differ, and that only look like one of these."""

from __future__ import annotations

import random
from typing import Any

import torch
from tqdm import tqdm

from tests import repeating_loops

# Before the loop, in its body, and what is returned; k is the velocity, y the state.
STATEMENTS = [
    ("n{0} = 0", "n{0} += {2}", "y * n{0}"),
    ("n{0} = 0", "n{0} += 1\n    y = y * (0.5 if n{0} == {1} else 1.0)", "y"),
    ("n{0} = 0", "n{0} = min(n{0} + 1, {1})\n    y = y + 0.01 * n{0}", "y * n{0}"),
    ("n{0} = 0", "n{0} = (n{0} + 1) % {2}\n    y = y + 0.01 * dt * n{0}", "y"),
    ("a{0} = y", "a{0} = a{0} + dt * k", "a{0}"),
    ("a{0} = None", "a{0} = k if a{0} is None else a{0}", "a{0}"),
    ("a{0}, b{0} = y, 2 * y", "a{0}, b{0} = b{0}, a{0} + dt * k", "a{0} - 3 * b{0}"),
    ("a{0} = b{0} = c{0} = y", "a{0}, b{0}, c{0} = k, a{0}, b{0}", "a{0} + 2 * b{0} + 3 * c{0}"),
    ("l{0} = []", "l{0}.append(k)", "__import__('torch').stack(l{0})"),
    ("l{0} = [y]", "l{0}.append(y)\n    l{0}.append(t_i * k)", "__import__('torch').stack(l{0}, 1)"),
    ("l{0} = []", "l{0}.append(k)\n    y = y + (0.1 if len(l{0}) == {1} else 0.0)", "l{0}"),
    ("l{0} = [y]", "l{0}.append(y + k)", "l{0}[-1] + len(l{0}) * l{0}[0]"),
    ("l{0} = [y] * {2}", "l{0} = [k, *l{0}[:-1]]", "sum(l{0})"),
    ("d{0} = dict(y=y)", "d{0}['k'] = k + d{0}['y']", "d{0}['y']"),
    ("d{0} = dict()", "d{0}[{1}] = k", "d{0}[{1}]"),
    ("d{0} = dict()", "d{0}[len(d{0})] = k", "d{0}[0]"),
    ("f{0} = True", "y = y + (dt * k if f{0} else 0.5 * dt * k)\n    f{0} = not f{0}", "y"),
    ("f{0} = True", "y = y + (dt * k if f{0} else 0.5 * dt * k)\n    f{0} = False", "y"),
    ("g{0} = iter([0.1] * {1} + [0.2] * 100)", "y = y + next(g{0}) * dt * k", "y"),
    ("s{0} = ''", "s{0} = (s{0} + 'x')[-{2}:]\n    y = y * (1.0 + 0.01 * len(s{0}))", "y"),
    ("z{0} = y.clone()", "z{0} += dt * k", "z{0}"),
    ("w{0} = m.gain", "w{0} = m.shift if w{0} is m.gain else m.gain\n    y = y + 0.1 * w{0}", "y"),
    ("h{0} = lambda x: x", "y = h{0}(y)\n    h{0} = lambda x, k=k: x + 0.01 * k", "h{0}(y)"),
    ("pass", "m.keeper.last = k", "m.keeper.last"),
    ("pass", "m.keeper.seen.append(1)", "y"),
    ("pass", "m.mean.add_(0.1 * k.detach().mean(0))", "m.mean * y"),
    ("pass", "y = y + 0 * t_i", "t_i * y + dt"),
    ("p{0} = None", "p{0} = (k, p{0} if {1} > 90 else None)", "p{0}[0]"),
    ("t = t * 1.0", "y = y + dt * t[-1]", "t.sum() * y"),
]
# Likewise, i counts the steps. Of the tensors o rows are written, of c they are read.
NUMBERED = [
    ("o{0} = y.new_zeros(60, *y.shape)", "o{0}[i + {2}] = y", "o{0}"),
    ("o{0} = y.new_zeros(*y.shape, 200)", "o{0}[..., {2} * i + 1] = k", "o{0}"),
    ("o{0} = y.new_zeros(3, 60, 4)", "o{0}[:, i] = k\n    o{0}[:, i + {2}] = y", "o{0}"),
    ("o{0} = y.new_zeros(60, 2, *y.shape)", "o{0}[i, 0] = k\n    o{0}[i, 1] = y", "o{0}"),
    ("o{0} = y.new_zeros(60, *y.shape)", "o{0}[i + {2}] = o{0}[i].clone() + dt * k", "o{0}"),
    ("o{0} = y.new_ones(60, *y.shape)", "o{0}[i + 1] = 0.5 * o{0}[i + {2}].clone() + k", "o{0}"),
    ("o{0} = y.new_zeros(60, *y.shape)", "o{0}[i] = k if i != {1} else y", "o{0}"),
    ("o{0} = y.new_zeros(60, *y.shape)", "o{0}[i - {2}] = y", "o{0}"),
    ("o{0} = y.new_zeros(60, *y.shape)", "o{0}[min(i, {1})] = y", "o{0}"),
    ("o{0} = y.new_zeros(60, *y.shape)", "o{0}[-1 - i] = y", "o{0}"),
    ("o{0} = y.new_zeros(60, *y.shape)", "o{0}[i] = y\n    y = y + 0.01 * o{0}[{1}].detach()", "o{0}"),
    ("o{0} = y.new_zeros(60, *y.shape)", "o{0}[i] = y.sum(0)\n    o{0}[{1}] = k", "o{0}"),
    ("c{0} = controls * m.gain", "y = y + 0.1 * c{0}[i + {2}]", "y"),
    ("c{0} = controls", "y = y + 0.1 * c{0}[i] * c{0}[{1}]", "y"),
    ("c{0} = controls.t()", "y = y + 0.1 * c{0}[:, i]", "y"),
    ("pass", "y = y + 0.1 * (t[i + 1] - t[i])", "y"),
    ("pass", "y = y * (0.5 if i > {1} else 1.0)", "y"),
    ("pass", "y = y * (0.5 if i == 0 else 1.0) * (1.0 if i >= 0 else 9.0)", "y * i"),
    ("pass", "y = y + 0.01 * dt * i", "y"),
    ("pass", "y = y + 0.01 * m.layers[i](y)", "y"),
    ("q{0} = (0, y)", "q{0} = (i + q{0}[0] if {1} > 9 else i - 3, k)", "q{0}[0] * q{0}[1]"),
    ("n{0} = {1}", "n{0} -= {2}\n    m.keeper.calls = n{0} + 2 * i", "y * m.keeper.calls"),
    ("l{0} = [(0, y)]", "l{0}.append((i * {2}, k))", "[a * b for a, b in l{0}]"),
    ("l{0} = []", "l{0}.append({{'k': k, 't': (t_i, [dt])}})", "[e['k'] * e['t'][1][0] for e in l{0}]"),
    ("l{0} = []; e{0} = {{}}", "e{0}['k'] = k\n    l{0}.append(e{0})", "[e['k'] for e in l{0}]"),
    ("l{0} = []", "e{0} = {{'k': k}}\n    l{0}.append(e{0})", "[e['k'] for e in l{0}] + [e{0}['k']]"),
]
HEADS = [
    "for t_i, dt in steps(t):",
    "for j, (t_i, dt) in enumerate(steps(t)):",
    "for t_i, dt in doubled(steps(t)):",
    "for (t_i, dt), c in zip(steps(t), controls):",
    "for t_i, dt in tqdm(steps(t), disable=True):",
]


def random_program(seed: int) -> tuple[Any, str]:
    """A program like those of repeating_loops, and its text."""
    draw = random.Random(seed)
    chosen = []
    numbered = draw.random() < 0.6
    for i in range(draw.randint(1, 4)):
        numbers = draw.randint(2, 14), draw.randint(1, 4)
        table = NUMBERED if numbered and draw.random() < 0.6 else STATEMENTS
        chosen.append([part.format(i, *numbers) for part in draw.choice(table)])
    head = draw.choice(HEADS)
    if "enumerate" in head and draw.random() < 0.5:
        chosen.append(["pass", "y = y * (0.9 if j == 5 else 1.0)", "y * j"])
    if "zip" in head:
        chosen.append(["pass", "y = y + 0.01 * c", "c"])
    statements = [*(statement for _, statement, _ in chosen), "y = y + dt * k"]
    draw.shuffle(statements)
    counts_first = draw.random() < 0.5
    if numbered:
        statements = ["i += 1", *statements] if counts_first else [*statements, "i += 1"]
    body = ["k = m.field(t_i, y)", *statements]
    lines = ["def doubled(pairs):", "  for a, b in pairs:", "    yield 2 * a, b", "def program(m, y, t):"]
    lines += ["  controls = torch.linspace(-1, 1, 240).reshape(60, 4)", f"  i = {-1 if counts_first else 0}"]
    lines += [f"  {before}" for before, *_ in chosen]
    lines += [f"  {head}", *(f"    {statement}" for statement in body)]
    lines.append(f"  return y, {', '.join(result for *_, result in chosen)}")
    text = "\n".join(lines)
    names: dict[str, Any] = {"steps": repeating_loops.steps, "torch": torch, "tqdm": tqdm}
    exec(compile(text, f"<program {seed}>", "exec"), names)
    return names["program"], text
