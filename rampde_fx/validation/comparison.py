"""What a model leaves, and whether two runs of it agree to rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rampde_fx.errors import RewriteMismatchError
from rampde_fx.ir.graphs import has_derivatives

Named = dict[str, torch.Tensor | None]

# Rounding costs a float64 run about 2^-29 of what it costs an eager float32 run of the same code, which tells how
# much the model amplifies it. A rewrite sums in another order, and may take SLACK times as much.
SLACK = 64
FLOAT64_OF_FLOAT32 = 2.0**-29
# Where float32 happens to round nothing: of the value itself, and of the largest one of its kind, in whose terms a
# value may be what is left of a cancellation.
FLOOR, FLOOR_OF_LARGEST = 2.0**-40, 2.0**-50
# How many times the error of eager float32 that of the float32 policy may be: its sums are in another order.
SLACK_OF_FLOAT32 = 64


@dataclass(frozen=True)
class Outcome:
    """What one run left, by the user's names.

    Attributes:
        values: The outputs.
        gradients: The gradients of what requires one; None for one that does not depend on it.
        written: The tensors from outside, as they are afterwards.
    """

    values: Named
    gradients: Named
    written: Named

    def kinds(self) -> Iterator[tuple[str, Named]]:
        """What an error calls each kind of tensor, and the tensors; causes before their effects."""
        yield "", self.values
        yield "what the model leaves in ", self.written
        yield "the gradient of ", self.gradients


@dataclass(frozen=True)
class Mismatch:
    """The first tensor in which two runs differ by more than rounding.

    Attributes:
        tensor: Its name.
        found: The difference.
    """

    tensor: str
    found: str


def first_mismatch(wanted: Outcome, got: Outcome, rounded: Outcome) -> Mismatch | None:
    """Compare two runs in float64.

    Args:
        wanted: Of the code as it is written.
        got: Of its rewrite.
        rounded: Of the code as it is written in its own dtypes, which tells what rounding costs this model.
    """
    for (kind, exact), (_, found), (_, narrow) in zip(wanted.kinds(), got.kinds(), rounded.kinds(), strict=True):
        largest = max(map(norm, exact.values()), default=0.0)
        for name, value in exact.items():
            noise = distance(narrow.get(name), value)
            bound = SLACK * FLOAT64_OF_FLOAT32 * noise + FLOOR * norm(value) + FLOOR_OF_LARGEST * largest
            if (text := difference(value, found.get(name), bound)) is not None:
                return Mismatch(kind + name, text)
    return None


def difference(wanted: torch.Tensor | None, got: torch.Tensor | None, bound: float) -> str | None:
    """How two tensors differ by more than a bound in the Euclidean norm, or None; no tensor is one of zeros."""
    if wanted is None and got is None:
        return None
    if wanted is not None and got is not None and wanted.shape != got.shape:
        return f"its shape is {list(got.shape)} and should be {list(wanted.shape)}"
    both = [_wide(x) if x is not None else None for x in (wanted, got)]
    exact, found = (x if x is not None else torch.zeros_like(y) for x, y in (both, both[::-1]))
    finite = exact.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return (
            f"{int((finite != found.isfinite()).sum())} of its {finite.numel()} entries are not finite in one of both"
        )
    error = norm(found[finite] - exact[finite])
    if error <= bound:
        return None
    size = norm(exact[finite])
    share = f", {error / size:.2g} of its norm" if size else ", and it should be zero"
    return f"its error is {error:.3g} in the Euclidean norm{share}; rounding explains {bound:.2g}"


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64)


def norm(x: torch.Tensor | None) -> float:
    """The Euclidean norm of the finite entries; 0 for no tensor."""
    return 0.0 if x is None else float(torch.linalg.vector_norm(_wide(x)[x.isfinite()]))


def distance(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    """The norm of the difference, where both are finite; no tensor is one of zeros."""
    if a is None or b is None:
        return norm(a if b is None else b)
    difference = _wide(a) - _wide(b)
    return norm(torch.where(difference.isfinite(), difference, 0))


def relative_error(got: torch.Tensor | None, wanted: torch.Tensor | None, largest: float) -> float:
    """The error in the Euclidean norm over that of what is wanted; inf where an entry alone is not finite.

    Args:
        got: What is measured; None is zero.
        wanted: The exact value.
        largest: The largest norm of its kind, of which what is wanted counts as zero below 2^-40: the error is then
            given in terms of the largest.
    """
    if got is not None and wanted is not None and not torch.equal(got.isfinite(), wanted.isfinite()):
        return float("inf")
    error, size = distance(got, wanted), norm(wanted)
    scale = size if size > FLOOR * largest else largest
    return error / scale if scale else error


def weights_of(results: Sequence[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every tensor with fixed random weights, of whose sum gradients are compared where no loss is known."""
    for position, result in enumerate(results):
        if isinstance(result, torch.Tensor) and has_derivatives(result.dtype):
            generator = torch.Generator().manual_seed(position)
            pairs = torch.randn((*result.shape, 2), generator=generator, dtype=torch.float64)
            weights = torch.view_as_complex(pairs) if result.is_complex() else pairs[..., 0]
            yield result, weights.to(result)


def errors_of(wanted: Outcome, got: Outcome) -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors of the values, with what is written in place, and of the gradients."""
    floats = {n: x for n, x in wanted.written.items() if x is not None and x.is_floating_point()}
    values = _relative(wanted.values, got.values)
    written = _relative(floats, got.written)
    return values | {n: e for n, e in written.items() if e > 0}, _relative(wanted.gradients, got.gradients)


def _relative(wanted: Named, got: Named) -> dict[str, float]:
    largest = max(map(norm, wanted.values()), default=0.0)
    return {name: relative_error(got.get(name), value, largest) for name, value in wanted.items()}


def check_dtypes(got: Outcome, rounded: Outcome, where: str) -> None:
    """The compiled graph gives what eager gives, in its dtypes and shapes.

    Raises:
        RewriteMismatchError: naming the first tensor that does not.
    """
    for (kind, found), (_, wanted) in zip(got.kinds(), rounded.kinds(), strict=True):
        for name, value in wanted.items():
            other = found.get(name)
            if value is not None and other is not None and (value.dtype, value.shape) != (other.dtype, other.shape):
                raise RewriteMismatchError(
                    kind + name,
                    f"it is {other.dtype} of shape {list(other.shape)}, and {value.dtype} of shape "
                    f"{list(value.shape)} in eager",
                    where,
                )


def check_float32(got: Outcome, wanted: Outcome, rounded: Outcome, where: str) -> None:
    """The compiled graph without low precision has the errors of eager, up to the order of sums.

    Raises:
        RewriteMismatchError: naming the first tensor that has others.
    """
    if (wrong := first_beyond_float32(wanted, got, rounded)) is not None:
        raise RewriteMismatchError(wrong.tensor, wrong.found, where)


def first_beyond_float32(wanted: Outcome, got: Outcome, rounded: Outcome | None = None) -> Mismatch | None:
    """The first tensor that is not what is wanted to the rounding of its own dtype, or of eager's error."""
    runs = (wanted, got, wanted if rounded is None else rounded)
    for (kind, exact), (_, found), (_, eager) in zip(*(run.kinds() for run in runs), strict=True):
        largest = max(map(norm, exact.values()), default=0.0)
        for name, value in exact.items():
            like = next((x for x in (found.get(name), eager.get(name)) if x is not None), None)
            inexact = like is not None and has_derivatives(like.dtype)
            unit = torch.finfo(like.dtype).eps if like is not None and inexact else 0.0
            bound = SLACK_OF_FLOAT32 * (distance(eager.get(name), value) + unit * (norm(value) + unit**0.5 * largest))
            if (text := difference(value, found.get(name), bound)) is not None:
                return Mismatch(kind + name, text)
    return None
