"""Butcher tableaux: the order conditions, what is refused, and the order of convergence of every method."""

import dataclasses
import math
import pickle
from fractions import Fraction

import pytest
import torch

from rampde_fx.errors import MethodError, RampdeError, TableauError
from rampde_fx.solvers.runge_kutta import advance_collecting, interpolate
from rampde_fx.solvers.tableau import (
    METHODS,
    PAIRS_OF_ORDER_2,
    ButcherTableau,
    bracket,
    density,
    rooted_trees,
    tableau_of,
    vertices,
)


def embedded(tableau):
    """The embedded method as a method of its own."""
    return dataclasses.replace(
        tableau, name=tableau.name + "-embedded", b=tableau.b_error, order=tableau.order_error, **NOT_ADAPTIVE
    )


NOT_ADAPTIVE = {"b_error": None, "order_error": None, "interpolant": None}
ALONE = [
    *METHODS.values(),
    *(embedded(tableau) for tableau in METHODS.values() if tableau.adaptive),
    *PAIRS_OF_ORDER_2.values(),
]
every_method = pytest.mark.parametrize("tableau", ALONE, ids=lambda tableau: tableau.name)

ORDERS = {
    "euler": (1, None),
    "midpoint": (2, None),
    "heun2": (2, None),
    "ralston": (2, None),
    "heun3": (3, None),
    "ssprk33": (3, None),
    "bosh3": (3, 2),
    "rk4": (4, None),
    "rk4_38": (4, None),
    "dopri5": (5, 4),
    "tsit5": (5, 4),
    "dopri8": (8, 7),
}
RK4 = {
    "a": ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)),
    "b": (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    "c": (0, 1 / 2, 1 / 2, 1),
    "order": 4,
    "name": "mine",
}


def refused(found, kind=TableauError, **fields):
    """The message that RK4 with these fields changed is refused with."""
    with pytest.raises(kind) as raised:
        ButcherTableau(**{**RK4, **fields})
    assert isinstance(raised.value, RampdeError) and isinstance(raised.value, ValueError)
    message = str(raised.value)
    assert "ButcherTableau(name='mine')" in message and found in message, message
    assert "required:" in message and "fix:" in message
    return message


# Rooted trees


def test_number_of_rooted_trees():
    assert [len(rooted_trees(order)) for order in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]
    for order in range(1, 9):
        assert len(set(rooted_trees(order))) == len(rooted_trees(order))
        assert {vertices(tree) for tree in rooted_trees(order)} == {order}


def test_trees_and_densities_of_order_four():
    found = {bracket(tree): density(tree) for order in range(1, 5) for tree in rooted_trees(order)}
    assert found == {
        "τ": 1,
        "[τ]": 2,
        "[ττ]": 3,
        "[[τ]]": 6,
        "[τττ]": 4,
        "[τ[τ]]": 8,
        "[[ττ]]": 12,
        "[[[τ]]]": 24,
    }


# The known methods


def test_methods_are_all_there_and_read_only():
    assert {name: (tableau.order, tableau.order_error) for name, tableau in METHODS.items()} == ORDERS
    assert all(name == tableau.name and tableau.source for name, tableau in METHODS.items())
    with pytest.raises(TypeError):
        METHODS["euler"] = METHODS["rk4"]


@every_method
def test_order_is_claimed_in_full(tableau):
    with pytest.raises(TableauError, match=f"does not have the order {tableau.order + 1}"):
        dataclasses.replace(tableau, order=tableau.order + 1, **NOT_ADAPTIVE)


@every_method
def test_conditions_to_order_four_written_out(tableau):
    a = torch.zeros(tableau.stages, tableau.stages, dtype=torch.float64)
    for i, row in enumerate(tableau.a):
        a[i, :i] = torch.tensor(row, dtype=torch.float64)
    b, c = torch.tensor(tableau.b, dtype=torch.float64), torch.tensor(tableau.c, dtype=torch.float64)
    torch.testing.assert_close(a.sum(1), c, rtol=0, atol=1e-14)
    conditions = [
        (b.sum() - 1,),
        (b @ c - 1 / 2,),
        (b @ c**2 - 1 / 3, b @ a @ c - 1 / 6),
        (b @ c**3 - 1 / 4, b @ (c * (a @ c)) - 1 / 8, b @ a @ c**2 - 1 / 12, b @ a @ a @ c - 1 / 24),
    ]
    missed = [max(map(abs, residuals)) > 1e-13 for residuals in conditions]
    assert missed == [order > tableau.order for order in range(1, 5)]


def test_stages_fsal_and_adaptive():
    stages = {name: tableau.stages for name, tableau in METHODS.items()}
    assert stages == dict(zip(ORDERS, (1, 2, 2, 2, 3, 3, 4, 4, 4, 7, 7, 13), strict=True))
    assert [name for name, tableau in METHODS.items() if tableau.fsal] == ["bosh3", "dopri5", "tsit5"]
    assert [name for name, tableau in METHODS.items() if tableau.adaptive] == ["bosh3", "dopri5", "tsit5", "dopri8"]
    # The embedded weights of these do not have the last row of a: their last stage is at another state.
    assert not any(tableau.fsal for tableau in ALONE if tableau.name.endswith("-embedded"))


def test_pairs_of_order_2():
    """Both interpolate by Hermite's cubic; of fehlberg2 the embedded method is the one that shares its last stage."""
    pairs = PAIRS_OF_ORDER_2.values()
    assert [(pair.name, pair.order, pair.order_error, pair.stages) for pair in pairs] == [
        ("adaptive_heun", 2, 1, 2),
        ("fehlberg2", 2, 1, 3),
    ]
    assert all(pair.interpolates and not pair.fsal and pair.source for pair in pairs)
    assert [pair.name for pair in map(embedded, pairs) if pair.fsal] == ["fehlberg2-embedded"]
    assert not PAIRS_OF_ORDER_2.keys() & METHODS.keys()


def test_frozen_equal_and_pickled():
    tableau = METHODS["dopri5"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        tableau.order = 6
    assert pickle.loads(pickle.dumps(tableau)) == tableau == dataclasses.replace(tableau)
    assert len({*METHODS.values(), dataclasses.replace(tableau)}) == len(METHODS)


def test_square_rows_lists_and_fractions_become_tuples_of_floats():
    half = Fraction(1, 2)
    rows = [[0, 0, 0, 0], [half, 0, 0, 0], [0, half, 0, 0], [0, 0, 1, 0]]
    tableau = ButcherTableau(rows, [Fraction(1, 6), Fraction(1, 3), Fraction(1, 3), Fraction(1, 6)], RK4["c"], 4)
    assert (tableau.a, tableau.b, tableau.c) == (METHODS["rk4"].a, METHODS["rk4"].b, METHODS["rk4"].c)
    assert {type(entry) for row in (*tableau.a, tableau.b, tableau.c) for entry in row} == {float}


def test_an_order_too_low_is_no_error():
    assert ButcherTableau(**{**RK4, "order": 2}).order == 2


def test_tableau_of():
    assert all(tableau_of(name) is tableau for name, tableau in METHODS.items())
    mine = ButcherTableau(**RK4)
    assert tableau_of(mine) is mine


@pytest.mark.parametrize("method", ["dopri", "RK4", "implicit_euler", "", None, 4, ["rk4"]], ids=repr)
def test_unknown_method(method):
    with pytest.raises(MethodError) as raised:
        tableau_of(method)
    assert isinstance(raised.value, RampdeError) and isinstance(raised.value, ValueError)
    assert repr(method) in str(raised.value) and ", ".join(METHODS) in str(raised.value)


# What is refused


def test_lengths():
    refused("len(a) = 3, len(b) = 4, len(c) = 4", a=RK4["a"][:3])
    refused("len(c) = 3", c=(0, 1 / 2, 1))
    refused("len(b_error) = 3", b_error=(1, 0, 0), order_error=1)
    refused("len(b) = 0", a=(), b=(), c=())
    message = refused("2 entries in row 3 of a", a=((), (1 / 2,), (0, 1 / 2), (0, 1)))
    assert "the 3 entries left of the diagonal, or all 4" in message


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_not_finite(number):
    refused(f"has {number} in a", a=((), (1 / 2,), (number, 1 / 2), (0, 0, 1)))
    refused(f"has {number} in b", b=(number, 1 / 3, 1 / 3, 1 / 6))
    refused(f"has {number} in c", c=(0, 1 / 2, 1 / 2, number))
    refused(f"has {number} in b_error", b_error=(1, 0, 0, number), order_error=1)


def test_no_numbers():
    refused("cannot be read as floats", a=((), ("half",), (0, 1 / 2), (0, 0, 1)))
    refused("cannot be read as floats", b=1)
    refused("cannot be read as floats", c=(0, None, 1 / 2, 1))
    refused("cannot be read as floats", b=(10**400, 0, 0, 0))


@pytest.mark.parametrize("i, j", [(0, 0), (0, 3), (2, 2), (2, 3), (3, 3)])
def test_implicit(i, j):
    rows = [[*row, *[0.0] * (4 - len(row))] for row in RK4["a"]]
    rows[i][j] = 1e-30
    message = refused(f"is implicit: row {i} of a", a=rows)
    assert "explicit method" in message


def test_implicit_methods_of_the_literature():
    gauss = {"a": ((0.5,),), "b": (1,), "c": (0.5,), "order": 2}
    trapezoid = {"a": ((0, 0), (0.5, 0.5)), "b": (0.5, 0.5), "c": (0, 1), "order": 2}
    for fields in (gauss, trapezoid):
        refused("is implicit", **fields)


def test_row_sums():
    refused("the row sum 0.5 in row 2 of a", c=(0, 1 / 2, 2 / 3, 1))
    refused("the row sum 0 in row 0 of a", c=(0.25, 1 / 2, 1 / 2, 1))
    # Every condition is met in an autonomous problem, which does not read c.
    refused("beside c = 0.0", c=(0, 1 / 2, 0, 1))


def test_weights_that_do_not_sum_to_one():
    refused("has weights b that sum to 0.75", b=(0.125, 0.25, 0.25, 0.125), order=1)


@pytest.mark.parametrize("order", [5, 6, 9, 100])
def test_order_too_high(order):
    message = refused(f"does not have the order {order} claimed for b", order=order)
    assert "claim order 4" in message


@pytest.mark.parametrize("order", [0, -1, 4.0, True, "4", None])
def test_order_that_is_no_positive_int(order):
    refused(f"has order={order!r}", order=order)
    if order is not None:
        refused(f"has order_error={order!r}", b_error=(1, 0, 0, 0), order_error=order)


def test_embedded_method():
    assert ButcherTableau(**RK4, b_error=(0, 1, 0, 0), order_error=2).adaptive
    message = refused("does not have the order 3 claimed for b_error", b_error=(0, 1, 0, 0), order_error=3)
    assert "claim order 2" in message
    refused("has weights b_error that sum to 0.5", b_error=(0, 0.5, 0, 0), order_error=1)
    # The difference b - b_error, which some programs store, sums to 0.
    refused("has weights b_error that sum to 0.0", b_error=(-1, 1, 0, 0), order_error=2)
    refused("b_error=None and order_error=2", order_error=2)
    refused("order_error=None", b_error=(0, 1, 0, 0))
    refused("has b_error = b", b_error=RK4["b"], order_error=4)


def test_which_methods_interpolate():
    """Hermite's cubic is of order 3, enough for bosh3's order 2; with a quartic term it is of order 4."""
    assert [name for name, tableau in METHODS.items() if tableau.interpolates] == ["bosh3", "dopri5", "tsit5"]
    assert ButcherTableau(**RK4, b_error=(0, 1, 0, 0), order_error=2).interpolates
    without = dataclasses.replace(METHODS["dopri5"], interpolant=None)
    assert without.adaptive and not without.interpolates


@pytest.mark.parametrize("name", ["dopri5", "tsit5", "dopri8"])
def test_an_interpolant_that_is_off_is_found(name):
    tableau = METHODS[name]
    weights = list(tableau.interpolant)
    for stage in (i for i, weight in enumerate(weights) if weight):
        changed = [*weights[:stage], weights[stage] + 1e-9, *weights[stage + 1 :]]
        with pytest.raises(TableauError, match="not of order 4: the coefficient of x"):
            dataclasses.replace(tableau, interpolant=changed)
    with pytest.raises(
        TableauError, match=rf"len\(interpolant\) = {tableau.stages}.\n.*one of the velocity at the step's end"
    ):
        dataclasses.replace(tableau, interpolant=weights[:-1])
    with pytest.raises(TableauError, match="inf in interpolant"):
        dataclasses.replace(tableau, interpolant=[math.inf, *weights[1:]])
    with pytest.raises(TableauError, match="cannot be read as floats"):
        dataclasses.replace(tableau, interpolant=["a", *weights[1:]])
    refused("an interpolant that is not of order 4", interpolant=(0, 0, 0, 0, 0))


@pytest.mark.parametrize("name", ["dopri5", "tsit5"])
def test_weights_of_an_interpolant_against_its_source(name):
    """dopri5's as in section II.6 of Hairer, Norsett and Wanner; tsit5's as Tsitouras prints them."""
    x = 0.3
    by_power = METHODS[name]._weights_by_power()
    found = [sum(weights[i] * x ** (power + 1) for power, weights in enumerate(by_power)) for i in range(8)]
    if name == "dopri5":
        hermite = x**2 * (3 - 2 * x)
        quartic = x**2 * (x - 1) ** 2
        d = METHODS[name].interpolant
        b = METHODS[name].b
        wanted = {0: hermite * b[0] + x * (x - 1) ** 2 + quartic * d[0], 3: hermite * b[3] + quartic * d[3]}
        wanted[7] = x**2 * (x - 1) + quartic * d[7]
    else:
        wanted = {
            0: -1.0530884977290216
            * x
            * (x - 1.3299890189751412)
            * (x**2 - 1.4364028541716351 * x + 0.7139816917074209),
            1: 0.1017 * x**2 * (x**2 - 2.1966568338249754 * x + 1.2949852507374631),
            2: 2.490627285651252793 * x**2 * (x**2 - 2.38535645472061657 * x + 1.57803468208092486),
            7: 2.5 * (x - 1) * (x - 0.6) * x**2,
        }
    for stage, weight in wanted.items():
        assert found[stage] == pytest.approx(weight, abs=1e-13)


@every_method
def test_a_coefficient_that_is_off_is_found(tableau):
    """1e-9 in one weight or one row is found in every method; 1e-14 is rounding."""

    def changed(off):
        yield {"b": (tableau.b[0] + off, *tableau.b[1:])}
        if tableau.order > 2:  # the conditions of order 2 read nothing of a but its row sums
            i = max(i for i, weight in enumerate(tableau.b) if weight)
            row = tableau.a[i]
            yield {"a": (*tableau.a[:i], (row[0] + off, *row[1:-1], row[-1] - off), *tableau.a[i + 1 :])}

    for fields in changed(1e-14):
        dataclasses.replace(tableau, **fields, **NOT_ADAPTIVE)
    for fields in changed(1e-9):
        with pytest.raises(TableauError):
            dataclasses.replace(tableau, **fields, **NOT_ADAPTIVE)


# Convergence

FLOOR = 2e-14  # a hundred unit roundoffs of float64, about what rounding leaves of the relative error
A = torch.tensor([[-1.0, 4.0, 0.6], [-4.0, -0.8, 1.4], [0.4, -1.2, 0.8]], dtype=torch.float64)
Y0 = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


def integrate(tableau, velocity, y, t1, steps):
    """The state at t1, of equal steps from t = 0."""
    h = t1 / steps
    for n in range(steps):
        k = []
        for row, c in zip(tableau.a, tableau.c, strict=True):
            k.append(velocity((n + c) * h, y + h * sum(a * k_j for a, k_j in zip(row, k, strict=True))))
        y = y + h * sum(b * k_i for b, k_i in zip(tableau.b, k, strict=True))
    return y


def slope(tableau, velocity, y0, t1, exact):
    """The observed order: log2 of the ratio of the last two errors above the round-off floor, of halved steps."""
    errors = []
    for steps in (4, 8, 16, 32, 64, 128, 256):
        error = (integrate(tableau, velocity, y0, t1, steps) - exact).norm() / exact.norm()
        if error < FLOOR:
            break
        errors.append(error.item())
    assert tableau.order < 5 or errors[-1] < 1e-11  # the slope is that at small errors
    return math.log2(errors[-2] / errors[-1])


def linear(t, y):
    return A @ y


def solution(t):
    return torch.tensor([math.sin(t), math.cos(2 * t), math.exp(-t)], dtype=torch.float64)


def coupled(y):
    return torch.sin(torch.stack([2 * y[1] + y[2], y[2] - 2 * y[0], y[0] - y[1]]))


def nonlinear(t, y):
    """A velocity that depends on t and on all of y, and has solution(t) as its solution."""
    rate = torch.tensor([math.cos(t), -2 * math.sin(2 * t), -math.exp(-t)], dtype=torch.float64)
    return rate + coupled(y) - coupled(solution(t))


@every_method
def test_convergence_on_a_linear_system(tableau):
    # dopri8 misses the condition of order 9 that a linear system has by 4e-9 of 3e-6: its slope there is 9.
    order = 9 if tableau.name == "dopri8" else tableau.order
    assert slope(tableau, linear, Y0, 1.0, torch.linalg.matrix_exp(A) @ Y0) == pytest.approx(order, abs=0.3)


@every_method
def test_convergence_on_a_nonlinear_problem(tableau):
    found = slope(tableau, nonlinear, solution(0.0), 2.0, solution(2.0))
    assert found == pytest.approx(tableau.order, abs=0.3)


@pytest.mark.parametrize("name, order", [("bosh3", 3), ("dopri5", 4), ("tsit5", 4), ("dopri8", 4)])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_convergence_of_an_interpolant(name, order, share):
    """Within one step of size h the error is of h to the order + 1; that of dopri8 is of order 5 at the middle."""
    tableau, found = METHODS[name], []
    order += name == "dopri8" and share == 0.5
    for h in (0.16, 0.08, 0.04) if name == "dopri8" else (0.04, 0.02, 0.01):
        t, dt = (torch.tensor(number, dtype=torch.float64) for number in (0.3, h))

        def velocity(t, y):
            return [nonlinear(t.item(), y[0])]

        y = [solution(0.3)]
        nexts, rates, quartics, at_end = advance_collecting(tableau, velocity, t, dt, y)
        assert at_end == []
        ends = (y[0], nexts[0]), (rates[0], velocity(t + dt, nexts)[0])
        between = interpolate(
            tableau, torch.tensor(share, dtype=torch.float64), dt, *ends, quartics[0] if quartics else None
        )
        found.append((between - solution(0.3 + share * h)).norm().item())
    assert found[-1] > FLOOR / 10
    assert math.log2(found[-2] / found[-1]) == pytest.approx(order + 1, abs=0.3)
