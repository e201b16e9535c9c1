"""A picture of a step or of its adjoint: its nodes in program order, in lanes by role; what is low is filled.

Each node has a row of its own, so that a curve can pass a lane at the height of the node that it comes from, and
crosses no other node. Outputs of a call are drawn with the call; its code stands below the picture.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any, assert_never

import torch
from torch import fx

from rampde_fx.ir import graphs, operator_table, pass_log
from rampde_fx.ir.ends import ActivationSlot, Cotangent, Operand, Saved, Target, Total
from rampde_fx.ir.loops import CompensatedLoop
from rampde_fx.policy_text import word_of

LANES = ("time", "state", "velocity", "parameter")
LANE, GUTTER, MARGIN, ROW, BOX, TOP = 184, 40, 30, 26, 20, 30
WIDTH = 2 * MARGIN + len(LANES) * LANE + (len(LANES) - 1) * GUTTER
CHARACTERS = 25  # of the label's font, in a box
# Of every role (ROLES of rampde_fx/ir/loop_verifier.py).
LANE_OF = {"time": "time", "state": "state", "velocity": "velocity", "scale": "velocity", "storage": "state"}
SCALINGS = {"scale", "storage"}  # roles of calls that multiply or divide by a power of two


def find_lanes(loop: CompensatedLoop, graph_module: fx.GraphModule) -> dict[fx.Node, str]:
    """The lanes of a step's or an adjoint's nodes: by the roles that the passes left, of new nodes by dataflow."""
    lanes: dict[fx.Node, str] = {}
    given = _lanes_of_inputs(loop, graph_module)
    for node in graph_module.graph.nodes:
        parents = node.all_input_nodes
        if node.op == "placeholder":
            lanes[node] = given.get(node, "state")
        elif node.target is operator.getitem:
            lanes[node] = lanes[node.args[0]]
        elif node.op == "call_module":
            lanes[node] = LANE_OF[node.meta.get("role", "velocity")]
        else:
            alone = bool(parents) and all(lanes[parent] == "time" for parent in parents)
            lanes[node] = LANE_OF[node.meta.get("role") or ("time" if alone else "state")]
    return lanes


def _lanes_of_inputs(loop: CompensatedLoop, graph_module: fx.GraphModule) -> dict[fx.Node, str]:
    """Lanes of the placeholders; of corrections, which are states, none is given."""
    inputs = graphs.placeholders(loop.step)
    own = {node: LANE_OF[node.meta["role"]] for node in inputs if "role" in node.meta}
    own |= {node: "parameter" for node in inputs if node.meta.get("outside") and graphs.is_differentiable(node)}
    if graph_module is loop.step:
        return own
    found = {}
    assert loop.adjoint is not None
    for node, entry in zip(graphs.placeholders(graph_module), loop.adjoint.inputs, strict=False):
        match entry:
            case Operand(i):
                found[node] = own.get(inputs[i], "time")
            case Saved(slot):
                found[node] = "velocity" if isinstance(loop.slots[slot], ActivationSlot) else "state"
            case Target():
                found[node] = "time"
            case Cotangent() | Total():
                found[node] = "state"
            case _:
                assert_never(entry)
    return found


def picture(loop: CompensatedLoop, graph_module: fx.GraphModule, key: str, title: str) -> str:
    """A step or an adjoint as HTML: boxes and curves in SVG, and below them the code of each submodule that is called.

    Args:
        loop: The rewritten loop.
        graph_module: Its step, or its adjoint.
        key: Begins the ids of the boxes in the page.
        title: What the picture shows, for those who do not see it.
    """
    drawing = _Drawing(loop, graph_module, key)
    edges, boxes = "".join(drawing.edges()), "".join(map(drawing.box, drawing.places))
    lanes = "".join(
        f'<text class="lane {lane}" x="{_left(lane) + LANE // 2}" y="16" text-anchor="middle">{lane}</text>'
        for lane in LANES
    )
    size = f'width="{WIDTH}" height="{drawing.height}"'
    return (
        f'<div class="picture"><svg {size} role="group" aria-label="{escape(title)}">{lanes}{edges}{boxes}</svg></div>'
        f"{''.join(map(drawing.code, drawing.calls))}"
    )


def _left(lane: str) -> int:
    return MARGIN + LANES.index(lane) * (LANE + GUTTER)


@dataclass(frozen=True)
class _Place:
    """Where a node stands: its lane, and the height of its middle."""

    lane: str
    y: int

    @property
    def left(self) -> int:
        return _left(self.lane)

    @property
    def right(self) -> int:
        return self.left + LANE


class _Drawing:
    """The nodes of a graph at their places."""

    def __init__(self, loop: CompensatedLoop, graph_module: fx.GraphModule, key: str) -> None:
        self.module = graph_module
        self.lanes = find_lanes(loop, graph_module)
        shown = [node for node in graph_module.graph.nodes if node.target is not operator.getitem]
        self.places = {node: _Place(self.lanes[node], TOP + ROW * i + ROW // 2) for i, node in enumerate(shown)}
        self.ids = {node: f"{key}-{i}" for i, node in enumerate(shown)}
        self.calls = [node for node in shown if node.op == "call_module"]
        self.height = TOP + ROW * len(shown) + ROW

    def edges(self) -> Iterator[str]:
        """One curve for every pair of a node and a reader."""
        for node, place in self.places.items():
            for parent in dict.fromkeys(map(_shown, node.all_input_nodes)):
                start = self.places[parent]
                yield (
                    f'<path class="edge {start.lane}" d="{_curve(start, place)}"'
                    f' data-from="{self.ids[parent]}" data-to="{self.ids[node]}"/>'
                )

    def box(self, node: fx.Node) -> str:
        """A node as a box; that of a call leads to its code."""
        place, is_call = self.places[node], node.op == "call_module"
        label, kind = _label(node)
        box = (
            f'<g class="{self._classes(node)}" id="{self.ids[node]}"><title>{self._title(node)}</title>'
            f'<rect x="{place.left}" y="{place.y - BOX // 2}" width="{LANE}" height="{BOX}" rx="4"/>'
            f'<text x="{place.left + 7}" y="{place.y + 4}">{escape(label)}</text>'
            f'<text class="kind" x="{place.right - 7}" y="{place.y + 4}" text-anchor="end">'
            f"{escape(kind)}{' ▾' if is_call else ''}</text></g>"
        )
        return f'<a href="#{self.ids[node]}-code" aria-label="{escape(label)}, its code">{box}</a>' if is_call else box

    def code(self, node: fx.Node) -> str:
        """The code of a submodule that is called, closed at first; a browser opens what a link leads to."""
        code = pass_log.readable(self._called(node))
        return (
            f'<details class="code {self._classes(node)}"><summary>{escape(node.name)}</summary>'
            f'<pre id="{self.ids[node]}-code">{escape(code)}</pre></details>'
        )

    def _called(self, node: fx.Node) -> fx.GraphModule:
        return self.module.get_submodule(str(node.target))

    def _is_low(self, node: fx.Node) -> bool:
        """Whether a node's value is in a dtype of 16 or 8 bits, or, of a call, a value in it."""
        if node.op == "call_module":
            return any(map(is_low, self._called(node).graph.nodes))
        return is_low(node)

    def _classes(self, node: fx.Node) -> str:
        kinds = (("cast", is_cast), ("scale", is_scaling), ("low", self._is_low))
        marks = [mark for mark, is_marked in kinds if is_marked(node)]
        return " ".join(["node", self.lanes[node], *marks])

    def _title(self, node: fx.Node) -> str:
        """All that is known of a node."""
        made = f"{node.target}({', '.join(map(str, node.args))})" if node.op.startswith("call") else node.op
        outputs = [user for user in node.users if user.target is operator.getitem]
        lines = [
            f"{node.name}{_type_of(node, ': ')}",
            made,
            *(f"output {user.args[1]}: {user.name}{_type_of(user, ': ')}" for user in outputs),
            f"role: {self.lanes[node]}",
            next(filter(None, map(graphs.user_line, [node, *outputs])), ""),
        ]
        return escape("\n".join(filter(None, lines)))


def is_cast(node: fx.Node) -> bool:
    """Whether a node changes the dtype of a floating tensor."""
    casts = operator_table.is_cast(node.target)
    return casts and graphs.value(node.args[0]).dtype != graphs.value(node).dtype


def is_low(node: fx.Node) -> bool:
    """Whether a node's value is a tensor in a floating dtype of 16 or 8 bits."""
    value = graphs.value(node) if node.op != "output" else None
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype.itemsize < 4


def is_scaling(node: fx.Node) -> bool:
    """Whether a node finds a power-of-two scale, or multiplies or divides by one."""
    if node.op == "call_module":
        return node.meta.get("role") in SCALINGS
    return any(_shown(operand).meta.get("role") == "scale" for operand in node.all_input_nodes)


def _shown(node: fx.Node) -> fx.Node:
    """The node that stands for a node in the picture: a call for its outputs."""
    while node.target is operator.getitem:
        node = node.args[0]
    return node


def _label(node: fx.Node) -> tuple[str, str]:
    """A node's name, shortened to fit beside its type, and the type."""
    name = "return" if node.op == "output" else node.name
    outputs = [user for user in node.users if user.target is operator.getitem]
    kind = _short_type(node) if not outputs else f"{len(outputs)} out" if len(outputs) > 1 else _short_type(outputs[0])
    room = CHARACTERS - len(kind) - (2 if node.op == "call_module" else 1)
    return name if len(name) <= room else f"…{name[len(name) - max(room, 6) + 1 :]}", kind


def _short_type(node: fx.Node) -> str:
    """Like f16[3,5]; of a cast f32→f16."""
    if is_cast(node):
        return f"{_dtype(graphs.value(node.args[0]))}→{_dtype(graphs.value(node))}"
    return _type_of(node).replace(" ", "")


def _type_of(node: fx.Node, before: str = "") -> str:
    value = graphs.value(node) if node.op != "output" else None
    return f"{before}{_dtype(value)}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""


def _dtype(value: Any) -> str:
    """float16 is f16, bfloat16 bf16, int64 i64."""
    return word_of(value.dtype).replace("float", "f").replace("uint", "u").replace("int", "i")


def _curve(start: _Place, end: _Place) -> str:
    """The path of an edge; in the gutters it bends, a lane between it crosses at the height of its start."""
    a, b = LANES.index(start.lane), LANES.index(end.lane)
    if a == b:
        x, side = (start.right, 1) if start.lane == LANES[-1] else (start.left, -1)
        room = (GUTTER if start.lane == "state" else MARGIN) - 5
        reach = side * min(8 + (end.y - start.y) // 12, room) * 4 / 3  # of its handles a curve reaches 3/4
        return f"M{x},{start.y}C{x + reach:.0f},{start.y} {x + reach:.0f},{end.y} {x},{end.y}"
    x, to, step = (start.right, end.left, 1) if a < b else (start.left, end.right, -1)
    turn = to - step * GUTTER  # where the last gutter begins
    middle = (turn + to) // 2
    across = f"H{turn}" if abs(a - b) > 1 else ""
    return f"M{x},{start.y}{across}C{middle},{start.y} {middle},{end.y} {to},{end.y}"
