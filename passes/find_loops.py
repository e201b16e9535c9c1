"""Find the marked integration loops of a captured graph.

Before:  step(t, 0), nodes of iteration 0, step(t, 1), nodes of iteration 1, ..., end(t)
         or the first iterations, then repeat(t, values)
         or enter(t, dt, states), nodes of one iteration, leave(states, nexts) or leave_search(...), from odeint
After:   the graph is unchanged; a MarkedLoop lists markers and iterations.

These operators, the markers, are defined in rampde_fx/runtime/operators.py. A loop inside a checkpointed function
stands in the body of a tag_activation_checkpoint node, a graph of its own.

Requires: a graph captured by Dynamo, in which rampde_fx.steps and odeint left their markers.
Ensures:  loops in graph order, those of checkpointed bodies included; iteration k holds the nodes between marker k
          and the next one.
Raises:   TransformError for a loop inside a torch.func transform; UnsupportedLoopError for a loop that was left early,
          a loop inside a loop or inside another higher-order operation, and a loop outside mixed_precision; for a
          function with a backward of its own in a step, which tracing would lose; for a parameter that tensor
          parallelism shards. StateError for an odeint whose velocity returns what is no derivative of its state.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile

import torch
from torch import fx

from rampde_fx.errors import TransformError, UnsupportedLoopError, velocity_error
from rampde_fx.ir import graphs
from rampde_fx.ir.captured import MarkedLoop, begins_iteration, begins_loop, ends_loop, first_marker, has_loop
from rampde_fx.ir.chosen import policy_at
from rampde_fx.ir.effects import own_backward, with_bodies
from rampde_fx.ir.graphs import user_line, value
from rampde_fx.policy import MONITORED
from rampde_fx.runtime import operators
from rampde_fx.torch_private import dynamo, higher_order

# Higher-order operations that compute what their body computes.
TRANSPARENT = {"tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint"}
FIX_OWN_BACKWARD = "make it an operator: torch.library.custom_op with register_fake and register_autograd"
FIX_TENSOR_PARALLEL = (
    "leave the velocity's layers out of parallelize_module, and shard by fully_shard the module that holds the loop"
)
FIX_EARLY_EXIT = "run the loop over a shorter t instead of break, and put steps(t) first in a zip"


def find_loops(graph_module: fx.GraphModule, *, gradients: bool, autocast: bool) -> list[MarkedLoop]:
    """Find the marked loops; gradients and autocast say whether each is on where the graph begins."""
    loops: list[MarkedLoop] = []
    open_loop: MarkedLoop | None = None
    transforms, regions = 0, 0
    for node in graph_module.graph.nodes:
        if begins_iteration(node):
            if not user_line(node):  # behind a graph break Dynamo captures odeint by itself
                node.meta["stack_trace"] = dynamo.running_trace()
            if begins_loop(node):
                _check_surroundings(node, open_loop, transforms)
                open_loop = replace(_opened(node, gradients), autocast=autocast or regions > 0)
            assert open_loop is not None, "iteration 0 comes first"
            open_loop.markers.append(node)
            open_loop.iterations.append([])
        elif ends_loop(node) and open_loop is not None:
            loops.append(replace(open_loop, end=node))
            if open_loop.from_odeint and (problem := loops[-1].left().problem):
                raise velocity_error(problem, user_line(open_loop.markers[0]))
            for nodes in open_loop.iterations:
                _check_iteration(nodes, open_loop.with_gradients)
            open_loop = None
        elif (body := _body_with_loop(node)) is not None:
            marker = first_marker(body)
            assert marker is not None
            _check_surroundings(marker, open_loop, transforms)
            if node.target is not higher_order.tag_activation_checkpoint:
                _refuse(
                    marker, f"a marked loop runs inside the higher-order operation {node.target}", "call it plainly"
                )
            loops += find_loops(body, gradients=gradients, autocast=autocast or regions > 0)
        elif open_loop is not None and node.op != "output":
            open_loop.iterations[-1].append(node)
        elif open_loop is None:
            gradients = node.args[0] if node.target is torch._C._set_grad_enabled else gradients
            regions += _autocast_regions(node)
            transforms += _transforms(node) + _opens(node, "_enter_dual_level") - _opens(node, "_exit_dual_level")
    if open_loop is not None:
        raise _left_early(open_loop)
    return loops


def _body_with_loop(node: fx.Node) -> fx.GraphModule | None:
    """The body of a higher-order operation, if it holds a marked loop."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    owner = node.graph.owning_module
    bodies = (
        owner.get_submodule(operand.target)
        for operand in node.all_input_nodes
        if operand.op == "get_attr" and isinstance(getattr(owner, operand.target, None), fx.GraphModule)
    )
    return next((body for body in bodies if has_loop(body)), None)


def _opens(node: fx.Node, suffix: str) -> int:
    return int(node.op == "call_function" and getattr(node.target, "__name__", "").endswith(suffix))


def _transforms(node: fx.Node) -> int:
    """How many transforms of torch.func begin with a node, or minus how many end."""
    return _opens(node, "_increment_nesting") - _opens(node, "_decrement_nesting")


def _autocast_regions(node: fx.Node) -> int:
    """How many regions in which autocast is on begin with a node, or minus how many end."""
    begins, ends = _opens(node, "_enter_autocast"), _opens(node, "_exit_autocast")
    enter = node.args[0] if ends else node
    enabled = bool(enter.args[2]) if begins or ends else False  # (device type, dtype, enabled, cache)
    return (begins - ends) * enabled


def _opened(marker: fx.Node, gradients: bool) -> MarkedLoop:
    told = str(marker.args[-1])  # the policy as text, behind MONITORED where a monitor is open
    if not told.removeprefix(MONITORED):
        raise UnsupportedLoopError(
            "a loop over rampde_fx.steps(t), or an odeint without a policy, runs outside of any mixed_precision target",
            required="a policy for every loop that the rampde_fx backend compiles",
            fix="decorate the Module or the function that holds the loop with @rampde_fx.mixed_precision",
            where=user_line(marker),
        )
    policy, chosen = policy_at(marker)
    return MarkedLoop(policy, [], marker, [], gradients, MONITORED in told, notes=(chosen,) if chosen else ())


def _left_early(loop: MarkedLoop) -> UnsupportedLoopError:
    if loop.from_odeint:
        return UnsupportedLoopError(
            "there is a graph break in the velocity of an odeint",
            required="a velocity that Dynamo captures as a whole",
            fix="torch.compile(..., fullgraph=True) says where it breaks",
            where=user_line(loop.markers[-1]),
        )
    return UnsupportedLoopError(
        f"a loop over steps(t) was left in iteration {len(loop.markers)}, by a break or a return, or steps(t) was not "
        "asked for its end",
        required="a loop that runs over all of its steps",
        fix=FIX_EARLY_EXIT,
        where=user_line(loop.markers[-1]),
    )


def _check_surroundings(marker: fx.Node, open_loop: MarkedLoop | None, transforms: int) -> None:
    if open_loop is not None:
        _refuse_nested(marker, open_loop)
    if transforms:
        raise TransformError(
            "a marked loop runs inside a torch.func transform, or a level of torch.autograd.forward_ad",
            required="a marked loop of plain operations that stands by itself",
            fix="call the model outside of vjp, grad, vmap and the like, and differentiate with backward()",
            where=user_line(marker),
        )


def _refuse_nested(marker: fx.Node, outer: MarkedLoop) -> None:
    loop, odeint = "a loop over steps(t)", "an odeint"
    inner_is_odeint = marker.target is operators.enter
    fix = f"{FIX_EARLY_EXIT}; of two nested loops leave the inner one unmarked: write range(len(t) - 1)"
    if outer.from_odeint:
        fix = "in a velocity integrate by a loop that is not marked, over range(len(t) - 1)"
    elif inner_is_odeint:
        unmarked = "for i in range(t.shape[0] - 1): y = odeint(v, y, t[i:i + 2], ...)[-1]"
        fix = f"{FIX_EARLY_EXIT}; leave a loop round an odeint unmarked: write {unmarked}"
    inner, around = (odeint if inner_is_odeint else loop), (odeint if outer.from_odeint else loop)
    how = "a nested loop" if outer.from_odeint else "a nested loop, or a break or a return"
    _refuse(marker, f"{inner} begins before {around} around it has ended ({how})", fix)


def _check_iteration(nodes: list[fx.Node], with_gradients: bool) -> None:
    """Refuse what changes the meaning of a step without being in its dataflow."""
    modes = [node for node in nodes if node.target is torch._C._set_grad_enabled]
    if modes and modes[-1].args[0] is not with_gradients:
        _refuse(modes[-1], "a step leaves gradients off, or on in a loop under no_grad", "move the switch out")
    levels, gradients = 0, with_gradients  # of reverse mode, the only one that the switch is for
    for node in with_bodies(nodes):
        _check_operands(node)
        levels += _opens(node, "_grad_increment_nesting") - _opens(node, "_grad_decrement_nesting")
        gradients = node.args[0] if node in modes else gradients
        if levels and not (gradients or with_gradients) and isinstance(value(node), torch.Tensor):
            _refuse(
                node,
                "what torch.func differentiates turns gradients off inside, in a loop under no_grad",
                "detach() what is constant instead",
            )
        _check_operation(node, with_gradients)


def _check_operands(node: fx.Node) -> None:
    """Refuse tensors of which a process holds a part, inputs first: these have names."""
    for operand in sorted(node.all_input_nodes, key=lambda operand: operand.op != "placeholder"):
        if type(value(operand)).__name__ == "DTensor":
            found = f"a step reads '{graphs.user_name(operand)}', which is sharded by tensor parallelism"
            _refuse(node, found, FIX_TENSOR_PARALLEL)


def _check_operation(node: fx.Node, with_gradients: bool) -> None:
    """Refuse an operation whose meaning a trace of its body would lose."""
    if _opens(node, "_enter_autocast"):
        _refuse(node, "a step enters torch.autocast", "leave it out: the policy alone sets the loop's dtypes")
    if node.target is higher_order.autograd_function_apply:
        _refuse(node, "a step calls a torch.autograd.Function, which has a backward of its own", FIX_OWN_BACKWARD)
    if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() not in TRANSPARENT:
        _refuse(node, f"a step holds the higher-order operation {node.target.name()}", "write it out in plain torch")
    if with_gradients and (backward := own_backward(node)):
        _refuse(node, f"a step calls '{node.name}', which has a backward of its own, {backward}", FIX_OWN_BACKWARD)


def _refuse(node: fx.Node, found: str, fix: str) -> None:
    nodes = list(node.graph.nodes)
    before, behind = nodes[: nodes.index(node)], nodes[nodes.index(node) :]
    inside = takewhile(lambda n: not (begins_iteration(n) or ends_loop(n)) or n is node, behind)
    # What enters a context has no line of its own: what is inside has one, or what is before it.
    where = next(filter(None, map(user_line, (*inside, *reversed(before)))), "")
    raise UnsupportedLoopError(
        found, required="a marked loop of plain operations that stands by itself", fix=fix, where=where
    )
