"""The coefficients of tanh in rampde_fx/emit/cpu_functions.py: python -m tests.benchmarks.tanh

tanh(x) / x as a quotient of polynomials in x^2 of degree 4, with the least relative error on [-LARGEST, LARGEST]: least
squares whose weights follow the error (C. L. Lawson's algorithm), on the linearized problem (C. K. Sanathanan and
J. Koerner, doi 10.1109/TAC.1963.1105517).
"""

from __future__ import annotations

import numpy as np

from rampde_fx.emit.cpu_functions import LARGEST

DEGREE = 4
ITERATIONS = 600


def fit() -> tuple[float, list[float], list[float]]:
    """The largest relative error, the numerator and the denominator, from degree 0 up."""
    x = np.cos(np.linspace(0, np.pi / 2, 4000)[:-1]) * LARGEST
    wanted, z = np.tanh(x) / x, (x / LARGEST) ** 2
    powers = z[:, None] ** np.arange(DEGREE + 1)
    weights, below = np.ones_like(x), np.ones_like(x)
    best = (np.inf, np.zeros(DEGREE + 1), np.zeros(DEGREE + 1))
    for _ in range(ITERATIONS):
        scale = np.sqrt(weights) / (wanted * below)
        system = np.concatenate([powers, -wanted[:, None] * powers[:, 1:]], 1) * scale[:, None]
        sizes = np.linalg.norm(system, axis=0)
        found = np.linalg.lstsq(system / sizes, wanted * scale, rcond=None)[0] / sizes
        above, under = found[: DEGREE + 1], np.concatenate([[1.0], found[DEGREE + 1 :]])
        below = powers @ under
        error = np.abs(powers @ above / (below * wanted) - 1)
        if error.max() < best[0]:
            best = (float(error.max()), above, under)
        weights = weights * (error / error.max() + 1e-3)
        weights /= weights.mean()
    units = LARGEST ** (2.0 * np.arange(DEGREE + 1))
    return best[0], list(best[1] / units), list(best[2] / units)


def main() -> None:
    """Print them."""
    error, numerator, denominator = fit()
    print(f"largest relative error {error:.3g}")
    for name, coefficients in (("NUMERATOR", numerator), ("DENOMINATOR", denominator)):
        print(f"{name} = ({', '.join(f'{coefficient:.9e}' for coefficient in coefficients)})")


if __name__ == "__main__":
    main()
