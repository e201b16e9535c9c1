"""Power-of-two scales, found on the device."""

from __future__ import annotations

import math

import torch

EXPONENT_BITS = 0x7F800000  # of a float32
VANISHING = 2.0**-25  # half of float16's least subnormal number
OF_NOTHING = 126.0  # the exponent for a factor of zeros
LEAST, MOST = 2.0**-126, 2.0**120  # the least normal float32; a bound on s that keeps 1 / s normal too


def power_of_two_scale(target: torch.Tensor | float, *values: torch.Tensor) -> torch.Tensor:
    """The power of two that brings the largest magnitude among some tensors into [target, 2 target).

    s = 2^(log2(target) - floor(log2(max|x|))), from the exponent bits of max|x|: scaling and unscaling by it round
    nothing.

    Args:
        target: A power of two, a number or a 0-d float32 tensor.
        *values: Floating tensors of any shapes, none of them empty.

    Returns:
        The scale, float32, 0-d, at most 2^120; 1 where a value is not finite.

    >>> power_of_two_scale(1.0, torch.tensor([0.3, -5.0])).item()
    0.25
    """
    maxima = [value.abs().amax().to(torch.float32) for value in values]
    largest = maxima[0] if len(maxima) == 1 else torch.stack(maxima).amax()
    power = (largest.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    scale = torch.clamp(target / torch.clamp(power, min=LEAST), max=MOST)
    return torch.where(torch.isfinite(largest), scale, torch.ones_like(scale))


def exponent_of(scale: torch.Tensor) -> torch.Tensor:
    """The exponent of a power of two, both 0-d and float32.

    >>> exponent_of(torch.tensor(0.25)).item()
    -2.0
    """
    return ((scale.view(torch.int32) >> 23) - 127).to(torch.float32)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Two to the power of an exponent, rounded down: exact on every device, as exp2 is not.

    >>> power_of_two(torch.tensor(-1.5)).item()
    0.25
    """
    return ((torch.floor(exponent).to(torch.int32) + 127) << 23).view(torch.float32)


def exponent_for(factor: torch.Tensor) -> torch.Tensor:
    """The exponent of two, not rounded, that makes up for a factor.

    A small factor is made up for by its largest entry. A large one takes back what its root mean square is: its largest
    entry may concern few. Behind a factor of zeros everything is zero, and needs less than anything else.

    Args:
        factor: A tensor of any shape and dtype, not empty.

    Returns:
        -log2(max|x|) if that is positive, else -log2(rms(x)) if that is negative, else 0; 0 where x is not finite.
        Float32, 0-d.

    >>> exponent_for(torch.tensor([0.0, 0.25])).item(), exponent_for(torch.tensor([0.5, 1.0])).item() == 0
    (2.0, True)
    >>> exponent_for(torch.full((3,), 8.0)).item()
    -3.0
    """
    size = factor.abs().to(torch.float32) if factor.dtype is not torch.bool else factor.to(torch.float32)
    largest = size.amax()
    mean = largest * (size / torch.clamp(largest, min=LEAST)).square().mean().sqrt()
    exponent = -torch.log2(torch.where(largest < 1, largest, torch.clamp(mean, min=1.0)))
    exponent = torch.where(largest == 0, OF_NOTHING, exponent)
    return torch.where(torch.isfinite(largest), exponent, 0.0)


def are_finite(values: torch.Tensor) -> torch.Tensor:
    """Which numbers of a tensor are finite in memory, one by one; of a complex one its parts.

    Inductor has numbers of lower precision in float32, and leaves their rounding out: what would be rounded to an
    infinity is not finite.

    >>> are_finite(torch.tensor([65504.0, float("inf"), float("nan")], dtype=torch.float16)).tolist()
    [True, False, False]
    """
    sizes, least = _sizes(values)
    return sizes < least


def are_infinite(values: torch.Tensor) -> torch.Tensor:
    """Which numbers of a tensor are infinite in memory, one by one.

    >>> are_infinite(torch.tensor([65504.0, float("inf"), float("nan")], dtype=torch.float16)).tolist()
    [False, True, False]
    """
    sizes, least = _sizes(values)
    return sizes >= least


def _sizes(values: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The magnitudes of a tensor, of a complex one of its parts, and from which on they are infinite in memory."""
    sizes = (torch.view_as_real(values) if values.is_complex() else values).abs()
    return (sizes, math.inf) if sizes.dtype.itemsize >= 4 else (sizes.to(torch.float32), least_infinite(sizes.dtype))


def least_infinite(dtype: torch.dtype) -> float:
    """The least number that a dtype rounds to infinity.

    >>> least_infinite(torch.float16)
    65520.0
    """
    info = torch.finfo(dtype)
    return info.max / (2 - info.eps) * (2 - info.eps / 2)  # half a unit in the last place above its largest


def vanishing_entries(scaled: torch.Tensor) -> torch.Tensor:
    """How many entries of a scaled tensor are not zero, and become zero in float16: float32, 0-d.

    They are found by their magnitude, at most half of the least subnormal number: a compiler may leave a rounding out.

    >>> vanishing_entries(torch.tensor([0.0, 1.0, 1e-8])).item()
    1.0
    """
    size = scaled.abs()
    return ((size != 0) & (size <= VANISHING)).sum().to(torch.float32)
