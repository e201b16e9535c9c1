"""What is saved for the backward, measured; what is computed in which dtype; what is compiled again."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import rampde_fx
from tests.comparison import compiled
from tests.models import FORMS, RK4, Midpoint, Uneven


def saved_bytes(function, y, t):
    """Bytes of the distinct tensors that a forward leaves for the backward."""
    saved = {}
    function(y, t)  # compiles, if it has to

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(y, t)
    return sum(saved.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_saved_bytes_are_one_state_per_step_in_the_storage_dtype(dtype):
    model = RK4(dim=16, width=32)
    y = torch.randn(64, 16)
    measured = {}
    for steps in (3, 7, 12):
        torch._dynamo.reset()
        measured[steps] = saved_bytes(compiled(model, dtype), y, torch.linspace(0, 1, steps + 1))
    state, grid = 64 * 16 * dtype.itemsize, 2 * 4  # the stored state; t and dt
    assert measured[7] - measured[3] == 4 * (state + grid)
    assert measured[12] - measured[7] == 5 * (state + grid)
    assert measured[3] - 3 * (state + grid) <= 8 * sum(p.numel() for p in model.parameters())


def test_explain_reports_what_is_measured():
    model = rampde_fx.mixed_precision(RK4(dim=16, width=32))
    y, t = torch.randn(64, 16), torch.linspace(0, 1, 9)
    (loop,) = rampde_fx.explain(model, y, t).loops
    assert loop.steps == 8 and loop.evaluations == 4 and loop.emitted == "scan"
    assert loop.carries == ("y: float32[64, 16]",) and loop.stored == ("y: float16[64, 16]",)
    assert loop.stored_bytes == 8 * 64 * 16 * 2 and loop.stored_bytes_fp32 == 8 * 64 * 16 * 4
    plain, small, large = RK4(dim=16, width=32), torch.linspace(0, 1, 3), torch.linspace(0, 1, 5)
    per_step = (saved_bytes(plain, y, large) - saved_bytes(plain, y, small)) // 2
    assert abs(loop.stored_bytes_autograd - 8 * per_step) < 0.05 * 8 * per_step
    text = str(rampde_fx.explain(torch.compile(model, backend="rampde_fx"), y, t))
    assert "models.py" in text and "4 evaluations per step in float16" in text and "16,384 bytes" in text


def test_explain_names_unequal_iterations():
    report = rampde_fx.explain(rampde_fx.mixed_precision(Uneven()), torch.randn(3, 5), torch.linspace(0, 1, 4))
    assert [loop.steps for loop in report.loops] == [1, 1, 1]
    assert all("differ" in str(loop) for loop in report.loops)


def narrow(factor):
    """The dtype of a factor before it was widened for a product that is formed in float32."""
    before = factor.args[0] if factor.target is torch.ops.aten._to_copy.default else factor
    return min((node.meta["val"].dtype for node in (factor, before)), key=lambda dtype: dtype.itemsize)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_matrix_products_are_low_and_states_are_not(form):
    model = rampde_fx.mixed_precision(form())
    for loop in rampde_fx.explain(model, torch.randn(16, model.dim), torch.linspace(0, 1, 5)).loops:
        assert loop.evaluations > 0
        for module in (loop.step, loop.adjoint):
            for name, graph in ((n, m.graph) for n, m in module.named_modules() if isinstance(m, torch.fx.GraphModule)):
                for node in graph.nodes:
                    low = node.meta["val"].dtype if isinstance(node.meta.get("val"), torch.Tensor) else None
                    if node.target in (
                        torch.ops.aten.mm.default,
                        torch.ops.aten.addmm.default,
                        torch.ops.aten.bmm.default,
                    ):
                        factors = [narrow(factor) for factor in node.all_input_nodes]
                        assert name and factors == [torch.float16] * len(factors), (node, factors)
                    elif not name and node.op == "call_function" and "getitem" not in str(node.target):
                        stored = [user.op for user in node.users] == ["output"] and module is loop.step
                        assert low is not torch.float16 or stored, (node, "outside of a velocity")


def test_a_changed_batch_size_compiles_again_at_most_once():
    counter = CompileCounterWithBackend("rampde_fx")
    model = torch.compile(rampde_fx.mixed_precision(Midpoint()), backend=with_aot_eager(counter), fullgraph=True)
    for batch in (16, 12, 7, 33):
        y = torch.randn(batch, 5, requires_grad=True)
        model(y, torch.linspace(0, 1, 5)).sum().backward()
        assert y.grad.isfinite().all()
    assert counter.frame_count <= 2


def with_aot_eager(counter):
    from rampde_fx.backend import rampde_fx as backend

    def compile_and_count(graph_module, inputs):
        counter.frame_count += 1
        return backend(graph_module, inputs, options={"compiler": "aot_eager"})

    return compile_and_count
