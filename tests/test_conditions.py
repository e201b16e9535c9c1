"""Conditions of single lines in the passes: a byte, a dtype, a graph or a number that each of them decides."""

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rampde_fx
from rampde_fx.emit.recurrence import Body
from rampde_fx.ir import graphs, lowering, tracing
from rampde_fx.ir.ends import Inputs, Results
from rampde_fx.passes.match_iterations import _alike
from rampde_fx.torch_private import fake_tensors
from tests.comparison import compiled, gradients, relative_errors

aten = torch.ops.aten
A = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * 0.5
STATE = torch.linspace(-1, 1, 12).view(3, 4)
GRID = torch.linspace(0, 1, 8)


def stepped(velocity):
    """Euler steps of velocity(i, y)."""

    def flow(y, t):
        for i, (_, dt) in enumerate(rampde_fx.steps(t)):
            y = y + dt * velocity(i, y)
        return y

    return flow


class Weighted(nn.Module):
    """Euler steps of a velocity of a state and two matrices."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity
        self.w, self.v = nn.Parameter(A[:, [0, 1, 2, 3, 0, 1, 2, 3]].clone()), nn.Parameter(A.clone())

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * self.velocity(y, self.w, self.v)
        return y


def explained(function, y, t, **policy):
    marked = rampde_fx.mixed_precision(
        function, policy=rampde_fx.PrecisionPolicy(**{"velocity": torch.float16, **policy})
    )
    return rampde_fx.explain(marked, y.clone().requires_grad_(), t).loops


# Constants of a velocity in low precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_number_is_beyond_a_dtype_outside_of_its_normal_range(dtype):
    info = torch.finfo(dtype)
    inside = [0.0, info.max, -info.max, info.smallest_normal, -info.smallest_normal, float("inf"), -float("inf")]
    assert not lowering.is_beyond(dtype, inside)
    for number in (2 * info.max, -2 * info.max, info.smallest_normal / 2, -info.smallest_normal / 2):
        assert lowering.is_beyond(dtype, [1.0, number]), number
    assert not lowering.is_beyond(torch.float32, [1e300, 1e-300])


# What enters a velocity in float16.


def test_a_number_without_dimensions_enters_a_velocity_as_it_is():
    """1e6 is beyond float16, and the products are not."""
    scale = torch.tensor(1e6)
    flow = stepped(lambda i, y: torch.sin((y @ A.to(y)) * 1e-3 * scale.to(y) * 1e-3) + scale.to(y) * (1e-3 * y) * 1e-3)
    wanted = flow(STATE.double(), GRID.double())
    assert relative_errors([compiled(flow, torch.float16)(STATE, GRID).double()], [wanted])[0] <= 2.0**-10


def test_an_array_that_operations_in_float32_alone_read_enters_a_velocity_as_it_is():
    """1e5 is beyond float16, and its entries are shifted by a softmax."""
    shift = 1e5 + torch.linspace(0, 1, 4)
    flow = stepped(lambda i, y: torch.softmax(y @ A.to(y) + shift.to(y), -1))
    wanted = flow(STATE.double(), GRID.double())
    assert relative_errors([compiled(flow, torch.float16)(STATE, GRID).double()], [wanted])[0] <= 2.0**-8


def test_an_array_that_a_sum_in_float16_reads_enters_a_velocity_low():
    """Of a wide bias the sum, and all that follows from it, would be float32."""
    (loop,) = explained(Weighted(lambda y, w, v: torch.tanh(y @ v + v[0])), STATE, GRID)
    (call,) = [node for node in loop.step.graph.nodes if node.op == "call_module"]
    velocity = loop.step.get_submodule(call.target)
    found = {
        n.target: n.meta["val"].dtype for n in velocity.graph.nodes if n.target in (aten.add.Tensor, aten.tanh.default)
    }
    assert found == {aten.add.Tensor: torch.float16, aten.tanh.default: torch.float16}


# What is kept of a velocity, in bytes.


@pytest.mark.parametrize(
    ("velocity", "dtype", "kept"),
    [
        # A part of a product: the two columns that the next product reads, not all eight.
        (lambda y, w, v: (y @ w)[:, :2] @ v[:2], torch.float16, (4 + 2) * 2),
        # What a logarithm in float32 reads: the sum before it was widened.
        (lambda y, w, v: torch.log(3 + y @ v), torch.bfloat16, (4 + 4) * 2),
        # A column that is repeated: it, its derivative, both factors and the state.
        (lambda y, w, v: (torch.sin(y @ v[:, :1]).expand(3, 4) * (y @ v)) @ v, torch.bfloat16, (1 + 1 + 4 + 4 + 4) * 2),
    ],
    ids=["a part", "a cast", "a repetition"],
)
def test_of_a_view_or_a_cast_the_smaller_side_is_kept(velocity, dtype, kept):
    (loop,) = explained(Weighted(velocity), STATE, GRID, velocity=dtype, checkpoint="none")
    assert loop.stored_bytes == 7 * 3 * kept, loop.stored


@pytest.mark.parametrize("bias", [False, True])
def test_sizes_that_are_known_at_run_time_only_are_those_of_the_state(bias):
    """Where activations are kept the adjoint still asks for the batch's size: of a value that has it."""
    model = Weighted(lambda y, w, v: torch.sin(y @ v) - y.sum(1, keepdim=True) + bias * v[0].expand(len(y), 4))
    policy = rampde_fx.PrecisionPolicy(velocity=torch.float32, checkpoint="none")
    marked = rampde_fx.mixed_precision(model, policy=policy)
    run = torch.compile(marked, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True, dynamic=True)
    for batch in (6, 9):
        y = torch.linspace(-1, 1, 4 * batch).view(batch, 4)
        wanted = gradients(model, model, y, GRID)
        final, dy, dt, *weights = relative_errors(gradients(run, model, y, GRID), wanted)
        assert max(final, dy, *weights) < 1e-6 and dt < 1e-4  # dt is a sum in which terms cancel


# Which carries are stored.


class Cascade(nn.Module):
    """y reads b, and b reads c, linearly: the adjoint of a step reads y alone, and a segment all three."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(A.clone())

    def forward(self, y, t):
        b = c = y
        for _, dt in rampde_fx.steps(t):
            y, b, c = y + dt * torch.tanh(y @ self.weight) + dt * b, b - dt * c, c + dt * c
        return y


def test_segments_store_the_carries_of_the_carries_of_a_state():
    model = Cascade()
    (loop,) = explained(model, STATE, GRID, velocity=torch.float32, checkpoint=3)
    assert [stored.split(":")[0] for stored in loop.stored] == [carry.split(":")[0] for carry in loop.carries]
    assert len(loop.carries) == 3
    wanted = gradients(model, model, STATE, GRID)
    got = gradients(compiled(model, torch.float32, checkpoint=3), model, STATE, GRID)
    assert max(relative_errors(got, wanted)) < 1e-6
    (loop,) = explained(model, STATE, GRID, velocity=torch.float32)
    assert len(loop.stored) == 1


# Sums that are widened.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_sum_that_a_product_reads_too_stays_low(dtype):
    """The derivative of a row is a sum over the batch, which leaves the pullback, and which a product reads."""

    def flow(y, row, v, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.sin(y + (row + y[:1] @ v))
        return y

    def run(function, own):
        leaves = [x.to(own).clone().requires_grad_() for x in (STATE, torch.ones(1, 4), A, GRID)]
        return list(torch.autograd.grad(function(*leaves).square().sum(), leaves[:3]))

    got = [x.double() for x in run(compiled(flow, dtype), torch.float32)]
    errors = relative_errors(got, run(flow, torch.float64))
    assert max(errors) <= 4 * torch.finfo(dtype).eps, errors


# Casts of the user's.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32], ids=str)
def test_a_rounding_of_the_users_is_not_folded_away(dtype):
    """To a narrower dtype and back is a rounding; a loop in float32 does it as eager code does."""
    flow = stepped(lambda i, y: (3 * y).to(dtype).to(torch.float32) * 0.3)
    got = compiled(flow, torch.float32)(STATE, GRID)
    assert torch.equal(got, flow(STATE, GRID))
    assert not torch.equal(got, stepped(lambda i, y: (3 * y) * 0.3)(STATE, GRID))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32], ids=str)
def test_a_widening_and_back_is_folded_away(narrow):
    wide = {torch.bfloat16: torch.float32, torch.float32: torch.float64}[narrow]
    captured = fx.symbolic_trace(nn.Identity())
    with FakeTensorMode():
        value = torch.zeros(3, dtype=narrow)
    graphs.placeholders(captured)[0].meta["example_value"] = value
    with fake_tensors.fake_mode_of(captured):
        step = tracing.trace(lambda x: [x.to(wide).to(narrow).sin()], [value])
        body = Body(step, Inputs(graphs.placeholders(step), [], [], []), Results(graphs.results(step), [], [], [])).body
    assert aten._to_copy.default in {node.target for node in graphs.body(step)}
    assert [node.target for node in graphs.body(body)] == [aten.sin.default]


# What ends a gradient.


@torch._dynamo.allow_in_graph
def by_data(y):
    return torch.sin(y) * y.data


@torch._dynamo.allow_in_graph
def by_detach(y):
    return torch.sin(y) * y.detach()


@pytest.mark.parametrize("inner", [by_data, by_detach], ids=lambda inner: inner.__name__)
def test_a_gradient_ends_where_a_function_that_dynamo_does_not_enter_detaches(inner):
    def gradient(function):
        y = STATE.clone().requires_grad_()
        return torch.autograd.grad(function(y, GRID).square().sum(), y)

    flow = stepped(lambda i, y: inner(y))
    wanted = gradient(flow)
    assert max(relative_errors(gradient(compiled(flow, torch.float32)), wanted)) < 1e-5
    whole = gradient(stepped(lambda i, y: torch.sin(y) * y))
    assert relative_errors(whole, wanted)[0] > 1e-2


# Iterations that are one.


def test_tensors_of_different_dtypes_are_no_entries_of_one_stack():
    """not(True) is False, and not(1) is -2."""
    masks = [torch.tensor([True, False, True, False]), torch.tensor([1, 0, 1, 0])]
    flow = stepped(lambda i, y: torch.sin(y) * ~masks[i])
    assert [loop.steps for loop in explained(flow, STATE, GRID[:3], velocity=torch.float32)] == [1, 1]
    got = compiled(flow, torch.float32)(STATE, GRID[:3])
    assert relative_errors([got], [flow(STATE, GRID[:3])])[0] < 1e-6


def test_tensors_are_alike_if_they_can_be_stacked():
    def node(value):
        made = fx.Graph().placeholder("x")
        made.meta["example_value"] = value
        return made

    first, number = node(torch.zeros(3)), node(3)
    assert _alike(first, node(torch.ones(3))) and _alike(number, number)
    others = [torch.zeros(4), torch.zeros(1, 3), torch.zeros(3, dtype=torch.float64), torch.zeros(3, device="meta"), 3]
    assert not any(_alike(first, node(other)) or _alike(node(other), first) for other in others)
    assert not _alike(number, node(3))


# What is state.

# Ways from the state to the next one that pass no product: each sum of them must be wide.
PATHS = {
    "a relu": lambda y, k: torch.relu(y + k),
    "a decay": lambda y, k: torch.exp(-0.01 * A.to(y)[0].abs()) * y + k,
    "a norm": lambda y, k: (y + k) / (y + k).norm(dim=-1, keepdim=True) * 4,
    "a relu of two paths": lambda y, k: torch.maximum(y + k, torch.relu(y) + 0.9 * k),
    "a product beside it": lambda y, k: torch.relu(y + k) + 0 * torch.relu(y @ A.to(y)),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_to_the_next_state_without_a_product_is_summed_wide(name):
    """The error of 256 steps in bfloat16 is that of one evaluation, not of the sums."""

    def flow(y, t):
        for _, dt in rampde_fx.steps(t):
            y = PATHS[name](y, dt * torch.tanh(y @ A.to(y)))
        return y

    y, t = 2 + STATE, torch.linspace(0, 1, 257)
    wanted = flow(y.double(), t.double())
    got = compiled(flow, torch.bfloat16)(y, t)
    assert (got - wanted).norm() <= 4 * torch.finfo(torch.bfloat16).eps * wanted.norm()


def operations_of_state(step, *names):
    """Which of these operations a step has outside of its velocities, in float32."""

    def flow(y, u, w, t):
        for _, dt in rampde_fx.steps(t):
            y, u = step(y, u, dt * torch.tanh((y + u) @ w), w[0, 0])
        return y, u

    arguments = [x.clone().requires_grad_() for x in (STATE, STATE, A)]
    (loop,) = rampde_fx.explain(rampde_fx.mixed_precision(flow, dtype=torch.float16), *arguments, GRID).loops
    outside = {
        n.target.overloadpacket.__name__ for n in loop.step.graph.nodes if isinstance(n.target, torch._ops.OpOverload)
    }
    return outside & set(names), [note for note in loop.notes if "rounds it" in note]


# Steps of (y, u, dt * k, a parameter), and which of their elementwise operations are state.
STEPS = {
    "a product beside the state": (lambda y, u, k, w: (torch.maximum(y + k, torch.tanh(y @ A)), u + k), {"maximum"}),
    "an increment beside the state": (lambda y, u, k, w: (torch.relu(y) + 0.1 * torch.sin(y), u + k), {"relu"}),
    "nothing but increments": (lambda y, u, k, w: (1.5 * torch.sin(y) + k, u + k), {"mul", "sin"}),
    "a value of two states": (
        lambda y, u, k, w: (w * (r := torch.relu(y + k)), torch.sin(r)),
        {"mul", "relu", "sin"},
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_lies_between_a_state_and_the_next_one_is_state(name):
    step, wanted = STEPS[name]
    found = operations_of_state(step, "maximum", "mul", "sin", "relu", "tanh")
    assert found == (wanted | {"mul"}, [])  # dt * k is a product too


def test_a_product_on_every_path_makes_a_velocity_of_the_state():
    flow = lambda y, t: [y := torch.tanh(y @ A.to(y)) + 0 * dt for _, dt in rampde_fx.steps(t)][-1]  # noqa: E731
    (loop,) = explained(flow, STATE, GRID)
    assert any("each step rounds it" in note for note in loop.notes)
