"""Transforms, batches of gradients, forward mode and compiled autograd round a compiled loop: refused by name."""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import rampde_fx
import rampde_fx.torchdiffeq
from rampde_fx import errors
from tests.comparison import compiled, gradients, relative_errors
from tests.models import Euler, Flow

Y, T = torch.linspace(-1, 1, 20).view(4, 5), torch.linspace(0, 1, 5)
ROWS = Y[:, None]


class Solved(Flow):
    def forward(self, y, t):
        return rampde_fx.odeint(self.velocity, y, t, method="midpoint")[-1]


class Pair(Flow):
    def forward(self, y, t):
        def velocity(t, state):
            return {"y": self.velocity(t, state["y"]), "sum": state["y"].sum(-1)}

        return rampde_fx.odeint(velocity, {"y": y, "sum": y.sum(-1)}, t, method="euler")["sum"]


class Adaptive(Flow):
    def forward(self, y, t):
        return rampde_fx.odeint(self.velocity, y, t, method="bosh3", options={"status": True})[0]


class OfOneSize(Flow):
    def forward(self, y, t):
        return rampde_fx.odeint(self.velocity, y, t, method="rk4", options={"step_size": 0.3})


class Torchdiffeq(Flow):
    def forward(self, y, t):
        return rampde_fx.torchdiffeq.odeint(self.velocity, y, t, method="rk4")


class Checkpointed(Euler):
    def forward(self, y, t):
        return checkpoint(super().forward, y, t, use_reentrant=False)


LOOPS = [Euler, Solved, Pair, Adaptive, OfOneSize, Torchdiffeq]
# What is computed of a function of y and t.
TRANSFORMS = {
    "vmap": lambda function: lambda y, t: vmap(lambda row: function(row[None], t))(y),
    "vmap over times": lambda function: lambda y, t: vmap(lambda t: function(y, t))(torch.stack([t, 2 * t])),
    "grad": lambda function: grad(lambda y, t: function(y, t).sum()),
    "vjp": lambda function: lambda y, t: vjp(function, y, t)[0],
    "jvp": lambda function: lambda y, t: jvp(lambda y: function(y, t), (y,), (y,))[1],
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda function: hessian(lambda y, t: function(y, t).sum()),
}


# All of them round one loop, and of each kind one round the others.
CASES = [(Solved, name) for name in TRANSFORMS]
CASES += [(model_class, name) for model_class in LOOPS for name in ("vmap over times", "grad", "jacfwd")]


@pytest.mark.parametrize(("model_class", "transform"), dict.fromkeys(CASES))
def test_a_transform_round_a_loop(model_class, transform):
    """Inside of what is compiled it has the user's line; round what is compiled Dynamo refuses it by its name."""
    function = TRANSFORMS[transform](rampde_fx.mixed_precision(model_class(), dtype=torch.bfloat16))
    with pytest.raises(errors.TransformError, match=r"torch\.func") as caught:
        torch.compile(function, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True)(Y, T)
    assert f"{__name__.rpartition('.')[2]}.py" in caught.value.where or "models.py" in caught.value.where
    with pytest.raises(errors.TransformError):
        rampde_fx.explain(function, Y, T)


ROUND_VIEWS = {
    "the state": lambda model: lambda y, t: jvp(lambda y: model(y, t), (y[::2],), (torch.ones(2, 5),)),
    "the times": lambda model: lambda y, t: jvp(lambda t: model(y, t), (y[0],), (torch.ones(5),)),
}
IN_VIEWS = [(Solved, "the state"), (Adaptive, "the state"), (OfOneSize, "the state"), (Torchdiffeq, "the state")]


@pytest.mark.parametrize(("model_class", "of"), [*IN_VIEWS, (Solved, "the times"), (Euler, "the times")])
def test_a_tangent_that_is_no_view_of_a_view(model_class, of):
    """Torch cannot view such a primal; what stands in place of a refused loop does not."""
    function = ROUND_VIEWS[of](rampde_fx.mixed_precision(model_class(), dtype=torch.float16))
    with pytest.raises(errors.TransformError, match=r"torch\.func"):
        torch.compile(function, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True)(Y, T)


def opened_inside(model):
    def function(y, t):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(y[::2], torch.ones(2, 5)), t)).tangent

    return function


@pytest.mark.parametrize("model_class", [Euler, Solved, Adaptive])
def test_a_forward_level_inside_of_what_is_compiled(model_class):
    """Its tangents would end at the loop."""
    function = opened_inside(rampde_fx.mixed_precision(model_class(), dtype=torch.float16))
    with pytest.raises(errors.TransformError, match="forward_ad"):
        torch.compile(function, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True)(Y.clone(), T)


def test_a_forward_level_that_ends_before_a_loop():
    model = Solved()

    def function(y, t):
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(forward_ad.make_dual(y, torch.ones(4, 5)).sin()).tangent
        return model(tangent, t)

    found = compiled(function, torch.float32)(Y, T)
    assert torch.allclose(found, model(Y.cos(), T), atol=1e-6)


def test_a_transform_round_a_compiled_model():
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.func\.vmap\(compiled_fn\)"):
        vmap(compiled(Solved(), torch.bfloat16), (0, None))(ROWS, T)
    torch._dynamo.reset()
    model = Solved()
    function = torch.compile(rampde_fx.mixed_precision(model), backend="rampde_fx")
    with pytest.warns(errors.FullPrecisionWarning, match="runs uncompiled"):
        found = vmap(function, (0, None))(ROWS, T)
    assert torch.allclose(found[:, 0], model(Y, T), atol=1e-6)


def test_a_transform_under_another_backend():
    """A loop that nothing rewrites is plain code, inside of a transform too."""

    def another(graph_module, example_inputs):
        return graph_module.forward

    model = Solved()
    function = TRANSFORMS["vmap"](model)
    found = torch.compile(function, backend=another, fullgraph=True)(Y, T)
    assert torch.allclose(found[:, 0], model(Y, T), atol=1e-6)


def batched(function, y):
    out = function(y, T)
    return torch.autograd.grad(out, y, torch.ones(3, *out.shape), is_grads_batched=True)


def forward_mode(function, y):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(y.detach(), Y), T)


def forward_mode_alone(function, y):
    with torch.no_grad():
        return forward_mode(function, y)


def compiled_autograd(function, y):
    out = function(y, T)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        out.sum().backward()


CALLS = {
    "a batch of gradients": (batched, "is_grads_batched"),
    "a vectorized Jacobian": (
        lambda function, y: torch.autograd.functional.jacobian(lambda y: function(y, T), y, vectorize=True),
        "is_grads_batched",
    ),
    "forward mode": (forward_mode, "forward_ad"),
    "forward mode without gradients": (forward_mode_alone, "forward_ad"),
    "compiled autograd": (compiled_autograd, "compiled autograd"),
}
POLICIES = {
    "scan": {"velocity": torch.float16},
    "unrolled": {"velocity": torch.bfloat16, "scaling": "none", "loop": "unroll"},
    "wide": {"velocity": torch.float32},
}


# Of all calls and policies those that differ most.
REFUSED = [(call, "scan", "aot_eager") for call in CALLS]
REFUSED += [
    (call, policy, "eager")
    for call, policy in zip(CALLS, ["unrolled", "wide", "wide", "scan", "unrolled"], strict=True)
]


@pytest.mark.parametrize(("call", "policy", "compiler"), REFUSED)
def test_what_a_compiled_loop_refuses_of_its_callers(call, policy, compiler):
    """A plain call works before and behind the one that is refused."""
    run, found = CALLS[call]
    model = Euler()
    marked = rampde_fx.mixed_precision(model, policy=rampde_fx.PrecisionPolicy(**POLICIES[policy]))
    function = torch.compile(marked, backend="rampde_fx", options={"compiler": compiler}, fullgraph=True)
    before = gradients(function, model, Y, T)
    with pytest.raises(errors.TransformError, match=found) as caught:
        run(function, Y.clone().requires_grad_())
    assert "models.py" in caught.value.where
    assert all(map(torch.equal, before, gradients(function, model, Y, T)))


def test_a_forward_level_without_tangents():
    model = Solved()
    function = compiled(model, torch.bfloat16)
    wanted = function(Y, T)
    with forward_ad.dual_level():
        assert torch.equal(function(Y, T), wanted)


def test_compiled_autograd_round_a_forward():
    """A loop is compiled while compiled autograd is on, and its backward runs behind: as without it."""
    model = Solved()
    plain, function = copy.deepcopy(model), compiled(model, torch.float16)
    y = Y.clone().requires_grad_()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        out = function(y, T)
    out.square().sum().backward()
    x = Y.clone().requires_grad_()
    plain(x, T).square().sum().backward()
    assert max(relative_errors([y.grad], [x.grad])) < 2.5e-3


def test_the_compiler_eager_under_a_checkpoint():
    model = Checkpointed()
    found = gradients(compiled(model, torch.float16, "eager"), model, Y, T)
    torch._dynamo.reset()
    wanted = gradients(compiled(model, torch.float16), model, Y, T)
    assert max(relative_errors(found, wanted)) < 1e-6


@pytest.mark.parametrize("odeint", [rampde_fx.odeint, rampde_fx.torchdiffeq.odeint], ids=["odeint", "torchdiffeq"])
def test_a_batch_has_one_sequence_of_steps(odeint):
    """Adaptive steps, uncompiled: what maps them is refused, and other transforms give their derivatives."""
    weight, y = torch.randn(3, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def solve(y, t=t, matrix=weight):
        return odeint(lambda _, y: torch.tanh(y @ matrix), y, t, method="dopri5", rtol=1e-5, atol=1e-7)[-1]

    for mapped in (
        lambda: torch.func.vmap(solve)(y),
        lambda: torch.func.vmap(lambda m: solve(y[0], matrix=m))(weight.expand(2, 3, 3)),
        lambda: torch.func.vmap(torch.func.grad(lambda y: solve(y).sum()))(y),
    ):
        with pytest.raises(errors.TransformError, match="vmap"):
            mapped()
    wanted = torch.autograd.functional.jacobian(solve, y[0])
    torch.testing.assert_close(torch.func.jacrev(solve)(y[0]), wanted)
