"""monitor(): what it records against closed forms, and that nothing of it is in a graph while it is closed."""

import math
import sys
import threading
from importlib.util import find_spec

import pytest
import torch

import rampde_fx
from rampde_fx import AdjointScaling, PrecisionPolicy, errors
from rampde_fx.runtime import monitoring
from rampde_fx.torch_private import inductor
from tests.comparison import compiled, gradients
from tests.models import RK4, Euler
from tests.test_scaling import Steep

A, N = -0.5, 8


class Decay(torch.nn.Module):
    """y' = a y by the midpoint rule: velocity cotangents known in closed form."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(A))

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            k = self.a * y
            y = y + dt * (self.a * (y + dt / 2 * k))
        return y


def watched(model, y, t, dtype=torch.float16, scale=1.0, **policy):
    """The records of one backward pass of scale * y(T).sum()."""
    torch._dynamo.reset()
    run = compiled(model, dtype, **policy)
    with rampde_fx.monitor() as monitor:
        (run(y, t).sum() * scale).backward()
    return monitor.records


@pytest.mark.parametrize(
    "policy",
    [{}, {"loop": "unroll"}, {"checkpoint": 3}, {"checkpoint": "none"}, {"accumulation": "compensated"}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cotangents_of_a_linear_problem(dtype, policy):
    """With growth g a step, g = 1 + a h + (a h)^2 / 2, the adjoint behind step n is g^(N - 1 - n)."""
    y, t = torch.tensor([1.0, 2.0], requires_grad=True), torch.linspace(0, 1, N + 1)
    (record,) = watched(Decay(), y, t, dtype, **policy)
    h = 1 / N
    adjoint = torch.tensor([(1 + A * h + (A * h) ** 2 / 2) ** (N - 1 - n) for n in range(N)])
    wanted = torch.stack([adjoint * h * (h / 2 * -A), adjoint * h], 1)  # of k, and of the velocity at the midpoint
    for found in (record.largest, record.smallest):
        assert (found / wanted - 1).abs().max() < 8 * torch.finfo(dtype).eps
    scales = 2.0 ** -torch.floor(torch.log2(record.largest)) if dtype is torch.float16 else torch.ones(N, 2)
    assert torch.equal(record.scales, scales)
    assert record.runs == 1 and record.training_step == 0
    assert not record.underflows.any() and not record.overflows.any()


def test_entries_that_become_zero():
    """Unscaled in float16: the cotangents of the last step of Euler's method, h = 1 / 4, at a loss of 2^-24 w y."""
    weights = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0, 64.0])

    @rampde_fx.mixed_precision(policy=PrecisionPolicy(torch.float16, scaling="none"))
    def run(y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.sin(y)
        return y

    with rampde_fx.monitor() as monitor:
        function = torch.compile(run, backend="rampde_fx", options={"compiler": "aot_eager"})
        (function(torch.ones(6, requires_grad=True), torch.linspace(0, 0.5, 3)) * weights * 2.0**-24).sum().backward()
    (record,) = monitor.records
    assert record.scales.eq(1).all()
    # 2^-26 w; half of the least subnormal number becomes zero.
    assert record.underflows[-1].tolist() == [2]
    assert record.largest[-1].item() == 2.0**-20 and record.smallest[-1].item() == 2.0**-26
    assert all("underflows" in shown and " entries" in shown for shown in (str(monitor), monitor._repr_html_()))


def test_overflow_and_repetition():
    (record,) = watched(Steep(64), 1e-3 * (1 + torch.rand(16, 64)), torch.linspace(0, 1e-6, 4))
    assert record.runs == 2 and not record.overflows.any()
    (once,) = watched(
        Steep(64),
        1e-3 * (1 + torch.rand(16, 64)),
        torch.linspace(0, 1e-6, 4),
        scaling=AdjointScaling(max_attempts=1),
    )
    assert once.runs == 1 and once.overflows.any()
    assert once.scales[-1] == record.scales[-1] * 2.0**8  # the gradients of the last step overflow


def test_a_cotangent_of_zeros():
    (record,) = watched(Euler(), torch.randn(3, 5), torch.linspace(0, 1, 4), scale=0.0)
    assert record.largest.eq(0).all() and record.smallest.isinf().all() and not record.underflows.any()


def test_an_empty_batch_has_no_statistics():
    model = Euler()
    assert watched(model, torch.randn(0, 5), torch.linspace(0, 1, 4)) == []
    assert all(parameter.grad.eq(0).all() for parameter in model.parameters())


def test_a_repeated_run_replaces_the_record_of_its_own_loop():
    with rampde_fx.monitor() as monitor:
        for loop, run in (("a", 0), ("b", 0), ("a", 1)):
            monitoring.record(loop, run, torch.full((2, 3, 5), 1.0 + run))
    assert [(record.loop, record.runs, record.scales[0, 0].item()) for record in monitor.records] == [
        ("a", 2, 2.0),
        ("b", 1, 1.0),
    ]


def test_nothing_is_in_the_graph_of_a_closed_monitor():
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module.print_readable(print_output=False))
        return inductor.lookup_backend("aot_eager")(graph_module, inputs)

    model, y, t = RK4(), torch.randn(3, 5), torch.linspace(0, 1, 4)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inductor, "compile_graph", lambda _, graph, inputs, *__, **___: backend(graph, inputs))
        run = compiled(model, torch.float16)
        plain = gradients(run, model, y, t)
        with rampde_fx.monitor() as monitor:
            inside = gradients(run, model, y, t)
        after = gradients(run, model, y, t)
        with rampde_fx.monitor() as second:
            gradients(run, model, y, t)
    assert ["record_adjoint" in text for text in graphs] == [False, True]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, inside, after, strict=True))
    assert len(monitor.records) == len(second.records) == 1
    assert monitor.records[0].scales.shape == (3, 4)


def test_training_steps_and_nested_monitors():
    model, y, t = Euler(), torch.randn(3, 5), torch.linspace(0, 1, 4)
    run, optimizer = compiled(model, torch.float16), None
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rampde_fx.monitor() as outer:
        for _ in range(2):
            run(y, t).sum().backward()
            optimizer.step()
        with rampde_fx.monitor() as inner:
            for part in y.split(2):
                run(part, t).sum().backward()
            optimizer.step()
        run(y, t).sum().backward()
    optimizer.step()
    assert [record.training_step for record in outer.records] == [0, 1, 2, 2, 3]
    assert [record.training_step for record in inner.records] == [0, 0]
    text = str(outer)
    assert "5, in 4 training steps" in text and "tests/models.py" in text


def test_an_error_closes_it():
    model, y, t = Euler(), torch.randn(3, 5), torch.linspace(0, 1, 4)
    run = compiled(model, torch.float16)
    with pytest.raises(KeyError), rampde_fx.monitor() as monitor:
        raise KeyError
    run(y, t).sum().backward()
    assert monitor.records == [] and str(monitor).startswith("no backward pass was recorded: run forward and backward")
    assert str(monitor) in monitor._repr_html_()


def test_another_thread_is_not_watched():
    model, y, t = Euler(), torch.randn(3, 5), torch.linspace(0, 1, 4)
    run = compiled(model, torch.float16)
    with rampde_fx.monitor() as monitor:
        thread = threading.Thread(target=lambda: run(y, t).sum().backward())
        thread.start()
        thread.join()
    assert monitor.records == [] and model.velocity.linear[0].weight.grad is not None


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Euler(), Euler()])

    def forward(self, y, t):
        for block in self.blocks:
            y = torch.sin(block(y, t))
        return y


def test_loops_of_one_line_have_names_of_their_own():
    records = watched(Twice(), torch.randn(3, 5), torch.linspace(0, 1, 4))
    first, second = sorted(record.loop for record in records)
    assert second == f"{first} (2)" and first.rpartition(":")[0].endswith("models.py")
    counts = rampde_fx.backward_counts()
    assert first in counts and second in counts


def test_adaptive_odeint():
    class Solved(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(A))

        def forward(self, y, t):
            return rampde_fx.odeint(lambda t, y: self.a * torch.sin(y), y, t, method="bosh3", rtol=1e-3, atol=1e-3)[-1]

    y = torch.linspace(1, 2, 5)
    (record,) = watched(Solved(), y, torch.tensor([0.0, 1.0]))
    assert record.scales.shape[1] == 3 and len(record.scales) >= 2 and record.largest.isfinite().all()
    run = compiled(Solved(), torch.float16)
    with rampde_fx.monitor() as monitor:
        for end in (1.0, 20.0):
            run(y, torch.tensor([0.0, end])).sum().backward()
    short, long = monitor.records
    assert len(short.scales) < len(long.scales)
    smallest = min(float(record.smallest.min()) for record in monitor.records)
    largest = max(float(record.largest.max()) for record in monitor.records)
    for text in (str(monitor), monitor._repr_html_()):
        assert f"{smallest:.2g} to {largest:.2g}" in text
    if find_spec("matplotlib"):
        assert [len(line.get_ydata()) for line in monitor.plot().axes[1].lines] == [2, 2]


def records_of_a_flow():
    model, y, t = Euler(), torch.randn(3, 5), torch.linspace(0, 1, 4)
    run = compiled(model, torch.float16)
    with rampde_fx.monitor() as monitor:
        for scale in (1.0, 1e-6, 0.0):
            (run(y, t).sum() * scale).backward()
    return monitor


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    monitor = records_of_a_flow()
    figure = monitor.plot(tmp_path / "monitor.png")
    assert (tmp_path / "monitor.png").read_bytes().startswith(b"\x89PNG")
    scales, adjoint, losses, last = figure.axes
    (median,) = scales.lines
    assert median.get_ydata()[1] - median.get_ydata()[0] == pytest.approx(math.log2(1e6), abs=1)
    assert len(adjoint.lines) == 2 and len(last.lines) == 3
    assert losses.lines[0].get_ydata().tolist() == [0, 0, 0]


def test_plot_without_records_or_matplotlib(monkeypatch):
    with rampde_fx.monitor() as monitor:
        pass
    with pytest.raises(errors.MonitorError, match="no backward pass was recorded"):
        monitor.plot()
    monitor = records_of_a_flow()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(errors.MonitorError, match="pip install matplotlib"):
        monitor.plot()


@pytest.mark.inductor
@pytest.mark.slow
def test_under_inductor():
    model, y, t = Euler(), torch.randn(8, 5), torch.linspace(0, 1, 4)
    run = compiled(model, torch.float16, compiler="inductor")
    reference = compiled(model, torch.float16)
    with rampde_fx.monitor() as monitor:
        for function in (run, reference):
            (function(y, t).sum() * 1e-6).backward()
    ours, wanted = monitor.records
    assert torch.equal(ours.scales, wanted.scales) and torch.equal(ours.underflows, wanted.underflows)
    assert (ours.largest / wanted.largest - 1).abs().max() < 4 * torch.finfo(torch.float16).eps
