"""Steps of which autograd keeps what they begin with: their backward computes them once more.

As torch.utils.checkpoint does without reentrance, so that gradients reach whatever the velocity reads, and derivatives
have derivatives. What differs: a velocity that differentiates, FFJORD's divergence for one, finds its own graph whole
while the step runs, where a checkpoint would compute the step anew for each of its derivatives; and what is not the
same in the backward is an error: a parameter or a buffer that was changed in place or is another one, a step whose
result is another.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from rampde_fx.errors import RecomputationError
from rampde_fx.solvers.runge_kutta import State
from rampde_fx.torch_private import callers, dynamo
from rampde_fx.torch_private.function_modes import active_modes
from rampde_fx.torch_private.saved_hooks import hooks_outside_of_transforms
from rampde_fx.torchdiffeq.fingerprints import Fingerprint, Fingerprints, is_of_leaf, memory_of, place_of, version_of
from rampde_fx.torchdiffeq.kept_buffers import Buffers, Keep
from rampde_fx.torchdiffeq.problem import warn
from rampde_fx.torchdiffeq.reproducibility import FilledMemory, sums_in_order, written_memory
from rampde_fx.torchdiffeq.surroundings import Random, Surroundings, autocasts_of, random_of

NUMBERS = (0, 1, 2)  # with which memory is filled, to tell what nobody has written
Function = Callable[..., Any]  # of states
Compare = Callable[[torch.Tensor, int], None]  # is told what is saved, and its number
Then = Callable[[list[State], Any], None]  # is told the states and the result of what was computed once more


class Recomputation:
    """How one solve calls its steps, if their backward is to compute them once more.

    Args:
        func: The user's velocity.
        is_called_back: Whether code of the user's runs between steps.
    """

    def __init__(self, func: Any, *, is_called_back: bool) -> None:
        self.buffers, self.fingerprints = Buffers(func, is_called_back=is_called_back), Fingerprints()
        self.random: Random | None = None
        self.doubts: dict[int, Doubts] = {}
        self.warnings = set[str]()

    def __call__(self, function: Function, *states: State, then: Then | None = None) -> Any:
        """The function of these states; it must not hold a tensor that it has computed itself.

        Inside of a torch.func transform, and in forward-mode differentiation, autograd keeps every step. Of one that
        func calls it keeps what is computed in it.
        """
        if not torch.is_grad_enabled() or dynamo.is_transformed() or callers.in_dual_level():
            return function(*states)
        states = tuple([leaf.clone() if leaf.is_inference() else leaf for leaf in state] for state in states)
        surroundings, gradients = self._surroundings(states), self._gradients()
        found = _Recomputed(self, function, states, surroundings, then).first(states)
        if self._gradients() != gradients:
            raise adds_gradients()
        self.buffers.note_changes(surroundings.before)
        return found

    def doubts_of(self, now: Fingerprint) -> Doubts:
        """Those that are known of steps with as many tensors."""
        count = len(now.numbers)
        if count not in self.doubts:
            self.doubts[count] = Doubts(*(torch.zeros_like(now.numbers, dtype=torch.bool) for _ in range(2)))
        return self.doubts[count]

    def warn_once(self, message: str) -> None:
        """Warn, unless it was warned so before in this solve."""
        if message not in self.warnings:
            self.warnings.add(message)
            warn(message)

    def _gradients(self) -> list[tuple[int, int]]:
        """Which tensors stand in .grad of what func reads, and how often each was changed."""
        found = [leaf.grad for leaf in self.buffers.leaves]
        return [(0, 0) if gradient is None else (id(gradient), version_of(gradient)) for gradient in found]

    def _surroundings(self, states: tuple[State, ...]) -> Surroundings:
        random = random_of(states)
        if self.random is None or not random.equals(self.random):
            self.random = random
        return Surroundings(
            self.random,
            autocasts_of(states),
            self.buffers,
            self.buffers.before(),
            torch.get_num_threads(),
            active_modes(),
        )


class _Saved:
    """In the place of a tensor that autograd saves: how it looked then, and its value while that is at hand.

    Args:
        tensor: The tensor.
    """

    __slots__ = ("__weakref__", "current", "look", "place", "value", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.version, self.look = version_of(tensor), (tensor.shape, tensor.dtype, tensor.device)
        self.current = self.version  # the count of changes of the value at hand
        self.place = place_of(tensor)
        self.value: torch.Tensor | None = tensor.detach()  # with the counter of changes of the tensor

    def checked(self) -> torch.Tensor:
        """The value, which nobody has changed since."""
        assert self.value is not None, "there is a value at hand"
        if version_of(self.value) != self.current:
            raise changed_in_place(f"a tensor of shape {tuple(self.value.shape)} that func reads")
        return self.value

    def compare(self, tensor: torch.Tensor, *, is_counted: bool) -> None:
        """Raise if it cannot be the same; is_counted says whether its changes are counted as before."""
        if (tensor.shape, tensor.dtype, tensor.device) != self.look:
            saved, before = f"{tuple(tensor.shape)} of {tensor.dtype}", f"{tuple(self.look[0])} of {self.look[1]}"
            raise not_the_same(f"saves {saved} for its derivative, where the forward has saved {before}")
        if is_counted and version_of(tensor) != self.version and place_of(tensor) == self.place:
            raise changed_in_place(f"a tensor of shape {tuple(tensor.shape)} that func reads")

    def take(self, other: _Saved) -> None:
        """Its value, which was computed once more."""
        self.value, self.current = other.value, other.current


class _Inputs(torch.autograd.Function):
    """Saves tensors as autograd does: hooks of the user's see them, and to change one in place is an error."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise AssertionError("nothing depends on the anchor")


class _Recomputed:
    """One call of a function."""

    def __init__(
        self,
        recomputation: Recomputation,
        function: Function,
        states: tuple[State, ...],
        surroundings: Surroundings,
        then: Then | None,
    ) -> None:
        self.recomputation, self.function, self.surroundings, self.then = recomputation, function, surroundings, then
        self.sizes = [len(state) for state in states]
        leaves = [leaf for state in states for leaf in state]
        self.versions = [version_of(leaf) for leaf in leaves]
        self.unit = 0.0  # of the coarsest dtype that a result depends on
        self.inputs: Any = _Inputs.apply(torch.empty(0, requires_grad=True), *leaves)  # its node lives as long
        self.saved: list[weakref.ref[_Saved]] = []
        self.lasting: set[int] = set()  # the numbers of those that are saved still when the function has ended
        self.numbers: torch.Tensor | None = None  # of the fingerprint
        self.are_large: Sequence[bool] = ()
        self.is_first = True
        self.keep = Keep.FLAGGED  # of what this call has made

    def first(self, states: tuple[State, ...]) -> Any:
        """The result; what the function has saved is let go."""
        leaves: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> _Saved:
            if is_of_leaf(tensor):
                leaves[len(self.saved)] = tensor
            saved = _Saved(tensor)
            self.saved.append(weakref.ref(saved))
            if tensor.is_floating_point() or tensor.is_complex():
                self.unit = max(self.unit, torch.finfo(tensor.dtype).eps)
            return saved

        with hooks_outside_of_transforms(pack, self._unpack):
            found = self.function(*states)
        alive = [reference() for reference in self.saved]
        lasting = {number: saved.value for number, saved in enumerate(alive) if saved and saved.value is not None}
        printed = self.recomputation.fingerprints.of(found, [leaves.get(k, value) for k, value in lasting.items()])
        self.numbers, self.are_large = (None, ()) if printed is None else (printed.numbers, printed.are_large)
        self.lasting, self.is_first = set(lasting), False
        for saved in alive:
            if saved is not None:
                saved.value = None
        return found

    def _unpack(self, saved: _Saved) -> torch.Tensor:
        if saved.value is None:
            self._recompute()
        value = saved.checked()
        if not self.is_first:  # a second backward computes it anew
            saved.value = None
        return value

    def _recompute(self) -> None:
        try:
            saved = self.inputs.grad_fn.saved_tensors
        except RuntimeError as error:  # autograd's own, which names no cause
            raise changed_in_place("the state that func is given") from error
        given = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in saved]
        leaves, as_before = iter(given), [version_of(leaf) for leaf in given] == self.versions
        # Of copies, which hooks of the user's may make, changes are counted anew.
        copied = set() if as_before else {memory_of(leaf) for leaf in given}
        states = [[next(leaves) for _ in range(size)] for size in self.sizes]

        def compare(tensor: torch.Tensor, number: int) -> None:
            if (saved := self._alive(number)) is not None:
                saved.compare(tensor, is_counted=memory_of(tensor) not in copied)

        found, again = self._in_any_way(states, compare)
        for number, value in enumerate(again):
            if value is not None and (saved := self._alive(number)) is not None:
                saved.take(value)
        if self.then is not None:
            self.then(states, found)

    def _alive(self, number: int) -> _Saved | None:
        """The one of this number that the forward has saved, while something holds it."""
        return self.saved[number]() if number < len(self.saved) else None

    def _in_any_way(self, states: list[State], compare: Compare) -> tuple[Any, list[_Saved | None]]:
        """The result of the forward and what it saves, whatever is kept of what this call has made."""
        errors = list[RecomputationError]()
        for keep in self.surroundings.buffers.ways(self.surroundings.before):
            self.keep = keep
            try:
                return self._as_before(states, compare)
            except RecomputationError as error:
                errors.append(error)
        raise errors[0]  # of what is most likely

    def _as_before(self, states: list[State], compare: Compare) -> tuple[Any, list[_Saved | None]]:
        """The result and what it saves, which are those of the forward."""
        found, now, saved = self._once_more(states, compare)
        self._compare(states, now)
        return found, saved

    def _once_more(self, states: list[State], compare: Compare) -> tuple[Any, Fingerprint | None, list[_Saved | None]]:
        """The result, its fingerprint, and what is saved; compare is told of each such tensor, and its number."""
        again, tensors = list[_Saved | None](), list[torch.Tensor]()

        def pack(tensor: torch.Tensor) -> _Saved:
            compare(tensor, len(again))
            if len(again) in self.lasting:  # detached: what hooks hold must not hold their graph
                tensors.append(tensor if is_of_leaf(tensor) else tensor.detach())
            saved = _Saved(tensor)
            again.append(None if self._alive(len(again)) is None else saved)
            return saved

        with self.surroundings.again(self.keep):
            with hooks_outside_of_transforms(pack, _Saved.checked):
                found = self.function(*states)
            if len(again) != len(self.saved):
                raise not_the_same(
                    f"saves {len(again)} tensors for its derivative, where the forward has saved {len(self.saved)}"
                )
            return found, self.recomputation.fingerprints.of(found, tensors, self.are_large), again

    def _compare(self, states: list[State], now: Fingerprint | None) -> None:
        """Raise if this is not the computation of the forward."""
        if self.numbers is None or now is None or torch.equal(self.numbers, now.numbers):
            return
        doubts = self.recomputation.doubts_of(now)
        if not bool(self._is_another(now, self.numbers, doubts).any()):
            return
        self._look_closer(states, now, doubts)
        if bool(self._is_another(now, self.numbers, doubts).any()):
            share = now.difference(self.numbers)
            raise not_the_same(f"gives another result than in the forward: they differ by {share:.1e} of their size")

    def _look_closer(self, states: list[State], now: Fingerprint, doubts: Doubts) -> None:
        """Note what is not reproducible, and raise where that is no work of torch's operators."""
        plain = self._printed(states, contextlib.nullcontext())
        filled, again = (self._printed(states, written_memory()) for _ in range(2))
        if plain is None or filled is None or again is None:
            return
        differ = again.is_another(filled.numbers, None if sums_in_order(now.numbers.device) else self.unit)
        if bool(differ.any()):
            share = again.difference(filled.numbers)
            raise not_the_same(f"gives another result each time: two evaluations differ by {share:.1e} of their size")
        is_unwritten = self._is_unwritten(states, filled, plain)
        is_noisy = (plain.numbers != now.numbers) | (again.numbers != filled.numbers)
        # What follows from a tensor that is noisy may be the same twice by chance.
        doubts.is_noisy.logical_or_(is_unwritten | is_noisy.any())
        doubts.is_unknown.logical_or_(is_unwritten)
        for tensor, rest in filled.rests(is_unwritten.tolist()):
            self.recomputation.warn_once(
                f"func saves a tensor of shape {tuple(tensor.shape)} for its derivative, of which {rest} entries are "
                "written and the others are not: a change of these before the backward is not seen. Make it by "
                "torch.zeros"
            )

    def _is_unwritten(self, states: list[State], filled: Fingerprint, plain: Fingerprint) -> torch.Tensor:
        """Which tensors have entries that nobody has written, by one for which all memory was filled.

        These are filled each time that memory is, and are not where it is zero: a NaN of the user's is one always, or
        where a counter of the user's says so.
        """
        first, fewest = filled.fills(), plain.fills()
        if not any(first):
            return torch.zeros_like(filled.numbers, dtype=torch.bool)
        memories: list[contextlib.AbstractContextManager[Any]] = [contextlib.nullcontext(), *map(FilledMemory, NUMBERS)]
        for memory in memories:
            if all(few < many for few, many in zip(fewest, first, strict=True) if many):
                break
            filled.leave_zeros()  # memory may be what was filled before
            with contextlib.suppress(RecomputationError):  # a dispatch mode leaves compiled code uncompiled
                if (tried := self._printed(states, memory)) is not None:
                    fewest = list(map(min, fewest, tried.fills()))
        again = self._printed(states, written_memory())
        most = first if again is None else again.fills()
        is_unwritten = [a == b > c for a, b, c in zip(first, most, fewest, strict=True)]
        return torch.tensor(is_unwritten, device=filled.numbers.device)

    def _printed(self, states: list[State], memory: contextlib.AbstractContextManager[Any]) -> Fingerprint | None:
        """The fingerprint of one evaluation more."""
        with memory:
            return self._once_more(states, lambda tensor, number: None)[1]

    def _is_another(self, now: Fingerprint, before: torch.Tensor, doubts: Doubts) -> torch.Tensor:
        """Which tensors are others."""
        far = now.is_another(before, self.unit) & ~doubts.is_unknown
        if torch.get_num_threads() != self.surroundings.threads:  # sums are taken in another order
            return far
        return torch.where(doubts.is_noisy, far, ~now.is_near(before))


class Doubts(NamedTuple):
    """What is not reproducible, of the tensors of a step.

    Attributes:
        is_noisy: Which have other bits each time.
        is_unknown: Which are memory that nobody has written.
    """

    is_noisy: torch.Tensor
    is_unknown: torch.Tensor


def changed_in_place(what: str) -> RecomputationError:
    """The error of a tensor whose value is no longer that of the forward."""
    return RecomputationError(
        f"{what} was changed in place, before the backward or by func itself",
        required="parameters, states and other tensors that stay as they are until the backward has run, buffers apart",
        fix="change them after it: loss.backward() before optimizer.step(); what func makes of them at its first call, "
        "make before the solve",
    )


def adds_gradients() -> RecomputationError:
    """The error of a velocity that calls backward()."""
    return RecomputationError(
        "func calls backward(), which adds to the .grad of its parameters: the backward would add it once more",
        required="a func that leaves .grad alone",
        fix="take torch.autograd.grad(..., create_graph=True) in func, or use odeint",
    )


def not_the_same(told: str) -> RecomputationError:
    """The error of a velocity that depends on more than its inputs."""
    return RecomputationError(
        f"func {told}, in the backward",
        required="a func that computes the same from the same t and y until the backward has run: what it reads of "
        "attributes, contexts and generators of random numbers stays as it is, torch.func.functional_call included",
        fix="use odeint, of which autograd keeps every step, or change what func reads after loss.backward(); a func "
        "that is compiled by torch.compile by itself must not compile again from call to call, as for a counter",
    )
