"""Typed errors: what was found, where, what is required, and one way to mend it."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any

import torch


class RampdeError(RuntimeError):
    """Base class of every error that rampde_fx raises on purpose.

    Args:
        found: What was found, a full clause without a final stop.
        required: What is required instead.
        fix: One thing that the user can do.
        where: The user's source line, or an empty string where none is known.
    """

    def __init__(self, found: str, *, required: str, fix: str, where: str = "") -> None:
        self.found, self.required, self.fix, self.where = found, required, fix, where
        at = f"\n  at: {where}" if where else ""
        super().__init__(f"{found}.{at}\n  required: {required}.\n  fix: {fix}.")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.found, self.required, self.fix, self.where)


def _rebuild(kind: type[RampdeError], found: str, required: str, fix: str, where: str) -> RampdeError:
    return kind(found, required=required, fix=fix, where=where)


def raising(error: RampdeError) -> Callable[..., Any]:
    """What to give Dynamo instead of a compiled graph, so that the error reaches the user as it is."""

    @torch.compiler.disable
    def refuse(*_: Any) -> Any:
        raise error.with_traceback(None) from error.__cause__

    return refuse


# argparse shows the text of an ArgumentTypeError, where PrecisionPolicy.parse is the type of an option.
class PolicyError(RampdeError, ValueError, ArgumentTypeError):
    """A precision policy, or an option of the backend, that means nothing."""


class TimeGridError(RampdeError, ValueError):
    """Time points that are not a floating 1-D tensor of at least two points; of odeint, not finite or not monotone.

    steps does not look at the times themselves, which may lie on a device.
    """


class StateError(RampdeError, TypeError):
    """An initial state that is not of real floating tensors, or a velocity that gives no derivative of it."""


def velocity_error(found: str, where: str = "") -> StateError:
    """What to raise where odeint's func returns something else than a derivative of y0."""
    return StateError(
        found,
        required="a derivative of the structure, shapes and dtypes of y0",
        fix="keep y0 in float32 or float64, and return one derivative for each tensor of it, nested as it is, of its "
        "shape and dtype",
        where=where,
    )


class OptionError(RampdeError, ValueError):
    """An option of odeint that does not exist or means nothing."""


class StepSizeError(RampdeError, ArithmeticError, AssertionError):
    """Adaptive steps that did not reach the last output time; an AssertionError as well, as in torchdiffeq."""


def too_many_steps(count: int, reached: float) -> StepSizeError:
    """For adaptive steps that were used up at the time that was reached."""
    return StepSizeError(
        f"the adaptive steps of odeint ended at t = {reached:g} with {count} steps, or four times max_steps tried",
        required="a problem that max_steps steps (torchdiffeq's max_num_steps) solve to rtol and atol",
        fix="raise rtol and atol, above all in a low-precision velocity, or the option max_steps (max_num_steps)",
    )


def step_too_small(count: int, reached: float) -> StepSizeError:
    """For a step size that vanished at the time that was reached."""
    return StepSizeError(
        f"the step size of odeint fell below the resolution of t at t = {reached:g}, after {count} steps",
        required="a velocity that is finite and smooth enough for rtol and atol",
        fix="raise rtol and atol, give t in float64, or look for a singularity of the velocity at this time",
    )


def max_num_steps_used(most: int, reached: float) -> StepSizeError:
    """For steps of rampde_fx.torchdiffeq that were used up between two output times."""
    return StepSizeError(
        f"{most} steps from one output time to the next led to t = {reached:g} alone",
        required="a problem that max_num_steps steps solve to rtol and atol",
        fix='raise rtol and atol, or options={"max_num_steps": ...}',
    )


def not_finite(count: int, reached: float) -> StepSizeError:
    """For a start from which no step can be tried."""
    return StepSizeError(
        f"y0, the velocity at it or first_step is not finite at t = {reached:g}, where adaptive steps begin",
        required="a finite state with a finite velocity, and a first_step above 0 if one is given",
        fix="look for NaN and inf in y0, and for a singularity of the velocity",
    )


class EventError(RampdeError, AssertionError):
    """An event that was not met, or is NaN; an AssertionError as well, as in torchdiffeq."""


class RecomputationError(RampdeError):
    """A step of odeint_adjoint that is not computed once more as it was: what func reads has changed."""


def event_not_met(count: int, reached: float) -> EventError:
    """For steps that led to no event up to the time that was reached."""
    return EventError(
        f"event_fn does not change its sign in {count} steps, up to t = {reached:g}",
        required="an event that the steps lead to",
        fix="take larger steps (adaptive ones: coarser tolerances, or a larger max_num_steps), or look for a sign that "
        "event_fn does not change",
    )


def event_is_nan(count: int, reached: float) -> EventError:
    """For an event function that is NaN at the time that was reached."""
    return EventError(
        f"event_fn is NaN at t = {reached:g}",
        required="a number whose sign changes at the event",
        fix="look for NaN in the state and in event_fn",
    )


class UncompiledError(RampdeError):
    """What rampde_fx.torchdiffeq does uncompiled alone."""


class UnsupportedLoopError(RampdeError):
    """A marked loop that cannot be rolled up or rewritten."""


class RewriteError(RampdeError):
    """The passes failed on a loop in a way that they do not foresee; its __cause__ is what they met."""


class RewriteMismatchError(RampdeError):
    """A rewritten graph that computes something else than the user's code, both in float64: a fault of the rewrite.

    Args:
        tensor: What differs, by the user's names, such as "the gradient of velocity.linear.0.weight".
        found: How it differs.
        where: The user's line of the loop.
    """

    def __init__(self, tensor: str, found: str, where: str = "") -> None:
        self.tensor, self.difference = tensor, found
        super().__init__(
            f"{tensor} of the rewritten graph is not that of the model as it is written: {found}",
            required="the same values and gradients to rounding, in float64",
            fix="report this as a bug, with the loop; until then train the uncompiled model",
            where=where,
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.tensor, self.difference, self.where)


class MissingTorchNameError(RampdeError):
    """A private name of torch that compiling needs, and that the installed version does not have."""


class CheckError(RampdeError):
    """A model that check() cannot compare with float64, or a bound that none of the checked policies satisfies."""


class StateChangeError(UnsupportedLoopError):
    """A carried state whose shape, dtype or device changes from one step to the next."""


class TransformError(UnsupportedLoopError):
    """A marked loop inside of a transform of torch.func, or asked for forward derivatives or batches of gradients."""


class MutationError(UnsupportedLoopError):
    """A step that changes a buffer, or a tensor that is read by another name, in place."""


class UnsupportedVelocityError(RampdeError):
    """A velocity that cannot be evaluated in low precision or differentiated."""


class RandomVelocityError(UnsupportedVelocityError):
    """A step that draws random numbers of a distribution that the backward's recomputation cannot draw again."""


class CounterError(UnsupportedVelocityError):
    """A number in Python that a marked loop changes, such as a count of evaluations."""


class SecondDerivativeError(RampdeError):
    """A second derivative asked for through a rewritten loop, or of the time of an event."""


class ExportError(RampdeError):
    """A model whose rewritten forward cannot be a program of its own."""


class CaptureError(RampdeError):
    """A loop that cannot be captured as a CUDA graph."""


class TableauError(RampdeError, ValueError):
    """A Butcher tableau that is not that of an explicit method of the order it claims."""


class MethodError(RampdeError, ValueError):
    """A method that is neither a known name nor a tableau."""


class MonitorError(RampdeError):
    """A plot of a monitor that recorded nothing, or without matplotlib."""


class FullPrecisionWarning(UserWarning):
    """A marked loop, or a marked target, that was to be compiled in mixed precision, and is not."""
