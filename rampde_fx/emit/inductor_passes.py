"""What Inductor does with a rewritten graph beside its own passes, and what it writes for our operators."""

from __future__ import annotations

import torch

from rampde_fx.emit.compared import round_compared
from rampde_fx.emit.cpu_biases import SplitBiases
from rampde_fx.emit.cpu_casts import MoveCasts
from rampde_fx.emit.cpu_functions import replace_tanh
from rampde_fx.emit.cpu_narrow import replace_narrow_products
from rampde_fx.emit.cpu_products import replace_products
from rampde_fx.emit.native_code import NativeOrKept
from rampde_fx.runtime.scales import least_infinite
from rampde_fx.torch_private import lowerings
from rampde_fx.torch_private.inductor import LoweringPasses

ops = torch.ops.rampde_fx


def inductor_passes() -> LoweringPasses:
    """The passes, those for the CPU of this machine, which leave other devices alone."""
    lowerings.lower_overflows(ops.narrow.default, ops.mark_overflow.default, least_infinite)
    return LoweringPasses(
        before=(MoveCasts(), replace_products(), replace_tanh(), round_compared()),
        behind=(SplitBiases(), replace_narrow_products()),
        code=NativeOrKept(),
    )
