"""The flow of small_loops.py in JAX and diffrax: one contender, trained in turns. Runs in an environment of its own.

PYTHON tests/benchmarks/jax_peer.py NAME WIDTH BATCH STEPS, where PYTHON has jax and diffrax. It prints the seconds of
the first step, and then for each line that it reads, a number of seconds, the median milliseconds of a step in that
time.
"""

from __future__ import annotations

import operator
import statistics
import sys
import time
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

DIM = 3
THIRDS = np.array([1 / 3]), np.array([-1 / 3, 1.0]), np.array([1.0, -1.0, 1.0])
TABLEAU = diffrax.ButcherTableau(
    a_lower=THIRDS,
    b_sol=np.array([1 / 8, 3 / 8, 3 / 8, 1 / 8]),
    b_error=np.zeros(4),  # no adaptive steps
    c=np.array([1 / 3, 2 / 3, 1.0]),
)


class ThreeEighths(diffrax.AbstractERK):
    """Kutta's 3/8 rule, which diffrax does not have."""

    tableau = TABLEAU
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms: Any) -> int:
        """Of the method."""
        return 4


def parameters(width: int) -> list[tuple[Any, Any]]:
    """Weights and biases of the three layers."""
    sizes = [(DIM + 1, width), (width, width), (width, DIM)]
    keys = jax.random.split(jax.random.PRNGKey(0), len(sizes))
    return [
        (jax.random.uniform(key, (rows, columns), minval=-1, maxval=1) / rows**0.5, jnp.zeros(columns))
        for key, (rows, columns) in zip(keys, sizes, strict=True)
    ]


def velocity(t: Any, y: Any, layers: Any) -> Any:
    """A network of (y, t) with tanh."""
    h = jnp.concatenate([y, jnp.broadcast_to(t, (y.shape[0], 1))], 1)
    for weight, bias in layers[:-1]:
        h = jnp.tanh(h @ weight + bias)
    return h @ layers[-1][0] + layers[-1][1]


def scan(layers: Any, y: Any, steps: int, *, recomputes: bool) -> Any:
    """A loop of steps; recomputed in the backward where asked for."""
    h = 1 / steps

    def step(y: Any, t: Any) -> Any:
        k1 = velocity(t, y, layers)
        k2 = velocity(t + h / 3, y + h * k1 / 3, layers)
        k3 = velocity(t + 2 * h / 3, y + h * (k2 - k1 / 3), layers)
        k4 = velocity(t + h, y + h * (k1 - k2 + k3), layers)
        return y + h * (k1 + 3 * (k2 + k3) + k4) / 8, None

    return jax.lax.scan(jax.checkpoint(step) if recomputes else step, y, jnp.arange(steps) * h)[0]


def solve(layers: Any, y: Any, steps: int) -> Any:
    """By diffrax, with its default adjoint: recursive checkpoints."""
    term, sizes = diffrax.ODETerm(velocity), diffrax.ConstantStepSize()
    saved = diffrax.SaveAt(t1=True)
    result = diffrax.diffeqsolve(
        term,
        ThreeEighths(),
        0.0,
        1.0,
        1 / steps,
        y,
        layers,
        saveat=saved,
        stepsize_controller=sizes,
        max_steps=steps + 1,
    )
    return result.ys[0]


CONTENDERS = {
    "JAX, scan with remat": lambda p, y, n: scan(p, y, n, recomputes=True),
    "JAX, scan": lambda p, y, n: scan(p, y, n, recomputes=False),
    "diffrax, recursive checkpoints": solve,
}


def main() -> None:
    """Compile, then train when told."""
    name, width, batch, steps = sys.argv[1], *map(int, sys.argv[2:])
    layers, y = parameters(width), jax.random.normal(jax.random.PRNGKey(1), (batch, DIM))
    step = jax.jit(jax.value_and_grad(lambda p: jnp.mean(CONTENDERS[name](p, y, steps) ** 2)))
    begin = time.perf_counter()
    jax.block_until_ready(step(layers))
    print(time.perf_counter() - begin, flush=True)
    for line in sys.stdin:
        # Of each step: the first ones after a pause may take fifty times as long, where a host takes memory back.
        ends = [time.perf_counter()]
        while len(ends) < 4 or ends[-1] - ends[0] < float(line):
            jax.block_until_ready(step(layers))
            ends.append(time.perf_counter())
        print(statistics.median(map(operator.sub, ends[1:], ends)) * 1e3, flush=True)


if __name__ == "__main__":
    main()
