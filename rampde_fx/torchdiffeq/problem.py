"""What a solver is given: the user's function on a state of several tensors, its times, its tolerances, its norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from rampde_fx.errors import OptionError, StateError, TimeGridError
from rampde_fx.solvers.fixed_steps import is_number
from rampde_fx.solvers.integrate import check_order_of_parameters, is_state
from rampde_fx.solvers.runge_kutta import State, real_dtype
from rampde_fx.torch_private import dynamo
from rampde_fx.torch_private.refusals import described, refuse, shown

Tolerance = Any  # a number or a tensor


@dataclass(frozen=True)
class Problem:
    """An initial value problem, in the user's direction of time.

    Attributes:
        func: The user's function.
        y: The initial state, all of its tensors of one dtype.
        is_tuple: Whether the user gave a tuple of tensors.
        t: The times, on the state's device.
    """

    func: Callable[[torch.Tensor, Any], Any]
    y: State
    is_tuple: bool
    t: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a time beside the state."""
        return real_dtype(self.y[0].dtype)

    def structured(self, state: Iterable[torch.Tensor]) -> Any:
        """A state as the user has it."""
        return tuple(state) if self.is_tuple else next(iter(state))

    def checked(self, t: torch.Tensor, state: State) -> tuple[State, str]:
        """The velocity at a time and a state; with what the user's function returns, what is wrong with it.

        What can be expanded to the state's shape, and converted to its dtype, is.
        """
        found = self.func(t.to(self.dtype), self.structured(state))
        rates = list(found) if self.is_tuple and isinstance(found, (tuple, list)) else [found]
        if len(rates) != len(state):
            return state, f"func returns {described(found)} for a state of {len(state)} tensors"
        for before, after in zip(state, rates, strict=True):
            if not _fits(after, before, reshaped=self.is_tuple):
                return state, f"func returns {described(after)} as the derivative of {described(before)}"
        return [_like(after, before) for before, after in zip(state, rates, strict=True)], ""


def problem_of(func: Any, y0: Any, t: Any) -> Problem:
    """The problem that the user's arguments say; t may be of one point.

    Raises:
        StateError: if y0 is neither a floating or complex tensor nor a tuple of such, or func is no function.
        TimeGridError: if t is not a floating 1-D tensor of at least one point.
    """
    if not callable(func):
        refuse(
            StateError,
            f"func is {described(func)}",
            required="a function of t and y that returns dy/dt",
            fix="write odeint(func, y0, t), in this order",
        )
    if not torch.compiler.is_dynamo_compiling():
        check_order_of_parameters(func)
    leaves = list(y0) if isinstance(y0, tuple) else [y0]
    wrong = [leaf for leaf in leaves if not is_state(leaf)]
    if wrong or not leaves:
        refuse(
            StateError,
            f"y0 holds {described(wrong[0])}" if wrong else "y0 is an empty tuple",
            required="a floating or complex tensor, or a tuple of such",
            fix="convert integers by .float(), and a list to a tuple",
        )
    if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.ndim != 1 or t.shape[0] < 1:
        refuse(
            TimeGridError,
            f"t is {described(t)}",
            required="a floating 1-D tensor of time points",
            fix="pass torch.linspace(t0, t1, number_of_times), or torch.tensor([t0, t1])",
        )
    dtype = leaves[0].dtype
    for leaf in leaves[1:]:
        dtype = torch.promote_types(dtype, leaf.dtype)
    return Problem(func, [leaf.to(dtype) for leaf in leaves], isinstance(y0, tuple), _on(t, leaves[0].device))


def _on(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    if t.device == device:
        return t
    warn("t is not on the device of y0, and is copied there")
    return t.to(device)


def _fits(rate: Any, leaf: torch.Tensor, *, reshaped: bool) -> bool:
    """Whether it can be made a derivative: of the same number of entries in a tuple, otherwise broadcast."""
    if not isinstance(rate, torch.Tensor) or (rate.is_complex() and not leaf.is_complex()):
        return False
    if reshaped:
        return rate.numel() == leaf.numel()
    behind = leaf.shape[leaf.ndim - rate.ndim :]
    if rate.ndim > leaf.ndim:
        return False
    # Two comparisons, for Dynamo answers "m in (1, n)" with no for sizes that it does not know.
    return all(any(m == size for size in (1, n)) for m, n in zip(rate.shape, behind, strict=True))


def _like(rate: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    # "As" the leaf: a shape whose sizes are symbols would be read anew in each step.
    shaped = rate.reshape_as(leaf) if rate.numel() == leaf.numel() else rate.expand_as(leaf)
    return shaped.to(leaf.dtype)


def tolerances(name: str, given: Any, problem: Problem) -> list[Tolerance]:
    """A tolerance for each tensor of the state: a number, or a tensor that broadcasts with it.

    Of a tuple one may be given for each entry.

    Raises:
        OptionError: if one is neither a number nor a tensor, is negative, or requires a gradient, or if they are not as
            many as the entries.
    """
    device = problem.y[0].device
    if not problem.is_tuple or is_number(given) or (isinstance(given, torch.Tensor) and given.ndim == 0):
        return [_tolerance(name, given, device)] * len(problem.y)
    each = list(given) if isinstance(given, Iterable) else [given]
    if len(each) != len(problem.y):
        refuse(
            OptionError,
            f"{name} has {len(each)} entries, and y0 {len(problem.y)}",
            required="one tolerance, or one for each entry of the tuple y0",
            fix=f"give {len(problem.y)} of them",
        )
    found = [_tolerance(name, value, device) for value in each]
    return [
        value.reshape(leaf.shape) if isinstance(value, torch.Tensor) and value.numel() == leaf.numel() else value
        for value, leaf in zip(found, problem.y, strict=True)
    ]


def _tolerance(name: str, given: Any, device: torch.device) -> Tolerance:
    value = torch.tensor(given, dtype=torch.float64) if isinstance(given, (list, tuple)) else given
    if not (_is_tolerance(value) if isinstance(value, torch.Tensor) else is_number(value) and value >= 0):
        refuse(
            OptionError,
            f"{name}={shown(given)}",
            required="tolerances of at least 0: numbers, or tensors that require no gradient",
            fix="write rtol=1e-3, atol=1e-6, or leave both out",
        )
    return value.to(device) if isinstance(value, torch.Tensor) else value


@dynamo.never_alone
def _is_tolerance(value: torch.Tensor) -> bool:
    if value.requires_grad or value.is_complex():
        return False
    return torch.compiler.is_dynamo_compiling() or bool((value >= 0).all())  # Dynamo knows no values


@dynamo.never_alone
def warn(message: str) -> None:
    """Warn, also in code that Dynamo captures, which takes no part in it."""
    if torch.compiler.is_dynamo_compiling():
        _warn_while_captured(message)
    else:
        _warn(message)


def _warn(message: str) -> bool:
    import warnings

    warnings.warn(message, stacklevel=2)
    return True


_warn_while_captured = dynamo.constant(_warn)
