"""odeint with adaptive steps: tolerances, output times, gradients, what is refused; compiled against uncompiled."""

import itertools
import linecache
import math
import re
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

import rampde_fx
from rampde_fx import errors
from rampde_fx.passes import emit_search
from rampde_fx.runtime import step_control
from rampde_fx.solvers.tableau import METHODS, ButcherTableau
from tests import counting, models, oscillators
from tests.comparison import gradients, relative_errors
from tests.golden import printed
from tests.models import Solved, Velocity
from tests.test_odeint import compiled

ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
INTERPOLATING = [name for name, tableau in METHODS.items() if tableau.interpolates]


def decay(t, y):
    return -y * torch.cos(t)


def exact(t):
    return torch.exp(-torch.sin(t))


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("end", [4.0, -4.0])
def test_the_error_follows_the_tolerance(method, end):
    y0 = torch.ones(2, dtype=torch.float64)
    found = {
        2: [],
        5: [],
    }  # by the number of outputs: at its outputs dopri8 ends a step, and is more accurate than asked
    for outputs, tolerance in itertools.product(found, (1e-4, 1e-6, 1e-9)):
        t = torch.linspace(0, end, outputs, dtype=torch.float64)
        y = rampde_fx.odeint(decay, y0, t, method=method, rtol=tolerance, atol=tolerance)
        found[outputs].append((y - exact(t)[:, None]).abs().max().item())
        # A sum of local errors; the controller aims each at 0.9^q of the tolerance. torchdiffeq's: up to 3,000 times.
        assert found[outputs][-1] < 30 * tolerance
    assert found[2][0] > 5 * found[2][1] > 25 * found[2][2]


def test_steps_add_up_to_the_interval_in_float32_times():
    """y turns by 300 radians; steps whose sizes are not those of their rounded starts would miss 7e-6 of them."""
    y = rampde_fx.odeint(
        lambda t, y: torch.stack([y[1], -y[0]]),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        torch.tensor([0.0, 300.0]),
        method="dopri8",
        rtol=1e-9,
        atol=1e-9,
    )
    wanted = torch.tensor([math.cos(300), -math.sin(300)], dtype=torch.float64)
    assert (y[-1] - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("method", ADAPTIVE)
def test_no_stage_is_evaluated_twice(method):
    """A step shares its first stage with the one before (FSAL), or with itself after a rejection."""
    calls, counted = [], []

    def velocity(t, y):
        calls.append(t)
        return decay(t, y)

    y0, t = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 4.0], dtype=torch.float64)
    judge = step_control.judge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_control, "judge", lambda *args: counted.append(judge(*args)) or counted[-1])
        rampde_fx.odeint(velocity, y0, t, method=method, rtol=1e-6, atol=1e-6, options={"first_step": 2.0})
    assert not counted[0][0]  # the first step is rejected
    tableau, accepted = METHODS[method], sum(bool(counts) for counts, _ in counted)
    own_first_stages = 1 if tableau.fsal else accepted
    assert len(calls) == own_first_stages + (tableau.stages - 1) * len(counted)


def test_steps_grow_where_the_solution_is_smooth():
    times = []

    def bump(t, y):
        times.append(t.item())
        return torch.exp(-100 * (t - 1) ** 2) * torch.ones_like(y)

    y = rampde_fx.odeint(
        bump, torch.zeros(1).double(), torch.tensor([0.0, 10.0]).double(), method="tsit5", options={"first_step": 0.01}
    )
    assert abs(y[-1].item() - math.sqrt(math.pi) / 10) < 1e-6
    assert sum(0.5 < t < 1.5 for t in times) > 5 * sum(3 < t < 10 for t in times)


def tried(monkeypatch, run):
    """The start and the size of every step that a solver tries."""
    found, propose = [], step_control.propose

    def proposed(*args):
        trial = propose(*args)
        found.append((trial.t.item(), trial.dt.item()))
        return trial

    with monkeypatch.context() as patch:
        patch.setattr(step_control, "propose", proposed)
        run()
    return found


@pytest.mark.parametrize("method", INTERPOLATING)
@pytest.mark.parametrize("end", [4.0, -4.0])
def test_the_steps_do_not_depend_on_the_output_times(method, end, monkeypatch):
    y0, ends = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, end], dtype=torch.float64)
    many = torch.linspace(0, end, 1001, dtype=torch.float64)
    solutions = []

    def solve(t):
        solutions.append(rampde_fx.odeint(decay, y0, t, method=method, rtol=1e-6, atol=1e-6))

    assert tried(monkeypatch, lambda: solve(ends)) == tried(monkeypatch, lambda: solve(many))
    assert torch.equal(solutions[0][-1], solutions[1][-1])
    assert (solutions[1] - exact(many)[:, None]).abs().max() < 20e-6


def test_a_method_that_does_not_interpolate_ends_steps_at_the_output_times(monkeypatch):
    y0, t = torch.ones(2, dtype=torch.float64), torch.linspace(0, 4, 9, dtype=torch.float64)
    steps = tried(monkeypatch, lambda: rampde_fx.odeint(decay, y0, t, method="dopri8", rtol=1e-6, atol=1e-6))
    assert {0.5 * i for i in range(9)} <= {round(start, 12) for start, _ in steps} | {4.0}


@pytest.mark.parametrize(
    ("method", "as_compiled"), [*((method, False) for method in INTERPOLATING), ("bosh3", True), ("dopri5", True)]
)
def test_outputs_cost_no_evaluations(method, as_compiled):
    counts = []
    for points in (2, 1001):
        model = Solved(lambda t, y: counting.counted(decay(t, y)), method=method, rtol=1e-4, atol=1e-4)
        run = compiled(model, compiler="eager") if as_compiled else model
        y0, t = torch.ones(2, requires_grad=True), torch.linspace(0, 4, points)
        run(y0, t)
        counting.calls.clear()
        run(y0, t)
        counts.append(len(counting.calls))
    assert counts[0] > 30
    assert counts[1] == counts[0]


@pytest.mark.parametrize(
    ("method", "as_compiled", "end"),
    [
        *((method, False, end) for method in INTERPOLATING for end in (2.0, -2.0)),
        *((method, True, 2.0) for method in INTERPOLATING),
        ("bosh3", True, -2.0),
    ],
)
def test_gradients_between_the_ends_of_steps_in_closed_form(method, as_compiled, end):
    """y' = -a y cos t from y(0) = y0: of an output, dy/dy0, dy/da and, of its own time, the velocity."""
    rate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    model = Solved(lambda t, y: -rate * y * torch.cos(t), method=method, rtol=1e-8, atol=1e-8)
    run = compiled(model, torch.float64) if as_compiled else model
    y0 = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0, end, 41, dtype=torch.float64, requires_grad=True)
    y = run(y0, t)
    wanted = torch.exp(-0.7 * torch.sin(t.detach()))
    for i in (1, 17, 39):
        of_y0, of_t, of_rate = torch.autograd.grad(y[i, 0], (y0, t, rate), retain_graph=True)
        close = dict(rtol=1e-5, atol=1e-6)  # a derivative of the interpolant is less accurate than itself
        torch.testing.assert_close(of_y0, torch.stack([wanted[i], torch.zeros_like(wanted[i])]), **close)
        torch.testing.assert_close(of_rate, -torch.sin(t[i]).detach() * wanted[i], **close)
        velocity = -0.7 * torch.cos(t[i]).detach() * wanted[i]
        assert of_t[i].item() == pytest.approx(velocity.item(), abs=1e-4)
        others = torch.arange(41)[1:-1] != i
        assert (of_t[1:-1][others] == 0).all()


FORMS = {
    "nested": ({"a": torch.ones(3), "b": (torch.tensor(0.5),)}, lambda t, y: {"a": -y["a"] * y["b"][0], "b": (t * t,)}),
    "scalar": (torch.tensor(0.5), decay),
    "empty": (torch.ones(0, 3), decay),
    "the state itself": (torch.ones(3), lambda t, y: y),
    "from outside": (torch.ones(3), lambda t, y: OUTSIDE.to(y.dtype)),
    "a jump": (torch.ones(3), lambda t, y: torch.where(t > 0.777, y, -y)),
}
OUTSIDE = torch.tensor([0.5, -1.0, 2.0])


@pytest.mark.parametrize(
    ("form", "method"),
    [*((form, "bosh3") for form in FORMS), ("nested", "tsit5"), ("a jump", "tsit5"), ("scalar", "dopri8")],
)
def test_compiled_outputs_of_any_state_and_velocity(form, method):
    y0, velocity = FORMS[form]
    y0 = pytree.tree_map(torch.Tensor.double, y0)
    model = Solved(velocity, method=method, rtol=1e-5, atol=1e-5)
    run, t, found = compiled(model, torch.float64), torch.linspace(0, 2, 9, dtype=torch.float64), []
    for solve in (run, model):
        leaves, structure = pytree.tree_flatten(y0)
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        times = t.clone().requires_grad_()
        outputs = pytree.tree_leaves(solve(pytree.tree_unflatten(leaves, structure), times))
        loss = sum((y.square().reshape(9, -1).sum(1) * torch.arange(9)).sum() for y in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, (*leaves, times))])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("as_compiled", [False, True], ids=["uncompiled", "compiled"])
@pytest.mark.parametrize("method", ["bosh3", "dopri5"])
def test_what_was_not_reached_has_no_part_in_gradients(method, as_compiled):
    """y = 1 / (1 / y0 - t) up to t = 1: of y(0.3) and y(0.8) the gradients are right, and all are finite."""
    options = {"status": True, "max_steps": 1000}
    model = Solved(lambda t, y: y * y, method=method, rtol=1e-7, atol=1e-7, options=options)
    run = compiled(model, torch.float64) if as_compiled else model
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.3, 0.8, 1.5, 2.0], dtype=torch.float64, requires_grad=True)
    solution, status = run(y0, t)
    assert status in (step_control.TOO_MANY_STEPS, step_control.STEP_TOO_SMALL)
    assert solution[:3].isfinite().all() and solution[3:].isnan().all()
    of_y0, of_t = torch.autograd.grad(solution[1:3, 0].sum(), (y0, t))
    torch.testing.assert_close(
        of_y0, torch.tensor([1 / 0.7**2 + 1 / 0.2**2, 0], dtype=torch.float64), rtol=1e-4, atol=0
    )
    assert of_t[1].item() == pytest.approx(1 / 0.7**2, rel=1e-3)
    assert of_t.isfinite().all()


def test_two_times_store_and_evaluate_what_they_did():
    """No velocity leaves a step, and no state but the last, where nothing lies between the ends."""
    model = Solved(Velocity(), method="dopri5", rtol=1e-3, policy=rampde_fx.PrecisionPolicy(torch.float16))
    outputs = []
    for points in (2, 3):
        _, loop = rampde_fx.explain(model, torch.randn(3, 5, requires_grad=True), torch.linspace(0, 1, points)).loops
        assert loop.evaluations == 6
        outputs.append(len(loop.step.graph.output_node().args[0]))
    # The next state, the count of what underflows, what is stored; and the state, the first velocity, the quartic term.
    assert outputs == [3, 6]


@pytest.mark.parametrize("method", ADAPTIVE)
def test_gradcheck_of_the_state_and_the_times(method):
    y0 = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    tolerance = 1e-8 if method == "bosh3" else 1e-11
    options = {"max_steps": 20000}
    assert torch.autograd.gradcheck(
        lambda y, t: rampde_fx.odeint(decay, y, t, method=method, rtol=tolerance, atol=tolerance, options=options),
        (y0, t),
        atol=1e-4 if method == "bosh3" else 1e-6,
    )


@pytest.mark.parametrize("method", ["bosh3", "dopri5"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_compiled_it_is_what_it_is_uncompiled(method, dtype):
    torch.manual_seed(0)
    u = max(torch.finfo(dtype).eps / 2, 2.0**-24)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 2 * u)
    model = Solved(method=method, rtol=tolerance, atol=tolerance)
    y, t = torch.randn(3, 5), torch.linspace(0, 2, 4)
    if dtype == torch.float64:
        model, y, t = model.double(), y.double(), t.double()
    wanted = gradients(model, model, y, t)
    got = relative_errors(gradients(compiled(model, dtype), model, y, t), wanted)
    # Steps differ where roundings do, within the tolerance.
    assert max(got) < (1e-10 if dtype == torch.float64 else 10 * max(u, tolerance))


HEUN_EULER = ButcherTableau(a=[[], [1]], b=[0.5, 0.5], c=[0, 1], order=2, b_error=[1, 0], order_error=1)
FURTHER = {
    "tsit5": dict(method="tsit5"),
    "dopri8": dict(method="dopri8"),
    "a tableau of one's own": dict(method=HEUN_EULER),
    "segments of three steps": dict(method="bosh3", checkpoint=3),
    "kept activations": dict(method="bosh3", checkpoint="none"),
}


@pytest.mark.parametrize("case", FURTHER)
def test_further_methods_and_policies(case):
    arguments = dict(FURTHER[case])
    policy = {"checkpoint": arguments.pop("checkpoint", "step")}
    model = Solved(Velocity().double(), rtol=1e-5, atol=1e-5, **arguments)
    y, t = torch.randn(3, 5).double(), torch.tensor([0.0, 0.5, 2.0]).double()
    wanted = gradients(model, model, y, t)
    assert max(relative_errors(gradients(compiled(model, torch.float64, **policy), model, y, t), wanted)) < 1e-10


@pytest.mark.parametrize("options", [None, {"step_size": 0.3}], ids=str)
def test_one_graph_without_fullgraph(options):
    """Dynamo may capture the number of steps though its capture began without scalars; explain sees both loops."""
    solved = Solved(method="bosh3" if options is None else "heun3", options=options)
    model = rampde_fx.mixed_precision(solved, dtype=torch.float32)
    run = torch.compile(model, backend="rampde_fx", options={"compiler": "eager"})
    y, t = torch.randn(3, 5), torch.tensor([0.0, 0.5, 2.0])
    counters.clear()
    for times in (t, t * 1.5):
        torch.testing.assert_close(run(y, times), model(y, times))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    loops = rampde_fx.explain(model, y, t).loops
    assert [loop.emitted for loop in loops] == ["search", "scan"][options is not None :]
    assert all(loop.steps is None for loop in loops)


def test_a_nested_state_and_a_parameter_outside_of_the_velocity():
    rate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    y0 = {"a": torch.randn(3).double().requires_grad_(), "b": (torch.tensor(0.5).double().requires_grad_(),)}
    t = torch.tensor([0.0, 1.0]).double()

    def velocity(t, y):
        return {"a": -rate * y["a"] * y["b"][0], "b": (rate * torch.cos(t),)}

    @rampde_fx.mixed_precision(dtype=torch.float64)
    def solve(y0, t):
        return rampde_fx.odeint(velocity, y0, t, method="bosh3", rtol=1e-5, atol=1e-5)

    run = torch.compile(solve, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True)
    got, wanted = run(y0, t), solve(y0, t)
    assert got["b"][0].shape == (2,)
    torch.testing.assert_close(got, wanted)
    leaves = (*pytree.tree_leaves(y0), rate)
    found = [
        torch.autograd.grad(sum(y.sum() for y in pytree.tree_leaves(solution)), leaves) for solution in (got, wanted)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd], ids=lambda of: of.__name__)
def test_a_velocity_with_an_exact_trace(jacobian):
    """Its transforms are in a search, which runs under no_grad, and in the loop behind it."""
    velocity = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def func(t, state):
        matrix = torch.func.vmap(jacobian(velocity))(state[0])
        return velocity(state[0]), -matrix.diagonal(dim1=1, dim2=2).sum(1)

    @rampde_fx.mixed_precision(dtype=torch.float64)
    def solve(z, t):
        return rampde_fx.odeint(func, (z, torch.zeros(3).double()), t, method="bosh3", rtol=1e-4, atol=1e-4)

    z, t = torch.randn(3, 2).double().requires_grad_(), torch.tensor([0.0, 1.0]).double()
    leaves, found = [z, *velocity.parameters()], []
    for run in (torch.compile(solve, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True), solve):
        state, change = run(z, t)
        loss = (state[-1].square().sum() - change[-1]).sum()
        found.append([state, change, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*found)


def test_one_compilation_serves_any_number_of_steps(monkeypatch):
    torch._dynamo.reset()
    rewritten = []
    rewrite = rampde_fx.backend.rewrite
    monkeypatch.setattr(rampde_fx.backend, "rewrite", lambda graph: rewritten.append(1) or rewrite(graph))
    model = Solved(decay, method="bosh3", rtol=1e-4, atol=1e-4)
    run = compiled(model)
    y0 = torch.ones(2)
    for end in (0.5, 3.0, 12.0):
        t = torch.tensor([0.0, end])
        torch.testing.assert_close(run(y0, t), model(y0, t), rtol=1e-4, atol=1e-4)
    assert len(rewritten) == 1


def test_what_is_stored_are_the_steps_that_count():
    saved = []
    model = Solved(Velocity(), method="bosh3", rtol=1e-3, atol=1e-3)
    run = compiled(model, torch.float16)
    y, t = torch.randn(64, 5, requires_grad=True), torch.tensor([0.0, 1.0])
    run(y, t)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        run(y, t)
    stacks = [x for x in saved if x.dtype == torch.float16 and x.shape[1:] == y.shape]
    assert len(stacks) == 1 and 2 < len(stacks[0]) < 50


def test_the_error_is_estimated_in_the_dtype_of_the_state():
    model = Solved(Velocity(), method="bosh3", rtol=1e-3, atol=1e-3, policy=rampde_fx.PrecisionPolicy(torch.float16))
    search, loop = rampde_fx.explain(model, torch.randn(3, 5), torch.tensor([0.0, 1.0])).loops
    assert (search.emitted, search.evaluations, search.adjoint) == ("search", 3, None)
    assert (loop.policy, loop.evaluations) == (search.policy, 3)
    _, _, error, counted = search.step.graph.output_node().args[0]
    assert counted.meta["val"].dtype == torch.int64  # entries that vanish where they enter in float16
    assert error.meta["val"].dtype == torch.float32 and error.meta["role"] == "state"
    text = printed(search.step)
    assert "f32[3, 5]" in text and len(re.findall(r"self\.velocity_\d\(", text)) == 3


@pytest.fixture
def unwarned():
    """No tolerance has been warned of."""
    emit_search._warn_once.cache_clear()


def explained(dtype, **arguments):
    """Rewrites an adaptive odeint, without compiling it."""
    model = Solved(lambda t, y: -y, method="bosh3", policy=rampde_fx.PrecisionPolicy(dtype), **arguments)
    return rampde_fx.explain(model, torch.randn(3, 5), torch.tensor([0.0, 0.1]))


def test_too_tight_a_tolerance_is_said_once(unwarned):
    said = r"rtol=1e-05 and atol=1e-05 of stages in torch.float16.*for states above 0.02.*write rtol=0.001"
    with pytest.warns(UserWarning, match=said) as warned:
        explained(torch.float16, rtol=1e-5, atol=1e-5)
    assert warned[0].filename == models.__file__
    assert "rampde_fx.odeint(" in linecache.getline(models.__file__, warned[0].lineno)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explained(torch.float16, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="rtol=2e-05"):
        explained(torch.float16, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, rtol, atol", [(torch.float32, 1e-5, 1e-5), (torch.float16, 0.0, 1e-2), (torch.float16, 1e-3, 0.0)], ids=str
)
def test_a_tolerance_that_the_velocity_reaches_is_not_warned_of(dtype, rtol, atol, unwarned):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explained(dtype, rtol=rtol, atol=atol)


@pytest.mark.parametrize("as_compiled", [False, True], ids=["uncompiled", "compiled"])
def test_a_singularity_ends_in_an_error(as_compiled):
    model = Solved(lambda t, y: y * y, method="dopri5", rtol=1e-4, atol=1e-4)
    run = compiled(model) if as_compiled else model
    with pytest.raises(errors.StepSizeError, match="t = 1"):
        run(torch.ones(1), torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize("as_compiled", [False, True], ids=["uncompiled", "compiled"])
def test_too_many_steps_end_in_an_error(as_compiled):
    model = Solved(decay, method="bosh3", rtol=1e-6, atol=1e-6, options={"max_steps": 10})
    run = compiled(model) if as_compiled else model
    with pytest.raises(errors.StepSizeError, match="with 10 steps"):
        run(torch.ones(1), torch.tensor([0.0, 2.0]))
    model.arguments["options"] = {"max_steps": 10, "status": True}
    solution, status = run(torch.ones(1), torch.tensor([0.0, 1e-3, 2.0]))
    assert status == step_control.TOO_MANY_STEPS
    assert solution[:2].isfinite().all() and solution[2].isnan()


NOT_FINITE = {
    "velocity": (lambda t, y: y * math.nan, 1.0, {}),
    "velocity, at a given first step": (lambda t, y: 1 / t + y, 1.0, {"first_step": 0.1}),
    "state": (decay, math.nan, {}),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_a_start_that_is_not_finite_is_no_search(case, monkeypatch):
    velocity, start, options = NOT_FINITE[case]
    y0, t = torch.full((1,), start), torch.tensor([0.0, 2.0])
    monkeypatch.delattr(step_control, "propose")  # no step is tried
    with pytest.raises(errors.StepSizeError, match="not finite at t = 0"):
        rampde_fx.odeint(velocity, y0, t, method="dopri5", options=options)
    solution, status = rampde_fx.odeint(velocity, y0, t, method="dopri5", options={**options, "status": True})
    assert status == step_control.NOT_FINITE and solution[1:].isnan().all()


@pytest.mark.parametrize("points", [2, 4])
def test_a_start_that_is_not_finite_has_a_derivative_that_is_none(points):
    """With a status, backward() runs: NaN, compiled or not, where no step counts."""
    weight = torch.ones(1, requires_grad=True)
    model = Solved(lambda t, y: weight * y, method="bosh3", options={"status": True})
    y, t = torch.full((1,), math.nan), torch.linspace(0, 1, points)
    for run in (model, compiled(model, compiler="eager")):
        assert torch.autograd.grad(run(y, t)[0].sum(), weight)[0].isnan().all()


@pytest.mark.parametrize("options", [{}, {"status": True}], ids=str)
def test_compiled_a_start_that_is_not_finite_is_no_search(options):
    run = compiled(Solved(lambda t, y: y * math.nan, method="bosh3", options=options), compiler="eager")
    if options:
        solution, status = run(torch.ones(1), torch.tensor([0.0, 2.0]))
        assert status == step_control.NOT_FINITE and solution[1:].isnan().all()
    else:
        with pytest.raises(errors.StepSizeError, match="not finite at t = 0"):
            run(torch.ones(1), torch.tensor([0.0, 2.0]))


def test_a_half_precision_state_is_judged_in_float32():
    """Its velocity over the tolerance is 500, and the square of that is inf in float16."""
    y0, t = torch.ones(2, dtype=torch.float16), torch.tensor([0.0, 4.0])
    y = rampde_fx.odeint(decay, y0, t, method="dopri5", rtol=1e-3, atol=1e-3)
    assert y.dtype == torch.float16
    assert (y[-1] - exact(t[-1])).abs().max() < 0.02


@pytest.mark.parametrize("speed", [1e11, 1e33])
def test_a_norm_beyond_the_range_of_float32(speed):
    """The velocity over atol is 1e20 or inf; a first step of size 0 would stay one."""
    y = rampde_fx.odeint(
        lambda t, y: torch.full_like(y, speed), torch.zeros(3), torch.tensor([0.0, 1.0]), method="dopri5"
    )
    torch.testing.assert_close(y[-1], torch.full((3,), speed))


def test_no_step_is_below_the_resolution_of_the_times():
    """Beside 1e7, float32 times are whole numbers."""
    calls = []

    def velocity(t, y):
        calls.append(t)
        return -y

    with pytest.raises(errors.StepSizeError, match="resolution of t at t = 1e"):
        rampde_fx.odeint(velocity, torch.ones(3), torch.tensor([1e7, 1e7 + 8]), method="bosh3")
    assert len(calls) < 20


def test_a_state_without_entries():
    y = rampde_fx.odeint(decay, torch.ones(0, 3), torch.tensor([0.0, 1.0, 2.0]), method="dopri5")
    assert y.shape == (3, 0, 3)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(5)], ids=["dropout", "batch_norm"])
def test_a_velocity_that_is_no_function_is_refused(layer):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, t, y):
            return self.layer(y)

    run = compiled(Solved(Noisy(), method="bosh3"))
    with pytest.raises(errors.UnsupportedLoopError, match="adaptive odeint") as caught:
        run(torch.randn(8, 5), torch.tensor([0.0, 1.0]))
    assert "self.layer(y)" in caught.value.where


BAD = {
    "negative": (dict(rtol=-1.0), "rtol=-1.0"),
    "infinite": (dict(atol=math.inf), "atol=inf"),
    "both zero": (dict(rtol=0.0, atol=0.0), "rtol=0.0 and atol=0.0"),
    "tensor": (dict(rtol=torch.tensor(1e-3)), "rtol=a float32 tensor of shape"),
    "unknown": (dict(options={"jump_t": 0.5}), "jump_t"),
    "no steps": (dict(options={"max_steps": 0}), "max_steps"),
    "half a step": (dict(options={"max_steps": 0.5}), "max_steps"),
    "safety above 1": (dict(options={"safety": 1.5}), "safety"),
    "first step of 0": (dict(options={"first_step": 0.0}), "first_step"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    arguments, message = BAD[case]
    with pytest.raises(errors.OptionError, match=message):
        rampde_fx.odeint(decay, torch.ones(1), torch.tensor([0.0, 1.0]), method="dopri5", **arguments)


@pytest.mark.parametrize("as_compiled", [False, True], ids=["uncompiled", "compiled"])
def test_by_option_a_failure_is_a_status(as_compiled):
    options = {"status": True, "max_steps": 100}
    model = Solved(lambda t, y: y * y, method="dopri5", rtol=1e-4, atol=1e-4, options=options)
    run = compiled(model) if as_compiled else model
    for t, status, reached in (([0.0, 0.5, 0.8], 1, 3), ([0.0, 0.5, 2.0], 3, 2), ([0.0, 1.5, 2.0], 3, 1)):
        solution, found = run(torch.ones(2), torch.tensor(t))
        assert found == status
        torch.testing.assert_close(solution[:reached, 0], 1 / (1 - torch.tensor(t)[:reached]), rtol=1e-3, atol=0)
        assert solution[reached:].isnan().all()


# Evaluations of torchdiffeq 0.2.5 by dopri5, at rtol 1e-3, 1e-6 and 1e-9 (python -m tests.benchmarks.evaluations).
THEIRS = {
    "van der Pol": (320, 902, 3074),
    "Lotka-Volterra": (212, 620, 2066),
    "stiff linear": (500, 614, 1442),
    "spiral network": (32, 80, 218),
}


@pytest.mark.parametrize("outputs", [2, 101])
@pytest.mark.parametrize("name", THEIRS)
def test_adaptive_steps_evaluate_as_often_as_those_of_torchdiffeq(name, outputs):
    velocity, y0, end = oscillators.problems()[name]
    t = torch.linspace(0, end, outputs, dtype=torch.float64)
    for rtol, theirs in zip((1e-3, 1e-6, 1e-9), THEIRS[name], strict=True):
        options = {"stats": True}
        with torch.no_grad():
            _, counted = rampde_fx.odeint(velocity, y0, t, rtol=rtol, atol=rtol / 100, method="dopri5", options=options)
        assert counted.evaluations <= 1.15 * theirs
