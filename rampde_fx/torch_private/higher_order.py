"""Higher-order operators, and what tells the backward to compute them again."""

from __future__ import annotations

import operator

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "torch._functorch.autograd_function": "autograd_function_apply",
        "torch._higher_order_ops.scan": "scan_op",
        "torch._higher_order_ops.while_loop": "while_loop_op",
        "torch._higher_order_ops.wrap": "tag_activation_checkpoint",
    }
)
autograd_function_apply = _torch.autograd_function_apply
scan_op, while_loop_op = _torch.scan_op, _torch.while_loop_op
LOOPS = (scan_op, while_loop_op)
tag_activation_checkpoint = _torch.tag_activation_checkpoint


def recompute_in_backward(node: fx.Node) -> None:
    """Have the backward compute a node again, instead of that the forward saves it: activation checkpointing's tag."""
    node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE


def is_recomputed(node: fx.Node) -> bool:
    """Whether recompute_in_backward was called with a node, or with that of which it is a result."""
    of = node.args[0] if node.target is operator.getitem else node
    return isinstance(of, fx.Node) and of.meta.get("recompute") is CheckpointPolicy.PREFER_RECOMPUTE


def recompute_loops(body: fx.GraphModule) -> None:
    """Have the emitted loops of a checkpointed body recomputed by the backward, and not what they store saved.

    Torch tags the nodes of a checkpointed body, but up to 2.11 not those inside an autograd_function_apply.
    """
    selective = "_checkpoint_context_fn" in body.meta  # the user's own policy decides, node by node
    for apply in body.graph.find_nodes(op="call_function", target=autograd_function_apply):
        for node in body.get_submodule(apply.args[0].target).graph.nodes:
            if node.op == "call_function" and selective:
                node.meta["recompute"] = None
            elif node.op == "call_function":
                recompute_in_backward(node)
