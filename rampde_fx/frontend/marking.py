"""What a user writes: steps(t) marks an integration loop, mixed_precision says how it is rewritten.

Uncompiled, both are transparent: steps yields plain slices of t. While torch.compile traces, every iteration leaves a
marker node with the policy in the captured graph, and an end marker follows the last iteration.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

import torch
from torch import nn

from rampde_fx.errors import PolicyError, TimeGridError
from rampde_fx.frontend import unrewritten
from rampde_fx.frontend.unrewritten import Target
from rampde_fx.policy import DTYPES, MONITORED, Auto, PrecisionPolicy
from rampde_fx.runtime import operators
from rampde_fx.runtime.monitoring import open_here
from rampde_fx.torch_private import dynamo
from rampde_fx.torch_private.refusals import refuse

T = TypeVar("T")
NO_POLICY = ""
MARK = "_rampde_fx_policy"  # attribute of a marked function


class _UnderWay(threading.local):
    """The innermost mixed_precision call that is under way in a thread."""

    def __init__(self) -> None:  # runs once per thread; a class attribute would hide the thread's own from Dynamo
        self.target: Target | None = None


# Dynamo traces it away: it reads it, and guards it, in the thread that runs.
_under_way = _UnderWay()


@dynamo.never_alone
def is_time_grid(t: Any) -> bool:
    """Whether t is a floating 1-D tensor of at least two points."""
    return is_real(t) and t.ndim == 1 and t.shape[0] >= 2


@dynamo.never_alone
def is_real(value: Any) -> bool:
    """Whether it is a tensor of a floating dtype in which torch computes: those of eight bits only store."""
    return isinstance(value, torch.Tensor) and value.dtype in DTYPES.values()


def steps(t: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Iterate over the steps of a time grid, and mark the loop for the rampde_fx backend.

    Args:
        t: Time points, floating, shape (N + 1,) with N >= 1, monotone, in the unit of the velocity's t. It may run
            backward, and it may require a gradient.

    Yields:
        N pairs (t_i, dt_i) of 0-d tensors in t's dtype: the start of step i, and t[i + 1] - t[i].

    Raises:
        TimeGridError: if t is not a floating 1-D tensor of at least two points.

    >>> [(t_i.item(), dt.item()) for t_i, dt in steps(torch.tensor([0.0, 0.5, 2.0]))]
    [(0.0, 0.5), (0.5, 1.5)]
    """
    if not is_time_grid(t):
        shape = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, torch.Tensor) else f"a {type(t).__name__}"
        refuse(
            TimeGridError,
            f"steps(t) was given {shape}",
            required="a floating 1-D tensor of at least two time points",
            fix="pass torch.linspace(t0, t1, number_of_steps + 1)",
        )
    meet_loop()
    if not torch.compiler.is_dynamo_compiling() or dynamo.is_exporting():
        for i in range(t.shape[0] - 1):
            yield t[i], t[i + 1] - t[i]
        return
    if dynamo.is_transformed():
        t = t.clone()  # torch takes no view of a view with a tangent of another layout
    policy = policy_in_force()
    if policy and refuses_shards():
        mark_refused(t, policy)
        return
    if _compares_iterations():
        i = 0
        while (ahead := _ahead(i)) == "step":
            yield operators.step(t, i, policy)
            i += 1
        if ahead == "end":
            operators.end(t)
    else:
        for i in range(t.shape[0] - 1):
            yield operators.step(t, i, policy)
        operators.end(t)
    loop_ends(once=False)


def mark_refused(t: torch.Tensor, policy: str) -> None:
    """Leave the marks of a loop without a step, in place of one that is refused once the graph is captured."""
    t = t.clone()  # torch takes no view of a view with a tangent of another layout
    operators.step(t, 0, policy)
    operators.end(t)
    loop_ends(once=False)


def policy_in_force(own: PrecisionPolicy | None = None) -> str:
    """What a marker says: the policy, or where None that of the innermost mixed_precision call that is under way.

    Encoded, behind MONITORED where a monitor is open; empty where there is none.
    """
    target = _under_way.target
    policy = own.encoded if own is not None else NO_POLICY if target is None else target.policy
    if own is None and torch.compiler.is_dynamo_compiling():
        policy = _policy_of_body() or policy
    return MONITORED + policy if policy and open_here.any else policy


@dynamo.never_alone
def meet_loop(own: PrecisionPolicy | None = None) -> None:
    """Where a marked loop begins, see to it that it is said if nothing rewrites it."""
    if not torch.compiler.is_dynamo_compiling():
        target = _under_way.target
        unrewritten.loop_runs(target, has_policy=own is not None or target is not None)
    elif policy_in_force(own):
        _loop_is_captured()


@dynamo.constant
def _loop_is_captured() -> bool:
    unrewritten.loop_is_captured(_under_way.target)
    return True


@dynamo.constant
def refuses_shards() -> bool:
    """Whether the loop that begins cannot be captured for the hooks of FSDP2 inside it."""
    return unrewritten.shards_are_refused()


@dynamo.constant
def _policy_of_body() -> str:
    return unrewritten.policy_of_body()


@dynamo.constant
def _body_begins(policy: str) -> bool:
    return unrewritten.body_begins(policy)


@dynamo.constant
def _body_ends() -> bool:
    unrewritten.body_ends()
    return True


@dynamo.constant
def _compares_iterations() -> bool:
    from rampde_fx.torch_private import repetition

    return repetition.compares_iterations()


@dynamo.constant
def _ahead(i: int) -> str:
    """What follows in a loop whose iterations are compared: step i, the end, or what repeats up to the end."""
    from rampde_fx.torch_private import repetition

    return repetition.ahead(i)


@dynamo.constant
def loop_ends(*, once: bool) -> bool:
    """Where Dynamo captures the end of a marked loop, or of the one step that stands for all."""
    unrewritten.loop_ends(once=once)
    return True


def _under(policy: PrecisionPolicy, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the policy in force while it runs."""
    place, encoded = unrewritten.place_of(function), policy.encoded

    @dynamo.constant
    def enters() -> bool:
        unrewritten.target_is_entered(place)
        return True

    @dynamo.constant
    def leaves() -> bool:
        unrewritten.target_is_left(place)
        return True

    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and _body_begins(encoded):
            try:
                return function(*args, **kwargs)
            finally:
                _body_ends()
        outer = _under_way.target
        _under_way.target = Target(encoded, place, outer)
        if torch.compiler.is_dynamo_compiling():
            enters()
        try:
            result = function(*args, **kwargs)
        finally:
            _under_way.target = outer
        if torch.compiler.is_dynamo_compiling():
            leaves()
        else:
            unrewritten.target_ends(place)
        return result

    marked.__dict__.setdefault(MARK, policy)  # wraps has copied that of a mark inside, which counts
    return dynamo.with_own_code(marked)


def _with_policy(extra_repr: Callable[[Any], str]) -> Callable[[Any], str]:
    """A Module's extra_repr, with the policy on a line of its own."""

    @functools.wraps(extra_repr)
    def with_policy(self: nn.Module) -> str:
        own, policy = extra_repr(self), policy_of(self)
        line = f"mixed_precision: {policy}"
        if policy is None or line in own:  # a subclass does not call the marked forward, or is marked as well
            return own
        return f"{own}\n{line}" if own else line

    return with_policy


def _marked_methods(module_class: type[nn.Module], policy: PrecisionPolicy) -> dict[str, Callable[..., Any]]:
    """What replaces methods of a Module class, by their names."""
    return {"forward": _under(policy, module_class.forward), "extra_repr": _with_policy(module_class.extra_repr)}


def _mark_class(module_class: type[nn.Module], policy: PrecisionPolicy) -> None:
    for name, method in _marked_methods(module_class, policy).items():
        setattr(module_class, name, method)


@functools.cache
def _marked_subclass(module_class: Any, policy: PrecisionPolicy) -> Any:
    """A subclass of the module's class, of the same name, with a marked forward; its instances pickle as marked."""

    def reduce(self: nn.Module, protocol: Any) -> tuple[object, ...]:
        return _rebuild_marked, (module_class, policy), self.__dict__

    namespace = {
        **_marked_methods(module_class, policy),
        "__reduce_ex__": reduce,
        "__module__": module_class.__module__,
        "_unmarked_class": module_class,
    }
    return type(module_class.__name__, (module_class,), namespace)


def _rebuild_marked(module_class: Any, policy: PrecisionPolicy) -> Any:
    marked = _marked_subclass(module_class, policy)
    return marked.__new__(marked)


def policy_of(target: Callable[..., Any]) -> PrecisionPolicy | None:
    """The policy with which mixed_precision has marked a target.

    Args:
        target: A Module class, a Module instance, a function or a method, compiled by torch.compile or not. Of a Module
            its forward counts: a subclass is marked as the class is, unless it has a forward of its own.

    Returns:
        The policy as it was given; of a target that is marked more than once, the innermost one, which its loops take.
        None where it is not marked. The submodules of a Module, and what surrounds it, do not count.

    Raises:
        PolicyError: if the target cannot be called.

    >>> marked = mixed_precision(nn.Identity(), dtype=torch.bfloat16)
    >>> print(policy_of(marked), policy_of(nn.Identity()))
    bfloat16 None
    >>> marked
    Identity(mixed_precision: bfloat16)
    """
    if not callable(target):
        raise PolicyError(
            f"policy_of was given {target!r}",
            required="a Module class, a Module instance, a function or a method",
            fix="pass the model itself",
        )
    from rampde_fx.torch_private import capturing

    marked: Any = capturing.uncompiled(target)
    is_module = isinstance(marked, nn.Module) or (isinstance(marked, type) and issubclass(marked, nn.Module))
    return getattr(marked.forward if is_module else marked, MARK, None)


def _setting_as_target(setting: Any) -> PolicyError:
    name = "policy" if isinstance(setting, PrecisionPolicy) else "dtype"
    given = f"torch.{setting}" if isinstance(setting, str) and hasattr(torch, setting) else setting
    return PolicyError(
        f"mixed_precision({setting!r}) was given its setting in place of what it marks",
        required="a setting by its name",
        fix=f"write @rampde_fx.mixed_precision({name}={'...' if name == 'policy' else given})",
    )


@overload
def mixed_precision(
    target: None = None, /, *, dtype: torch.dtype | Auto | None = ..., policy: PrecisionPolicy | None = ...
) -> Callable[[T], T]: ...
@overload
def mixed_precision(
    target: T, /, *, dtype: torch.dtype | Auto | None = ..., policy: PrecisionPolicy | None = ...
) -> T: ...
def mixed_precision(
    target: Any = None, /, *, dtype: torch.dtype | Auto | None = None, policy: PrecisionPolicy | None = None
) -> Any:
    """Mark a model, so that the rampde_fx backend rewrites its marked loops in mixed precision.

    Every loop over steps(t) that runs inside the target takes this policy; the innermost marked target counts.
    Uncompiled, or compiled by another backend, the target computes as before.

    Args:
        target: A Module class, a Module instance or a function. A class and an instance are marked in place and
            returned (their parameters, state_dict keys and isinstance relations stay; an instance that is marked again
            takes the new policy); for a function a marked one is returned. Without a target, a decorator is returned.
        dtype: Dtype of the velocity evaluations, short for policy=PrecisionPolicy(velocity=dtype). Without it, and
            without a policy, it is "auto": bfloat16 on a CPU that multiplies in it, float32 on any other CPU, float16
            on CUDA, chosen when a loop is compiled.
        policy: The whole policy, instead of dtype.

    Returns:
        The marked target, or a decorator.

    Raises:
        PolicyError: if the policy is wrong, dtype and policy are both given, or the target is of another kind.

    Source: arXiv 2510.23498.
    """
    if torch.compiler.is_dynamo_compiling():
        refuse(
            PolicyError,
            "mixed_precision is applied in code that is compiled",
            required="a target that is marked once, before torch.compile",
            fix="apply mixed_precision outside of the compiled function",
        )
    if policy is not None and (not isinstance(policy, PrecisionPolicy) or dtype is not None):
        raise PolicyError(
            f"mixed_precision(dtype={dtype!r}, policy={policy!r})",
            required="either a dtype or a PrecisionPolicy",
            fix="write policy=PrecisionPolicy(velocity=...) alone, or PrecisionPolicy.parse(...) of a text",
        )
    if isinstance(target, (torch.dtype, PrecisionPolicy, str)):
        raise _setting_as_target(target)
    policy = policy or (PrecisionPolicy() if dtype is None else PrecisionPolicy(velocity=dtype))
    if target is None:
        return lambda target: mixed_precision(target, policy=policy)
    if isinstance(target, type) and issubclass(target, nn.Module):
        _mark_class(target, policy)
        return target
    if isinstance(target, nn.Module) and hasattr(target, "_orig_mod"):  # compiled: Dynamo captures what is inside anew
        mixed_precision(target._orig_mod, policy=policy)
        return target
    if isinstance(target, nn.Module):
        module_class: Any = getattr(type(target), "_unmarked_class", type(target))  # marked again: the new policy
        target.__class__ = _marked_subclass(module_class, policy)
        return target
    if callable(target) and not isinstance(target, type):
        return _under(policy, target)
    raise PolicyError(
        f"mixed_precision was applied to {target!r}",
        required="a Module class, a Module instance or a function",
        fix="decorate the Module that holds the loop, before torch.compile",
    )
