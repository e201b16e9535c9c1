"""Modes that see every function of torch: which are active."""

from __future__ import annotations

from typing import Any

from rampde_fx.torch_private.names import Names

_torch = Names({"torch.overrides": "_get_current_function_mode_stack"})


def active_modes() -> tuple[Any, ...]:
    """The modes, the innermost last; torch.device(...) and a default device are among them."""
    return tuple(_torch._get_current_function_mode_stack())
