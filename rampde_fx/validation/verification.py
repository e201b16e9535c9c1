"""options={"verify": True}: the first call of a compiled graph is checked in float64 before it is used.

The captured graph, run step by step as plain torch operations, and its rewrite, both in float64 on copies of the real
inputs, must agree in values, gradients and what they write in place. So the rewrite of this program is checked, not
that of programs in general: translation validation (Pnueli, Siegel and Singerman, TACAS 1998).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import fx

from rampde_fx.errors import CheckError, RampdeError, RewriteMismatchError
from rampde_fx.frontend import marking
from rampde_fx.ir import graphs
from rampde_fx.ir.captured import begins_iteration, begins_loop
from rampde_fx.ir.chosen import policy_at
from rampde_fx.ir.loops import KeptLoop, Loop
from rampde_fx.policy import MONITORED, PrecisionPolicy
from rampde_fx.runtime import counts, random_state
from rampde_fx.torch_private import capturing
from rampde_fx.validation.comparison import Mismatch, Named, Outcome, first_mismatch, weights_of
from rampde_fx.validation.widening import AsWritten, copies, default_dtype, widened

# rampde_fx.backend.rewrite, which imports this file.
Rewrite = Callable[..., list[Loop]]
SEED = 0


def in_float64(policy: PrecisionPolicy) -> PrecisionPolicy:
    """The policy that does to a graph all that the given one does, but in float64."""
    return replace(policy.filled_in(), velocity=torch.float64, storage=torch.float64)


def change_policies(
    graph_module: fx.GraphModule,
    change: Callable[[PrecisionPolicy], PrecisionPolicy],
    *,
    monitored: bool = False,
) -> None:
    """Change the policy of every marker of a captured graph, in place.

    A marker without one counts as float16; a dtype that is left to the device is chosen before.

    Args:
        graph_module: The captured graph.
        change: Takes a policy and gives another.
        monitored: Whether monitors watch the loops from now on.
    """
    for marker in filter(begins_iteration, graphs.all_nodes(graph_module)):
        if begins_loop(marker):
            told = str(marker.args[-1]).removeprefix(MONITORED)
            policy = policy_at(marker)[0] if told else PrecisionPolicy(torch.float16)
        marker.args = (*marker.args[:-1], (MONITORED if monitored else "") + change(policy).encoded)


class Twin:
    """The rewrite of a captured graph in float64, beside the graph as it was captured.

    Args:
        graph_module: The captured graph, which stays as it is.
        rewrite: The backend's.
        policy: What stands in for the policy of each loop.
        keeps: Of how many evaluations each loop keeps the activations, if a budget chose that in narrower dtypes.

    Attributes:
        rewritten: The rewrite in float64.
        loops: Its loops.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        rewrite: Rewrite,
        policy: Callable[[PrecisionPolicy], PrecisionPolicy] = lambda own: own,
        keeps: Sequence[int] | None = None,
    ) -> None:
        self._captured, self._rewrite, self._policy, self._keeps = graph_module, rewrite, policy, keeps
        try:
            wide = widened(graph_module)
        except Exception as error:
            raise _cannot_run(error) from error
        self.rewritten, self.loops = self._rewritten(wide)

    def _rewritten(
        self, twin: fx.GraphModule, only: Container[int] | None = None, dtype: torch.dtype = torch.float64
    ) -> tuple[fx.GraphModule, list[Loop]]:
        change_policies(twin, lambda own: in_float64(self._policy(own)))
        with default_dtype(dtype):
            return twin, self._rewrite(twin, lambda *_: None, only, keeps=self._keeps)

    def as_written(self, *, widen: bool, rolled: bool) -> AsWritten:
        """The captured graph, ready to run.

        Args:
            widen: Whether in float64.
            rolled: Whether its loops are rolled up, with the random numbers of the rewrite, or as the user wrote them.
        """
        graph_module = widened(self._captured) if widen else graphs.copied(self._captured)
        if not rolled:
            return AsWritten(graph_module)
        dtype = torch.float64 if widen else torch.get_default_dtype()
        return AsWritten(self._rewritten(graph_module, only=(), dtype=dtype)[0])

    def mismatch_error(self, mismatch: Mismatch, compare: Callable[[fx.GraphModule], Mismatch | None]) -> RampdeError:
        """The error that names the tensor and the loop: of several, the first one whose rewrite alone fails."""
        wrong = self.loops
        if len(self.loops) > 1:
            alone = (self._rewritten(widened(self._captured), only=(i,))[0] for i in range(len(wrong)))
            wrong = [loop for loop, rewritten in zip(wrong, alone, strict=True) if compare(rewritten)] or self.loops
        return RewriteMismatchError(mismatch.tensor, mismatch.found, wrong[0].where)


def inputs_like(values: Sequence[Any], *, widen: bool) -> tuple[list[Any], list[torch.Tensor | None]]:
    """Copies of a graph's inputs: what it is called with, and the leaves to differentiate by, None elsewhere.

    A leaf is known before the call: what is updated in place requires a gradient after it, too.
    """
    called = copies(values, widen=widen)
    leaves: list[torch.Tensor | None] = [None] * len(called)
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            leaves[i] = leaf = called[i].requires_grad_()
            called[i] = leaf if value.is_leaf else leaf.clone()  # it may be updated in place
    return called, leaves


class Verification:
    """The comparison that is due at the first call of a compiled graph.

    Args:
        graph_module: The captured graph, which stays as it is.
        rewrite: The backend's.
        loops: The loops of its rewrite.
    """

    def __init__(self, graph_module: fx.GraphModule, rewrite: Rewrite, loops: Sequence[Loop]) -> None:
        keeps = [loop.kept if isinstance(loop, KeptLoop) else 0 for loop in loops]
        self._twin = Twin(graph_module, rewrite, keeps=keeps)
        self._names = _names(graph_module)
        self._draws = False  # whether the last run drew random numbers

    def __call__(self, inputs: Sequence[Any]) -> None:
        """Compare on these inputs, of which nothing is changed.

        Raises:
            RewriteMismatchError: naming the tensor and the loop.
        """
        wanted, rounded = self._references(inputs, rolled=False)
        if self._draws:  # eager's numbers are others
            wanted, rounded = self._references(inputs, rolled=True)

        def compare(rewritten: fx.GraphModule) -> Mismatch | None:
            return first_mismatch(wanted, self._run(AsWritten(rewritten), inputs, widen=True), rounded)

        if (mismatch := compare(self._twin.rewritten)) is not None:
            raise self._twin.mismatch_error(mismatch, compare)

    def _references(self, inputs: Sequence[Any], *, rolled: bool) -> list[Outcome]:
        """The graph as it was captured, in float64 and in its own dtypes."""
        return [
            self._run(self._twin.as_written(widen=widen, rolled=rolled), inputs, widen=widen) for widen in (True, False)
        ]

    def _run(self, graph: AsWritten, inputs: Sequence[Any], *, widen: bool) -> Outcome:
        """What a run on copies of the inputs leaves."""
        called, leaves = inputs_like(inputs, widen=widen)
        dtype = torch.float64 if widen else torch.get_default_dtype()
        with counts.apart(), default_dtype(dtype), random_state.kept_random_state(SEED) as drew:
            try:
                outputs = list(graph.run(*called))
                self._draws = drew()
                gradients = self._gradients(outputs, called, leaves)
            except Exception as error:
                raise _cannot_run(error) from error
        values = {f"output {i}": x.detach() for i, x in enumerate(outputs) if isinstance(x, torch.Tensor)}
        written = {n: x.detach() for n, x in zip(self._names, called, strict=True) if isinstance(x, torch.Tensor)}
        return Outcome(values, gradients, written)

    def _gradients(self, outputs: Sequence[Any], called: Sequence[Any], leaves: Sequence[torch.Tensor | None]) -> Named:
        """Gradients of a weighted sum of all that the graph leaves, its inputs that it has updated included."""
        by = {name: leaf for name, leaf in zip(self._names, leaves, strict=True) if leaf is not None}
        updated = [x if isinstance(x, torch.Tensor) and x.grad_fn is not None else None for x in called]
        weighted = [(x, w) for x, w in weights_of([*outputs, *updated]) if x.requires_grad]
        if not by or not weighted:
            return dict.fromkeys(by)
        found = torch.autograd.grad(
            [x for x, _ in weighted], list(by.values()), [w for _, w in weighted], allow_unused=True
        )
        return dict(zip(by, found, strict=True))


def _names(graph_module: fx.GraphModule) -> list[str]:
    """The user's names of the inputs of the graph that is being captured."""
    file, variables = capturing.captured_frame()
    parameters: list[str] = []
    if file == marking.__file__:  # what mixed_precision has wrapped has *args and **kwargs
        parameters = list(signature(variables["function"]).parameters)

    def named(position: re.Match[str]) -> str:
        return parameters[int(position[1])] if int(position[1]) < len(parameters) else position[0]

    found = [capturing.source_name(node) for node in graphs.placeholders(graph_module)]
    found = [re.sub(r"^args\[(\d+)\]", named, name) for name in found]
    return [re.sub(r"^kwargs\['(\w+)'\]", r"\1", name).removeprefix("self.") for name in found]


def _cannot_run(error: Exception) -> CheckError:
    return CheckError(
        f"a graph cannot be verified: it does not run on copies of its inputs ({type(error).__name__}: {error})",
        required="a graph of plain torch operations that float64 tensors can take",
        fix='leave "verify" out',
    )


def on_first_call(compiled: Callable[..., Any], verification: Verification) -> Callable[..., Any]:
    """The compiled graph, which raises at every call until a verification has passed."""
    pending = [verification]

    @torch.compiler.disable
    def run(*args: Any) -> Any:
        if pending:
            pending[0](args)
            pending.clear()
        return compiled(*args)

    return run
