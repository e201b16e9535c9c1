"""A picture of the state of Dynamo's interpreter where a marked loop begins an iteration.

What Dynamo traces of a program from there on is a function of this state: of every frame that it interprets the
instruction, the locals that may still be read, cells, stack, blocks and exceptions; what it has buffered of changes to
objects, globals and cells; hooks, random numbers and modes; and of each tensor its metadata, and which ones share
memory. A picture is a word, which is equal for two states that differ by nothing but which nodes of the graph stand in
them, and the nodes in the order in which the word has them.

An object of the program stands for itself: what the traced code changes of it is in the buffers. Whatever is of an
unknown kind is equal only if it is the same object.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from rampde_fx.torch_private import loop_bytecode
from rampde_fx.torch_private.dynamo import is_users
from rampde_fx.torch_private.names import Names
from rampde_fx.torch_private.state_parts import Irregular, Item, Number
from rampde_fx.torch_private.step_numbers import is_step_number, parts_of

_torch = Names(
    {
        "torch._C": "_functorch.maybe_current_level _len_torch_dispatch_stack _len_torch_function_stack",
        "torch._dynamo.bytecode_transformation": "Instruction",
        "torch._dynamo.output_graph": "OutputGraph",
        "torch._dynamo.side_effects": "SideEffects",
        "torch._dynamo.symbolic_convert": "InstructionTranslatorBase",
        "torch._dynamo.variables": "CellVariable ConstantVariable ListVariable TensorVariable",
        "torch._dynamo.variables.base": "AttributeMutationNew ValueMutationNew VariableTracker",
        "torch._guards": "Source",
        "torch._subclasses.fake_tensor": "FakeTensor",
    },
    everywhere=False,
)

PLAIN = (bool, int, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout)
# Of what tracks a value: what says nothing of the value. A proxy is compared as the node behind it.
UNREAD = {"proxy", "source", "mutation_type", "user_stack", "source_location", "_is_name_set"}
CHANGES = {("DequeVariable", "state")}  # how often it was changed, by which torch 2.14 stops iterators over it
# Of a frame: what is compared beside its locals, and what never changes, is computed anew at each instruction, or
# serves names and messages alone. What a generator has yielded before, its generated_items and symbolic_result, is read
# by nobody once it is asked for more.
COMPARED_OF_FRAME = (
    "instruction_pointer stack symbolic_globals symbolic_cellvars block_stack exn_vt_stack kw_names debug_locals"
    " active_generic_context_managers symbolic_torch_function_state symbolic_stream_state nn_module_stack"
    " frame_state gi_exc_state generator_exhausted is_child_tracer_active skip_one_hop_torch_function_depth"
    " error_on_graph_break inconsistent_side_effects _comprehension_depth _comprehension_end_for_ips"
    " is_generator_from_ctx_manager"
).split()
CONSTANT_OF_FRAME = (
    "symbolic_locals _allow_nested_graph_breaks _cell_and_freevars _constants_cache _pycode_last_varname"
    " _pycode_varname_counter accept_prefix_inst closure code_options current_instruction current_instruction_push"
    " current_speculation dispatch_table distributed_state exec_recorder export f_builtins f_code f_globals f_locals"
    " funcvar generated_items has_no_inlined_calls indexof inline_depth instructions is_non_empty_graph"
    " is_trace_bytecode_log_enabled is_trace_source_log_enabled is_tracing_resume_prologue latest_bytecode_queue lineno"
    " num_calls one_graph output package parent post_prune_cell_and_freevars prefix_insts speculation_log start_point"
    " strict_checks_fn nn_modules_globals_vt symbolic_result"
).split()
# Of the capture as a whole: what is compared by its length, or as it is; the rest are caches, guards, names, inputs.
COUNTED_OF_OUTPUT = (
    "random_calls functorch_layers backward_state autograd_grad_consumed_grad_fns _shallow_copy_placeholder_snapshots"
).split()
COMPARED_OF_OUTPUT = "torch_function_mode_enabled torch_function_subclass_inlined current_device should_exit".split()
CONSTANT_OF_OUTPUT = (
    "_aotautograd_guards _cached_replayed_side_effect_source_refs _current_tx _emit_debugger_breakpoint _guards"
    " _input_mutation_streams _last_checked_input_versions attr_source_cache backward_state_proxy backward_state_var"
    " bytecode_tracing_timings cleanup_hooks cleanups co_fields code_options compile_id compiler_fn"
    " compiler_trace_stack compliant_custom_ops cudagraph_annotation dual_level dynamo_compile_id"
    " dynamo_flat_name_to_original_fqn export export_constraints export_metadata frame_state global_scope"
    " global_state_guard guard_on_key_order guarded_mro_absent_keys has_user_defined_allowed_in_graph import_sources"
    " input_source_to_sizes_strides input_source_to_var installed_globals leaf_var_creation_order local_generators"
    " local_scope"
    " mro_source_cache name_of_builtins_dict_key_in_fglobals non_compliant_ops output_instructions output_pycode"
    " package param_name_to_source pregraph_bytecode profiler_state random_values_var region_tracker"
    " register_finalizer_fns root_tx saved_tensors_hooks_subgraph_names side_effects signature_cache"
    " skip_guards_check source_to_user_stacks synthetic_source_ctor_info timestamp torch_function_mode_stack"
    " traced_code tracers tracing_context tracked_fakes tracked_fakes_id_to_source unique_var_id unspec_variable_map"
    " used_inlined_inbuilt_modules_names variable_tracker_cache _old_fake_mode _shape_env compile_subgraph_reason"
).split()
COUNTED_OF_EFFECTS = "tensor_hooks save_for_backward ca_final_callbacks_var deferred_attr_mutations".split()
CONSTANT_OF_EFFECTS = (
    "_has_existing_dict_mutation attr_mutation_kinds id_to_variable ignore_mutation_on_these_variables keepalive"
    " mutated_sources mutation_user_stacks output_graph_weakref store_attr_mutations"
).split()
OF_PYTHON = 1 << 9  # flag of a type that was made by a class statement, or as if by one


class UnknownTorch(Irregular):
    """A version of torch keeps state of which this file knows nothing."""


class Picture:
    """The state of the interpreter.

    Args:
        steps: The frame of steps, whose own state is known.
        frames: The frames around it, the innermost first.
        loops: How many of these stand in a for loop over what the frame before yields: the user's own is the last.

    Attributes:
        word: What is equal of equal states.
        labels: For each entry of the word, the variable of the user's where it was found.
        nodes: The nodes that stand in the state, in the order in which the word names them.
        holders: What tracks a tensor, by its node.
        bare: Nodes that something else holds.
        lists: Lists to which the loop only appends tensors, or what is made of tensors, each with its items.
        numbers: The whole numbers that stand in variables and attributes, or that every iteration moves on.
    """

    def __init__(self, steps: Any, frames: list[Any], loops: int) -> None:
        self.word: list[Any] = []
        self.labels: list[str] = []
        self.nodes: list[fx.Node] = []
        self.holders: dict[fx.Node, list[Any]] = {}
        self.bare: set[fx.Node] = set()
        self.lists: list[tuple[Any, list[Item]]] = []
        self.numbers: list[Number] = []
        self._steps, self._frames, self._label = steps, frames, ""
        self._effects = frames[0].output.side_effects
        self._numbers: dict[Any, int] = {}
        self._in_lists: set[int] = set()  # lists to which the loop appends, and the mutable objects in them
        self._alive: list[Any] = []  # so that no number of an object is another one's
        for k, frame in enumerate(frames):
            self._add_frame(frame, in_loop=k < loops)
        self._add_capture(frames[0].output)
        if not self._in_lists.isdisjoint(self._numbers):
            raise Irregular("a list to which the loop appends, or an item of it, has a second name")

    # What is on the interpreter's stack, and beside it

    def _add_frame(self, frame: Any, *, in_loop: bool) -> None:
        _require_known(frame, (*COMPARED_OF_FRAME, *CONSTANT_OF_FRAME))
        self._put(id(frame), id(frame.f_code))
        names = {*frame.f_code.co_names}
        head, instructions = frame.current_instruction, frame.instructions
        everything = not names.isdisjoint(loop_bytecode.SEES_ALL_LOCALS)
        live = set(frame.symbolic_locals) if everything else loop_bytecode.live_locals(instructions, head)
        body = loop_bytecode.body_of_loop(instructions, head) if in_loop and not everything else []
        appended = loop_bytecode.only_appended_to(body)
        owner = "" if is_users(frame.f_code.co_filename) else f" of {frame.f_code.co_name}"
        for name, value in frame.symbolic_locals.items():
            self._label = f"the variable '{name}'{owner}"
            if not isinstance(value, _torch.CellVariable) and name not in live:
                continue
            self._put("local", name)
            if name in appended and type(value) is _torch.ListVariable:
                if id(value) in self._in_lists:
                    raise Irregular(f"{self._label} is a list that has a second name")
                self._in_lists.add(id(value))
                self.lists.append((value, [self._collected(item.unwrap()) for item in value.items]))
            else:
                self._add_held(frame.symbolic_locals, name)
        self._label = f"what Python keeps of {frame.f_code.co_name}"
        for name in COMPARED_OF_FRAME:
            if hasattr(frame, name):
                self._put(name)
                value = getattr(frame, name)
                self.add(vars(value) if name.startswith(("exn", "symbolic_torch", "symbolic_stream")) else value)

    def _collected(self, item: Any) -> Item:
        found = Item(self._in_lists, self._effects)
        try:
            found.add(item)
        except Irregular as irregular:
            raise Irregular(f"{self._label} {irregular}") from irregular
        return found

    def _add_capture(self, output: Any) -> None:
        effects = self._effects
        _require_known(output, (*COUNTED_OF_OUTPUT, *COMPARED_OF_OUTPUT, *CONSTANT_OF_OUTPUT))
        _require_known(effects, (*COUNTED_OF_EFFECTS, *CONSTANT_OF_EFFECTS))
        for owner in [*effects.store_attr_mutations, *effects.id_to_variable.values()]:
            if not isinstance(owner.mutation_type, (_torch.AttributeMutationNew, _torch.ValueMutationNew)):
                self._label = "an object, a global or a variable of another function"
                self.add(owner)
        self._label = "hooks, random numbers or modes of Python"
        self._put(*(len(getattr(output, name, None) or ()) for name in COUNTED_OF_OUTPUT))
        self._put(*(getattr(output, name, None) for name in COMPARED_OF_OUTPUT))
        generators = getattr(output, "local_generators", ())  # of torch 2.14, which closes at the end what is not
        self._put(sum(not generator._frame_state_finished() for generator in generators))
        self._put(*(len(getattr(effects, name, None) or ()) for name in COUNTED_OF_EFFECTS))
        self._put(*_modes(), id(output.current_tracer))
        self._label = "an input"
        for graph in {id(g): g for g in (output.graph, output.current_tracer.graph)}.values():
            for node in graph.find_nodes(op="placeholder"):
                self.add(node.meta.get("example_value"))

    # Values

    def add(self, value: Any) -> None:
        """Whatever the interpreter holds."""
        if isinstance(value, _torch.VariableTracker):
            self._add_tracked(value.unwrap())
        elif isinstance(value, fx.Proxy):
            self._add_node(value.node)
            self.bare.add(value.node)
        elif isinstance(value, fx.Node):
            self._add_node(value)
            self.bare.add(value)
        elif isinstance(value, _torch.FakeTensor):
            self._add_fake(value, is_time=False)
        elif isinstance(value, (float, *PLAIN)) and type(value) in (float, *PLAIN):
            self._put(type(value), value.hex() if isinstance(value, float) else value)
        elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            self._put(type(value), str(value.node.expr))
        elif isinstance(value, dict):
            self._put(type(value), len(value))
            for key in value:
                self.add(getattr(key, "vt", key))
                self._add_held(value, key)
        elif isinstance(value, list):
            self._put(type(value), len(value))
            for i in range(len(value)):
                self._add_held(value, i)
        elif isinstance(value, (tuple, set, frozenset)) or type(value).__name__ in ("deque", "OrderedSet"):
            self._put(type(value), len(value))
            for item in value:
                self.add(item)
        else:
            self._add_object(value)

    def _add_held(self, holder: Any, name: Any) -> None:
        """What stands at a place: a number may be one that every iteration moves on."""
        value = holder[name]
        number = value.unwrap() if isinstance(value, _torch.VariableTracker) else None
        if number is not None and type(number) is _torch.ConstantVariable and type(number.value) is int:
            self._put("a number")
            self.numbers.append(Number(len(self.word), self._label, number.value, 0, holder, name))
        else:
            self.add(value)

    def _add_object(self, value: Any) -> None:
        if isinstance(value, _torch.Source):
            self._put(value)
        elif isinstance(value, random.Random):
            self._put(value.getstate())
        elif isinstance(value, _torch.InstructionTranslatorBase):  # behind a generator
            if not self._met(value) and value not in self._frames:  # one that waits
                self._put(id(value.f_code))
                self.add(value.symbolic_locals)
                self.add({name: getattr(value, name) for name in COMPARED_OF_FRAME if _is_data(value, name)})
        elif isinstance(value, (_torch.Instruction, _torch.SideEffects, _torch.OutputGraph)):  # constant, or compared
            self._put("object", id(value))
        elif hasattr(type(value), "__next__"):
            raise Irregular(f"{self._label} holds a {type(value).__name__}, whose position nobody knows")
        elif type(value).__module__.startswith("torch._dynamo.") and hasattr(value, "__dict__"):
            self._put(type(value))
            if not self._met(value):
                self.add(vars(value))
        else:
            self._put("object", id(value))
            self._alive.append(value)

    def _add_tracked(self, value: Any) -> None:
        if is_step_number(value):
            number, slope, _ = parts_of(value)
            self._put("a number of the step")
            self.numbers.append(Number(len(self.word), self._label, number, slope, tracked=value))
            return
        if getattr(value, "inline_tracer", None) is self._steps:
            self._put("steps")
            return
        if isinstance(value, _torch.ConstantVariable):
            self.add(value.value)
            return
        if self._met(value):
            return
        mutation = value.mutation_type
        is_new = isinstance(mutation, _torch.AttributeMutationNew) and _has_attributes_alone(getattr(value, "value", 0))
        self._put(type(value), mutation and (type(mutation), mutation.scope, getattr(mutation, "is_modified", None)))
        if isinstance(value, _torch.TensorVariable):
            self._add_node(value.proxy.node)
            self.holders.setdefault(value.proxy.node, []).append(value)
        self.add(value.source)
        for name, part in sorted(vars(value).items()):
            if name == "value" and is_new:  # an object of the traced code: its attributes are in the buffers
                self._put(type(part))
                self._met(part)
            elif name not in UNREAD and (type(value).__name__, name) not in CHANGES:
                self._put(name)
                self.add(part)
        own = self._effects.store_attr_mutations.get(value, {})
        for name in own:
            self._put("attribute", name)
            self._add_held(own, name)

    def _add_node(self, node: fx.Node) -> None:
        self._put("node")
        if not self._met(node):
            self.nodes.append(node)
            value = node.meta.get("example_value")
            if isinstance(value, _torch.FakeTensor):
                self._add_fake(value, is_time=node.target is operator.getitem and _is_step(node.args[0]))
            else:
                self.add(value)

    def _add_fake(self, value: Any, *, is_time: bool) -> None:
        """A tensor's metadata. Of a time t_i the place in t is left out: no traced code can read it."""
        if self._met(value):
            return
        self._put(type(value), value.dtype, value.device, value.layout, value.requires_grad, value.is_leaf)
        self._put(tuple(map(str, value.shape)), value.is_inference())
        self._put(None if value.constant is None else str(value.constant.tolist()))
        if value.layout is torch.strided:
            self._put(tuple(map(str, value.stride())), None if is_time else str(value.storage_offset()))
            self._met(("storage", value.untyped_storage()._cdata))

    def _put(self, *entries: Any) -> None:
        self.word.append(entries)
        self.labels.append(self._label)

    def _met(self, value: Any) -> bool:
        """Whether a value was met before; the order in which it was met is put down either way."""
        key = value if isinstance(value, tuple) else id(value)
        known = key in self._numbers
        self._alive.append(value)
        self._put("number", self._numbers.setdefault(key, len(self._numbers)))
        return known


def _has_attributes_alone(value: Any) -> bool:
    """Whether an object holds nothing but attributes, and the items of a list, dict or set, by the size of its type."""
    own, bases = type(value), (object, list, dict, set)
    if hasattr(own, "__next__") or not all(base in bases or base.__flags__ & OF_PYTHON for base in own.__mro__):
        return False
    slots = sum(len(vars(base).get("__slots__", ())) for base in own.__mro__)
    plain = max(base.__basicsize__ for base in bases if isinstance(value, base))
    return own.__basicsize__ <= plain + 8 * (2 + slots)


def _is_data(frame: Any, name: str) -> bool:
    return hasattr(frame, name) and not name.startswith(("exn", "symbolic_torch", "symbolic_stream"))


def _is_step(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is torch.ops.rampde_fx.step


def _require_known(owner: Any, names: Iterable[str]) -> None:
    unknown = {name for name in vars(owner) if not name.startswith("_cache_method_")} - set(names)
    if unknown:
        raise UnknownTorch(
            f"torch {torch.__version__} keeps state in its interpreter of which rampde_fx knows nothing:"
            f" {', '.join(sorted(unknown))} of {type(owner).__name__}"
        )


def _modes() -> tuple[Any, ...]:
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        *(torch.is_autocast_enabled(device) for device in devices),
        *(torch.get_autocast_dtype(device) for device in devices),
        torch.is_autocast_cache_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        _torch.maybe_current_level(),
        _torch._len_torch_function_stack(),
        _torch._len_torch_dispatch_stack(),
    )
