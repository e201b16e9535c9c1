"""Loops as CUDA graphs: the launches of all steps are captured once, and replayed by one launch.

Inductor runs a scan as a loop on the host, which launches the kernels of each step anew. A loop of small operations
takes as long as its launches. Where nothing that the device computes decides what is launched, every call of the loop
launches the same kernels, on memory that can be the same too: a CUDA graph.

Code that Inductor generates calls run_loop in the place of such a loop (launches_alone says of which ones).
The overflow flag of the backward is read outside, after the replay, so that a repetition is one more replay.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from rampde_fx.errors import CaptureError
from rampde_fx.ir import operator_table
from rampde_fx.torch_private import kernels
from rampde_fx.torch_private.higher_order import while_loop_op

aten = torch.ops.aten

# Maps the carried and the additional inputs, a list that it empties, to the next carried ones; a condition to a bool.
Body = Callable[[list[Any]], Sequence[Any]]
DEVICES = {"cuda"}
MOST_GRAPHS = 8  # of one loop; under further shapes it runs step by step
MOST_SEEN = 64  # shapes, and numbers on the host, that a loop remembers
_SIZED = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}

# By the generated function of a step; what was seen once has no graph yet.
_captured: WeakKeyDictionary[Body, dict[Hashable, _Captured | None]] = WeakKeyDictionary()
_lock = threading.Lock()


class _Outer(threading.local):
    active = False  # whether a loop is captured, or will be: those inside of it are part of it


_outer = _Outer()


def run_loop(
    cond: Body, body: Body, carried: Sequence[Any], additional: Sequence[Any], mutated: Sequence[int]
) -> list[Any]:
    """Run a loop: step by step the first time, captured the second, replayed from then on.

    The first call lets kernels tune themselves and libraries allocate their workspaces, which a capture does not allow.
    A captured loop owns copies of its inputs, beside what one step needs: one more set of the stored states.

    Args:
        cond: Whether to go on, a 0-d bool tensor on the host that follows from scalars on the host.
        body: One step.
        carried: The initial carries: tensors, and numbers.
        additional: What all steps read: tensors, and numbers.
        mutated: The carries, by position, that the body updates in place: their results lie in the caller's tensors.

    Returns:
        The final carries.

    Raises:
        CaptureError: If the body does what a capture does not allow.
    """
    device = _only_device([*carried, *additional])
    on_cuda = device is not None and device.type == "cuda"
    with torch.cuda.device(device) if on_cuda else contextlib.nullcontext():
        key = _key([*carried, *additional]) if device is not None else None
        if key is None:
            return _iterate(cond, body, carried, additional)
        with _lock:
            graphs = _captured.setdefault(body, {})
            if key in graphs and _has_room(graphs, key):
                captured = graphs[key] or _Captured(cond, body, carried, additional, mutated)
                graphs[key] = captured
                return captured(carried, additional)
        with _outermost():
            results = _iterate(cond, body, carried, additional)
        with _lock:
            _remember(graphs, key)
        return results


def clear() -> None:
    """Free the graphs of all loops. They live as long as the code that Inductor generated, which torch keeps."""
    with _lock:
        _captured.clear()


def _has_room(graphs: dict[Hashable, _Captured | None], key: Hashable) -> bool:
    return graphs[key] is not None or sum(graph is not None for graph in graphs.values()) < MOST_GRAPHS


def _remember(graphs: dict[Hashable, _Captured | None], key: Hashable) -> None:
    """Note that a loop ran under a key, and forget the oldest key without a graph where there are too many."""
    graphs.setdefault(key, None)
    seen = [other for other, graph in graphs.items() if graph is None]
    if len(seen) > MOST_SEEN:
        del graphs[seen[0]]


@contextlib.contextmanager
def _outermost() -> Iterator[None]:
    _outer.active = True
    try:
        yield
    finally:
        _outer.active = False


def _only_device(inputs: Sequence[Any]) -> torch.device | None:
    """The device of all tensors but scalars on the host, if it is one that captures."""
    devices = {value.device for value in inputs if isinstance(value, torch.Tensor) and not _is_host_scalar(value)}
    return devices.pop() if len(devices) == 1 and {device.type for device in devices} <= DEVICES else None


def _iterate(cond: Body, body: Body, carried: Sequence[Any], additional: Sequence[Any]) -> list[Any]:
    carries = list(carried)
    if not cond([*carries, *additional])[0]:
        return [carry.clone() if isinstance(carry, torch.Tensor) else carry for carry in carries]
    while cond([*carries, *additional])[0]:
        carries = list(body([*carries, *additional]))
    return carries


def _key(inputs: Sequence[Any]) -> Hashable | None:
    """What a captured loop depends on beside numbers on the device; None where it cannot be captured."""
    started = torch.cuda.is_initialized()
    if _outer.active or (started and torch.cuda.is_current_stream_capturing()):
        return None  # part of a larger loop, of segments, or of the user's own graph
    if torch.is_inference_mode_enabled():
        return None  # the memory of a graph would be that of inference tensors
    parts: list[Hashable] = [torch.cuda.current_stream().cuda_stream if started else None]
    for value in inputs:
        if not isinstance(value, torch.Tensor):
            parts.append(repr(value))
        elif _is_host_scalar(value):
            parts.append((value.dtype, repr(value.item())))
        elif not _overlaps(value):
            parts.append((value.shape, value.stride(), value.dtype, value.device))
        else:
            return None
    return tuple(parts)


def _is_host_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 0 and value.device.type == "cpu"


def _overlaps(value: torch.Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True))


def _empty_like(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


class _Captured:
    """One loop under one key."""

    def __init__(
        self, cond: Body, body: Body, carried: Sequence[Any], additional: Sequence[Any], mutated: Sequence[int]
    ) -> None:
        inputs = [*carried, *additional]
        self.mutated = mutated
        self.copied = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and not _is_host_scalar(x)]
        self.inputs = [x.clone() if _is_host_scalar(x) else x for x in inputs]
        for i in self.copied:
            self.inputs[i] = _empty_like(inputs[i]).copy_(inputs[i])
        first = len(carried)

        def run() -> list[Any]:
            return _iterate(cond, body, self.inputs[:first], self.inputs[first:])

        try:
            with _outermost():
                self.launch, self.results = capture(run)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureError(
                f"a loop could not be captured as a CUDA graph: {error.__context__ or error}",
                required="a step that only launches work on the device: it neither waits for it nor reads from it",
                fix='compile without mode="reduce-overhead" or "max-autotune", or by "max-autotune-no-cudagraphs"',
            ) from error

    def __call__(self, carried: Sequence[Any], additional: Sequence[Any]) -> list[Any]:
        given = [*carried, *additional]
        kernels.copy_all([self.inputs[i] for i in self.copied], [given[i] for i in self.copied])
        self.launch()
        finals, targets, sources = [], [], []
        for i, result in enumerate(self.results):
            if result is self.inputs[i] and i not in self.mutated:
                finals.append(carried[i])
            elif not isinstance(result, torch.Tensor) or _is_host_scalar(result):
                finals.append(result.clone() if isinstance(result, torch.Tensor) else result)
            else:
                finals.append(carried[i] if i in self.mutated else _empty_like(result))
                targets.append(finals[-1])
                sources.append(result)
        kernels.copy_all(targets, sources)
        return finals


def capture(run: Callable[[], list[Any]]) -> tuple[Callable[[], None], list[Any]]:
    """Capture what a function launches; what launches it again, and the function's results, which it overwrites."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # of the current device, unlike torch's own for this
    kernels.free_cublas_workspaces()  # those of a graph are in its memory, and another must not share them
    try:
        # The outer context restores the stream even if the capture cannot be ended.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            results = run()
    finally:
        kernels.free_cublas_workspaces()
    return graph.replay, results


def launches_alone(cond: fx.GraphModule, body: fx.GraphModule) -> bool:
    """Whether a loop only launches work: no value on the device reaches the host, and no operator acts on the host."""
    if not _decided_on_host(cond):
        return False
    modules = [module for graph in (cond, body) for module in graph.modules()]
    return not any(
        _involves_host(node)
        or (node.target is while_loop_op and not _decided_on_host(getattr(module, str(node.args[0].target))))
        for module in modules
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    )


def _decided_on_host(cond: fx.GraphModule) -> bool:
    return _devices(cond.graph.output_node().all_input_nodes) == {"cpu"}


def _involves_host(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload) and not _only_launches(node):
        return True
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    if node.target is torch.ops.higher_order.cond:
        return True
    made, read = _devices([node]), _devices(node.all_input_nodes)
    if made == {"cpu"} or node.target is aten._local_scalar_dense.default:
        return not read <= {"cpu"}
    # A move from the host's memory waits, and so does an index that lies there.
    return operator_table.properties(node.target).from_host and "cpu" in read and "cpu" not in made


def _only_launches(node: fx.Node) -> bool:
    target: Any = node.target
    name = target._schema.name
    if target.namespace == "rampde_fx":
        return not name.startswith(("rampde_fx::record", "rampde_fx::keep"))
    if target is aten.index.Tensor:
        sized = any(source.meta["val"].dtype in (torch.bool, torch.uint8) for source in node.all_input_nodes[1:])
    else:  # a number is read from a tensor: that may be on the host
        sized = bool(_SIZED & set(target.tags)) and target is not aten._local_scalar_dense.default
    solves = "linalg" in name  # most of these ask the device whether they succeeded
    return target.namespace in ("aten", "prims", "inductor") and not sized and not solves


def _devices(nodes: Sequence[fx.Node]) -> set[str]:
    leaves = tree_leaves([node.meta.get("val") for node in nodes])
    return {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
