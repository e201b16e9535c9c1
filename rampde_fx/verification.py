"""options={"verify": True}: the first call of a compiled graph is checked in float64 before it is used.

The captured graph, run step by step as plain torch operations, and its rewrite, both in float64 on copies of the real
inputs, must agree in values, gradients and what they write in place. So the rewrite of this program is checked, not
that of programs in general: translation validation (Pnueli, Siegel and Singerman, TACAS 1998).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rampde_fx import counts, graphs, torch_private
from rampde_fx.comparison import Mismatch, Outcome, cotangents, differentiable, first_mismatch
from rampde_fx.errors import CheckError, RewriteMismatchError
from rampde_fx.loop import Loop
from rampde_fx.operators import enter
from rampde_fx.passes.find_loops import STEP
from rampde_fx.policy import MONITORED, PrecisionPolicy
from rampde_fx.widening import AsWritten, copies, default_dtype, widened

# rampde_fx.backend.rewrite, which imports this file.
Rewrite = Callable[..., list[Loop]]
SEED = 0


def in_float64(policy: PrecisionPolicy) -> PrecisionPolicy:
    """The policy that does to a graph all that the given one does, but in float64."""
    return replace(
        policy,
        velocity=torch.float64,
        storage=torch.float64,
        storage_scaling="dynamic" if policy.scales_storage else "none",
        scaling=policy.adjoint_scaling or "none",
    )


def change_policies(graph_module: fx.GraphModule, change: Callable[[PrecisionPolicy], PrecisionPolicy]) -> None:
    """Change the policy of every marker of a captured graph, in place; a marker without one counts as the default.

    No monitor watches the loops any more.
    """
    for module in graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.target in STEP or node.target is enter:
                told = str(node.args[-1]).removeprefix(MONITORED)
                policy = PrecisionPolicy.decode(told) if told else PrecisionPolicy()
                node.args = (*node.args[:-1], change(policy).encoded)


class Twin:
    """The rewrite of a captured graph in float64, beside the graph as it was captured.

    Args:
        graph_module: The captured graph, which stays as it is.
        rewrite: The backend's.
        policy: What stands in for the policy of each loop.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        rewrite: Rewrite,
        policy: Callable[[PrecisionPolicy], PrecisionPolicy] = lambda own: own,
    ) -> None:
        self._captured, self._rewrite, self._policy = graph_module, rewrite, policy
        self.wide = widened(graph_module)
        self.rewritten, self.loops = self._rewritten()

    def _rewritten(self, only: Container[int] | None = None) -> tuple[fx.GraphModule, list[Loop]]:
        twin = widened(self._captured)
        change_policies(twin, lambda own: in_float64(self._policy(own)))
        with default_dtype(torch.float64):
            return twin, self._rewrite(twin, lambda *_: None, only)

    def as_written(self, *, rolled: bool) -> fx.GraphModule:
        """The graph in float64, its loops as the user wrote them or, rolled up, with the rewrite's random numbers."""
        return self._rewritten(only=())[0] if rolled else self.wide

    def mismatch_error(self, mismatch: Mismatch, fails: Callable[[fx.GraphModule], Mismatch | None]) -> Exception:
        """The error that names the tensor and the loop: of several, the first one whose rewrite alone fails."""
        wrong = self.loops
        if len(self.loops) > 1:
            wrong = [loop for i, loop in enumerate(self.loops) if fails(self._rewritten(only=(i,))[0])] or self.loops
        return RewriteMismatchError(mismatch.tensor, mismatch.found, wrong[0].where)


def inputs_like(values: Sequence[Any], *, widen: bool) -> tuple[list[Any], list[Any]]:
    """Copies of a graph's inputs: what it is called with, and the leaves to differentiate by."""
    leaves = copies(values, widen=widen)
    called = list(leaves)
    for i, (value, leaf) in enumerate(zip(values, leaves, strict=True)):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            leaf.requires_grad_()
            called[i] = leaf if value.is_leaf else leaf.clone()  # it may be updated in place
    return called, leaves


class Verification:
    """The comparison that is due at the first call of a compiled graph.

    Args:
        graph_module: The captured graph, which stays as it is.
        rewrite: The backend's.
    """

    def __init__(self, graph_module: fx.GraphModule, rewrite: Rewrite) -> None:
        self._captured = graph_module
        self._twin = Twin(graph_module, rewrite)
        self._names = [torch_private.source_name(node) for node in graphs.placeholders(graph_module)]

    def __call__(self, inputs: Sequence[Any]) -> None:
        """Compare on these inputs, of which nothing is changed.

        Raises:
            RewriteMismatchError: naming the tensor and the loop.
        """
        wanted, draws = self._run(AsWritten(self._twin.wide).run, inputs, widen=True)
        rounded, _ = self._run(AsWritten(self._captured).run, inputs, widen=False)
        if draws:  # eager's numbers are others
            wanted, _ = self._run(AsWritten(self._twin.as_written(rolled=True)).run, inputs, widen=True)

        def fails(rewritten: fx.GraphModule) -> Mismatch | None:
            return first_mismatch(wanted, self._run(AsWritten(rewritten).run, inputs, widen=True)[0], rounded)

        got, _ = self._run(AsWritten(self._twin.rewritten).run, inputs, widen=True)
        if (mismatch := first_mismatch(wanted, got, rounded)) is not None:
            raise self._twin.mismatch_error(mismatch, fails)

    def _run(self, function: Callable[..., Any], inputs: Sequence[Any], *, widen: bool) -> tuple[Outcome, bool]:
        """What a run on copies of the inputs leaves, and whether it drew random numbers."""
        called, leaves = inputs_like(inputs, widen=widen)
        dtype = torch.float64 if widen else torch.get_default_dtype()
        with counts.apart(), default_dtype(dtype), torch_private.kept_random_state(SEED) as drew:
            try:
                outputs = list(function(*called))
            except Exception as error:
                raise _cannot_run(error) from error
            random = drew()
            gradients = self._gradients([*outputs, *called], leaves)
        tensors = {f"output {i}": x for i, x in enumerate(outputs) if isinstance(x, torch.Tensor)}
        written = {n: x.detach() for n, x in zip(self._names, called, strict=True) if isinstance(x, torch.Tensor)}
        return Outcome({n: x.detach() for n, x in tensors.items()}, gradients, written), random

    def _gradients(self, results: Sequence[Any], leaves: Sequence[Any]) -> dict[str, torch.Tensor | None]:
        by = {n: x for n, x in zip(self._names, leaves, strict=True) if isinstance(x, torch.Tensor) and x.requires_grad}
        given = [x for x in differentiable(results) if x.grad_fn is not None]
        if not by or not given:
            return dict.fromkeys(by)
        found = torch.autograd.grad(given, list(by.values()), cotangents(given), allow_unused=True)
        return dict(zip(by, found, strict=True))


def _cannot_run(error: Exception) -> CheckError:
    return CheckError(
        f"a captured graph cannot be verified: it does not run on copies of its inputs, {type(error).__name__}: {error}",
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
