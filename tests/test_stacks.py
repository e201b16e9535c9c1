"""Marked loops inside the stacks that people train with: autocast, export, sharded parameters, hooks, sparse ones."""

import contextlib
import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._pytree import tree_leaves, tree_structure
from torch.utils.checkpoint import checkpoint

import rampde_fx
from rampde_fx import errors
from tests.comparison import compiled, relative_errors
from tests.processes import run_in_processes

T = torch.linspace(0, 1, 6)
BF16 = 2e-2  # a few unit roundoffs of bfloat16, 2^-9, in each of a few layers and steps


class Field(nn.Module):
    """dy/dt of y, and of a context beside it."""

    def __init__(self, context=0):
        super().__init__()
        self.wide, self.narrow = nn.Linear(5 + context, 8), nn.Linear(8, 5)

    def forward(self, t, y):
        return self.narrow(torch.tanh(self.wide(y)))


class Layers(nn.Module):
    """What the models of this file are made of."""

    def __init__(self):
        super().__init__()
        self.stem, self.encoder = nn.Linear(5, 5), nn.Linear(5, 3)
        self.field, self.conditioned, self.norm = Field(), Field(3), nn.LayerNorm(5)


class Steps(Layers):
    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * self.field(t_i, y)
        return y


class Solved(Layers):
    def forward(self, y, t):
        return rampde_fx.odeint(self.field, y, t, method="midpoint")


class SolvedPair(Layers):
    def forward(self, y, t):
        def field(t, state):
            return self.field(t, state[0]), state[0].sum(-1)

        return rampde_fx.odeint(field, (y, y.sum(-1)), t, method="midpoint")[1]


class Adaptive(Layers):
    def forward(self, y, t):
        return rampde_fx.odeint(self.field, y, t[[0, -1]], method="bosh3", rtol=1e-3, atol=1e-4)[-1]


class Checkpointed(Steps):
    def forward(self, y, t):
        return checkpoint(super().forward, y, t, use_reentrant=False)


class Collected(Layers):
    def forward(self, y, t):
        states = []
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * self.field(t_i, y)
            states.append(y)
        return torch.stack(states)


class Behind(Steps):
    """The state is made by a layer before the loop."""

    def forward(self, y, t):
        return super().forward(self.stem(y), t)


class SolvedBehind(Layers):
    def forward(self, y, t):
        return rampde_fx.odeint(lambda t, y: self.norm(self.field(t, y)) * t.sin(), self.stem(y), t, method="midpoint")[
            -1
        ]


class Conditioned(Layers):
    """The velocity reads what an encoder has made, in a cat and in a product."""

    def forward(self, y, t):
        context = self.encoder(y)
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * (self.conditioned(t_i, torch.cat([y, context], -1)) + context @ self.encoder.weight)
        return y


class Recurrent(Layers):
    """The step is a layer: autocast changes the dtype of the state."""

    def forward(self, y, t):
        for t_i, _ in rampde_fx.steps(t):
            y = torch.tanh(self.stem(y) + t_i)
        return y


class Headed(Layers):
    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * self.field(t_i, y)
        y = self.stem(y)
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * self.field(t_i, y)
        return y


class Region(Steps):
    """autocast begins in the model."""

    def forward(self, y, t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(y, t)


def seeded(model_class, *args):
    torch.manual_seed(0)
    model = model_class(*args)
    return model, copy.deepcopy(model), torch.randn(8, 5)


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def gradients(function, model, y, around=contextlib.nullcontext, behind=contextlib.nullcontext):
    """The output and all gradients, as float32; the backward runs under `behind`."""
    model.zero_grad()
    y = y.clone().requires_grad_()
    with around():
        out = function(y, T)
    with behind():
        out.float().square().mean().backward()
    grads = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
    return [out.detach().float(), y.grad, *grads]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


ALONE = [Steps, Solved, SolvedPair, Checkpointed, Collected]
WITH_LAYERS = [Behind, SolvedBehind, Conditioned, Recurrent, Headed]


@pytest.mark.parametrize("model_class", [*ALONE, Region])
def test_a_loop_under_autocast_is_the_policys(model_class):
    """In float32 it is the model without autocast, forward and backward, wherever the backward runs."""
    model, plain, y = seeded(model_class)
    function = compiled(model, torch.float32)
    wanted = gradients(plain if model_class is not Region else Steps.forward.__get__(plain), plain, y)
    found = gradients(function, model, y, autocast)
    assert max(relative_errors(found, wanted)) < 1e-5
    assert equal(found, gradients(function, model, y, autocast, autocast))


def test_an_adaptive_odeint_under_autocast():
    """The guess of its first step alone is autocast's: the same to the tolerance."""
    model, plain, y = seeded(Adaptive)
    found = gradients(compiled(model, torch.float32), model, y, autocast, autocast)
    assert max(relative_errors(found, gradients(plain, plain, y))) < 1e-3


@pytest.mark.parametrize("model_class", [Steps, Solved])
def test_autocast_changes_no_bit_of_a_low_loop(model_class):
    model, _, y = seeded(model_class)
    function = compiled(model, torch.bfloat16)
    found = gradients(function, model, y)
    assert equal(found, gradients(function, model, y, autocast))
    assert equal(found, gradients(function, model, y, behind=autocast))


@pytest.mark.parametrize("model_class", WITH_LAYERS)
def test_layers_round_a_loop_keep_their_autocast(model_class):
    """Dtypes are eager's, and what arrives in half is as good as eager's autocast has it."""
    model, plain, y = seeded(model_class)
    exact, eager = gradients(plain, plain, y), gradients(plain, plain, y, autocast)
    function = compiled(model, torch.bfloat16)
    with autocast():
        assert function(y, T).dtype == plain(y, T).dtype
    found = gradients(function, model, y, autocast)
    assert max(relative_errors(found, exact)) <= max(BF16, *relative_errors(eager, exact))


def test_the_report_says_what_is_widened():
    model, _, y = seeded(Headed)
    marked = rampde_fx.mixed_precision(model, dtype=torch.bfloat16)
    with autocast():
        told = str(rampde_fx.explain(marked, y, T))
    assert "half precision, as autocast made it before the loop, which takes it in float32" in told
    assert "half precision" not in str(rampde_fx.explain(marked, y, T))


@pytest.mark.parametrize("model_class", [SolvedBehind, Solved])
def test_uncompiled_odeint_under_autocast(model_class):
    """The velocity's dtype is autocast's choice, and no mistake of the user's."""
    model, plain, y = seeded(model_class)
    assert max(relative_errors(gradients(model, model, y, autocast), gradients(plain, plain, y))) < 2 * BF16


class SumOfSines(Layers):
    solved, widens = False, False

    def forward(self, y, t):
        with autocast():
            z = torch.tanh(self.stem(y))
        z = z.to(torch.float32) if self.widens else z
        if self.solved:
            return rampde_fx.odeint(lambda t, y: torch.sin(y @ self.stem.weight.to(y.dtype)), z, t, method="midpoint")[
                -1
            ]
        for _, dt in rampde_fx.steps(t):
            z = z + dt * torch.sin(z @ self.stem.weight.to(z.dtype))
        return z


@pytest.mark.parametrize(("solved", "name"), [(False, "z"), (True, "y0")])
def test_a_half_state_behind_an_autocast_region_has_the_users_name(solved, name):
    model, plain, y = seeded(SumOfSines)
    model.solved = plain.solved = solved
    with pytest.raises(errors.StateChangeError, match=f"the state '{name}' is bfloat16") as caught:
        compiled(model, torch.bfloat16)(y, T)
    assert f"{name}.to(torch.float32)" in caught.value.fix
    model.widens = plain.widens = True
    found = gradients(compiled(model, torch.bfloat16), model, y)
    assert max(relative_errors(found, gradients(plain, plain, y))) < BF16


def test_a_scaler_under_autocast():
    """Float16 with a loss scale: a step that overflows is left out, the next one trains."""
    model, plain, y = seeded(Headed)
    function, scaler = compiled(model, torch.float16), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = function(y, T).square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    plain(y, T).square().mean().backward()
    pairs = [
        (p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True) if q.grad is not None
    ]
    assert max(relative_errors(*map(list, zip(*pairs, strict=True)))) < 1e-2
    scaler.step(optimizer)
    assert not torch.equal(model.stem.weight, plain.stem.weight)


# Export


class Served(Layers):
    """Results in a dict, beside what is no tensor and what is an argument."""

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * self.field(t_i, y)
        return {"end": self.stem(y), "times": t, "stages": 1}


class ServedPair(Layers):
    def forward(self, state, t, *, rate):
        def field(t, state):
            return self.field(t, state[0]), -rate * state[1]

        return rampde_fx.odeint(field, state, t, method="rk4", options={"num_steps": 2})


BATCH = torch.export.Dim("batch", min=2, max=64)
TIMES = torch.export.Dim("times", min=6, max=64)  # as few steps as are captured are captured as they are
PAIR = {"state": ({0: BATCH}, {0: BATCH}), "t": None, "rate": None}
# The model, its arguments at a size, those by keyword, and what may change.
SHIPPED = {
    "steps": (Served, lambda n: (torch.randn(n, 5), T), {}, {"y": {0: BATCH}, "t": None}),
    "pair": (ServedPair, lambda n: ((torch.randn(n, 5), torch.ones(n)), T), {"rate": 0.5}, PAIR),
    "times": (Collected, lambda n: (torch.randn(3, 5), torch.linspace(0, 1, n)), {}, {"y": None, "t": {0: TIMES}}),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_rewritten_forward_is_shipped(tmp_path, name):
    """The program gives the bits of the compiled model, at other sizes too, in a process without rampde_fx."""
    model_class, arguments, options, sizes = SHIPPED[name]
    model = seeded(model_class)[0]
    function = compiled(model, torch.float16)
    program = rampde_fx.export(function, *arguments(8), dynamic_shapes=sizes, **options)
    assert program.state_dict.keys() < model.state_dict().keys()
    assert any(node.target is torch.ops.higher_order.scan for node in program.graph.nodes)
    calls = [arguments(count) for count in (8, 11)]
    with torch.no_grad():
        wanted = [function(*call, **options) for call in calls]
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((calls, options), tmp_path / "calls.pt")
    script = (
        "import sys, torch\n"
        "model = torch.export.load('program.pt2').module()\n"
        "calls, options = torch.load('calls.pt')\n"
        "torch.save([model(*call, **options) for call in calls], 'found.pt')\n"
        "assert 'rampde_fx' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)
    found = torch.load(tmp_path / "found.pt")
    assert tree_structure(found) == tree_structure(wanted)
    for got, value in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value


@pytest.mark.parametrize("points", [2, 3, 6])
def test_a_shipped_program_has_no_gradients(points):
    """They would not be scaled. Few steps are unrolled; a scan would ask torch for its derivative."""
    function, y, t = compiled(seeded(Served)[0], torch.float16), torch.randn(8, 5), torch.linspace(0, 1, points)
    program = rampde_fx.export(function, y, t)
    found = tree_leaves(program.module()(y.clone().requires_grad_(), t))
    with torch.no_grad():
        wanted = tree_leaves(function(y, t))
    for got, value in zip(found, wanted, strict=True):
        assert torch.equal(got, value) and not got.requires_grad if isinstance(value, torch.Tensor) else got == value


@pytest.mark.inductor
@pytest.mark.slow
def test_the_rewritten_forward_is_packaged(tmp_path):
    model = seeded(Served)[0]
    function, y = compiled(model, torch.bfloat16), torch.randn(8, 5)
    program = rampde_fx.export(function, y, T, dynamic_shapes={"y": {0: BATCH}, "t": None})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "program.pt2"))
    served = torch._inductor.aoti_load_package(package)
    for part in (y, y[:3]):
        with torch.no_grad():
            assert torch.allclose(served(part, T)["end"], function(part, T)["end"], atol=1e-6)


class Sized(Layers):
    def forward(self, y, t):
        y = 2 * y if y.shape[0] > 6 else y
        return rampde_fx.odeint(self.field, y, t, method="euler")[-1]


class StepSize(Layers):
    def forward(self, y, t):
        return rampde_fx.odeint(self.field, y, t, method="euler", options={"step_size": 0.1})


@pytest.mark.parametrize(
    ("model_class", "sizes", "found"),
    [
        (Adaptive, None, "adaptive steps"),
        (StepSize, None, "count_steps"),
        (Sized, {"y": {0: BATCH}, "t": None}, "something else for other sizes"),
        (Field, None, "no marked loop"),
    ],
)
def test_what_cannot_be_shipped(model_class, sizes, found):
    marked = rampde_fx.mixed_precision(seeded(model_class)[0])
    args = (torch.randn(8, 5), T) if model_class is not Field else (T, torch.randn(8, 5))
    with pytest.raises(errors.ExportError, match=found):
        rampde_fx.export(marked, *args, dynamic_shapes=sizes)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("model_class", [Steps, Solved])
def test_torch_export_exports_plain_code(model_class, strict):
    """Without an operator of ours; a marked model is told what rewrites it."""
    model, _, y = seeded(model_class)
    program = torch.export.export(model, (y, T), strict=strict)
    assert torch.equal(program.module()(y, T), model(y, T))
    assert not any(getattr(node.target, "namespace", "") == "rampde_fx" for node in program.graph.nodes)
    with pytest.warns(errors.FullPrecisionWarning, match="rampde_fx.export"):
        torch.export.export(rampde_fx.mixed_precision(model), (y, T), strict=strict)


def test_times_of_an_exported_odeint_are_checked_by_nan():
    model, _, y = seeded(Solved)
    program = torch.export.export(model, (y, T), strict=False)
    assert program.module()(y, T.flip(0)).isfinite().all()
    assert program.module()(y, T.sin() * (1 - T)).isnan().any()


@pytest.mark.parametrize("model_class", [Solved, Adaptive])
def test_another_backend_compiles_plain_code(model_class):
    def another(graph_module, example_inputs):
        return graph_module.forward

    model, plain, y = seeded(model_class)
    with pytest.warns(errors.FullPrecisionWarning):
        found = torch.compile(rampde_fx.mixed_precision(model), backend=another)(y, T)
    assert torch.equal(found, plain(y, T))


# Hooks, normalised weights, profiles, sparse matrices


def doubled(layer, args, output):
    return 2 * output


def halved(layer, args):
    return args[0], args[1] / 2


HOOKS = {
    "forward": lambda model: model.field.wide.register_forward_hook(doubled),
    "before": lambda model: model.field.register_forward_pre_hook(halved),
}


@pytest.mark.parametrize("model_class", [Steps, Solved])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_the_velocity(model_class, hook):
    model, plain, y = seeded(model_class)
    without = plain(y, T)
    for hooked in (model, plain):
        HOOKS[hook](hooked)
    assert not torch.allclose(plain(y, T), without, rtol=1e-2)
    found = gradients(compiled(model, torch.bfloat16), model, y)
    assert max(relative_errors(found, gradients(plain, plain, y))) < BF16


NORMS = {
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "spectral_norm of hooks": nn.utils.spectral_norm,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "weight_norm of hooks": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:`?torch.nn.utils.weight_norm")
@pytest.mark.parametrize("norm", NORMS)
def test_normalised_weights_in_training(norm):
    """The vectors of a spectral norm move on in each evaluation, as they do in eager code."""
    models = [seeded(Steps)[0] for _ in range(2)]
    y = torch.randn(8, 5)
    for made in models:
        torch.manual_seed(1)
        NORMS[norm](made.field.wide)
    model, plain = models
    found = gradients(compiled(model, torch.bfloat16), model, y)
    assert max(relative_errors(found, gradients(plain, plain, y))) < BF16
    buffers = [list(made.buffers()) for made in models]
    assert max(relative_errors(*buffers), default=0) < BF16


def test_the_hooks_of_a_spectral_norm_in_an_odeint():
    """They leave the vectors of each evaluation outside of it, and one captured step stands for all."""
    model, _, y = seeded(Solved)
    nn.utils.spectral_norm(model.field.wide)
    with pytest.raises(errors.UnsupportedLoopError, match="read outside of it"):
        compiled(model, torch.bfloat16)(y, T)


def doubles(gradients):
    return tuple(None if gradient is None else 2 * gradient for gradient in gradients)


@pytest.mark.parametrize("model_class", [Steps, Solved])
def test_backward_hooks(model_class):
    """Of the model and of a parameter they run; of a module of the velocity Dynamo refuses them."""
    models = [seeded(model_class)[0] for _ in range(2)]
    y = torch.randn(8, 5)
    for made in models:
        made.register_full_backward_hook(lambda model, inputs, outputs: doubles(inputs))
        made.field.wide.weight.register_hook(lambda gradient: 3 * gradient)
    model, plain = models
    found = gradients(compiled(model, torch.bfloat16), model, y)
    assert max(relative_errors(found, gradients(plain, plain, y))) < BF16
    torch._dynamo.reset()
    model.field.wide.register_full_backward_hook(lambda layer, inputs, outputs: doubles(inputs))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="backwards hooks"):
        compiled(model, torch.bfloat16)(y, T)


class HookedInStep(Layers):
    """A hook on a tensor of a step."""

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            rate = self.field(t_i, y)
            rate.register_hook(lambda gradient: 2 * gradient)
            y = y + dt * rate
        return y


def test_a_hook_on_a_tensor_of_a_step():
    model, _, y = seeded(HookedInStep)
    with pytest.raises(errors.UnsupportedLoopError, match="register_hook") as caught:
        compiled(model, torch.bfloat16)(y.requires_grad_(), T)
    assert "rate.register_hook" in caught.value.where


class Profiled(Layers):
    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            with torch.profiler.record_function("velocity"):
                rate = self.field(t_i, y)
            y = y + dt * rate
        return y


def test_scopes_of_a_profiler_in_a_step():
    model, plain, y = seeded(Profiled)
    found = gradients(compiled(model, torch.bfloat16), model, y)
    assert max(relative_errors(found, gradients(plain, plain, y))) < BF16


def ranges_of(function, y):
    """The names in a profile of a forward and a backward that begin with ours."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(y, T).sum().backward()
    return [event for event in profile.events() if event.name.startswith("rampde_fx ")]


@pytest.mark.parametrize("model_class", [Steps, Solved, Headed])
def test_a_profile_shows_forward_and_backward_of_loops(model_class):
    """Each by the user's lines, round the operators of its part; without a profiler nothing is entered."""
    model, _, y = seeded(model_class)
    function = compiled(model, torch.bfloat16)
    without = [value.clone() for value in gradients(function, model, y)]
    forward, backward = ranges_of(function, y.clone().requires_grad_())
    assert forward.name.startswith("rampde_fx forward, loop at ") and backward.name.startswith("rampde_fx backward, ")
    for event in (forward, backward):
        assert event.name.count("test_stacks.py:") == (2 if model_class is Headed else 1)
        inside = {child.name for child in event.cpu_children}
        assert any("scan" in name or "mm" in name or "Compiled" in name for name in inside), inside
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(y, T)
    assert len([event for event in profile.events() if event.name.startswith("rampde_fx ")]) == 1
    assert equal(without, gradients(function, model, y))


def test_compiled_autograd():
    model, plain, y = seeded(Steps)
    function = compiled(model, torch.bfloat16)
    with torch._dynamo.config.patch(compiled_autograd=True):
        found = gradients(function, model, y)
    assert max(relative_errors(found, gradients(plain, plain, y))) < BF16


GRAPH = (torch.rand(8, 8, generator=torch.manual_seed(0)) > 0.6).float()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the layout is in beta
    SPARSE = {"coo": GRAPH.to_sparse(), "csr": GRAPH.to_sparse_csr()}


@torch.library.custom_op("rampde_fx_tests::neighbours", mutates_args=())
def neighbours(y: torch.Tensor, layout: str, transposed: bool) -> torch.Tensor:
    matrix = SPARSE[layout].to(y.dtype)
    return (matrix.t() if transposed else matrix) @ y


def to_backward(ctx, inputs, output):
    _, ctx.layout, ctx.transposed = inputs


neighbours.register_fake(lambda y, layout, transposed: torch.empty_like(y))
neighbours.register_autograd(
    lambda ctx, gradient: (neighbours(gradient, ctx.layout, not ctx.transposed), None, None), setup_context=to_backward
)


class OnGraph(Layers):
    layout, as_operator = "coo", True

    def forward(self, y, t):
        for t_i, dt in rampde_fx.steps(t):
            around = neighbours(y, self.layout, False) if self.as_operator else SPARSE[self.layout] @ y
            y = y + dt * self.field(t_i, around)
        return y


@pytest.mark.parametrize("layout", SPARSE)
def test_products_with_a_sparse_matrix(layout):
    """As an operator they are part of the loop; Dynamo takes no sparse tensor, and what follows is said."""
    model, plain, y = seeded(OnGraph)
    model.layout = plain.layout = layout
    found = gradients(compiled(model, torch.bfloat16), model, y)
    assert max(relative_errors(found, gradients(plain, plain, y))) < BF16
    model.as_operator = plain.as_operator = False
    torch._dynamo.reset()
    function = torch.compile(model, backend="rampde_fx", options={"compiler": "aot_eager"})
    with pytest.warns(errors.FullPrecisionWarning, match="runs uncompiled"):
        assert torch.allclose(function(y, T), plain(y, T))


# Sharded parameters


class Sharded(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, y, t):
        y = self.stem(y)
        for _, dt in rampde_fx.steps(t):
            y = y + dt * self.narrow(torch.tanh(self.wide(y)))
        return y


def shards(rank, folder, count):
    mesh = init_device_mesh("cpu", (count,))
    torch.manual_seed(0)
    model, plain, y = Sharded(), Sharded(), torch.randn(8, 6)
    plain.load_state_dict(model.state_dict())
    low, parallel = copy.deepcopy(model), copy.deepcopy(model)
    part = y.chunk(count)[rank]
    function = compiled(model, torch.bfloat16)
    fully_shard(model, mesh=mesh)
    function(part, T).square().mean().backward()
    plain(y, T).square().mean().backward()
    pairs = [(p.grad.full_tensor(), q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True)]
    assert max(relative_errors(*map(list, zip(*pairs, strict=True)))) < BF16
    torch._dynamo.reset()
    function = compiled(low, torch.bfloat16)
    fully_shard(low, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(errors.StateChangeError, match="the state 'y' is bfloat16") as caught:
        function(part, T)
    assert "param_dtype" in caught.value.fix
    torch._dynamo.reset()
    parallelize_module(parallel, mesh, {"wide": ColwiseParallel(), "narrow": RowwiseParallel()})
    with pytest.raises(errors.UnsupportedLoopError, match="tensor parallelism") as caught:
        compiled(parallel, torch.bfloat16)(y, T)
    assert "fully_shard" in caught.value.fix and "test_stacks.py" in caught.value.where


def shards_inside(rank, folder, count):
    """fully_shard round layers of the velocity: refused by their names, said without fullgraph=True."""
    mesh = init_device_mesh("cpu", (count,))
    for model_class, inner, root in ((Steps, ("field",), True), (SolvedBehind, ("field.narrow", "field.wide"), False)):
        torch._dynamo.reset()
        model, _, y = seeded(model_class)
        for name in inner:
            fully_shard(model.get_submodule(name), mesh=mesh)
        if root:
            fully_shard(model, mesh=mesh)
        with pytest.raises(
            errors.UnsupportedLoopError, match=f"fully_shard is round '{min(inner, key=len)}'"
        ) as caught:
            compiled(model, torch.bfloat16)(y, T)
        assert "test_stacks.py" in caught.value.where
    torch._dynamo.reset()
    model, plain, y = seeded(Steps)
    fully_shard(model.field, mesh=mesh)
    function = torch.compile(rampde_fx.mixed_precision(model), backend="rampde_fx", options={"compiler": "aot_eager"})
    with pytest.warns(errors.FullPrecisionWarning, match="runs uncompiled"):
        found = function(y, T)
    assert torch.allclose(found, plain(y, T), atol=1e-6)


class BesideShards(Steps):
    """A layer that is sharded by itself stands before the loop; the loop's own parameters are the model's group."""

    def forward(self, y, t):
        return super().forward(self.stem(y), t)


def shards_before(rank, folder, count):
    """Hooks before the loop break the graph there, and the loop is rewritten behind the break."""
    mesh = init_device_mesh("cpu", (count,))
    model, plain, y = seeded(BesideShards)
    fully_shard(model.stem, mesh=mesh)
    fully_shard(model, mesh=mesh)
    marked = rampde_fx.mixed_precision(model, dtype=torch.bfloat16)
    function = torch.compile(marked, backend="rampde_fx", options={"compiler": "aot_eager"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.FullPrecisionWarning)
        found = function(y, T)
    error = relative_errors([found.detach()], [plain(y, T).detach()])[0]
    assert 1e-6 < error < BF16, error


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("work", [shards_inside, shards_before])
def test_shards_of_layers(tmp_path, work):
    run_in_processes(work, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_shards_of_two_processes(tmp_path):
    """fully_shard gives the gradients of one process; low parameters and tensor parallelism are refused by name."""
    run_in_processes(shards, tmp_path, 2)
