"""Dynamo, as the code asks it that is captured or runs beside captured code.

Nothing of Dynamo is imported with it. Models call this part uncompiled, too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import fx

from rampde_fx.errors import MissingTorchNameError
from rampde_fx.indices import read_at, scalar_places
from rampde_fx.torch_private.names import Names

F = TypeVar("F", bound=Callable[..., Any])

_torch = Names(
    {
        "torch._C._functorch": "peek_interpreter_stack",
        "torch._C._dynamo.eval_frame": "_FrameAction _FrameExecStrategy get_eval_frame_callback set_code_exec_strategy",
        "torch._dynamo": "patch_dynamo_config",
        "torch._higher_order_ops": "while_loop",
        "torch._dynamo.backends.distributed": "DDPOptimizer",
        "torch._dynamo.config": ".",
        "torch._dynamo.eval_frame": ". _stance",
        "torch._dynamo.exc": "TensorifyScalarRestartAnalysis",
        "torch._dynamo.symbolic_convert": "InstructionTranslator.current_tx tls",
        "torch._dynamo.utils": ". run_node",
        "torch._guards": "TracingContext",
    }
)


def never_alone(function: F) -> F:
    """The function, which Dynamo captures as part of another one only, and otherwise runs as it is."""
    _skip(function, with_calls=False)
    return function


def never_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which runs as it is with all that it calls."""
    _skip(function, with_calls=True)
    return function


def _skip(function: Any, *, with_calls: bool) -> None:
    """As torch._dynamo.eval_frame.skip_code does, which would import Dynamo."""
    with contextlib.suppress(MissingTorchNameError):  # which is raised where something is compiled
        actions = _torch._FrameAction
        strategy = _torch._FrameExecStrategy(actions.SKIP, actions.SKIP if with_calls else actions.DEFAULT)
        _torch.set_code_exec_strategy(function.__code__, strategy)


never_compiled(Names.__getattr__)  # names are read in functions that are never compiled alone


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which Dynamo calls while it captures, and whose result is a constant of the graph.

    As torch.compiler.assume_constant_result, which would import Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own: Dynamo keeps its compilations, and their limit, by code object."""
    function.__code__ = function.__code__.replace()
    return function


@never_alone
def compilation_asked() -> Any:
    """Dynamo's callback of the call of torch.compile in which the code that runs was to be compiled, and is not.

    None where nobody asked for it, or it is turned off on purpose. Dynamo itself has none outside of torch.compile, but
    neither in code under fullgraph=True that was compiled before, with a graph break in it; and it has False where it
    has given up on compiling once more.
    """
    if "torch._dynamo" not in sys.modules:
        return None
    if _torch.config.disable or _torch._stance.stance not in _COMPILING_STANCES:
        return None
    return _torch.get_eval_frame_callback() or _callback_of_caller()


_COMPILING_STANCES = ("default", "eager_on_recompile", "fail_on_recompile")


@never_alone
def _callback_of_caller() -> Any:
    """Dynamo's callback in the innermost call of torch.compile; None in what the user has disabled."""
    frame: Any = sys._getframe()
    file = _torch.eval_frame.__file__
    while (frame := frame.f_back) is not None:
        if frame.f_code.co_filename != file:
            continue
        if frame.f_code.co_qualname.startswith("_TorchDynamoContext.__call__"):
            return getattr(frame.f_locals.get("self"), "callback", None)
        off = frame.f_code.co_qualname.startswith("DisableContext.__call__")
        if off and not is_of(frame.f_locals.get("fn"), "torch"):  # torch turns it off in its own, in checkpoint for one
            return None
    return None


@never_alone
def innermost(backend: Any) -> Any:
    """The user's backend, behind what Dynamo wraps round it."""
    names = ("_torchdynamo_orig_backend", "compiler_fn")
    while (inner := next((getattr(backend, name) for name in names if hasattr(backend, name)), None)) is not None:
        backend = inner
    optimizer = getattr(backend, "__self__", None)
    return innermost(optimizer.backend_compile_fn) if isinstance(optimizer, _torch.DDPOptimizer) else backend


def is_of(function: Any, package: str) -> bool:
    """Whether a function is defined in a package."""
    return f"{getattr(function, '__module__', '')}.".startswith(f"{package}.")


@constant
def rewritten_later() -> bool:
    """Whether the code that Dynamo traces is for a backend that may rewrite it: any but torch's own, if it does.

    No other knows what to do with a loop inside of a torch.func transform, which ours refuses by its name.
    """
    capture = current_capture()
    backend = innermost(capture.compiler_fn)
    if is_of(backend, "torch") or hasattr(capture.root_tx.speculation_log, PLAINLY):
        return False
    return is_of(backend, "rampde_fx") or not is_transformed()


@constant
def is_transformed() -> bool:
    """Whether the code that Dynamo traces, or that runs, is inside of a torch.func transform.

    A level of torch.autograd.forward_ad that the traced code opens counts as one.
    """
    return _torch.peek_interpreter_stack() is not None or _opens_dual_level()


def _opens_dual_level() -> bool:
    output = getattr(getattr(_torch.tls, "current_tx", None), "output", None)
    tracer = getattr(output, "current_tracer", None)
    levels = 0
    while tracer is not None:
        names = [getattr(node.target, "__name__", "") for node in tracer.graph.nodes if node.op == "call_function"]
        levels += names.count("_enter_dual_level") - names.count("_exit_dual_level")
        tracer = tracer.parent
    return levels > 0


@constant
def is_exporting() -> bool:
    """Whether torch.export captures; traced, torch 2.11 says that it always does."""
    return torch.compiler.is_exporting()


def capture_plainly() -> None:
    """Have Dynamo capture the model again, without what the backend that has it would have to rewrite.

    Raises:
        TensorifyScalarRestartAnalysis: which Dynamo catches.
    """
    log = current_capture().root_tx.speculation_log
    log.clear()  # the next attempt takes another way
    setattr(log, PLAINLY, True)
    raise _torch.TensorifyScalarRestartAnalysis


PLAINLY = "rampde_fx_plainly"  # attribute of what Dynamo keeps from one attempt at a frame to the next


def names_of_arguments() -> list[str]:
    """The parameters of the function around which the captured frame was put to mark it; none without one."""
    tracer = getattr(_torch.tls, "current_tx", None)
    frame = getattr(getattr(tracer, "output", None), "root_tx", None)
    function = getattr(frame, "f_locals", {}).get("function")
    return list(inspect.signature(function).parameters) if callable(function) else []


def is_static_input(node: fx.Node) -> bool:
    """Whether a captured input is a parameter, a buffer or another attribute of a module, which keeps its memory."""
    return "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def current_capture() -> Any:
    """Dynamo's capture that is under way."""
    return _torch.current_tx().output


def capture_log() -> Any:
    """What Dynamo keeps from one attempt at the function that it captures to the next; None outside of any."""
    output = getattr(getattr(_torch.tls, "current_tx", None), "output", None)
    return getattr(getattr(output, "root_tx", None), "speculation_log", None)


def notes_so_far() -> dict[str, list[Any]]:
    """The notes on the graph that is being captured, or compiled; none outside of any."""
    output = getattr(getattr(_torch.tls, "current_tx", None), "output", None)
    return getattr(getattr(output, "compiler_fn", None), "notes", {})


def notes_of_capture(after: Callable[[fx.GraphModule, Any, dict[str, list[Any]]], Any]) -> dict[str, list[Any]]:
    """Notes on the graph that is being captured, which are lost if Dynamo begins anew.

    `after` is given the graph, the backend and the notes when it is compiled; what it returns, if anything, runs
    instead. The graph goes to the backend whole:
    DDPOptimizer, which cuts the graph of a DistributedDataParallel module at its gradient buckets, would cut the loops.
    """
    capture = current_capture()
    notes: dict[str, list[Any]] | None = getattr(capture.compiler_fn, "notes", None)
    if notes is not None:
        return notes
    _read_numbers_late()
    notes, backend = {}, capture.compiler_fn
    optimizer = getattr(backend, "__self__", None)
    if isinstance(optimizer, _torch.DDPOptimizer):
        backend = optimizer.backend_compile_fn

    @functools.wraps(backend, updated=())
    def compile_whole(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        compiled = backend(graph_module, example_inputs)
        return after(graph_module, backend, notes) or compiled

    compile_whole.notes, compile_whole._torchdynamo_orig_backend = notes, backend  # type: ignore[attr-defined]
    capture.compiler_fn = compile_whole
    return notes


@functools.cache
def _read_numbers_late() -> None:
    """Have Dynamo run an index by 0-d integer tensors in a loop without their numbers, which nobody knows."""
    run_node = _torch.run_node

    @functools.wraps(run_node)
    def read_in_loop(tracer: Any, node: fx.Node, args: Any, kwargs: Any, nnmodule: Any) -> Any:
        notes: dict[str, list[Any]] = getattr(current_capture().compiler_fn, "notes", {})
        if node.target is operator.getitem and notes.get("open") and isinstance(args[0], torch.Tensor):
            entries = args[1] if isinstance(args[1], tuple) else (args[1],)
            if places := scalar_places(args[0], entries):
                return read_at(args[0], entries, places)
        return run_node(tracer, node, args, kwargs, nnmodule)

    _torch.utils.run_node = read_in_loop


def put_methods(tracker: Any, **methods: Callable[..., Any]) -> None:
    """Put methods of captured values, by the user's names, in the place of those of a class of Dynamo's variables."""
    table = getattr(tracker, "tp_methods", {})  # of torch 2.14, which takes them from there
    for name, method in methods.items():
        setattr(tracker, f"method_{name}", method)
        if name in table:
            table[name].handler = method


def captures_body() -> bool:
    """Whether Dynamo captures the body of a higher-order operation, such as a checkpoint, which may change nothing."""
    return current_capture().current_tracer.parent is not None


def captures_whole() -> bool:
    """Whether a part that cannot be captured is an error: fullgraph=True, or torch._dynamo.error_on_graph_break."""
    root = current_capture().root_tx
    return bool(root.one_graph or root.error_on_graph_break)


def captured_line() -> tuple[str, int]:
    """File and line of the user's code that Dynamo is tracing."""
    stack = _torch.TracingContext.extract_stack()
    return next(((frame.filename, frame.lineno or 0) for frame in reversed(stack) if is_users(frame.filename)), ("", 0))


def running_line() -> tuple[str, int]:
    """File and line of the user's code that runs."""
    frame = _running_frame()
    return frame.f_code.co_filename, frame.f_lineno


def running_trace() -> str:
    """The line of the user's code that runs, as it stands in a traceback."""
    frame = _running_frame()
    return "".join(traceback.format_list(traceback.extract_stack(frame, limit=1)))


def _running_frame() -> Any:
    frame: Any = sys._getframe()
    while frame.f_back is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def is_users(file: str) -> bool:
    """Whether code of a file is the user's, and not of torch or of this package."""
    return not file.startswith((_TORCH, _PACKAGE)) and "<" not in file


_TORCH, _PACKAGE = (f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parent.parent))


@never_alone
def while_loop(condition: Callable[..., Any], body: Callable[..., Any], carried: tuple[torch.Tensor, ...]) -> Any:
    """What a loop in captured code carries in the end: one node of the graph."""
    return torch._higher_order_ops.while_loop(condition, body, carried)  # by this name, for Dynamo captures it


@contextlib.contextmanager
def capturing_scalars() -> Iterator[None]:
    """Let Dynamo capture a number that is read from a tensor: here alone, for it then reads indices as numbers too."""
    if not torch.compiler.is_dynamo_compiling() and "torch._dynamo" not in sys.modules:
        yield
        return
    before = torch.compiler.is_dynamo_compiling() and _allow_scalar_outputs(allowed=True)
    with torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True):  # by this name, for Dynamo captures it
        yield
    if torch.compiler.is_dynamo_compiling():
        _allow_scalar_outputs(allowed=before)


@constant
def _allow_scalar_outputs(*, allowed: bool) -> bool:
    """Say whether the capture that is under way makes sizes of such numbers, and whether it did."""
    mode = current_capture().fake_mode
    before, mode.allow_scalar_outputs = mode.allow_scalar_outputs, allowed
    return bool(before)
