"""Compiling by torch's backends: Inductor's settings and caches, and the code that it writes for loops."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from torch import fx

from rampde_fx.torch_private import cpp_compiler
from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "torch._dynamo.backends.registry": "lookup_backend",
        "torch._functorch._aot_autograd.graph_compile": ". collect_bw_donated_buffer_idxs",
        "torch._guards": "TracingContext",
        "torch._higher_order_ops.scan": ".",
        "torch._higher_order_ops.utils": "validate_subgraph_args_types",
        "torch._inductor": "list_mode_options",
        "torch._inductor.config": ".",
        "torch._inductor.metrics": ".",
        "torch._inductor.codegen.wrapper": "PythonWrapperCodegen PythonWrapperCodegen.codegen_while_loop"
        " PythonWrapperCodegen.define_subgraph_launcher_fn",
        "torch._inductor.compile_fx": "compile_fx_inner",
        "torch._inductor.graph": "GraphLowering GraphLowering._compile_to_module_lines",
        "torch._inductor.custom_graph_pass": "CustomGraphPass",
        "torch.utils.checkpoint": "_CachedTorchDispatchMode _CachingTorchDispatchMode",
    }
)
_functorch = Names({"torch._functorch.config": "."})
lookup_backend = _torch.lookup_backend
CACHEABLE = {"torch.ops.higher_order.scan": "rampde_fx", "torch.ops.higher_order.while_loop": "rampde_fx"}


class GraphPass(Protocol):
    """A pass over a graph, which it changes in place."""

    def __call__(self, graph: fx.Graph, /) -> None: ...
    def uuid(self) -> str:
        """What the result depends on, for Inductor's caches."""


class CodePass(Protocol):
    """From the module in Python that Inductor writes to the one that is run."""

    def __call__(self, code: str, /) -> str: ...
    def uuid(self) -> str:
        """What the result depends on, for Inductor's caches."""


# Entries from which threads of a CPU share a kernel: with fewer they wait for each other longer than they compute.
# Inductor shares these for each thread, with which two threads took longer than one at width 16 (docs/benchmarks.md).
SHARED, SHARED_OF_INDUCTOR = 2**13, 512


@dataclass(frozen=True)
class LoweringPasses:
    """What changes a graph that Inductor lowers: before Inductor's own passes, behind them, and what it writes."""

    before: Sequence[GraphPass]
    behind: Sequence[GraphPass]
    code: CodePass


# Whether a loop with these condition and body may be replayed.
Replayable = Callable[[fx.GraphModule, fx.GraphModule], bool]
# Entered round the compilation of a forward or a backward (True), which says in words what was made.
Watch = Callable[[bool], contextlib.AbstractContextManager[Callable[[str], None]]]


@contextlib.contextmanager
def compile_settings() -> Iterator[None]:
    """The settings of torch under which a graph with rewritten loops compiles correctly, and caches.

    Donated buffers: Inductor applies the outer graph's donated indices to the bodies of scan and while_loop, and
    overwrites inputs that a later iteration reads (pytorch/pytorch issue 153679, pull requests 193787 and 193960). No
    buffer is named as one, instead of donated_buffer=False: with that the backward would not know that there is none,
    and would refuse to run with retain_graph=True where the setting is on, as it is outside of this patch.
    Caches: a graph with a custom backward is cached only where that is allowed; one with scan, see compile_graph. What
    is cached holds the backward's graph, and traces it again when it is loaded: a scan inside a while loop then takes
    the tracer's proxies for operands of a wrong type.
    Checkpoints: the modes under which a checkpointed body is traced know what to do with scan, but do not say so. With
    the compiler "eager" the body runs under them, whenever it is called: they are told for good.
    """
    for checkpoint_mode in (_torch._CachingTorchDispatchMode, _torch._CachedTorchDispatchMode):
        checkpoint_mode.supports_higher_order_operators = True
    with (
        _functorch.config.patch(autograd_cache_allow_custom_autograd_functions=True),
        mock.patch.object(_torch.graph_compile, "collect_bw_donated_buffer_idxs", lambda *_: []),
        mock.patch.object(_torch.scan, "validate_subgraph_args_types", _validate_operands),
    ):
        yield


def _validate_operands(operands: Sequence[Any]) -> None:
    if not any(isinstance(operand, fx.Proxy) for operand in operands):
        _torch.validate_subgraph_args_types(operands)


def prepare(example_inputs: Sequence[Any]) -> None:
    """Begin, in a thread, what Inductor asks of the C++ compiler whatever the graph is, if it is to write C++."""
    if {value.device.type for value in example_inputs if isinstance(value, torch.Tensor)} == {"cpu"}:
        cpp_compiler.prepare()


def compile_graph(
    compiler: str,
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: dict[str, Any],
    mode: str | None,
    passes: LoweringPasses,
    replayable: Replayable | None,
    watch: Watch,
    *,
    has_ranges: bool = False,
) -> Callable[..., Any]:
    """Compile a graph with rewritten loops by one of torch's backends; Inductor applies passes of ours while it lowers.

    The forward and the backward, which is compiled when it is first called, are watched each. If the graph is to have
    ranges, a profile shows each step of theirs: all loops are taken for ours.

    Inductor's own CUDA graphs leave loops out, and move what the host counts to the device. If loops are to be
    replayed, those that are replayable become CUDA graphs instead, and nothing else.

    Inductor turns a scan into a while loop that reads its index from a tensor; Dynamo allows that to graphs under
    fullgraph=True only. Its cache takes graphs with scan where they are marked as cacheable: in a patch of its own,
    which holds where the backward is compiled as well, at the first backward pass.
    """
    _torch.TracingContext.get().fake_mode.allow_scalar_outputs = True
    if compiler != "inductor":
        return lookup_backend(compiler)(graph_module, list(example_inputs))
    prepare(example_inputs)  # begun by the backend, not by check
    patches = {
        "unsafe_marked_cacheable_functions": {**_torch.config.unsafe_marked_cacheable_functions, **CACHEABLE},
        "cpp.min_chunk_size": shared_by_thread(_torch.config.cpp.min_chunk_size),
        **_options(options, mode),
    }
    # C++ that Inductor writes itself, and kernels with clocks of their own, stay as they are.
    keeps_code = any(asks_for(name, options, mode) for name in ("cpp_wrapper", "cpp.enable_kernel_profile"))
    code = None if keeps_code else passes.code
    for name, ours in (("post_grad_custom_pre_pass", passes.before), ("post_grad_custom_post_pass", passes.behind)):
        patches[name] = _Lowering(ours, options.get(name, getattr(_torch.config, name)), replayable is not None, code)
    if replayable is not None:
        patches["triton.cudagraphs"] = False
    inner = functools.partial(_compile_watched, watch, replayable, has_ranges, code)
    return lookup_backend(compiler)(graph_module, list(example_inputs), config_patches=patches, inner_compile=inner)


def shared_by_thread(asked: int) -> int:
    """Entries for each thread that shares a kernel: what Inductor is asked for, or ours where nobody asked."""
    return asked if asked != SHARED_OF_INDUCTOR else max(asked, SHARED // torch.get_num_threads())


def compile_plainly(
    compiler: str,
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: dict[str, Any],
    mode: str | None,
) -> Callable[..., Any]:
    """Compile a graph without rewritten loops as torch.compile does by one of torch's backends."""
    backend = lookup_backend(compiler)
    if compiler != "inductor":
        return backend(graph_module, list(example_inputs))
    return backend(graph_module, list(example_inputs), config_patches=_options(options, mode))


def _options(options: dict[str, Any], mode: str | None) -> dict[str, Any]:
    return {**(_torch.list_mode_options(mode) if mode else {}), **options}


def asks_for(setting: str, options: dict[str, Any], mode: str | None) -> bool:
    """Whether a setting of Inductor is on: by an option, a mode of torch.compile, or everywhere."""
    given = _options(options, mode)
    return bool(given[setting] if setting in given else operator.attrgetter(setting)(_torch.config))


def is_setting(name: str) -> bool:
    """Whether Inductor has a setting of this name."""
    try:
        operator.attrgetter(name)(_torch.config)
    except AttributeError:
        return False
    return True


def _compile_watched(
    watch: Watch,
    replayable: Replayable | None,
    has_ranges: bool,
    code: Callable[[str], str] | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Inductor's compilation of one graph, the backward's included, in which loops may be replayed."""
    before, is_backward = _torch.metrics.generated_kernel_count, kwargs.get("is_backward", False)
    with watch(is_backward) as told, contextlib.ExitStack() as settings:
        if replayable is not None:
            settings.enter_context(
                _writing(_torch.PythonWrapperCodegen, "codegen_while_loop", _write_loop, _replays, replayable)
            )
        if has_ranges:
            name = STEP_BACK if is_backward else STEP
            settings.enter_context(
                _writing(_torch.PythonWrapperCodegen, "define_subgraph_launcher_fn", _write_subgraph, _range, name)
            )
        if code is not None:
            settings.enter_context(
                _writing(_torch.GraphLowering, "_compile_to_module_lines", _load_module, _code, code)
            )
        compiled = _torch.compile_fx_inner(*args, **kwargs)
        told(f"{_torch.metrics.generated_kernel_count - before} kernels")
    return compiled


@contextlib.contextmanager
def _writing(writer: Any, method: str, function: Any, variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Inductor's code is written by another method, which is told a value in this thread."""
    token = variable.set(value)
    try:
        with mock.patch.object(writer, method, function):
            yield
    finally:
        variable.reset(token)


STEP, STEP_BACK = "rampde_fx step", "rampde_fx step of the backward"  # in a profile
_range: ContextVar[str] = ContextVar("the range of a step in the code that this thread compiles", default="")
_write_plain_subgraph = _torch.define_subgraph_launcher_fn


def _write_subgraph(wrapper: Any, name: str, code: Any) -> None:
    """Write a function; the body of a loop without another one inside has a range."""
    _write_plain_subgraph(wrapper, name, code)
    if (
        _range.get()
        and re.search(r"while_loop_body_graph_[\d_]+$", name)
        and "while should_loop" not in str(code.value)
    ):
        wrapper.subgraph_definitions.splice(
            f"{name} = __import__('rampde_fx.torch_private.callers').torch_private.callers.ranged("
            f"{name}, {_range.get()!r})"
        )


_code: ContextVar[CodePass | None] = ContextVar("what this thread makes of a module", default=None)
_load_plain_module = _torch._compile_to_module_lines


def _load_module(graph: Any, module: Any) -> Any:
    """Load the module of a graph; its lines are not those of the nodes any more, if they are changed."""
    change = _code.get()
    changed = module.value if change is None else change(module.value)
    if changed != module.value:
        module.value, module.line_map = changed, []
    return _load_plain_module(graph, module)


_replays: ContextVar[Replayable | None] = ContextVar("which loops this thread compiles to be replayed", default=None)
_write_host_loop = _torch.codegen_while_loop


def _write_loop(wrapper: Any, loop: Any, stack_output: bool) -> None:
    """Write a call of cuda_graphs.run_loop for a loop that can be replayed, Inductor's own loop for any other."""
    replayable = None if stack_output else _replays.get()
    if replayable is None or not replayable(loop.cond_subgraph.graph_module, loop.body_subgraph.graph_module):
        _write_host_loop(wrapper, loop, stack_output)
        return
    inputs = [
        ", ".join(value.codegen_reference() for value in values)
        for values in (loop.carried_inputs, loop.additional_inputs)
    ]
    for subgraph in (loop.cond_subgraph, loop.body_subgraph):
        wrapper.codegen_subgraph_common(subgraph)
    fresh = {output.indices[0][1] for output in loop.outputs}
    mutated = [i for i in range(len(loop.carried_inputs)) if i not in fresh]
    functions = f"{loop.cond_subgraph.graph.name}, {loop.body_subgraph.graph.name}"
    # Imported in place: the code of a subgraph has no header.
    wrapper.writeline(
        f"{loop.get_name()} = __import__('rampde_fx.emit.cuda_graphs').emit.cuda_graphs.run_loop("
        f"{functions}, [{inputs[0]}], [{inputs[1]}], {mutated})"
    )


CustomGraphPass: Any = _torch.CustomGraphPass


class _Lowering(CustomGraphPass):
    """Passes of ours over each graph that Inductor lowers, behind the user's: None, one or, as of 2.13, several."""

    def __init__(self, ours: Sequence[GraphPass], users: Any, replayed: bool, code: CodePass | None) -> None:
        self.replayed, self.code = replayed, code  # what is generated from a graph depends on them
        self.passes = [*(users if isinstance(users, Sequence) else filter(None, [users])), *ours]

    def __call__(self, graph: fx.Graph) -> None:
        for graph_pass in self.passes:
            graph_pass(graph)
        cpp_compiler.wait_for_vectors()

    def uuid(self) -> Any:
        """The key by which Inductor caches what the passes made; None, not at all, if the user's has none."""
        keys = tuple(getattr(graph_pass, "uuid", lambda: None)() for graph_pass in self.passes)
        code = None if self.code is None else self.code.uuid()
        return None if None in keys else (*keys, self.replayed, code, _digest_of_package())


def cpp_wrapper_calls_loops() -> bool:
    """Whether code that Inductor writes in C++ can call a loop; that of torch 2.11 fails on its condition."""
    return torch.__version__ >= (2, 13)


@functools.cache
def _digest_of_package() -> str:
    """Changes with the package: what it generates is not to be taken from a cache that another version filled."""
    digest, folder = hashlib.sha256(), Path(__file__).parent.parent
    for file in sorted([*folder.glob("*.py"), *folder.glob("*/*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
