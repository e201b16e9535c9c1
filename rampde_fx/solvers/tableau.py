"""Explicit Runge-Kutta methods as data: Butcher tableaux that check themselves, and those of the known methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from operator import mul
from types import MappingProxyType
from typing import TypeAlias

from rampde_fx.errors import MethodError, TableauError
from rampde_fx.torch_private import dynamo
from rampde_fx.torch_private.refusals import refuse, shown

Row: TypeAlias = tuple[float, ...]
Tree: TypeAlias = "tuple[Tree, ...]"  # the sorted branches of the root; () is the single vertex

# How far a condition may be missed, relative to 1 or to the magnitudes of its terms, where these sum to more. The
# methods below miss theirs by 1e-14 at most, the rounding of their coefficients, and one of the next order by 8e-6 at
# least. Between these, 1e-12 admits coefficients that are printed to 13 digits. What it lets pass changes a step of
# size h by about 1e-12 h, far below the unit roundoff of float32.
TOLERANCE = 1e-12
INTERPOLANT_ORDER = 4  # of Hermite's cubic with the quartic term


@dataclass(frozen=True)
class ButcherTableau:
    """An explicit Runge-Kutta method of s stages.

    k_i = velocity(t + c_i h, y + h sum_j a_ij k_j), then y(t + h) = y + h sum_i b_i k_i. What does not meet every order
    condition up to the order that is claimed is refused.

    Args:
        a: The s rows; row i, counted from 0, has the i entries left of the diagonal, or all s of them. Like b, c and
            b_error of any number type, and stored as tuples of floats.
        b: The s weights.
        c: The s nodes, the row sums of a.
        order: Order of the method; claiming less than the true one is no error.
        name: Name for messages.
        b_error: The s weights of the embedded method, not their difference from b.
        order_error: Order of the embedded method, given if and only if b_error is.
        interpolant: What makes the cubic Hermite interpolant of a step one of order 4: the s + 1 weights d_i, the last
            one of the velocity at the end of the step. Within a step, 0 <= x <= 1, the solution is
            y(t + x h) = H(x) + x^2 (1 - x)^2 h sum_i d_i k_i, H the cubic through the states and velocities at the
            step's start and end.
        source: Where the coefficients were published.

    Raises:
        TableauError: if the lengths do not fit, a number is not finite, the method is implicit, the embedded method is
            the method itself, a row sum of a is not its node, or a condition up to an order that is claimed, or up to
            order 4 of an interpolant that is given, is not met.

    Source: E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I, 2nd edition, 1993, section
        II.2, theorem 2.13; doi 10.1007/978-3-540-78862-1.

    >>> trapezoid = ButcherTableau(a=[[], [1]], b=[0.5, 0.5], c=[0, 1], order=2)
    >>> trapezoid.a, trapezoid.stages, trapezoid.adaptive
    (((), (1.0,)), 2, False)
    """

    a: tuple[Row, ...]
    b: Row
    c: Row
    order: int
    name: str = ""
    b_error: Row | None = None
    order_error: int | None = None
    interpolant: Row | None = None
    source: str = ""

    def __post_init__(self) -> None:
        self._to_floats()
        self._check_embedded_and_orders()
        self._check_shapes()
        self._check_finite()
        self._check_explicit()
        object.__setattr__(self, "a", tuple(row[:i] for i, row in enumerate(self.a)))
        self._check_row_sums()
        self._check_order_conditions()
        self._check_interpolant()

    @property
    def stages(self) -> int:
        """The number s of stages, evaluations of the velocity in a step."""
        return len(self.b)

    @property
    def fsal(self) -> bool:
        """Whether the last stage is evaluated at the new time and state, so that it is the next step's first."""
        return self.c[-1] == 1 and (*self.a[-1], 0.0) == self.b

    @property
    def adaptive(self) -> bool:
        """Whether there is an embedded method, from which the error of a step can be estimated."""
        return self.b_error is not None

    @property
    def interpolates(self) -> bool:
        """Whether the interpolant has the order of the embedded method, so that steps need not end at output times."""
        return self.order_error is not None and self.interpolant_order >= min(self.order, self.order_error)

    @property
    def interpolant_order(self) -> int:
        """The order of the solution between the ends of a step."""
        return min(self.order, 3) if self.interpolant is None else INTERPOLANT_ORDER

    @property
    def label(self) -> str:
        """The name, or what to call a method without one."""
        return self.name or "a tableau without a name"

    def _to_floats(self) -> None:
        try:
            object.__setattr__(self, "a", tuple(tuple(map(float, row)) for row in self.a))
            for field in ("b", "c", "b_error", "interpolant"):
                if getattr(self, field) is None and field in ("b_error", "interpolant"):
                    continue
                object.__setattr__(self, field, tuple(map(float, getattr(self, field))))
        except (TypeError, ValueError, OverflowError) as error:
            raise TableauError(
                f"{self._label} cannot be read as floats: {error}",
                required="a as a sequence of rows of numbers; b, c, b_error and interpolant as sequences of numbers",
                fix="give tuples of floats",
            ) from error

    def _check_embedded_and_orders(self) -> None:
        if (self.b_error is None) != (self.order_error is None):
            raise TableauError(
                f"{self._label} has b_error={self.b_error} and order_error={self.order_error}",
                required="the weights of the embedded method and its order, or neither",
                fix="give both",
            )
        if self.b_error == self.b:
            raise TableauError(
                f"{self._label} has b_error = b",
                required="an embedded method of its own: the difference estimates the error of a step",
                fix="leave b_error and order_error out, for fixed steps",
            )
        for field in ("order", "order_error"):
            order = getattr(self, field)
            if (type(order) is not int or order < 1) and not (field == "order_error" and order is None):
                raise TableauError(
                    f"{self._label} has {field}={order!r}",
                    required="a positive int",
                    fix="give the order of the method",
                )

    def _check_shapes(self) -> None:
        lengths = {"a": len(self.a), "b": len(self.b), "c": len(self.c)}
        if self.b_error is not None:
            lengths["b_error"] = len(self.b_error)
        if self.stages == 0 or set(lengths.values()) != {self.stages}:
            raise TableauError(
                f"{self._label} has " + ", ".join(f"len({field}) = {length}" for field, length in lengths.items()),
                required="as many rows of a as entries in each of the others, at least one",
                fix="give a row, a weight and a node for every stage; the first row of a is empty",
            )
        if self.interpolant is not None and len(self.interpolant) != self.stages + 1:
            raise TableauError(
                f"{self._label} has len(interpolant) = {len(self.interpolant)}",
                required=f"a weight of each of the {self.stages} stages, and one of the velocity at the step's end",
                fix="add zeros for what the interpolant does not use",
            )
        for i, row in enumerate(self.a):
            if len(row) not in (i, self.stages):
                raise TableauError(
                    f"{self._label} has {len(row)} entries in row {i} of a, counted from 0",
                    required=f"the {i} entries left of the diagonal, or all {self.stages}",
                    fix="add or remove zeros",
                )

    def _check_finite(self) -> None:
        fields = {field: getattr(self, field) or () for field in ("b", "c", "b_error", "interpolant")}
        for field, entries in {"a": chain(*self.a), **fields}.items():
            for entry in entries:
                if not math.isfinite(entry):
                    raise TableauError(
                        f"{self._label} has {entry} in {field}", required="finite numbers", fix="correct the entry"
                    )

    def _check_explicit(self) -> None:
        for i, row in enumerate(self.a):
            if any(row[i:]):
                raise TableauError(
                    f"{self._label} is implicit: row {i} of a, counted from 0, has {row[i:]} on and above the diagonal",
                    required="an explicit method, whose stages use earlier stages alone",
                    fix='use an explicit one, such as METHODS["dopri5"]',
                )

    def _check_row_sums(self) -> None:
        for i, (row, node) in enumerate(zip(self.a, self.c, strict=True)):
            if not _is_close(row, node):
                raise TableauError(
                    f"{self._label} has the row sum {sum(row)!r} in row {i} of a, counted from 0, beside c = {node!r}",
                    required="row sums of a that equal c",
                    fix=f"set this entry of c to {sum(row)!r}, or correct the row",
                )

    def _check_order_conditions(self) -> None:
        known: dict[Tree, list[float]] = {}
        claims = [("b", self.b, self.order)]
        if self.b_error is not None and self.order_error is not None:
            claims.append(("b_error", self.b_error, self.order_error))
        for field, weights, order in claims:
            for tree in chain.from_iterable(map(rooted_trees, range(1, order + 1))):
                terms = tuple(map(mul, weights, _stage_weights(self.a, tree, known)))
                if _is_close(terms, 1 / density(tree)):
                    continue
                if tree == ():
                    raise TableauError(
                        f"{self._label} has weights {field} that sum to {sum(terms)!r}",
                        required="weights that sum to 1, the condition of order 1",
                        fix="correct a weight",
                    )
                raise TableauError(
                    f"{self._label} does not have the order {order} claimed for {field}: "
                    f"the elementary weight of the tree {bracket(tree)} is {sum(terms)!r}, not 1/{density(tree)}",
                    required="every condition up to that order met",
                    fix=f"correct a coefficient, or claim order {vertices(tree) - 1}",
                )

    def _check_interpolant(self) -> None:
        """The weights of a step of size x h are polynomials in x; so are the two sides of each condition."""
        if self.interpolant is None:
            return
        known: dict[Tree, list[float]] = {}
        stages = (*self.a, self.b)  # with the velocity at the end of the step
        for tree in chain.from_iterable(map(rooted_trees, range(1, INTERPOLANT_ORDER + 1))):
            factors = _stage_weights(stages, tree, known)
            for power, weights in enumerate(self._weights_by_power(), 1):
                wanted = 1 / density(tree) if power == vertices(tree) else 0.0
                terms = tuple(map(mul, weights, factors))
                if not _is_close(terms, wanted):
                    raise TableauError(
                        f"{self._label} has an interpolant that is not of order {INTERPOLANT_ORDER}: the coefficient "
                        f"of x^{power} for the tree {bracket(tree)} is {sum(terms)!r}, not {wanted!r}",
                        required=f"every condition up to order {INTERPOLANT_ORDER} met",
                        fix="correct a weight, or leave interpolant out",
                    )

    def _weights_by_power(self) -> list[Row]:
        """The weights of x, x^2, x^3 and x^4 in the interpolant: of its stages and of the velocity at the end."""
        assert self.interpolant is not None, "Hermite's cubic needs none"
        last = self.stages
        start, end = ([float(i == j) for i in range(last + 1)] for j in (0, last))
        rows = zip((*self.b, 0.0), start, end, self.interpolant, strict=True)
        return list(zip(*((f, 3 * b - 2 * f - g + d, f + g - 2 * b - 2 * d, d) for b, f, g, d in rows), strict=True))

    @property
    def _label(self) -> str:
        return f"ButcherTableau(name={self.name!r})"


@cache
def rooted_trees(order: int) -> tuple[Tree, ...]:
    """All rooted trees of so many vertices, one for each condition of that order.

    >>> [len(rooted_trees(order)) for order in range(1, 9)]
    [1, 1, 2, 4, 9, 20, 48, 115]
    """
    if order == 1:
        return ((),)
    # Every tree is a smaller one with one more branch at its root (Butcher's product); the set drops repetitions.
    grafted = {
        tuple(sorted((*tree, branch)))
        for size in range(1, order)
        for tree in rooted_trees(order - size)
        for branch in rooted_trees(size)
    }
    return tuple(sorted(grafted))


@cache
def vertices(tree: Tree) -> int:
    """The number of vertices of a tree, the order of its condition."""
    return 1 + sum(map(vertices, tree))


@cache
def density(tree: Tree) -> int:
    """The density gamma of a tree: its elementary weight is 1 / gamma in a method of its order.

    >>> density(((), ((), ())))
    15
    """
    return vertices(tree) * math.prod(map(density, tree))


def bracket(tree: Tree) -> str:
    """A tree in Butcher's bracket notation.

    >>> bracket(((), ((), ())))
    '[τ[ττ]]'
    """
    return "[" + "".join(map(bracket, tree)) + "]" if tree else "τ"


def _stage_weights(a: tuple[Row, ...], tree: Tree, known: dict[Tree, list[float]]) -> list[float]:
    """The factor of b_i in the elementary weight of a tree, for each stage i: the product over its branches."""
    if tree not in known:
        branches = [_stage_weights(a, branch, known) for branch in tree]
        known[tree] = [math.prod(sum(map(mul, row, branch)) for branch in branches) for row in a]
    return known[tree]


def _is_close(terms: Row, total: float) -> bool:
    return abs(sum(terms) - total) <= TOLERANCE * max(1.0, sum(map(abs, terms)))


def tableau_of(method: str | ButcherTableau) -> ButcherTableau:
    """The tableau of a method that is given by name, or as a tableau.

    Raises:
        MethodError: if there is no method of that name.

    >>> tableau_of("dopri5").order
    5
    """
    if isinstance(method, ButcherTableau):
        return method
    if not isinstance(method, str) or method not in METHODS:
        refuse(
            MethodError,
            f"method={shown(method)} is not known",
            required="a ButcherTableau, or one of " + ", ".join(METHODS),
            fix='use "rk4" for fixed steps, "dopri5" for adaptive ones',
        )
    return named_tableau(method)


@dynamo.constant  # or under dynamic=True Dynamo makes inputs of the weights
def named_tableau(name: str) -> ButcherTableau:
    """The tableau of METHODS or PAIRS_OF_ORDER_2 that has a name."""
    return METHODS[name] if name in METHODS else PAIRS_OF_ORDER_2[name]


_HEUN = (
    "K. Heun, Neue Methoden zur approximativen Integration der Differentialgleichungen einer unabhängigen "
    "Veränderlichen, Z. Math. Phys. 45, 1900, 23-38"
)
_KUTTA = (
    "W. Kutta, Beitrag zur näherungsweisen Integration totaler Differentialgleichungen, Z. Math. Phys. 46, 1901, "
    "435-453"
)

# The last row of a, which is b less its final zero.
_BOSH3 = (2 / 9, 1 / 3, 4 / 9)
_DOPRI5 = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_TSIT5 = (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774)

_METHODS = (
    ButcherTableau(
        name="euler",
        order=1,
        a=((),),
        b=(1,),
        c=(0,),
        source="L. Euler, Institutiones calculi integralis 1, 1768, section 650",
    ),
    ButcherTableau(
        name="midpoint",
        order=2,
        a=((), (1 / 2,)),
        b=(0, 1),
        c=(0, 1 / 2),
        source="C. Runge, Über die numerische Auflösung von Differentialgleichungen, Math. Ann. 46, 1895, 167-178; "
        "doi 10.1007/BF01446807",
    ),
    ButcherTableau(
        name="heun2",
        order=2,
        a=((), (1,)),
        b=(1 / 2, 1 / 2),
        c=(0, 1),
        source=_HEUN,
    ),
    ButcherTableau(
        name="ralston",
        order=2,
        a=((), (2 / 3,)),
        b=(1 / 4, 3 / 4),
        c=(0, 2 / 3),
        source="A. Ralston, Runge-Kutta methods with minimum error bounds, Math. Comp. 16, 1962, 431-437; "
        "doi 10.1090/S0025-5718-1962-0150954-0",
    ),
    ButcherTableau(
        name="heun3",
        order=3,
        a=((), (1 / 3,), (0, 2 / 3)),
        b=(1 / 4, 0, 3 / 4),
        c=(0, 1 / 3, 2 / 3),
        source=_HEUN,
    ),
    ButcherTableau(
        name="ssprk33",
        order=3,
        a=((), (1,), (1 / 4, 1 / 4)),
        b=(1 / 6, 1 / 6, 2 / 3),
        c=(0, 1, 1 / 2),
        source="C.-W. Shu, S. Osher, Efficient implementation of essentially non-oscillatory shock-capturing schemes, "
        "J. Comput. Phys. 77, 1988, 439-471; doi 10.1016/0021-9991(88)90177-5",
    ),
    ButcherTableau(
        name="bosh3",
        order=3,
        a=((), (1 / 2,), (0, 3 / 4), _BOSH3),
        b=(*_BOSH3, 0),
        c=(0, 1 / 2, 3 / 4, 1),
        b_error=(7 / 24, 1 / 4, 1 / 3, 1 / 8),
        order_error=2,
        source="P. Bogacki, L. F. Shampine, A 3(2) pair of Runge-Kutta formulas, Appl. Math. Lett. 2, 1989, 321-325; "
        "doi 10.1016/0893-9659(89)90079-7",
    ),
    ButcherTableau(
        name="rk4",
        order=4,
        a=((), (1 / 2,), (0, 1 / 2), (0, 0, 1)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
        c=(0, 1 / 2, 1 / 2, 1),
        source=_KUTTA,
    ),
    ButcherTableau(
        name="rk4_38",
        order=4,
        a=((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)),
        b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
        c=(0, 1 / 3, 2 / 3, 1),
        source=_KUTTA,
    ),
    ButcherTableau(
        name="dopri5",
        order=5,
        a=(
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            _DOPRI5,
        ),
        b=(*_DOPRI5, 0),
        c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
        b_error=(5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
        order_error=4,
        interpolant=(
            -12715105075 / 11282082432,
            0,
            87487479700 / 32700410799,
            -10690763975 / 1880347072,
            701980252875 / 199316789632,
            -1453857185 / 822651844,
            0,
            69997945 / 29380423,
        ),
        source="J. R. Dormand, P. J. Prince, A family of embedded Runge-Kutta formulae, J. Comput. Appl. Math. 6, "
        "1980, 19-26; doi 10.1016/0771-050X(80)90013-3. Interpolant: E. Hairer, S. P. Norsett, G. Wanner, Solving "
        "Ordinary Differential Equations I, 2nd edition, 1993, section II.6, and its program dopri5",
    ),
    # The source prints b - b_error for the first six stages, beside b_error itself for the seventh. b advances the
    # solution; some programs advance b_error, which has a weight on the last stage and order 4.
    ButcherTableau(
        name="tsit5",
        order=5,
        a=(
            (),
            (0.161,),
            (-0.008480655492356989, 0.335480655492357),
            (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
            (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
            (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
            _TSIT5,
        ),
        b=(*_TSIT5, 0),
        c=(0, 0.161, 0.327, 0.9, 0.9800255409045097, 1, 1),
        b_error=(
            0.09468075576583945,
            0.009183565540343254,
            0.4877705284247616,
            1.234297566930479,
            -2.7077123499835256,
            1.866628418170587,
            1 / 66,
        ),
        order_error=4,
        # The source prints the weights as polynomials in x; these are their coefficients of x^4.
        interpolant=(
            -1.0530884977290216,
            0.1017,
            2.490627285651252793,
            -16.54810288924490272,
            47.37952196281928122,
            -34.87065786149660974,
            0,
            2.5,
        ),
        source="Ch. Tsitouras, Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying "
        "assumption, Comput. Math. Appl. 62, 2011, 770-775; doi 10.1016/j.camwa.2011.06.002",
    ),
    # RK8(7)13M. Its ratios are approximations of irrational numbers to about 18 digits.
    ButcherTableau(
        name="dopri8",
        order=8,
        a=(
            (),
            (1 / 18,),
            (1 / 48, 1 / 16),
            (1 / 32, 0, 3 / 32),
            (5 / 16, 0, -75 / 64, 75 / 64),
            (3 / 80, 0, 0, 3 / 16, 3 / 20),
            (
                29443841 / 614563906,
                0,
                0,
                77736538 / 692538347,
                -28693883 / 1125000000,
                23124283 / 1800000000,
            ),
            (
                16016141 / 946692911,
                0,
                0,
                61564180 / 158732637,
                22789713 / 633445777,
                545815736 / 2771057229,
                -180193667 / 1043307555,
            ),
            (
                39632708 / 573591083,
                0,
                0,
                -433636366 / 683701615,
                -421739975 / 2616292301,
                100302831 / 723423059,
                790204164 / 839813087,
                800635310 / 3783071287,
            ),
            (
                246121993 / 1340847787,
                0,
                0,
                -37695042795 / 15268766246,
                -309121744 / 1061227803,
                -12992083 / 490766935,
                6005943493 / 2108947869,
                393006217 / 1396673457,
                123872331 / 1001029789,
            ),
            (
                -1028468189 / 846180014,
                0,
                0,
                8478235783 / 508512852,
                1311729495 / 1432422823,
                -10304129995 / 1701304382,
                -48777925059 / 3047939560,
                15336726248 / 1032824649,
                -45442868181 / 3398467696,
                3065993473 / 597172653,
            ),
            (
                185892177 / 718116043,
                0,
                0,
                -3185094517 / 667107341,
                -477755414 / 1098053517,
                -703635378 / 230739211,
                5731566787 / 1027545527,
                5232866602 / 850066563,
                -4093664535 / 808688257,
                3962137247 / 1805957418,
                65686358 / 487910083,
            ),
            (
                403863854 / 491063109,
                0,
                0,
                -5068492393 / 434740067,
                -411421997 / 543043805,
                652783627 / 914296604,
                11173962825 / 925320556,
                -13158990841 / 6184727034,
                3936647629 / 1978049680,
                -160528059 / 685178525,
                248638103 / 1413531060,
                0,
            ),
        ),
        b=(
            14005451 / 335480064,
            0,
            0,
            0,
            0,
            -59238493 / 1068277825,
            181606767 / 758867731,
            561292985 / 797845732,
            -1041891430 / 1371343529,
            760417239 / 1151165299,
            118820643 / 751138087,
            -528747749 / 2220607170,
            1 / 4,
        ),
        c=(
            0,
            1 / 18,
            1 / 12,
            1 / 8,
            5 / 16,
            3 / 8,
            59 / 400,
            93 / 200,
            5490023248 / 9719169821,
            13 / 20,
            1201146811 / 1299019798,
            1,
            1,
        ),
        b_error=(
            13451932 / 455176623,
            0,
            0,
            0,
            0,
            -808719846 / 976000145,
            1757004468 / 5645159321,
            656045339 / 265891186,
            -3867574721 / 1518517206,
            465885868 / 322736535,
            53011238 / 667516719,
            2 / 45,
            0,
        ),
        order_error=7,
        # Of order 5 at the middle of the step, and of least norm among the weights of which this is true.
        interpolant=(
            -1.6821923658322067,
            0,
            0,
            0,
            0,
            2.7747989791831325,
            1.8453194787605733,
            -4.392013934443482,
            6.330159505831823,
            -5.527213952651565,
            -1.266337920470645,
            1.9090776098417075,
            -1.9957987001359236,
            2.0042012999171717,
        ),
        source="P. J. Prince, J. R. Dormand, High order embedded Runge-Kutta formulae, J. Comput. Appl. Math. 7, 1981, "
        "67-75; doi 10.1016/0771-050X(81)90010-3",
    ),
)

#: The methods that have a name. The names are those of torchdiffeq, except that its "rk4", the 3/8 rule, is "rk4_38"
#: here.
METHODS: Mapping[str, ButcherTableau] = MappingProxyType({tableau.name: tableau for tableau in _METHODS})

_PAIRS_OF_ORDER_2 = (
    ButcherTableau(
        name="adaptive_heun",
        order=2,
        a=((), (1,)),
        b=(1 / 2, 1 / 2),
        c=(0, 1),
        b_error=(0, 1),
        order_error=1,
        source=_HEUN + ". Embedded: Euler's method, with the velocity at the end of the step",
    ),
    ButcherTableau(
        name="fehlberg2",
        order=2,
        a=((), (1 / 2,), (1 / 256, 255 / 256)),
        b=(1 / 512, 255 / 256, 1 / 512),
        c=(0, 1 / 2, 1),
        b_error=(1 / 256, 255 / 256, 0),
        order_error=1,
        source="E. Fehlberg, Low-order classical Runge-Kutta formulas with stepsize control, NASA TR R-315, 1969",
    ),
)

#: Pairs that rampde_fx.torchdiffeq alone knows by name. odeint takes the tableau; bosh3 costs less at any tolerance.
PAIRS_OF_ORDER_2: Mapping[str, ButcherTableau] = MappingProxyType({pair.name: pair for pair in _PAIRS_OF_ORDER_2})
