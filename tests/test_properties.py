"""Random neural ODEs: the rewritten model agrees with eager, within the roundings that its dtypes make, or refuses.

The bound is not a fixed number of unit roundoffs, for a random problem may be badly conditioned. Each is run in fp64
as well, and again with every operation of the velocity, forward and backward, rounded to the velocity dtype, or
perturbed by a relative error of one unit roundoff of it and of random sign, and every other operation by one of the
state's dtype. What the results change by is what rounding in the right places costs. A state accumulated in low
precision, a gradient dropped, or a wrong value is far beyond it.

    python -m tests.test_properties --cases 2000 --seed 1      # the long run; prints the failures, minimised
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import math
import random
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rampde_fx
from rampde_fx import errors
from rampde_fx.errors import RampdeError
from rampde_fx.passes.store_states import TARGETS
from tests.random_models import DTYPES, Problem, RandomODE, data, layer_names, random_problem

UNIT = {
    torch.float8_e4m3fn: 2.0**-4,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
# Half the distance of subnormal numbers, where it matters.
SMALLEST = {torch.float16: 2.0**-25, torch.float8_e4m3fn: 2.0**-10}
# Beyond it a low velocity may overflow, which is loud.
LARGEST = {torch.float16: 2.0**14}
# How many times the largest deviation of the perturbed runs an error may reach; the runs on a second, closer look.
FACTOR, DRAWS, MORE_DRAWS = 2.0, 3, 64
# From where on a problem is chaotic: a norm of nearly equal numbers, in a low dtype.
CHAOS = 1e3


class Disagreement(AssertionError):
    """Outputs or gradients of a rewritten model that rounding does not explain."""


class Perturbation(TorchDispatchMode):
    """Gives the result of every operation a relative error of random sign, larger inside of the velocity."""

    def __init__(self, problem: Problem, seed: int, *, nearest: bool = False, smaller: bool = False) -> None:
        super().__init__()
        policy = problem.policy()
        # Smaller roundings than the largest ones, too: where a sine turns between them, both may change it less.
        self.smaller = smaller
        # To the nearest number: what lies close together becomes equal, as random roundings never make it.
        self.nearest = policy.velocity if nearest else None
        self.state = UNIT[DTYPES[problem.state_dtype]]
        self.velocity = max(self.state, UNIT[policy.velocity])
        self.storage = max(self.state, UNIT[policy.storage_dtype])
        self.smallest, self.stored_smallest = (
            SMALLEST.get(policy.velocity, 0.0),
            SMALLEST.get(policy.storage_dtype, 0.0),
        )
        self.scaled_storage = TARGETS.get(policy.storage_dtype) if policy.scales_storage else None
        self.scaling = policy.adjoint_scaling
        self.generator = torch.Generator().manual_seed(seed)
        self.inside, self.scale, self.largest = False, 1.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views:
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    tensor.copy_(self.perturbed(tensor))
        return result

    def perturbed(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor with the roundings of where the computation is."""
        if not self.inside:
            return x * (1 + self.state * self._signs(x))
        self.largest = max(self.largest, x.detach().abs().max().item()) if x.numel() else self.largest
        if self.nearest is not None:
            return (x * self.scale).to(self.nearest).to(x.dtype) / self.scale
        return x * (1 + self.velocity * self._signs(x)) + self.smallest / self.scale * self._signs(x)

    def rounded_for_storage(self, x: torch.Tensor) -> torch.Tensor:
        """A state as it is stored for the backward."""
        smallest = self.stored_smallest
        if self.scaled_storage is not None and x.numel():
            smallest *= x.detach().abs().max().item() / self.scaled_storage
        return x * (1 + self.storage * self._signs(x)) + smallest * self._signs(x)

    def _signs(self, x: torch.Tensor) -> torch.Tensor:
        if self.smaller:
            return torch.rand(x.shape, generator=self.generator, dtype=torch.float64) * 2 - 1
        return torch.randint(0, 2, x.shape, generator=self.generator, dtype=torch.float64) * 2 - 1


class Border(torch.autograd.Function):
    """Tells a Perturbation that the computation enters or leaves the velocity, in the backward the other way round."""

    @staticmethod
    def forward(ctx: Any, mode: Perturbation, entering: bool, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.mode, ctx.entering = mode, entering
        mode.inside, mode.scale = True, 1.0  # the casts round, at the entry and at the exit
        copies = tuple(tensor.clone() for tensor in tensors)
        mode.inside = entering
        return copies

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        mode = ctx.mode
        if not ctx.entering:
            largest = max((g.abs().max().item() for g in gradients if g.numel()), default=0.0)
            scaled = mode.scaling is not None and largest > 0
            mode.scale = (mode.scaling.target or 1.0) / largest if scaled else 1.0
        mode.inside = True
        copies = tuple(g.clone() for g in gradients)
        mode.inside = not ctx.entering
        return None, None, *copies


class Perturbed(nn.Module):
    """A random model whose evaluations stand between borders, and whose velocity's parameters are rounded once."""

    def __init__(self, model: RandomODE, mode: Perturbation, *, stored: bool) -> None:
        super().__init__()
        self.model, self.mode = model, mode
        plain = model.evaluate

        def evaluate(net: int, context: tuple[torch.Tensor, ...], y: torch.Tensor, *extra: torch.Tensor) -> Any:
            entered = Border.apply(mode, True, y, *context, *extra)
            count = 1 + len(context)
            results = plain(net, entered[1:count], entered[0], *entered[count:])
            return Border.apply(mode, False, *results)

        def store(y: torch.Tensor, second: Any) -> Any:
            return tuple(None if x is None else mode.rounded_for_storage(x) for x in (y, second))

        model.evaluate = evaluate
        if stored:
            model.stored = store

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> Any:
        self.mode.inside, self.mode.scale = True, 1.0
        low = {n: p.clone() for n, p in self.model.named_parameters() if n.startswith(("nets.", "join."))}
        self.mode.inside = False
        return torch.func.functional_call(self.model, low, (y, t))


@dataclasses.dataclass
class Outcome:
    """What a run left: outputs, gradients (None included), and the state that it was given, afterwards."""

    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor | None]
    given: list[torch.Tensor]

    def values(self) -> list[torch.Tensor | None]:
        """All that is compared."""
        return [*self.outputs, *self.gradients]


def run(problem: Problem, function: Callable[..., Any], model: nn.Module, y: torch.Tensor, t: torch.Tensor) -> Outcome:
    """Outputs and gradients of a loss that is a fixed random functional of all outputs."""
    wanted = problem.wanted
    y, t = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x) if _dense(x) else x for x in (y, t))
    y = y.detach().requires_grad_(wanted in ("all", "state"))
    t = t.detach().requires_grad_(wanted in ("all", "time"))
    for i, parameter in enumerate(model.parameters()):
        frozen = wanted in ("state", "time", "nothing") or (wanted == "some_parameters" and i % 2 == 0)
        parameter.requires_grad_(not frozen)
        parameter.grad = None
    with torch.no_grad() if wanted == "no_grad" else contextlib.nullcontext():
        outputs = tree_leaves(function(y, t))
        outputs = [output for output in outputs if isinstance(output, torch.Tensor)]
        generator = torch.Generator().manual_seed(problem.seed + 1)
        weights = [torch.randn(o.shape, generator=generator, dtype=torch.float32).to(o.dtype) for o in outputs]
        shares = [1.0, *[problem.second_weight] * (len(outputs) - 1)]
        terms = zip(shares, outputs, weights, strict=True)
        loss = sum(share * (output * weight).sum() for share, output, weight in terms)
    if loss.requires_grad:
        (loss * problem.loss_scale).backward()
    inputs = [y, t, *model.parameters()]
    return Outcome([o.detach() for o in outputs], [x.grad for x in inputs], [x.detach() for x in inputs])


def _dense(x: torch.Tensor) -> bool:
    return 0 not in x.stride()


def reference(problem: Problem, model: nn.Module, y: torch.Tensor, t: torch.Tensor) -> Outcome:
    """The same in fp64."""
    wide = copy.deepcopy(model).double()
    return run(problem, wide, wide, y.double(), t.double())


def deviations(
    problem: Problem, model: nn.Module, y: torch.Tensor, t: torch.Tensor, exact: Outcome, draws: int
) -> list[float]:
    """The largest deviation of each value over runs with random roundings."""
    largest = [0.0] * len(exact.values())
    stored = problem.policy().storage_dtype is not torch.float64
    for draw in range(2 * draws if stored else draws):
        mode = Perturbation(problem, draw, nearest=draw < 2, smaller=draw % 4 >= 2)
        wide = copy.deepcopy(model).double()
        perturbed = Perturbed(wide, mode, stored=bool(draw % 2 and stored))
        with mode:
            outcome = run(problem, perturbed, wide, y.double(), t.double())
        if mode.largest > LARGEST.get(problem.policy().velocity, math.inf):
            raise Invalid("a number of the velocity is beyond its dtype")
        for j, (got, wanted) in enumerate(zip(outcome.values(), exact.values(), strict=True)):
            output_of_stored = draw % 2 and stored and j < len(exact.outputs)
            if got is not None and not output_of_stored:
                deviation = _norm(got, wanted)
                if not math.isfinite(deviation):
                    raise Invalid("a run with roundings to the dtype is not finite")
                largest[j] = max(largest[j], deviation)
    return largest


def _norm(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return (got.double() - wanted.double()).norm().item()


class Invalid(Exception):
    """A problem that eager cannot run either."""


def ratios(problem: Problem) -> list[float]:
    """The error of every output and gradient of the rewritten model, over the deviation that rounding explains.

    Raises:
        Disagreement: for a dtype, shape or missing gradient unlike eager's, and for a changed argument.
        RampdeError: where the loop is refused.
        Invalid: where eager fails too.
    """
    torch._dynamo.reset()
    torch.manual_seed(problem.seed)
    try:
        model = RandomODE(problem).to(DTYPES[problem.state_dtype])
        if problem.parameters != "same":
            model.nets.to(DTYPES[problem.parameters])
        y, t = data(problem)
        eager = run(problem, model, model, y, t)
    except Exception as error:
        raise Invalid(str(error)) from error
    exact = reference(problem, model, y, t)
    for outcome in (exact, eager):
        if not all(value is None or value.isfinite().all() for value in outcome.values()):
            raise Invalid("eager, in float64 or in its own dtype, is not finite")
    mine = copy.deepcopy(model)
    marked = rampde_fx.mixed_precision(mine, policy=problem.policy())
    # The structure is compared in float64, but for loops of many steps: to verify, all of them are captured.
    options = {"compiler": problem.compiler, "verify": problem.steps < 12}
    function = torch.compile(marked, backend="rampde_fx", options=options, fullgraph=True)
    got = run(problem, function, mine, y, t)
    _check_kinds(got, eager)
    unit = UNIT[DTYPES[problem.state_dtype]]
    found: list[float] = []
    # Eager has its share: an operation may cancel inside.
    own = [0.0 if e is None else _norm(e, x) for e, x in zip(eager.values(), exact.values(), strict=True)]
    if not all(v is None or v.isfinite().all() for v in got.values()):
        deviations(problem, model, y, t, exact, 1)  # raises Invalid where a float16 state or activation overflows
    for draws in (DRAWS, MORE_DRAWS):
        spread = list(map(max, own, deviations(problem, model, y, t, exact, draws)))
        found = [
            _ratio(value, wanted, deviation, unit)
            for value, wanted, deviation in zip(got.values(), exact.values(), spread, strict=True)
        ]
        if max(found) <= FACTOR:
            break
    else:
        gradients = range(len(exact.outputs), len(spread))
        sizes = [exact.values()[j].norm().item() for j in gradients if exact.values()[j] is not None]
        if max(spread[len(exact.outputs) :], default=0.0) > CHAOS * max(sizes, default=0.0):
            raise Invalid("rounding alone makes a gradient a thousand times as large as the largest one is")
    return found


def _ratio(got: Any, wanted: Any, deviation: float, unit: float) -> float:
    if got is None or wanted is None:  # no gradient and a gradient of zero are the same
        value = got if wanted is None else wanted
        return 0.0 if value is None or value.count_nonzero() == 0 else float("inf")
    error = _norm(got, wanted)
    unit = max(unit, UNIT[got.dtype])  # a parameter's gradient has the parameter's dtype
    bound = deviation + unit * wanted.double().norm().item() + torch.finfo(torch.float32).tiny
    return error / bound if math.isfinite(error) else float("inf")


def _check_kinds(got: Outcome, eager: Outcome) -> None:
    kinds = [[(x.dtype, x.shape) for x in outcome.outputs] for outcome in (got, eager)]
    if kinds[0] != kinds[1]:
        raise Disagreement(f"outputs are {kinds[0]}, in eager {kinds[1]}")
    if not all(torch.equal(a, b) for a, b in zip(got.given, eager.given, strict=True)):
        raise Disagreement("an argument or a parameter was changed")


def check(problem: Problem) -> float:
    """The rewritten model agrees with eager; how much of the bound's deviation its errors come to."""
    found = ratios(problem)
    if max(found) > FACTOR:
        shown = ", ".join(f"{ratio:.3g}" for ratio in found)
        raise Disagreement(f"errors over roundings: {shown} (outputs, then gradients of y, t and parameters)")
    return max(found)


# What random problems found, each once a fault.
FOUND = {
    "in-place updates in a loop of one step were refused": Problem(update="in_place", steps=1, velocity="float16"),
    "a detached state in a loop of one step was refused": Problem(
        update="subtracted", gradient="state_detached", steps=1, velocity="bfloat16", compiler="eager"
    ),
    "cotangents of a trajectory stood before a correction that they use": Problem(
        output="trajectory", accumulation="compensated", compiler="eager"
    ),
    "a rectified state was low beside a share of the state": Problem(
        decay="rectified", span=0.01, velocity="float16", compiler="eager"
    ),
    "a rectified state was taken for an increment of the state that it is added to": Problem(
        decay="rectified", velocity="float16", compiler="eager"
    ),
    "outputs of a normalisation were taken for another kind of node than the normalisation": Problem(
        space="sequence",
        width=1,
        layers=("mlp", "layer_norm", "linear", "mish"),
        weights="per_step",
        a=((), (0.0,)),
        b=(-0.5, 0.25),
        c=(0.0, 0.0),
        update="lerp",
        carries="density",
        outside="initial",
        velocity="bfloat16",
        compiler="eager",
    ),
    "a detached state was refused compensated sums": Problem(
        update="terms", gradient="state_detached", accumulation="compensated", velocity="bfloat16", compiler="eager"
    ),
    "a velocity that differentiates was refused under no_grad": Problem(
        layers=("linear", "own_gradient"), wanted="no_grad", velocity="float16", compiler="eager"
    ),
    "the divergence of a spectral layer had a write to a complex slice, which torch does not differentiate": Problem(
        layers=("linear", "spectral", "linear"), carries="density", velocity="float16", compiler="eager"
    ),
    "a write through out= was refused under no_grad": Problem(
        layers=("linear", "out_write"), wanted="no_grad", velocity="float16", compiler="eager"
    ),
    "the fp32 log-sum-exp of an attention was cast down for its backward": Problem(
        space="sequence",
        layers=("sdpa",),
        carries="density",
        gradient="argument_detached",
        wanted="state",
        velocity="float16",
        compiler="eager",
    ),
}


@pytest.mark.parametrize("problem", FOUND.values(), ids=FOUND)
def test_what_random_problems_found(problem):
    check(problem)


def test_a_velocity_without_a_second_derivative_is_refused():
    """The divergence of an attention, which eager differentiates no further than asked, was an unforeseen error."""
    problem = Problem(
        seed=660,
        space="sequence",
        batch=3,
        width=5,
        layers=("sdpa", "mish", "plain_layer_norm", "roll"),
        weights="schedule",
        update="lerp",
        decay="number",
        carries="density",
        gradient="argument_detached",
        outside="initial",
        output="trajectory",
        layout="transposed",
        grid="repeated",
        start=1.0,
        steps=5,
        wanted="state",
        velocity="float16",
        loop="scan",
        compiler="eager",
    )
    with pytest.raises(errors.UnsupportedVelocityError, match="has no derivative") as caught:
        check(problem)
    assert "random_models.py" in caught.value.where


@pytest.mark.slow
@hypothesis.settings(
    max_examples=14, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(st.data())
def test_random_models_agree_with_eager(given):
    """None of these models is refused either, but for those that differentiate what has no further derivative."""
    problem = random_problem(lambda options: given.draw(st.sampled_from(options)))
    hypothesis.note(repr(problem))
    try:
        check(problem)
    except Invalid:
        hypothesis.reject()
    except errors.UnsupportedVelocityError as error:
        if "has no derivative that can be traced" not in str(error):
            raise
        hypothesis.reject()


def test_every_field_of_a_policy_is_drawn():
    problems = [problem for _, problem in cases(600, 0)]
    for field in dataclasses.fields(rampde_fx.PrecisionPolicy):
        assert len({getattr(problem.policy(), field.name) for problem in problems}) > 1, field.name


def test_every_field_of_a_problem_and_every_layer_is_drawn():
    problems = [problem for _, problem in cases(3000, 0)]
    for field in dataclasses.fields(Problem):
        assert len({getattr(problem, field.name) for problem in problems}) > 1, field.name
    drawn = {layer for problem in problems for layer in problem.layers}
    assert drawn >= {name for problem in problems for name in layer_names(problem.space)}


def cases(count: int, seed: int, first: int = 0, *, inductor: bool = False) -> Iterator[tuple[int, Problem]]:
    """Numbered random problems; each follows from the seed, its number and what may be drawn."""
    for number in range(first, first + count):
        yield number, random_problem(random.Random(f"{seed}/{number}").choice, inductor=inductor)


def verdict(problem: Problem) -> tuple[str, str]:
    """'agrees', 'invalid', 'refused ...' or 'FAILS ...', and what there is to say."""
    try:
        return "agrees", f"{check(problem):.3g}"
    except Invalid as error:
        return "invalid", str(error)
    except RampdeError as error:
        kind = type(error).__name__
        fails = isinstance(error, (errors.RewriteError, errors.RewriteMismatchError, errors.CheckError))
        return f"{'FAILS' if fails else 'refused'} {kind}", str(error)
    except Exception as error:
        text = "".join(traceback.format_exception(error)[-4:])
        return f"FAILS {type(error).__name__}", text if not isinstance(error, Disagreement) else str(error)


def minimised(problem: Problem, kind: str) -> Problem:
    """A simpler problem with the same verdict: one field after the other at its default, or shorter."""
    again = True
    while again:
        again = False
        for candidate in _simpler(problem):
            if verdict(candidate)[0] == kind:
                problem, again = candidate, True
                break
    return problem


def _simpler(problem: Problem) -> Iterator[Problem]:
    plain = Problem()
    if problem.a != plain.a:
        yield dataclasses.replace(problem, a=plain.a, b=plain.b, c=plain.c)
        yield dataclasses.replace(problem, a=problem.a[:-1], b=problem.b[1:], c=problem.c[:-1])
    for field in dataclasses.fields(problem):
        if field.name not in ("a", "b", "c", "layers", "space") and getattr(problem, field.name) != field.default:
            yield dataclasses.replace(problem, **{field.name: field.default})
    if problem.steps > 1:
        yield dataclasses.replace(problem, steps=problem.steps - 1)
    if len(problem.layers) > 1:
        for i in range(len(problem.layers)):
            yield dataclasses.replace(problem, layers=problem.layers[:i] + problem.layers[i + 1 :])
    if problem.space != plain.space:
        yield dataclasses.replace(problem, space=plain.space, layers=plain.layers)


def main() -> None:
    """The long run."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--inductor", action="store_true", help="compile a small share by Inductor, which takes long")
    parser.add_argument("--minimise", action="store_true", help="simplify every failure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    largest = 0.0
    begin = time.perf_counter()
    drawn = cases(arguments.cases, arguments.seed, arguments.first, inductor=arguments.inductor)
    for number, problem in drawn:
        kind, text = verdict(problem)
        counts[kind] += 1
        largest = max(largest, float(text)) if kind == "agrees" else largest
        if kind != "agrees":
            print(f"case {number}: {kind}\n  {problem}\n  {text}", flush=True)
            if arguments.minimise and kind.startswith("FAILS"):
                print(f"  simplest: {minimised(problem, kind)}", flush=True)
        if sum(counts.values()) % 20 == 0:
            seconds = (time.perf_counter() - begin) / sum(counts.values())
            share = f"largest error {largest:.2g} of {FACTOR}"
            print(f"{sum(counts.values())} cases, {seconds:.2f} s each: {dict(counts)}, {share}", flush=True)
    raise SystemExit(any(kind.startswith("FAILS") for kind in counts))


if __name__ == "__main__":
    main()
