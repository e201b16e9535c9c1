"""Every private interface of torch that rampde_fx touches, by purpose. No other file reads one.

A part is imported by its name, which says beside each call what of torch it is about, and that importing dynamo,
side_effects or kernels costs nothing: the others are for what compiles.
"""

from importlib import import_module
from typing import Any

# fmt: off
# ruff: noqa: E501
_PARTS = {
    "rampde_fx.torch_private.capturing": "Unsupported capture captured_frame compiled_by_torch source_name trace_artifact uncompiled",
    "rampde_fx.torch_private.dynamo": "captured_line captures_body capturing_scalars compilation_asked innermost is_of names_of_arguments never_alone notes_of_capture rewritten_later running_line with_own_code constant never_compiled",
    "rampde_fx.torch_private.fake_tensors": "autocast_enabled deduplicated detached differentiable fake_mode fake_mode_of fake_number is_wrapped propagate real_tensors storage_of",
    "rampde_fx.torch_private.higher_order": "autograd_function_apply recompute_in_backward recompute_loops scan_op tag_activation_checkpoint while_loop_op",
    "rampde_fx.torch_private.inductor": "asks_for compile_graph compile_plainly compile_settings cpp_wrapper_calls_loops lookup_backend",
    "rampde_fx.torch_private.kernels": "below_autograd copy_all cpu_multiplies free_cublas_workspaces",
    "rampde_fx.torch_private.shapes": "TensorifyScalarRestartAnalysis capture_again_with hint_of is_data_dependent number_of size_hint symbol_of takes_no_more_bytes",
    "rampde_fx.torch_private.side_effects": "is_specialized name_of numbers_kept was_read",
    "rampde_fx.graphs": "ceil_sqrt draws_random_numbers",
    "rampde_fx.indices": "read_at scalar_places",
    "rampde_fx.random_state": "kept_random_state",
    "rampde_fx.tracing": "LinalgChecks MAX_CONSTANT trace",
}


def __getattr__(name: str) -> Any:
    """The names of all parts, for code that says torch_private.name."""
    for part, names in _PARTS.items():
        if name in names.split():
            return getattr(import_module(part), name)
    raise AttributeError(name)
