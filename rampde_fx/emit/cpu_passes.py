"""What Inductor does with a rewritten graph on a CPU beside its own passes."""

from __future__ import annotations

from rampde_fx.emit.cpu_biases import SplitBiases
from rampde_fx.emit.cpu_functions import replace_tanh
from rampde_fx.emit.cpu_narrow import replace_narrow_products
from rampde_fx.emit.cpu_products import replace_products
from rampde_fx.emit.native_code import NativeOrKept
from rampde_fx.torch_private.inductor import LoweringPasses


def cpu_passes() -> LoweringPasses:
    """The passes for the CPU of this machine; they leave other devices alone."""
    return LoweringPasses(
        before=(replace_products(), replace_tanh()),
        behind=(SplitBiases(), replace_narrow_products()),
        code=NativeOrKept(),
    )
