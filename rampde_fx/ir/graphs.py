"""Plain operations on FX graphs that several passes need."""

from __future__ import annotations

import copy
import keyword
import math
import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from rampde_fx.ir import operator_table
from rampde_fx.policy_text import word_of
from rampde_fx.torch_private import fake_tensors, higher_order, shapes

PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


def placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The module's placeholders, in order."""
    return list(graph_module.graph.find_nodes(op="placeholder"))


def placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A new placeholder, where the graph inserts, of this name or, where that is taken, of the next free one."""
    node: fx.Node = graph.placeholder(name)
    node.target = node.name  # its name as an argument, which fx does not make unique
    return node


def call(graph: fx.Graph, name: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new call of a function, where the graph inserts, of this name or, where that is taken, of the next free one."""
    node: fx.Node = graph.create_node("call_function", target, args, kwargs, name)
    return node


def valued(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new call of a function in a graph whose nodes have values ("val"), with its own."""
    node: fx.Node = graph.call_function(target, args, kwargs)
    known, named = fx.map_arg((args, kwargs), value)
    node.meta["val"] = target(*known, **named)
    return node


def item(graph: fx.Graph, name: str, of: fx.Node, index: int) -> fx.Node:
    """A new node, named likewise, for one of the results of another one."""
    return call(graph, name, operator.getitem, of, index)


def results(graph_module: fx.GraphModule) -> list[Any]:
    """What the module returns, flat: nodes, constants or None."""
    (output,) = graph_module.graph.find_nodes(op="output")
    return list(output.args[0])


def value(node: fx.Node) -> Any:
    """The fake value of a node: of an ATen graph ("val") or of Dynamo's ("example_value")."""
    return node.meta["val"] if "val" in node.meta else node.meta.get("example_value")


def operands(node: fx.Node) -> list[fx.Node]:
    """Every node argument of a node in order, repetitions included."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def function_name(node: fx.Node) -> str:
    """The bare name of what a captured node calls, function or method."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def operation(node: fx.Node) -> str:
    """What a captured node does, its constants included, its operands left out."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: "%")
    body = getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
    target = _program(body) if isinstance(body, fx.GraphModule) else node.target
    return f"{node.op} {target} {args!r} {kwargs!r}"


def _program(body: fx.GraphModule) -> str:
    """What a captured body does, whatever its values are called."""
    number = {node: i for i, node in enumerate(body.graph.nodes)}
    lines = []
    for node in body.graph.nodes:
        read = [number[operand] for operand in operands(node)]
        lines.append("placeholder" if node.op == "placeholder" else f"{operation(node)} {read}")
    return "\n".join(lines)


def is_float(node: Any) -> bool:
    """Whether a node's value is a floating tensor."""
    return isinstance(node, fx.Node) and isinstance(value(node), torch.Tensor) and value(node).is_floating_point()


def description(tensor: torch.Tensor) -> str:
    """Dtype, shape and device of a tensor, in words."""
    return f"{word_of(tensor.dtype)}{list(tensor.shape)} on {tensor.device}"


def moves(node: fx.Node) -> bool:
    """Whether a node moves entries, or chooses among them, and computes none."""
    return is_view(node) or operator_table.properties(node.target).update in ("copy", "cast", "choose", "join")


def is_number(node: fx.Node) -> bool:
    """Whether a node's value is a number, a truth value or a shape of Python's: it has no precision."""
    return isinstance(value(node), (int, float, torch.SymBool, torch.SymInt, torch.SymFloat, torch.Size))


def is_differentiable(node: Any) -> bool:
    """Whether a node's value is a tensor that has gradients: a floating or a complex one."""
    tensor = value(node) if isinstance(node, fx.Node) else None
    return isinstance(tensor, torch.Tensor) and has_derivatives(tensor.dtype)


def has_derivatives(dtype: torch.dtype) -> bool:
    """Whether tensors of a dtype have gradients."""
    return dtype.is_floating_point or dtype.is_complex


def refresh(graph_module: fx.GraphModule, args: Sequence[Any] | None = None) -> fx.GraphModule:
    """Drop dead nodes, check, recompile and write true metadata: the end of every pass."""
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()
    args = [value(node) for node in placeholders(graph_module)] if args is None else args
    fake_tensors.propagate(graph_module, args)
    return graph_module


def user_line(node: fx.Node) -> str:
    """The user's source line that made a node, as 'file:line, in function: code', or an empty string."""
    frames = re.findall(
        r'File "([^"]+)", line (\d+), in (\S+)(?:\n(?!\s*File ")\s*([^\n]*))?', node.meta.get("stack_trace") or ""
    )
    users = [frame for frame in frames if "/torch/" not in frame[0] and not frame[0].startswith(PACKAGE)]
    if not users:
        return ""
    file, line, function, code = users[-1]
    function = re.sub(r"^torch_dynamo_resume_in_(\w+)_at_\d+$", r"\1", function)  # behind a graph break
    return f"{file}:{line}, in {function}" + (f": {code}" if code else "")  # a prompt has no code to show


def is_ours(node: fx.Node) -> bool:
    """Whether a captured node was made by a line of this package, as the arithmetic of odeint's steps is."""
    files = re.findall(r'File "([^"]+)", line', node.meta.get("stack_trace") or "")
    return bool(files) and files[-1].startswith(PACKAGE)


def is_view(node: Any) -> bool:
    """Whether an ATen node returns another view of its first operand."""
    return isinstance(node, fx.Node) and operator_table.is_view(node.target)


def base_of_view(node: Any) -> Any:
    """The node that a chain of views begins with."""
    while is_view(node):
        node = node.args[0]
    return node


def is_part(node: Any) -> bool:
    """Whether an ATen node returns a view that leaves entries of its first operand out."""
    if not is_view(node):
        return False
    whole, part = value(node.args[0]), value(node)
    are_tensors = isinstance(whole, torch.Tensor) and isinstance(part, torch.Tensor)
    return not (are_tensors and shapes.has_no_more_entries(whole, part))


def readable(name: str) -> str:
    """A placeholder's name as the user would write it: l_self_modules_net_parameters_weight_ is net_weight."""
    plain = re.sub(r"^(l_|L_)+", "", name)
    plain = re.sub(r"^args_\d+_(?=\w*[a-z])", "", plain)  # self, of a marked forward
    plain = re.sub(r"(^|_)(self|modules|parameters|buffers)(?=_)", "", plain).strip("_") or "value"
    # A name that is readable already may look like one of Dynamo's: of a layer l_1 or l_in.
    return plain if plain.isidentifier() and not keyword.iskeyword(plain) else name


def user_name(node: fx.Node) -> str:
    """What the user calls an input of a captured graph, as far as is known."""
    return str(node.meta.get("user_name") or readable(node.name))


def name_arguments(graph_module: fx.GraphModule, names: Sequence[str]) -> None:
    """Note the user's names of inputs that were captured as args[i] and kwargs of a function around the user's."""
    for node in placeholders(graph_module):
        name = re.sub("^l_kwargs_", "l_", node.name)
        position = re.match(r"l_args_(\d+)_", name)
        if position and int(position[1]) < len(names):
            name = f"l_{names[int(position[1])]}_{name[position.end() :]}"
        node.meta["user_name"] = readable(name)
    for call in graph_module.graph.find_nodes(op="call_function", target=higher_order.tag_activation_checkpoint):
        inner = placeholders(graph_module.get_submodule(call.args[0].target))
        for node, operand in zip(inner, call.args[1:], strict=True):
            if operand.op == "placeholder":  # another name may be that of a node inside
                node.meta["user_name"] = operand.meta["user_name"]


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether a node's result depends on the random number generator: not that of an attention without dropout."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    schema = node.target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema}
    given = {**defaults, **{a.name: value for a, value in zip(schema, node.args, strict=False)}, **node.kwargs}
    return bool(given.get("dropout_p", True))


def ceil_sqrt(size: int | torch.SymInt) -> int | torch.SymInt:
    """The square root of a positive size, rounded up."""
    if isinstance(size, torch.SymInt):  # floor: Inductor cannot spell sym_int, which truncates
        return math.floor(torch.sym_sqrt(size - 1)) + 1
    return math.isqrt(size - 1) + 1


def distinct(names: Iterable[str]) -> list[str]:
    """The names, numbered where they repeat."""
    seen: dict[str, int] = {}
    made: list[str] = []
    for name in names:
        fresh = name
        while fresh in seen:
            seen[name] += 1
            fresh = f"{name}_{seen[name]}"
        seen[fresh] = 0
        made.append(fresh)
    return made


def named(graph_module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """The same module with its placeholders renamed, in order."""
    graph, env = fx.Graph(), {}
    for node, name in zip(placeholders(graph_module), distinct(names), strict=True):
        env[node] = placeholder(graph, name)
        env[node].meta = dict(node.meta)
    graph.output(graph.graph_copy(graph_module.graph, env))
    for node, twin in env.items():
        twin.meta = dict(node.meta)
    return fx.GraphModule(graph_module, graph)


def copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A module with a graph of its own, and own graphs inside, equal to the given one; other modules are shared."""
    twin = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    for name, inner in twin.named_children():
        if isinstance(inner, fx.GraphModule):
            setattr(twin, name, copied(inner))
    return twin


def stops_gradient(node: fx.Node) -> bool:
    """Whether a node passes its operand on without a gradient."""
    return node.target is torch.ops.rampde_fx.stop_gradient.default


def depends_on(graph: fx.Graph, sources: Iterable[fx.Node], *, by_gradient: bool = False) -> set[fx.Node]:
    """The nodes that follow from any of the sources, the sources included; by_gradient stops where gradients do."""
    reached = set(sources)
    for node in graph.nodes:
        stops = by_gradient and (stops_gradient(node) or _output_stops(node, reached))
        if node.op != "output" and not stops and any(parent in reached for parent in node.all_input_nodes):
            reached.add(node)
    return reached


def _output_stops(node: fx.Node, reached: set[fx.Node]) -> bool:
    """Whether a node reads an output of a submodule to which no gradient comes from the reached inputs."""
    call = node.args[0] if node.target is operator.getitem else None
    if not isinstance(call, fx.Node) or call.op != "call_module":
        return False
    module = node.graph.owning_module.get_submodule(call.target)
    inputs = [inner for inner, arg in zip(placeholders(module), call.args, strict=True) if arg in reached]
    return results(module)[node.args[1]] not in depends_on(module.graph, inputs, by_gradient=True)


def extract(
    graph_module: fx.GraphModule, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[Any]
) -> fx.GraphModule:
    """A module that computes the outputs from the inputs by copies of the nodes (in graph order)."""
    graph, env = fx.Graph(), {}
    for node, name in zip(inputs, distinct(readable(node.name) for node in inputs), strict=True):
        env[node] = placeholder(graph, name)
        env[node].meta = dict(node.meta)
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(fx.map_arg(output, env.__getitem__) for output in outputs))
    return fx.GraphModule(graph_module, graph)


def ancestors(outputs: Iterable[Any], inputs: Sequence[fx.Node] = ()) -> set[fx.Node]:
    """The nodes that the outputs follow from, the outputs included, up to the inputs."""
    found: set[fx.Node] = set()
    open_nodes = [output for output in outputs if isinstance(output, fx.Node)]
    while open_nodes:
        node = open_nodes.pop()
        if node not in found and node not in inputs:
            found.add(node)
            open_nodes += node.all_input_nodes
    return found


def placeholders_among(outputs: Iterable[Any]) -> set[fx.Node]:
    """The placeholders that the outputs follow from."""
    return {node for node in ancestors(outputs) if node.op == "placeholder"}


def part(graph_module: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[Any]) -> fx.GraphModule:
    """The part of a module that computes the outputs from the inputs, which need not be placeholders."""
    needed = ancestors(outputs, inputs)
    return extract(graph_module, [node for node in body(graph_module) if node in needed], inputs, outputs)


def body(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that compute something, in order."""
    return [node for node in graph_module.graph.nodes if node.op not in ("placeholder", "output")]


def all_nodes(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of a graph, and of those inside it."""
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def split_invariants(
    graph_module: fx.GraphModule, first: int
) -> tuple[fx.GraphModule, fx.GraphModule, list[fx.Node]] | None:
    """Split off the nodes that depend only on the placeholders from number `first` on.

    Views and numbers stay, for they cost nothing where they are read.

    Returns:
        The preamble, which maps the invariants to what the rest reads of them; the rest, which takes the varying
        placeholders and the preamble's results; and these results as nodes of the given module. None if there is
        nothing to split off.
    """
    nodes = placeholders(graph_module)
    varying = depends_on(graph_module.graph, nodes[:first])
    invariant = [node for node in body(graph_module) if node not in varying]
    moved = {n for n in invariant if n.op == "get_attr" or not (is_view(n) or _is_number(n))}
    for node in reversed(invariant):
        if any(user in moved for user in node.users):
            moved.add(node)
    if not moved:
        return None
    hoisted = [node for node in invariant if node in moved]
    read = [node for node in [*nodes[first:], *hoisted] if any(user not in moved for user in node.users)]
    preamble = extract(graph_module, hoisted, nodes[first:], read)
    _own_results(preamble)
    rest = [node for node in body(graph_module) if node not in moved]
    step = refresh(extract(graph_module, rest, [*nodes[:first], *read], results(graph_module)))
    return refresh(preamble), step, read


def _own_results(graph_module: fx.GraphModule) -> None:
    """Clone the results that are views: a scan takes no two views of one tensor."""
    output = graph_module.graph.output_node()
    with graph_module.graph.inserting_before(output):
        owned = [
            graph_module.graph.call_function(torch.ops.aten.clone.default, (node,)) if is_view(node) else node
            for node in output.args[0]
        ]
    output.args = (tuple(owned),)


def _is_number(node: fx.Node) -> bool:
    """A size, or a tensor made of numbers: as cheap to make again as to pass."""
    return not isinstance(value(node), torch.Tensor) or not node.all_input_nodes
