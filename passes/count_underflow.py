"""Count what a state loses where it enters a velocity in float16.

Before:  k = velocity_0(y, w);  ...;  return y_next
After:   k = velocity_0(y, w);  ...;  n = rampde_fx.count_underflow([y, ...]);  return y_next, n

n holds how many entries of the states that enter, over the evaluations of a step, are too small for eight digits in
float16 but not zero, and how many are not zero. An overflow shows itself, as NaN; this would be silent.

Requires: a lowered Loop without adjoint.
Ensures:  a step whose velocity is float16 has n, int64 (2,), as its last per-step output; a search and all other loops
          stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from rampde_fx import graphs
from rampde_fx.loop import Loop


def count_underflow(loop: Loop) -> Loop:
    """Return the counts of the states that enter a velocity in float16."""
    entering = find_entering(loop.step) if loop.policy.velocity is torch.float16 and loop.controller is None else []
    if not entering:
        return loop
    step = graphs.copied(loop.step)
    twins = {node.name: node for node in step.graph.nodes}
    output = step.graph.output_node()
    with step.graph.inserting_before(output):
        states = [twins[node.name] for node in entering]
        count = step.graph.call_function(torch.ops.rampde_fx.count_underflow.default, (states,))
    output.args = ((*output.args[0], count),)
    return replace(loop, step=graphs.refresh(step), counted=True)


def find_entering(step: fx.GraphModule) -> list[fx.Node]:
    """The states that evaluations read, wider than float16, each once."""
    calls = [node for node in step.graph.nodes if node.op == "call_module" and node.meta.get("role") == "velocity"]
    read = dict.fromkeys(graphs.base_of_view(operand) for call in calls for operand in call.args)
    return [n for n in read if n.meta.get("role") == "state" and graphs.is_float(n) and graphs.value(n).numel() != 0]
