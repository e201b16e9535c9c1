"""What was to be compiled in mixed precision and is not says so, once for each place; what is right does not."""

import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import rampde_fx
from rampde_fx import torchdiffeq
from rampde_fx.errors import FullPrecisionWarning
from tests.comparison import compiled
from tests.models import Euler, Midpoint, Solved

Y, T = torch.linspace(-1, 1, 20).view(4, 5), torch.linspace(0, 1, 4)
FP16 = torch.float16
OURS = {"backend": "rampde_fx", "options": {"compiler": "aot_eager"}}


def said(function, *args):
    """The texts of our warnings that a call gives; others of torch's own are left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
    return [str(warning.message) for warning in caught if issubclass(warning.category, FullPrecisionWarning)]


def in_silence(function, *args):
    """The result of a call that gives no warning at all, and breaks no graph."""
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = function(*args)
    assert not counters["graph_break"]
    return result


def step(y, dt):
    return y + dt * torch.tanh(y)


def without_marks(y, t):
    for i in range(len(t) - 1):
        y = step(y, t[i + 1] - t[i])
    return y


def with_marks(y, t):
    for _, dt in rampde_fx.steps(t):
        y = step(y, dt)
    return y


def solved(y, t):
    return rampde_fx.odeint(lambda t, y: torch.tanh(y), y, t, method="midpoint")[-1]


def solved_adaptively(y, t):
    return rampde_fx.odeint(lambda t, y: torch.tanh(y), y, t, method="bosh3", rtol=1e-2, atol=1e-3)[-1]


def printing(y, t):
    print(end="")  # a graph break
    return with_marks(y, t)


def printing_in_the_loop(y, t):
    for _, dt in rampde_fx.steps(t):
        y = step(y, dt)
        print(end="")
    return y


def leaving(y, t):
    for _, dt in rampde_fx.steps(t):
        y = step(y, dt)
        if y.norm() > 100:
            break
    return y


class Unmarked(nn.Module):
    def forward(self, y, t):
        return without_marks(y, t)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("kind", ["function", "instance", "class", "in a larger function"])
def test_a_target_without_a_marked_loop(kind, fullgraph):
    @rampde_fx.mixed_precision(dtype=torch.float16)
    def fresh(y, t):  # a target of this test's own
        return without_marks(y, t)

    def larger(y, t):
        return 2 * fresh(y + 1, t).sum()

    @rampde_fx.mixed_precision(dtype=torch.float16)
    class OfItsOwn(Unmarked):
        pass

    instance = rampde_fx.mixed_precision(Unmarked(), dtype=torch.float16)
    targets = {"function": fresh, "instance": instance, "class": OfItsOwn(), "in a larger function": larger}
    function = torch.compile(targets[kind], fullgraph=fullgraph, **OURS)
    (text,) = said(function, Y, T)
    assert "no marked loop in it" in text and "test_full_precision.py" in text
    assert ("Unmarked.forward" if kind in ("instance", "class") else "fresh") in text
    assert said(function, Y, T) == []  # nothing is compiled


def test_a_target_without_a_marked_loop_behind_a_graph_break():
    @rampde_fx.mixed_precision(dtype=torch.float16)
    def fresh(y, t):
        print(end="")
        return without_marks(y, t)

    (text,) = said(torch.compile(fresh, **OURS), Y, T)
    assert "fresh" in text and "no marked loop in it" in text


def test_the_advice_of_a_target_without_a_marked_loop_works():
    @rampde_fx.mixed_precision(dtype=torch.float16)
    def fresh(y, t):
        return with_marks(y, t)

    got = in_silence(torch.compile(fresh, **OURS), Y, T)
    assert 1e-6 < (got - without_marks(Y, T)).abs().max() < 1e-2


@pytest.mark.parametrize("backend", ["aot_eager", "eager", lambda graph_module, _: graph_module.forward])
@pytest.mark.parametrize("target", [with_marks, solved, solved_adaptively])
def test_another_backend(target, backend):
    if callable(backend) and target is not with_marks:
        pytest.skip("an odeint that a backend unknown to us does not rewrite is an error: test_odeint.py")
    (text,) = said(torch.compile(rampde_fx.mixed_precision(target, dtype=torch.float16), backend=backend), Y, T)
    assert "a backend that does not rewrite it" in text and "test_full_precision.py" in text
    assert said(torch.compile(target, backend=backend), Y, T) == []  # no mixed precision was asked for


def test_another_backend_and_an_odeint_with_a_policy_of_its_own():
    def own(y, t):
        return rampde_fx.odeint(lambda t, y: -y, y, t, method="rk4", policy=rampde_fx.PrecisionPolicy(torch.float16))[
            -1
        ]

    (text,) = said(torch.compile(own, backend="aot_eager"), Y, T)
    assert "a backend that does not rewrite it" in text


@pytest.mark.parametrize("target", [leaving, printing_in_the_loop])
def test_a_graph_break_in_the_loop_and_the_advice_followed_in_the_same_session(target):
    marked = rampde_fx.mixed_precision(target, dtype=torch.float16)
    (text,) = said(torch.compile(marked, **OURS), Y, T)
    assert "runs uncompiled" in text and "test_full_precision.py" in text and "torch._dynamo.reset()" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises((FullPrecisionWarning, RuntimeError)):
                torch.compile(marked, fullgraph=True, **OURS)(Y, T)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(marked, fullgraph=True, **OURS)(Y, T)


def test_fullgraph_after_a_graph_break_in_the_caller():
    marked = rampde_fx.mixed_precision(leaving, dtype=torch.float16)

    def caller(y, t):
        return 2 * marked(y.sin(), t).cos()

    assert len(said(torch.compile(caller, **OURS), Y, T)) == 1
    try:
        assert len(said(torch.compile(caller, fullgraph=True, **OURS), Y, T)) == 1
    except RuntimeError as error:
        assert "fullgraph" in str(error)


def test_a_break_in_the_velocity_of_an_odeint():
    def velocity(t, y):
        print(end="")
        return -y

    marked = rampde_fx.mixed_precision(
        lambda y, t: rampde_fx.odeint(velocity, y, t, method="rk4")[-1], dtype=torch.float16
    )
    try:
        assert said(torch.compile(marked, **OURS), Y, T)
    except rampde_fx.errors.UnsupportedLoopError as error:
        assert "graph break" in str(error) and error.where.startswith(f"{__file__}:")


@pytest.mark.parametrize("limit", ["recompile_limit", "accumulated_recompile_limit"])
def test_the_limit_of_recompilations(limit):
    marked = rampde_fx.mixed_precision(with_marks, dtype=torch.float16)
    function = torch.compile(marked, dynamic=False, **OURS)
    with torch._dynamo.config.patch({limit: 2}):
        assert said(function, Y, T) == said(function, Y[:3], T) == []
        assert "runs uncompiled" in said(function, Y[:2], T)[0]


def test_a_stance_that_does_not_compile_again():
    function = torch.compile(rampde_fx.mixed_precision(with_marks, dtype=torch.float16), **OURS)
    with torch.compiler.set_stance("eager_on_recompile"):
        assert "runs uncompiled" in said(function, Y, T)[0]


def test_a_loop_without_a_policy_is_said_under_our_backend_alone():
    assert "runs uncompiled" in said(torch.compile(leaving, **OURS), Y, T)[0]
    torch._dynamo.reset()
    assert said(torch.compile(leaving, backend="aot_eager"), Y, T) == []


def test_one_warning_for_each_place():
    function = torch.compile(rampde_fx.mixed_precision(leaving, dtype=torch.float16), **OURS)
    assert [len(said(function, Y + i, T)) for i in range(3)] == [1, 0, 0]


# Near misses: each of these is as it should be, and nothing is said.


@pytest.mark.parametrize("target", [without_marks, with_marks, solved, solved_adaptively, leaving])
def test_uncompiled_on_purpose(target):
    marked = rampde_fx.mixed_precision(target, dtype=torch.float16)
    in_silence(marked, Y, T)
    in_silence(torch.compiler.disable(marked), Y, T)
    with torch.compiler.set_stance("force_eager"):
        in_silence(torch.compile(marked, **OURS), Y, T)
    with torch._dynamo.config.patch(disable=True):
        in_silence(torch.compile(marked, **OURS), Y, T)


@pytest.mark.parametrize("target", [with_marks, solved, without_marks])
def test_a_disabled_part_of_a_compiled_function(target):
    marked = rampde_fx.mixed_precision(target, dtype=torch.float16)

    @torch.compiler.disable
    def reference(y, t):
        return marked(y, t)

    def both(y, t):
        return reference(y, t) + y.sin()

    assert said(torch.compile(both, **OURS), Y, T) == []


@pytest.mark.parametrize("target", [with_marks, solved, solved_adaptively])
@pytest.mark.parametrize("grad", [True, False])
def test_a_rewritten_loop(target, grad):
    y = Y.clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        got = in_silence(
            torch.compile(rampde_fx.mixed_precision(target, dtype=torch.float16), fullgraph=True, **OURS), y, T
        )
        got = in_silence(torch.compile(rampde_fx.mixed_precision(target, dtype=torch.float16), **OURS), y, T)
    assert 1e-7 < (got - target(Y, T)).abs().max() < 1e-2


@pytest.mark.parametrize("form", [Euler, lambda: Solved(method="rk4")])
def test_a_rewritten_module(form):
    in_silence(compiled(form(), FP16), Y, T)


def test_a_loop_behind_a_graph_break():
    function = torch.compile(rampde_fx.mixed_precision(printing, dtype=torch.float16), **OURS)
    assert said(function, Y, T) == []
    assert (function(Y, T) - with_marks(Y, T)).abs().max() > 1e-6


def test_helpers_beside_the_loop():
    @torch.compile(**OURS)
    def helper(y):
        return y.exp()

    flow = torch.compile(rampde_fx.mixed_precision(with_marks, dtype=torch.float16), **OURS)

    def loss(y, t):
        return helper(flow(helper(y), t)).sum()

    in_silence(loss, Y, T)


def test_a_target_of_two_graphs_one_of_them_without_a_loop():
    def parted(y, t):
        y = with_marks(y, t)
        print(end="")
        return y.sin()

    assert said(torch.compile(rampde_fx.mixed_precision(parted, dtype=torch.float16), **OURS), Y, T) == []


def a_loop(velocity, y, t):
    for _, dt in rampde_fx.steps(t):
        y = y + dt * velocity(y)
    return y


@pytest.mark.parametrize(
    "solve",
    [
        a_loop,
        lambda velocity, y, t: rampde_fx.odeint(lambda t, y: velocity(y), y, t, method="midpoint")[-1],
        lambda velocity, y, t: rampde_fx.odeint(lambda t, y: velocity(y), y, t, rtol=1e-2, atol=1e-3)[-1],
        lambda velocity, y, t: torchdiffeq.odeint(lambda t, y: velocity(y), y, t, rtol=1e-2, atol=1e-3)[-1],
    ],
    ids=["steps", "fixed", "adaptive", "torchdiffeq"],
)
def test_a_velocity_that_is_marked_as_well(solve):
    """It is rewritten with the loop."""
    net = rampde_fx.mixed_precision(nn.Linear(5, 5), dtype=FP16)
    model = rampde_fx.mixed_precision(lambda y, t: solve(lambda y: torch.tanh(net(y)), y, t), dtype=FP16)
    in_silence(torch.compile(model, fullgraph=True, **OURS), Y, T)
    report = rampde_fx.explain(model, Y, T)
    assert all(loop.evaluations for loop in report.loops) and "in float16" in str(report)


def test_a_target_in_a_target():
    """The inner one has the loop; the outer one is its owner too."""
    inner = rampde_fx.mixed_precision(with_marks, dtype=torch.float16)
    outer = rampde_fx.mixed_precision(lambda y, t: inner(y, t).sin(), dtype=torch.float16)
    broken = rampde_fx.mixed_precision(lambda y, t: (print(end=""), inner(y, t).sin())[1], dtype=torch.float16)
    in_silence(torch.compile(outer, fullgraph=True, **OURS), Y, T)
    assert said(torch.compile(broken, **OURS), Y, T) == []


def test_a_loop_in_a_checkpoint():
    marked = rampde_fx.mixed_precision(
        lambda y, t: torch.utils.checkpoint.checkpoint(with_marks, y, t, use_reentrant=False), dtype=torch.float16
    )
    in_silence(torch.compile(marked, fullgraph=True, **OURS), Y.clone().requires_grad_(), T)


def test_a_marked_target_in_a_checkpoint():
    inner = rampde_fx.mixed_precision(with_marks, dtype=torch.float16)

    def loss(y, t):
        return torch.utils.checkpoint.checkpoint(inner, y, t, use_reentrant=False).square().sum()

    y = Y.clone().requires_grad_()
    (got,) = torch.autograd.grad(in_silence(torch.compile(loss, fullgraph=True, **OURS), y, T), y)
    (wanted,) = torch.autograd.grad(with_marks(y, T).square().sum(), y)
    assert 1e-6 < (got - wanted).norm() / wanted.norm() < 2.5e-3


def test_a_target_in_a_checkpoint_that_breaks_is_said():
    inner = rampde_fx.mixed_precision(printing, dtype=torch.float16)

    def loss(y, t):
        return torch.utils.checkpoint.checkpoint(inner, y, t, use_reentrant=False).square().sum()

    assert "runs uncompiled" in said(torch.compile(loss, **OURS), Y.clone().requires_grad_(), T)[0]


def test_explain():
    for target in (without_marks, with_marks, solved):
        assert in_silence(rampde_fx.explain, rampde_fx.mixed_precision(target, dtype=torch.float16), Y, T) is not None


def test_a_midpoint_model_whose_times_are_moved():
    model = compiled(Midpoint(), FP16)
    in_silence(model, Y, T)
    in_silence(model, Y, T * 2)


WEIGHT = torch.eye(5) - 0.3
OTHER = torch.ones(4, 5)


def decaying(y, t):
    for _, dt in rampde_fx.steps(t):
        y = y - dt * y
    return y


def normalised(y, t):
    for _, dt in rampde_fx.steps(t):
        y = y + dt * torch.softmax(y, -1)
    return y


def of_another(y, t):
    """One step that adds to another tensor: what is evaluated depends on no state."""
    for _, dt in rampde_fx.steps(t[:2]):
        y = OTHER + dt * torch.tanh(y @ WEIGHT)
    return y


@pytest.mark.parametrize("target", [decaying, normalised, of_another])
def test_a_loop_in_which_nothing_is_left_for_low_precision(target):
    function = compiled(target, torch.bfloat16)
    (warning,) = said(function, Y, T)
    assert "nothing in a marked loop is evaluated in torch.bfloat16" in warning and "test_full_precision.py" in warning
    (loop,) = rampde_fx.explain(rampde_fx.mixed_precision(target, dtype=torch.bfloat16), Y, T).loops
    assert "nothing of the loop is evaluated in bfloat16" in loop.notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_policy_that_asks_for_no_low_precision_is_not_warned_of(dtype):
    in_silence(compiled(decaying, dtype), Y, T)
