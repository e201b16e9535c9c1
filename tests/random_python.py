"""Random Python round a marked loop: statements that repeat, that differ, and that only look like one of these."""

from __future__ import annotations

import random
from typing import Any

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
HEADS = ["for t_i, dt in steps(t):", "for j, (t_i, dt) in enumerate(steps(t)):", "for t_i, dt in doubled(steps(t)):"]


def random_program(seed: int) -> tuple[Any, str]:
    """A program like those of repeating_loops, and its text."""
    draw = random.Random(seed)
    chosen = []
    for i in range(draw.randint(1, 4)):
        numbers = draw.randint(2, 14), draw.randint(1, 4)
        chosen.append([part.format(i, *numbers) for part in draw.choice(STATEMENTS)])
    head = draw.choice(HEADS)
    if "enumerate" in head and draw.random() < 0.5:
        chosen.append(["pass", "y = y * (0.9 if j == 5 else 1.0)", "y * j"])
    statements = [*(statement for _, statement, _ in chosen), "y = y + dt * k"]
    draw.shuffle(statements)
    body = ["k = m.field(t_i, y)", *statements]
    lines = ["def doubled(pairs):", "  for a, b in pairs:", "    yield 2 * a, b", "def program(m, y, t):"]
    lines += [f"  {before}" for before, *_ in chosen]
    lines += [f"  {head}", *(f"    {statement}" for statement in body)]
    lines.append(f"  return y, {', '.join(result for *_, result in chosen)}")
    text = "\n".join(lines)
    names: dict[str, Any] = {"steps": repeating_loops.steps}
    exec(compile(text, f"<program {seed}>", "exec"), names)
    return names["program"], text
