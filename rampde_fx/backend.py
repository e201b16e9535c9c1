"""The backend: the order of the passes, and the compiler behind them."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx

from rampde_fx.emit import cuda_graphs
from rampde_fx.emit.inductor_passes import inductor_passes
from rampde_fx.emit.kept_steps import KeptSteps, evaluated_once, search_of, why_twice
from rampde_fx.errors import PolicyError, RampdeError, RewriteError, raising
from rampde_fx.frontend import unrewritten
from rampde_fx.ir import graphs, pass_log
from rampde_fx.ir.budgets import Budgets
from rampde_fx.ir.captured import MarkedLoop, first_marker, has_loop, repeats
from rampde_fx.ir.loop_verifier import verify
from rampde_fx.ir.loops import CompensatedLoop, Loop, LoopNode, Pipeline
from rampde_fx.passes.capture_step import capture_step
from rampde_fx.passes.check_repetition import check_repetition
from rampde_fx.passes.compensate_sums import compensate_sums
from rampde_fx.passes.count_underflow import count_nothing, count_underflow
from rampde_fx.passes.emit_loop import emit_loop
from rampde_fx.passes.emit_search import emit_search
from rampde_fx.passes.find_loops import find_loops
from rampde_fx.passes.find_states import find_states
from rampde_fx.passes.generate_adjoint import generate_adjoint
from rampde_fx.passes.hoist_invariants import hoist_invariants
from rampde_fx.passes.keep_activations import keep_activations
from rampde_fx.passes.lift_floats import lift_floats
from rampde_fx.passes.lift_numbers import lift_numbers
from rampde_fx.passes.lift_rows import lift_rows
from rampde_fx.passes.lower_velocity import lower_velocity
from rampde_fx.passes.match_iterations import match_iterations
from rampde_fx.passes.partition_velocity import partition_velocity
from rampde_fx.passes.replay_random import replay_random
from rampde_fx.passes.roll_loop import roll_loop
from rampde_fx.passes.scale_adjoint import scale_adjoint
from rampde_fx.passes.spell_indices import spell_indices
from rampde_fx.passes.store_states import store_states
from rampde_fx.passes.watch_adjoint import watch_adjoint
from rampde_fx.passes.widen_gradients import widen_gradients
from rampde_fx.passes.widen_parameters import widen_parameters
from rampde_fx.runtime import phase_log
from rampde_fx.runtime.guarded import guarded
from rampde_fx.torch_private import dynamo, fake_tensors, higher_order, inductor, repetition, shapes
from rampde_fx.torch_private.names import require_all
from rampde_fx.validation.verification import Verification, on_first_call

require_all()

READ_FROM_SEARCH = "the forward is the search's, which keeps the steps that count: the velocity is evaluated once"
COMPILERS = ("inductor", "aot_eager", "eager")
OWN_OPTIONS = {"compiler": "inductor", "verify": False}  # what they are where nothing is said
# From one rolled loop to a loop that can be emitted. The order is part of the method, and of the passes' types.
STEP_PASSES: Pipeline[Loop, CompensatedLoop] = (
    Pipeline.of(hoist_invariants)
    .then(widen_parameters)
    .then(partition_velocity)
    .then(lower_velocity)
    .then(count_underflow)
    .then(generate_adjoint)
    .then(widen_gradients)
    .then(scale_adjoint)
    .then(watch_adjoint)
    .then(keep_activations)
    .then(store_states)
    .then(compensate_sums)
)


def rewrite(
    graph_module: fx.GraphModule,
    watch: pass_log.Watcher = pass_log.tell,
    only: Container[int] | None = None,
    counts: bool = True,
    keeps: Sequence[int] | None = None,
) -> list[Loop]:
    """Rewrite every marked loop of a captured graph in place.

    Args:
        graph_module: A graph captured by Dynamo, with its metadata.
        watch: Called with every loop, after roll_loop and after each of STEP_PASSES.
        only: The numbers of the loops to rewrite; the others stay rolled up, as calls of a LoopNode. All where None.
        counts: Whether the loops count what underflows.
        keeps: Of how many evaluations each loop keeps the activations, instead of what its budget of memory takes.

    Returns:
        The loops as they were emitted, in graph order.

    Raises:
        RampdeError: of the type that says what cannot be rewritten. Whatever else goes wrong is a RewriteError: Dynamo
            would take some exceptions for a wish to run the loop uncompiled, in fp32.
    """
    graph_module.meta.setdefault(unrewritten.BACKEND, "rewrite")
    autocast = fake_tensors.autocast_enabled()
    with _foreseen("the rewrite"), fake_tensors.fake_mode_of(graph_module), fake_tensors.no_autocast():
        return _rewrite(graph_module, watch, only, counts=counts, keeps=keeps, autocast=autocast)


@contextlib.contextmanager
def _foreseen(what: str, where: str = "") -> Iterator[None]:
    """Whatever goes wrong in it and has no type of ours is a RewriteError that names it."""
    try:
        yield
    except (RampdeError, shapes.TensorifyScalarRestartAnalysis):
        raise
    except Exception as error:
        raise RewriteError(
            f"{what} failed by {type(error).__name__}: {error}",
            required="a loop of plain torch operations",
            fix="report this as a bug, with the loop; until then write the named operation by others",
            where=where,
        ) from error


def _rewrite(
    graph_module: fx.GraphModule,
    watch: pass_log.Watcher,
    only: Container[int] | None,
    *,
    counts: bool,
    keeps: Sequence[int] | None,
    autocast: bool,
) -> list[Loop]:
    check_repetition(graph_module)
    lift_floats(graph_module)
    spell_indices(graph_module)
    # Of a loop in the body of a checkpoint lift_floats and match_iterations take such numbers out.
    if (first := first_marker(graph_module)) is not None and first.graph is graph_module.graph:
        lift_numbers(graph_module, first)
    found = find_loops(graph_module, gradients=torch.is_grad_enabled(), autocast=autocast)
    rolled = []
    for i, marked in enumerate(found):
        holder, captured = marked.holder(), _how_captured(marked)
        rolled += [(holder, name, i, captured, notes) for name, notes in _roll(holder, marked)]
    loops: list[Loop] = []
    ready: list[Ready] = []
    budgets = Budgets()
    for holder, name, marked_loop, captured, notes in rolled:
        (call,) = [node for node in holder.graph.nodes if node.target == name]
        begun = phase_log.now()
        number, loop = len(loops), holder.get_submodule(name).loop
        count = sum(other.where == loop.where for other in loops)
        told = {"notes": (*loop.notes, *notes), "captured": captured}
        loop = replace(loop, **told, number=1 + count, marked=marked_loop)
        verify(loop, roll_loop.__name__)
        watch(number, roll_loop.__name__, loop)
        loops.append(loop)
        if only is not None and number not in only:
            continue
        chosen = {"budget": budgets.of(loop)} if keeps is None else {"keeps": keeps[number]}
        loop = _rewritten(replace(loop, **chosen), number, watch, counts=counts)
        budgets.spend(loop)
        ready.append(Ready(number, holder, call, loop, begun))
    for number, loop in _emit(graph_module, ready).items():
        loops[number] = loop
    for holder in dict.fromkeys(holder for holder, *_ in rolled):
        if holder is not graph_module:
            higher_order.recompute_loops(holder)
        holder.graph.lint()
        holder.recompile()
    return loops


def _rewritten(loop: Loop, number: int, watch: pass_log.Watcher, *, counts: bool) -> CompensatedLoop:
    """A rolled loop behind all passes."""
    for step_pass in STEP_PASSES:
        counting = step_pass is count_underflow
        loop = _passed(count_nothing if counting and not counts else step_pass, loop)
        watch(number, step_pass.__name__, loop)
    assert isinstance(loop, CompensatedLoop), "behind all passes"
    return loop


class Ready(NamedTuple):
    """A loop behind all passes: its number, the call of its LoopNode, and when its passes began."""

    number: int
    holder: fx.GraphModule
    call: fx.Node
    loop: CompensatedLoop
    begun: float


def _emit(graph_module: fx.GraphModule, ready: Sequence[Ready]) -> dict[int, Loop]:
    """Emit the loops, each search with what it keeps for the loop behind it; the loops by their numbers."""
    by_call = {each.call: each for each in ready}
    kept: dict[fx.Node, KeptSteps] = {}
    loops: dict[int, Loop] = {each.number: each.loop for each in ready}
    for number, holder, call, loop, _ in ready:
        search = search_of(call)
        if search not in by_call:
            continue
        why = why_twice(by_call[search].loop, loop, apart=holder is not graph_module)
        if not why:
            kept[call] = kept[search] = KeptSteps(by_call[search].loop, loop)
            evaluated_once(search)
        note = f"the velocity is evaluated in the search and in this loop: {why}" if why else READ_FROM_SEARCH
        loops[number] = replace(loop, notes=(*loop.notes, note))
    for number, holder, call, loop, begun in ready:
        (emit_loop if loop.controller is None else emit_search)(holder, call, loop, kept.get(call))
        holder.delete_submodule(str(call.target))
        for note in loops[number].notes:
            phase_log.tell(loop.name, note)
        phase_log.tell_done(loop.name, f"rewritten ({loop.policy})", begun)
    return loops


def _how_captured(marked: MarkedLoop) -> str:
    """How many of a loop's iterations were captured, or why all."""
    if marked.repeats:
        steps = graphs.value(marked.markers[0].args[0]).shape[0] - 1
        told = f"{steps:,}" if isinstance(steps, int) else "N, of which any number takes this graph"
        return f"{len(marked.iterations)} iterations, which stand for all {told}"
    reason = repetition.why_in_full(graphs.user_line(marked.markers[0]))
    return f"all {len(marked.iterations):,} iterations: {reason}" if reason else ""


def _passed(step_pass: Callable[[Any], Loop], loop: Loop) -> Loop:
    """The loop behind a pass, whole."""
    with _foreseen(f"the pass {step_pass.__name__}", loop.where):
        loop = step_pass(loop)
    verify(loop, step_pass.__name__)
    return loop


def _roll(graph_module: fx.GraphModule, marked: MarkedLoop) -> list[tuple[str, tuple[str, ...]]]:
    """Roll a marked loop up, run by run, and take its end marker out; names of the LoopNodes, with notes."""
    names: list[str] = []
    sizes: list[int] = []
    marked = lift_rows(marked)
    while marked.iterations:
        run = match_iterations(marked)
        captured = capture_step(graph_module, marked, run)
        captured = captured if marked.searches else replay_random(captured)
        single = len(run.iterations) == 1 and not run.from_odeint
        captured = find_states(marked, captured, single=single, before=names)
        names.append(f"loop_{sum(isinstance(module, LoopNode) for module in graph_module.modules())}")
        roll_loop(graph_module, marked, run, captured, names[-1])
        count = len(run.iterations)
        sizes.append(graph_module.get_submodule(names[-1]).loop.steps)
        marked = replace(marked, markers=marked.markers[count:], iterations=marked.iterations[count:])
    graph_module.graph.erase_node(marked.end)
    note = f"the iterations of the loop differ: it was divided into runs of {', '.join(map(str, sizes))} equal steps"
    notes = (*marked.notes, *((note,) if len(sizes) > 1 else ()))
    return [(name, notes) for name in names]


@repetition.takes_repeats
def rampde_fx(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The torch.compile backend: rewrite the marked loops, then compile with Inductor, or with less.

    Args:
        graph_module: The captured graph.
        example_inputs: Its inputs, as Dynamo gives them.
        options: "compiler" is "inductor" (the default), "aot_eager" (AOTAutograd alone) or "eager" (the rewritten graph
            as it is); "verify", if True, has the first call of each graph with a loop checked in float64 before it is
            used, which takes about as long as a few eager training steps; all others go to Inductor.
        mode: A mode of torch.compile, for Inductor. Under "reduce-overhead" and "max-autotune", which ask for CUDA
            graphs, every rewritten loop on a GPU is captured as one, and the rest of the graph is not.

    Returns:
        The compiled callable. Where the graph cannot be rewritten, a callable that raises the typed error, so that it
        reaches the user as it is.
    """
    graph_module.meta[unrewritten.BACKEND] = "backend"
    repeated = repeats(graph_module)
    try:
        compiler, verifies, options = _own_options(options or {}, mode)
        marked = has_loop(graph_module)
        if marked:
            if compiler == "inductor":
                inductor.prepare(example_inputs)
            graphs.name_arguments(graph_module, dynamo.names_of_arguments())
            check_repetition(graph_module)  # here for the copy of verify; in rewrite for all others who call that
        if verifies and repeated:  # the graph is to be run as the user wrote it
            repetition.capture_in_full('options={"verify": True} runs the loop as it was captured')
        captured = graphs.copied(graph_module) if verifies and marked else None
        # The user's, which are no steps.
        has_own_loops = marked and any(node.target in higher_order.LOOPS for node in graphs.all_nodes(graph_module))
        loops = rewrite(graph_module) if marked else []
        verification = None if captured is None else Verification(captured, rewrite, loops)
        has_host_loop = any(not loop.unrolled or loop.policy.adjoint_scaling is not None for loop in loops)
        if compiler == "inductor" and any(loop.monitored for loop in loops):
            _check_monitored(options, mode)
        replayed = has_host_loop and compiler == "inductor" and _replays_loops(options, mode)
        replayable = cuda_graphs.launches_alone if replayed else None
    except RampdeError as error:
        if repeated:  # another capture may have more success, and has the better message
            repetition.capture_in_full(str(error))
        return raising(error)
    emitted = [loop for loop in loops if isinstance(loop, CompensatedLoop)]
    low = {loop.marked for loop in emitted if not loop.stays_wide}
    for loop in emitted:
        if loop.stays_wide and loop.controller is None and loop.marked not in low:
            unrewritten.loop_stays_wide(loop.where, loop.policy.dtype)
    if not loops:  # as torch compiles it: our settings are for our loops
        return inductor.compile_plainly(compiler, graph_module, example_inputs, options, mode)
    names = [loop.name for loop in loops]
    with inductor.compile_settings(), phase_log.compiling(names, compiler):
        watch = functools.partial(phase_log.lowering, names)
        compiled = inductor.compile_graph(
            *(compiler, graph_module, example_inputs, options, mode, inductor_passes(), replayable, watch),
            has_ranges=not has_own_loops,
        )
    compiled = _guarded(compiled, emitted)
    return compiled if verification is None else on_first_call(compiled, verification)


def _own_options(given: dict[str, Any], mode: str | None) -> tuple[str, bool, dict[str, Any]]:
    """The compiler, whether to verify, and the options that are Inductor's."""
    options = dict(given)
    own = {name: options.pop(name, default) for name, default in OWN_OPTIONS.items()}
    compiler, verifies = own["compiler"], own["verify"]
    if not isinstance(verifies, bool):
        raise PolicyError(
            f'options={{"verify": {verifies!r}}}', required="True or False", fix='write options={"verify": True}'
        )
    unknown = [name for name in options if not inductor.is_setting(name)] if compiler == "inductor" else []
    if unknown:
        spelled = unknown[0].replace("-", "_")
        meant = [spelled] if inductor.is_setting(spelled) else difflib.get_close_matches(unknown[0], OWN_OPTIONS, 1)
        raise PolicyError(
            f"options={{{unknown[0]!r}: {options[unknown[0]]!r}}}",
            required=f"{' and '.join(map(repr, OWN_OPTIONS))}, which are this backend's, or options of Inductor",
            fix=f"write {meant[0]!r}" if meant else f"leave {unknown[0]!r} out",
        )
    if compiler not in COMPILERS or (compiler != "inductor" and (options or mode)):
        raise PolicyError(
            f'options={{"compiler": {compiler!r}}} with {options}, mode={mode!r}',
            required='a compiler of "inductor", "aot_eager" or "eager"; further options and modes are for Inductor',
            fix='leave "compiler" out for Inductor',
        )
    return compiler, verifies, options


def _guarded(compiled: Callable[..., Any], loops: Sequence[CompensatedLoop]) -> Callable[..., Any]:
    """The compiled graph, which refuses what its loops cannot do; an error of a backward has the line of one."""
    differentiated = [loop for loop in loops if loop.adjoint is not None]
    where = [*differentiated, *loops][0].where
    return guarded(compiled, [loop.name for loop in loops], where, has_backward=bool(differentiated))


def _check_monitored(options: dict[str, Any], mode: str | None) -> None:
    """Code in C++ loses what it hands to a monitor: the process would end."""
    if inductor.asks_for("cpp_wrapper", options, mode):
        raise PolicyError(
            "cpp_wrapper was asked for where a monitor is open",
            required="code in Python, which can hand over what a monitor records",
            fix='leave "cpp_wrapper" out, or compile outside of the monitor',
        )


def _replays_loops(options: dict[str, Any], mode: str | None) -> bool:
    """Whether the loops are to be CUDA graphs (rampde_fx/emit/cuda_graphs.py)."""
    replays = inductor.asks_for("triton.cudagraphs", options, mode)
    if not inductor.asks_for("cpp_wrapper", options, mode):
        return replays
    if not inductor.cpp_wrapper_calls_loops():
        raise PolicyError(
            f"cpp_wrapper was asked for on torch {torch.__version__}",
            required="torch 2.13 or newer, whose code in C++ can call a loop",
            fix='leave "cpp_wrapper" out, or take a newer torch',
        )
    if replays:
        raise PolicyError(
            "CUDA graphs were asked for together with cpp_wrapper",
            required="one of the two: the code that calls a loop's graph is Python",
            fix='leave "cpp_wrapper" out: a replayed loop has nothing left that it would call',
        )
    return False
