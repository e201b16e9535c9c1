"""Emit the search of an adaptive odeint: a while loop that tries steps until the last time is reached.

Before:  intervals, positions, fractions, count, tried, status, reached = loop(y_0, k_0, t, numbers, w)
After:   while running:  t_i, dt = propose(t, search);  y', k', e = step(y, k, t_i, dt, w)
                         counts, search = judge(norm(e));  y, k = (y', k') if counts else (y, k)

The step is the lowered one, so that steps are chosen by the velocity that will be integrated; the norm of the error and
all of the control are in the accumulation dtype. The loop behind it, which has as many steps as the search found,
has the adjoint. It reads what the search keeps of the steps that count (rampde_fx/emit/kept_steps.py), or where the
policy asks for more than their states computes them again.

Requires: a Loop with a controller, lowered, without adjoint.
Ensures:  no gradient; the condition of the loop is read once per step that is tried, on the host.
Source:   the controller's, rampde_fx/runtime/step_control.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from rampde_fx.emit.autocast import without_autocast
from rampde_fx.emit.kept_steps import KeptSteps
from rampde_fx.emit.lasting import emit_call
from rampde_fx.emit.recurrence import Body, emit_preamble, repeat_while
from rampde_fx.ir import graphs, tracing
from rampde_fx.ir.loops import CompensatedLoop
from rampde_fx.runtime import counts, step_control
from rampde_fx.torch_private import fake_tensors

FIELDS = len(step_control.Search._fields)


def emit_search(
    graph_module: fx.GraphModule, call: fx.Node, loop: CompensatedLoop, kept: KeptSteps | None = None
) -> None:
    """Replace the call of a LoopNode by the search; its times are ends of intervals, and the control's numbers.

    With what it is to keep it gives, behind what leave_search gives, the token, and what it carries in the end.
    """
    _warn_of_tolerance(loop)
    inputs = graphs.placeholders(loop.step)
    values = list(map(graphs.value, inputs))
    first = loop.first_invariant
    values[loop.carries : first] = [
        fake_tensors.detached(graphs.value(node)) for node in call.args[loop.carries : first]
    ]
    search = graphs.named(
        tracing.trace(_Search(loop, kept).run, values, gradients=False), [node.name for node in inputs]
    )
    graph_module.add_submodule(f"{call.target}_search", without_autocast(search, loop))
    operands = emit_preamble(graph_module, call, loop)
    with graph_module.graph.inserting_before(call):
        new = emit_call(graph_module, f"{call.target}_search", operands, loop)
    call.replace_all_uses_with(new)
    graph_module.graph.erase_node(call)
    for result in new.users:  # AOTAutograd caches no graph that calls a method of a node without a value
        result.meta["example_value"] = graphs.value(graphs.results(search)[result.args[1]])


def _warn_of_tolerance(loop: CompensatedLoop) -> None:
    """Warn of a tolerance that stages of the velocity dtype miss by their rounding where the state is of order 1."""
    assert loop.controller is not None, "a search has a controller"
    rtol, atol = loop.controller.rtol, loop.controller.atol
    roundoff = torch.finfo(loop.policy.dtype).eps / 2
    if None in (rtol, atol):
        return
    if rtol + atol < roundoff:
        reached = atol / (roundoff - rtol)
        _warn_once(
            loop.name,
            f"odeint at {loop.where or 'an unknown line'} asks for rtol={rtol:g} and atol={atol:g} of stages in "
            f"{loop.policy.dtype}, whose unit roundoff is {roundoff:.1g}: for states above {reached:.1g} their "
            "rounding counts as error, and steps become small without becoming better; "
            f"write rtol={2 * roundoff:.1g} or more, or a wider velocity dtype",
        )


@functools.cache
def _warn_once(name: str, message: str) -> None:
    """Once in a process, whatever the number of compilations; Python's own record is lost where filters change."""
    counts.warn_at(name, message)


class _Search:
    """The while loop, as a function of the step's operands."""

    def __init__(self, loop: CompensatedLoop, kept: KeptSteps | None) -> None:
        assert loop.controller is not None, "a search has a controller"
        self.loop, self.controller, self.carries = loop, loop.controller, loop.carries
        self.evaluations, self.name = loop.evaluations_per_step, loop.name
        self.told, self.kept, results = loop.estimates, kept, loop.results()
        results = results._replace(outputs=results.outputs[: self.told])
        self.body = Body(loop.step, loop.inputs(), results if kept is None else kept.results_of_search())

    def run(self, *operands: Any) -> tuple[torch.Tensor, ...]:
        """What leave_search gives, then the token of what is kept, and what is carried in the end."""
        given = self.loop.divided(operands)
        starts = self.body.starts(given.carries)
        t, numbers = given.per_step
        invariants = self.body.prepare(given.invariants)
        begun = step_control.begin(t, numbers[0], self.controller.max_steps)
        token = [] if self.kept is None else self.kept.begin(t)
        varying, fixed = [*begun, *starts], [t, numbers[1:].clone(), *token, *invariants]

        def running(*args: Any) -> torch.Tensor:
            return step_control.Search(*args[:FIELDS]).status == step_control.RUNNING

        def try_step(*args: Any) -> tuple[torch.Tensor, ...]:
            search, carries = step_control.Search(*args[:FIELDS]), args[FIELDS : len(varying)]
            t, numbers, *rest = args[len(varying) :][: len(fixed)]
            controller = self.controller.with_numbers(numbers)
            trial = step_control.propose(t, search, controller)
            results = self.body(*carries, trial.t, trial.dt, *rest[len(token) :])
            nexts, told = results[: self.carries], results[self.carries :][: self.told]
            counts, search = step_control.judged(t, search, trial, told, (carries, nexts), controller)
            if self.kept is not None and token:
                further = results[self.carries + self.told :]
                search = search._replace(tried=search.tried + self.kept.keep(rest[0], carries, further, counts))
            lasting = (torch.where(counts, new, old) for old, new in zip(carries, nexts, strict=True))
            return *(value.clone() for value in search), *lasting

        results = repeat_while(running, try_step, varying, fixed)
        search = step_control.Search(*results[:FIELDS])
        record = torch.ops.rampde_fx.record_search
        count = search.count + record(search.tried, search.count, self.evaluations, self.name)
        found = (search.intervals, search.positions, search.fractions, count, search.tried, search.status)
        return *found, step_control.reached(t, search), *token, *(results[FIELDS:] if self.kept else ())
