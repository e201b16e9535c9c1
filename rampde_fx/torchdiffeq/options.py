"""The methods by their names in torchdiffeq, and the options that each of them takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rampde_fx.errors import MethodError, OptionError
from rampde_fx.solvers import tableau
from rampde_fx.solvers.fixed_steps import is_number
from rampde_fx.solvers.tableau import PAIRS_OF_ORDER_2, ButcherTableau, named_tableau
from rampde_fx.torch_private import dynamo
from rampde_fx.torch_private.refusals import refuse, shown
from rampde_fx.torchdiffeq.problem import warn

ADAPTIVE = (*PAIRS_OF_ORDER_2, "bosh3", "dopri5", "tsit5", "dopri8")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
SCIPY = "scipy_solver"
NAMES = (*ADAPTIVE, *FIXED, *ADAMS, SCIPY)

_OF_A_GRID = ("step_size", "grid_constructor", "interp", "perturb")
_NUMBERS_OF_ADAPTIVE = ("first_step", "min_step", "max_step", "max_num_steps", "safety", "ifactor", "dfactor")
_OF_ADAPTIVE = (*_NUMBERS_OF_ADAPTIVE, "step_t", "jump_t", "dtype")
NUMBERS = (*_NUMBERS_OF_ADAPTIVE, "step_size")
# Options that torchdiffeq takes of each kind of method. It is silent about a norm that a method does not use.
OPTIONS = {
    "adaptive": (*_OF_ADAPTIVE, "norm"),
    "fixed": (*_OF_A_GRID, "norm"),
    "adams": (*_OF_A_GRID, "norm", "max_iters", "max_order"),
    "scipy": ("min_step", "max_step", "solver", "norm", "grid_points", "eps"),
}
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
CALLED = {"adaptive": CALLBACKS, "fixed": CALLBACKS[:1], "adams": CALLBACKS[:1], "scipy": ()}


@dynamo.constant
def kind_of(method: str) -> str:
    """The kind of a method: "adaptive", "fixed", "adams" or "scipy"."""
    if method in ADAPTIVE:
        return "adaptive"
    return "fixed" if method in FIXED else "adams" if method in ADAMS else "scipy"


def known_method(method: Any) -> str:
    """The method's name, dopri5 where it is None.

    Raises:
        MethodError: if there is none of that name.
    """
    if method is None:
        return "dopri5"
    if not isinstance(method, str) or method not in NAMES:
        refuse(
            MethodError,
            f"method={shown(method)} is not known",
            required="one of " + ", ".join(NAMES),
            fix='use "dopri5" for adaptive steps, "rk4" (the 3/8 rule) for fixed ones; rampde_fx.odeint takes tableaux',
        )
    return method


def tableau_of(method: str) -> ButcherTableau:
    """The tableau of an adaptive or a fixed method: rk4 is the 3/8 rule."""
    # Dynamo has to meet a tableau where it stands before it is given it as a constant: it looks names up here.
    if method in PAIRS_OF_ORDER_2:
        return named_tableau(method)
    return tableau.tableau_of("rk4_38" if method == "rk4" else method)


def known_options(method: str, options: Any) -> dict[str, Any]:
    """The options that the method takes; others are warned of, and left out, and so is what is None.

    Raises:
        OptionError: if options is no dict, a value means nothing, or there are both a step_size and a grid_constructor.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        refuse(
            OptionError,
            f"options={shown(options)}",
            required="a dict of options by their names",
            fix='write options={"step_size": 0.1}',
        )
    kind = kind_of(method)
    taken = (*OPTIONS[kind], "implicit") if method in ("implicit_adams", "fixed_adams") else OPTIONS[kind]
    unknown = [str(name) for name in options if name not in taken]
    if unknown:
        warn(f"{method} does not know the options {', '.join(unknown)}, which are left out")
    given = {name: value for name, value in options.items() if name in taken and value is not None}
    if "step_size" in given and "grid_constructor" in given:
        refuse(
            OptionError,
            "options with both a step_size and a grid_constructor",
            required="one of the two",
            fix="leave one out",
        )
    for name, value in given.items():
        _check(name, value)
    return given


def _check(name: str, value: Any) -> None:
    """Refuse a value of an option that means nothing; Dynamo knows no values of tensors."""
    required = ""
    if name in NUMBERS and not _is_size(value):
        required = "a number of at least 0, or a tensor of one"
    elif name in ("norm", "grid_constructor") and not callable(value):
        required = "a function"
    elif name == "dtype" and not (isinstance(value, torch.dtype) and value.is_floating_point):
        required = "a floating dtype, such as torch.float64"
    if required:
        refuse(OptionError, f"options={{{name!r}: {value!r}}}", required=required, fix=f"leave {name!r} out")


def _is_size(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return is_number(value) and value >= 0
    if value.numel() != 1 or value.is_complex():
        return False
    return torch.compiler.is_dynamo_compiling() or bool(value >= 0)


ADJOINT = "_adjoint"  # the end of the names of callbacks of the backward


def callbacks_of(func: Any, method: str, end: str = "") -> dict[str, Any]:
    """The callbacks of func that the method calls, those whose names have this end; others are warned of."""
    found = {name: getattr(func, name) for name in (callback + end for callback in CALLBACKS) if hasattr(func, name)}
    called = [callback + end for callback in CALLED[kind_of(method)]]
    unused = [name for name in found if name not in called]
    if unused:
        warn(f"{method} does not call {', '.join(unused)}")
    return {name: callback for name, callback in found.items() if name in called}
