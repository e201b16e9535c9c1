"""odeint with fixed steps: uncompiled against closed forms, compiled against uncompiled."""

import math

import pytest
import torch
from torch import nn

import rampde_fx
from rampde_fx import errors
from rampde_fx.backend import rewrite
from rampde_fx.solvers.tableau import METHODS, ButcherTableau
from tests.comparison import gradients, relative_errors
from tests.models import Solved, Velocity


def compiled(model, dtype=torch.float32, compiler="aot_eager", **policy):
    model.arguments["policy"] = rampde_fx.PrecisionPolicy(velocity=dtype, **policy)
    return torch.compile(model, backend="rampde_fx", options={"compiler": compiler}, fullgraph=True)


@pytest.mark.parametrize("method", METHODS)
def test_the_error_falls_with_the_order_of_the_method(method):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    y0 = torch.ones(3, dtype=torch.float64)
    exact = torch.linalg.matrix_exp(matrix) @ y0
    counts = (2, 4) if METHODS[method].order == 8 else (16, 32)
    errors_ = [
        (
            rampde_fx.odeint(
                lambda t, y: matrix @ y, y0, torch.tensor([0.0, 1.0]).double(), method=method, options={"num_steps": n}
            )[-1]
            - exact
        ).norm()
        for n in counts
    ]
    slope = math.log2(errors_[0] / errors_[1])
    order = METHODS[method].order
    assert order - 0.3 < slope < order + (1.5 if order == 8 else 0.5)  # dopri8 is of order 9 but for 4e-9 on these


def test_steps_between_times_are_steps_of_a_finer_grid():
    velocity, y = Velocity(), torch.randn(3, 5)
    t = torch.tensor([0.0, 0.3, 1.0])
    fine = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.3 + 0.7 / 3, 0.3 + 1.4 / 3, 1.0])
    coarse = rampde_fx.odeint(velocity, y, t, method="rk4", options={"num_steps": 3})
    torch.testing.assert_close(coarse, rampde_fx.odeint(velocity, y, fine, method="rk4")[::3])


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_size_counts_from_the_first_time_and_interpolates(backward):
    """Steps from 0, 0.4, 0.8 to 1; the solution at 0.5 lies on the line between those at 0.4 and 0.8."""
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    t = 1 - t if backward else t
    grid = torch.tensor([0.0, 0.4, 0.8, 1.0], dtype=torch.float64)
    grid = 1 - grid if backward else grid

    def velocity(t, y):
        return torch.cos(t) - y

    y0 = torch.ones(2, dtype=torch.float64)
    got = rampde_fx.odeint(velocity, y0, t, method="euler", options={"step_size": 0.4})
    on_grid = rampde_fx.odeint(velocity, y0, grid, method="euler")
    wanted = torch.stack([on_grid[0], 0.75 * on_grid[1] + 0.25 * on_grid[2], on_grid[3]])
    torch.testing.assert_close(got, wanted)


def test_the_state_is_any_tree_of_tensors():
    y0 = {"a": torch.randn(4, 3), "b": (torch.randn(4), [torch.randn(())])}

    def velocity(t, y):
        a, (b, (c,)) = y["a"], y["b"]
        return {"a": -a * c, "b": (a.sum(1) - b, [torch.cos(t)])}

    t = torch.linspace(0, 1, 4)
    got = rampde_fx.odeint(velocity, y0, t, method="rk4")
    assert got["a"].shape == (4, 4, 3) and got["b"][0].shape == (4, 4) and got["b"][1][0].shape == (4,)
    torch.testing.assert_close(got["b"][1][0], y0["b"][1][0] + torch.sin(t), atol=1e-4, rtol=0)

    @rampde_fx.mixed_precision(dtype=torch.float32)
    def solve(y0, t):
        return rampde_fx.odeint(velocity, y0, t, method="rk4")

    also = torch.compile(solve, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True)(y0, t)
    torch.testing.assert_close(also, got)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_with_an_fp32_policy_it_is_what_it_is_uncompiled(method):
    torch.manual_seed(0)
    model = Solved(method=method, options={"num_steps": 1})
    y, t = torch.randn(3, 5), torch.linspace(1, 0, 4)
    wanted = gradients(model, model, y, t)
    assert max(relative_errors(gradients(compiled(model), model, y, t), wanted)) < 1e-6


@pytest.mark.parametrize("options", [{"num_steps": 2}, {"step_size": 0.4}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_compiled_steps_between_times(options, dtype):
    torch.manual_seed(0)
    model = Solved(options=options)
    y, t = torch.randn(3, 5), torch.linspace(0, 1, 4)
    wanted = gradients(model, model, y, t)
    bound = {torch.float32: 1e-6, torch.float16: 5 * 2.0**-11, torch.bfloat16: 5 * 2.0**-8}[dtype]
    got = relative_errors(gradients(compiled(model, dtype), model, y, t), wanted)
    assert max(error for i, error in enumerate(got) if i != 2) < bound
    assert got[2] < 8 * bound  # of t: a sum in which terms cancel


def test_compiled_steps_of_a_tableau_of_ones_own():
    kutta = ButcherTableau(a=[[], [0.5], [-1, 2]], b=[1 / 6, 2 / 3, 1 / 6], c=[0, 0.5, 1], order=3)
    model = Solved(method=kutta)
    y, t = torch.randn(3, 5), torch.linspace(0, 1, 4)
    wanted = gradients(model, model, y, t)
    assert max(relative_errors(gradients(compiled(model), model, y, t), wanted)) < 1e-6


def test_gradcheck_of_the_state_and_the_times():
    velocity = Velocity(dim=2, width=3).double()
    y = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
    model = Solved(velocity, method="bosh3", options={"num_steps": 1})
    assert torch.autograd.gradcheck(model, (y, t))
    assert torch.autograd.gradcheck(compiled(model, torch.float64), (y, t))


@pytest.fixture
def rewritten(monkeypatch):
    """How many nodes each graph has that was rewritten."""
    nodes = []
    monkeypatch.setattr(
        rampde_fx.backend, "rewrite", lambda graph: nodes.append(len(graph.graph.nodes)) or rewrite(graph)
    )
    return nodes


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "rk4"},
        {"method": "rk4", "options": {"step_size": 0.3}},
        {"method": "bosh3", "rtol": 1e-4, "atol": 1e-4},
    ],
    ids=str,
)
def test_forward_mode_derivatives_are_those_of_backpropagation(arguments):
    def solve(y0, t):
        return rampde_fx.odeint(lambda t, y: -y * torch.cos(t), y0, t, **arguments)

    point = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.0, 0.4, 1.0]).double()
    along = torch.tensor([0.3, -0.7]).double(), torch.tensor([0.1, 0.2, 0.3]).double()
    _, found = torch.func.jvp(solve, point, along)
    by_y0, by_t = torch.autograd.functional.jacobian(solve, point)
    torch.testing.assert_close(found, by_y0 @ along[0] + by_t @ along[1])


def test_another_number_of_times_recompiles_once(rewritten):
    model = Solved(method="midpoint")
    run = compiled(model)
    y = torch.randn(3, 5)
    for points in (8, 17, 40, 5):
        t = torch.linspace(0, 1, points)
        torch.testing.assert_close(run(y, t), model(y, t))
    assert len(rewritten) == 2
    assert rewritten[1] < rewritten[0] + 5  # the sizes


@pytest.mark.parametrize(
    "arguments",
    [{"method": "rk4"}, {"method": "rk4", "options": {"step_size": 0.3}}, {"method": "bosh3", "rtol": 1e-3}],
    ids=str,
)
def test_two_times_after_another_number(arguments, rewritten):
    """Two times are a program of their own: one step is no loop, and no state but the last is kept."""
    model = Solved(**arguments)
    run = compiled(model, compiler="eager")
    y = torch.randn(3, 5)
    for points in (5, 2, 9, 4, 2):
        t = torch.linspace(0, 1, points)
        wanted = gradients(model, model, y, t)
        assert max(relative_errors(gradients(run, model, y, t), wanted)) < 2e-6
    assert len(rewritten) == 3


def test_times_of_another_dtype_than_the_state():
    def velocity(t, y):
        assert t.dtype == torch.float32
        return t * y

    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    y = rampde_fx.odeint(velocity, torch.ones(3), t, method="rk4")
    assert y.dtype == torch.float32
    torch.testing.assert_close(y[-1], torch.full((3,), math.exp(0.5)))
    scalar = rampde_fx.odeint(velocity, torch.ones(()), t, method="rk4")
    assert scalar.dtype == torch.float32 and scalar.shape == (33,)


def test_gradients_reach_whatever_the_velocity_reads():
    scale, unused = nn.Parameter(torch.tensor(0.5)), nn.Linear(2, 2)
    model = Solved()

    def velocity(t, y):
        return scale * model.velocity(t, y)

    outer = Solved(velocity)
    outer.unused, outer.model, outer.scale = unused, model, scale
    y, t = torch.randn(3, 5), torch.linspace(0, 1, 4)
    outer(y, t).square().sum().backward()
    wanted = [p.grad.clone() for p in (scale, *model.velocity.parameters())]
    outer.zero_grad()
    compiled(outer)(y, t).square().sum().backward()
    torch.testing.assert_close([p.grad for p in (scale, *model.velocity.parameters())], wanted)
    assert all(p.grad is None or not p.grad.any() for p in unused.parameters())


def test_the_last_state_alone_collects_no_trajectory():
    model = Solved(policy=rampde_fx.PrecisionPolicy(velocity=torch.float16))
    t = torch.linspace(0, 1, 9)
    (last,) = rampde_fx.explain(lambda y: model(y, t)[-1], torch.randn(3, 5, requires_grad=True)).loops
    (whole,) = rampde_fx.explain(lambda y: model(y, t), torch.randn(3, 5, requires_grad=True)).loops
    outputs = [len(report.step.graph.output_node().args[0]) for report in (last, whole)]
    # The next state, the count of what underflows, what is stored; and the state of every step.
    assert outputs == [3, 4]
    assert last.steps == 8 and last.evaluations == 4
    assert "rampde_fx.odeint(self.velocity" in last.where


def test_its_own_policy_counts_and_not_the_surrounding_one():
    model = rampde_fx.mixed_precision(Solved(policy=rampde_fx.PrecisionPolicy(torch.bfloat16)), dtype=torch.float16)
    (own,) = rampde_fx.explain(model, torch.randn(3, 5), torch.linspace(0, 1, 4)).loops
    assert own.policy.velocity == torch.bfloat16
    del model.arguments["policy"]
    (surrounding,) = rampde_fx.explain(model, torch.randn(3, 5), torch.linspace(0, 1, 4)).loops
    assert surrounding.policy.velocity == torch.float16


def test_stages_share_one_velocity():
    model = Solved(method="dopri5", options={"num_steps": 1}, policy=rampde_fx.PrecisionPolicy(velocity=torch.float16))
    (report,) = rampde_fx.explain(model, torch.randn(3, 5), torch.linspace(0, 1, 9)).loops
    calls = [node.target for node in report.step.graph.nodes if node.op == "call_module"]
    assert calls == ["velocity_0"] * 6  # the seventh stage is for the error alone


def test_another_backend_runs_it_unrolled():
    model = Solved()
    y, t = torch.randn(3, 5), torch.linspace(0, 1, 3)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(y, t), model(y, t))


def test_a_backend_that_does_not_rewrite_is_given_plain_code():
    model, y, t = Solved(), torch.randn(3, 5), torch.linspace(0, 1, 3)
    run = torch.compile(model, backend=lambda graph_module, inputs: graph_module.forward, fullgraph=True)
    torch.testing.assert_close(run(y, t), model(y, t))


def test_without_a_policy_it_is_refused():
    run = torch.compile(Solved(), backend="rampde_fx", options={"compiler": "aot_eager"})
    with pytest.raises(errors.UnsupportedLoopError, match="without a policy"):
        run(torch.randn(3, 5), torch.linspace(0, 1, 3))


def test_a_velocity_may_draw_random_numbers_and_keep_statistics():
    torch.manual_seed(0)

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.dropout = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)

        def forward(self, t, y):
            return self.dropout(self.norm(self.linear(y)))

    model = Solved(Noisy())
    y, t = torch.randn(8, 5, requires_grad=True), torch.linspace(0, 1, 4)
    compiled(model)(y, t)[-1].sum().backward()
    assert model.velocity.norm.num_batches_tracked == 12
    assert y.grad.isfinite().all() and model.velocity.linear.weight.grad.abs().sum() > 0


Y, T = torch.ones(3), torch.linspace(0, 1, 3)
ADAPTIVE = {"method": "bosh3", "rtol": 1e-3}
FLOAT8 = torch.float8_e4m3fn
BAD = {
    "integers": (errors.StateError, "y0 holds a int64", dict(y0=torch.ones(3, dtype=torch.int64))),
    "half complex": (errors.StateError, "y0 holds a complex32", dict(y0=torch.ones(3, dtype=torch.complex32))),
    "float8": (errors.StateError, "y0 holds a float8", dict(y0=Y.to(FLOAT8))),
    "a number": (errors.StateError, "y0 holds a float", dict(y0=(Y, 1.0))),
    "nothing": (errors.StateError, "y0 holds no tensor", dict(y0=())),
    "one time": (errors.TimeGridError, "t is a float32 tensor of shape", dict(t=T[:1])),
    "times of ints": (errors.TimeGridError, "t is a int64 tensor", dict(t=torch.arange(3))),
    "times in float8": (errors.TimeGridError, "t is a float8", dict(t=T.to(FLOAT8))),
    "a list of times": (errors.TimeGridError, "t is a list", dict(t=[0.0, 1.0])),
    "times not monotone": (errors.TimeGridError, "not strictly monotone", dict(t=torch.tensor([0.0, 1.0, 0.5]))),
    "repeated times": (errors.TimeGridError, "not strictly monotone", dict(t=torch.tensor([0.0, 0.0, 0.5]))),
    "a distance beyond float32": (errors.TimeGridError, "longer than its dtype", dict(t=torch.tensor([-2e38, 2e38]))),
    "an infinite time": (errors.TimeGridError, "inf. is not finite", dict(t=torch.tensor([0.0, math.inf]))),
    "no such method": (errors.MethodError, "dopri8", dict(method="rk5")),
    "no such option": (errors.OptionError, "stepsize", dict(options={"stepsize": 0.1})),
    "options in a list": (errors.OptionError, "options=.*num_steps", dict(options=["num_steps"])),
    "step size of 0": (errors.OptionError, "step_size", dict(options={"step_size": 0.0})),
    "step size of True": (errors.OptionError, "step_size", dict(options={"step_size": True})),
    "steps too small for t": (errors.OptionError, "1e-20.* with times up to 1", dict(options={"step_size": 1e-20})),
    "half a step": (errors.OptionError, "num_steps", dict(options={"num_steps": 0.5})),
    "two options": (errors.OptionError, "at most one", dict(options={"num_steps": 2, "step_size": 0.1})),
    "a tolerance of fixed steps": (errors.OptionError, "rtol=nan", dict(rtol=math.nan)),
    "a negative one": (errors.OptionError, "atol=-1", dict(atol=-1.0)),
    "a tolerance of True": (errors.OptionError, "rtol=True", dict(rtol=True)),
    "a tolerance beside a fixed method": (
        errors.OptionError,
        "rtol=0.001.* beside fixed steps of rk4",
        dict(rtol=1e-3),
    ),
    "a tolerance beside steps by number": (
        errors.OptionError,
        "atol=0.001 beside fixed steps of dopri5",
        dict(method="dopri5", atol=1e-3, options={"num_steps": 4}),
    ),
    "a step size beside an adaptive method": (
        errors.OptionError,
        "step_size.: 0.1.* beside dopri5",
        dict(method="dopri5", options={"step_size": 0.1}),
    ),
    "a step size without a method": (
        errors.OptionError,
        "beside dopri5",
        dict(method="dopri5", options={"step_size": 1}),
    ),
    "a dtype as policy": (errors.PolicyError, "policy='float16'", dict(policy="float16")),
    "no function": (errors.StateError, "func is a float32 tensor", dict(func=Y)),
    "another shape": (errors.StateError, "func returns", dict(func=lambda t, y: y.sum())),
    "another dtype": (errors.StateError, "func returns", dict(func=lambda t, y: y.double())),
    "another structure": (errors.StateError, "func returns", dict(func=lambda t, y: (y,))),
    "a number as velocity": (errors.StateError, "func returns a int", dict(func=lambda t, y: 0)),
    "a number as velocity, adaptive": (errors.StateError, "func returns a int", dict(func=lambda t, y: 0, **ADAPTIVE)),
    "another shape, adaptive": (errors.StateError, "func returns", dict(func=lambda t, y: y.sum(), **ADAPTIVE)),
    "a status of 1": (errors.OptionError, "status.: 1", dict(options={"status": 1}, **ADAPTIVE)),
    "True steps": (errors.OptionError, "max_steps.: True", dict(options={"max_steps": True}, **ADAPTIVE)),
    "a first step of True": (errors.OptionError, "first_step.: True", dict(options={"first_step": True}, **ADAPTIVE)),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("as_compiled", ["uncompiled", "compiled", "fullgraph"])
def test_bad_input_is_refused_by_name(case, as_compiled):
    """What Dynamo meets before there is a graph, too."""
    kind, message, changed = BAD[case]
    given = {
        "func": lambda t, y: -y,
        "y0": Y,
        "t": T,
        "method": "rk4",
        "policy": rampde_fx.PrecisionPolicy(torch.float16),
    }
    arguments = {**given, **changed}

    def solve():
        return rampde_fx.odeint(arguments["func"], arguments["y0"], arguments["t"], **rest)

    rest = {name: value for name, value in arguments.items() if name not in ("func", "y0", "t")}
    fullgraph, run = as_compiled == "fullgraph", solve
    if as_compiled != "uncompiled":
        run = torch.compile(solve, backend="rampde_fx", options={"compiler": "eager"}, fullgraph=fullgraph)
    with pytest.raises(kind, match=message) as caught:
        run()
    assert "required:" in str(caught.value) and "fix:" in str(caught.value)
    assert "from user code" not in str(caught.value)
    if fullgraph and "\n  at: " in str(caught.value):
        assert "\n  at: " + __file__ in str(caught.value)


@pytest.mark.parametrize("arguments", [{"options": {"step_size": 0.3}}, ADAPTIVE], ids=str)
def test_steps_counted_from_the_times_are_not_unrolled(arguments):
    run = compiled(Solved(lambda t, y: -y, **arguments), compiler="eager", loop="unroll")
    with pytest.raises(errors.UnsupportedLoopError, match='loop="unroll" with a number of steps'):
        run(Y, T)


def test_an_implicit_tableau_is_refused():
    with pytest.raises(errors.TableauError, match="implicit"):
        ButcherTableau(a=[[0.5]], b=[1.0], c=[0.5], order=2)


@pytest.mark.parametrize(
    "dtype, rtol", [(torch.float64, 1e-7), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("as_compiled", [False, True])
def test_without_a_method_steps_adapt_to_tolerances_that_the_velocity_can_reach(dtype, rtol, as_compiled):
    """Against the same call with all of it spelled out; y' = -10 y over a unit of time takes more than a step."""
    exact = math.exp(-10)

    def solve(**how):
        @rampde_fx.mixed_precision(dtype=dtype)
        def flow(y0, t):
            return rampde_fx.odeint(lambda t, y: -10 * y, y0, t, **how)[-1]

        run = torch.compile(flow, backend="rampde_fx", options={"compiler": "eager"}) if as_compiled else flow
        return run(torch.ones(3, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64))

    got = solve()
    torch.testing.assert_close(got, solve(method="dopri5", rtol=rtol, atol=rtol / 100), rtol=0, atol=0)
    assert (got - exact).abs().max() < 10 * rtol
