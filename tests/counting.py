"""An operator that counts how often it is called, compiled or not, and is the identity."""

import torch

calls: list[int] = []


@torch.library.custom_op("rampde_fx_tests::counted", mutates_args=())
def counted(x: torch.Tensor) -> torch.Tensor:
    calls.append(1)
    return x.clone()


counted.register_fake(torch.empty_like)
counted.register_autograd(lambda ctx, gradient: gradient)
