"""Maximum mean discrepancy: how far two samples are from having one distribution.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),

k(a, b) the mean of exp(-|a - b|^2 / (2 s^2)) over several bandwidths s. It is estimated without bias: the pairs x = x'
and y = y' are left out, so that the estimate may be below zero.
Source: Gretton, Borgwardt, Rasch, Schoelkopf and Smola, A Kernel Two-Sample Test, JMLR 13, 2012, section 2.2.
"""

import torch
from torch import Tensor
from torch.nn.functional import pdist


def bandwidths(points: Tensor) -> list[float]:
    """1/4, 1/2, 1 and 2 times the median distance of different points (count, dim), the usual choice (section 8)."""
    median = pdist(points.double()).median().item()
    return [median / 4, median / 2, median, 2 * median]


def squared_mmd(x: Tensor, y: Tensor, bandwidths: list[float]) -> float:
    """The unbiased estimate of MMD^2 of x (n, dim) and y (m, dim), in fp64."""
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
        return torch.stack([torch.exp(squares / (-2 * s**2)) for s in bandwidths]).mean(dim=0)

    def within(a: Tensor) -> Tensor:
        return (kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1))

    return (within(x) + within(y) - 2 * kernel(x, y).mean()).item()
