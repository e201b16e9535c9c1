"""dtype="auto", whatever the CPU that the tests run on has arithmetic for."""

import copy
import logging

import pytest
import torch
from torch import nn

import rampde_fx
from rampde_fx import PrecisionPolicy, errors, policy_of
from rampde_fx.solvers.integrate import default_tolerance
from rampde_fx.torch_private import kernels
from tests.models import Euler

Y, T = torch.linspace(-1, 1, 20).view(4, 5), torch.linspace(0, 1, 4)
OURS = {"backend": "rampde_fx", "options": {"compiler": "aot_eager"}, "fullgraph": True}
CHOSEN = {True: torch.bfloat16, False: torch.float32}


@pytest.fixture(params=[True, False], ids=["bfloat16 in the CPU", "no bfloat16"])
def has_bfloat16(request, monkeypatch):
    monkeypatch.setattr(kernels, "cpu_has_bfloat16", lambda: request.param)
    return request.param


def gradients(function, model):
    model.zero_grad()
    function(Y, T).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_what_the_cpu_says_is_one_function():
    assert kernels.cpu_has_bfloat16() in (True, False)
    assert kernels.cpu_multiplies(torch.bfloat16) or not kernels.cpu_has_bfloat16()


def test_the_dtype_follows_the_cpu_and_is_the_default(has_bfloat16):
    models = [
        rampde_fx.mixed_precision(Euler()),
        rampde_fx.mixed_precision(Euler(), dtype="auto"),
        rampde_fx.mixed_precision(Euler(), policy=PrecisionPolicy.parse("auto")),
    ]
    assert {str(policy_of(model)) for model in models} == {"auto"}
    assert "mixed_precision: auto" in repr(models[0])
    for model in models:
        (loop,) = rampde_fx.explain(model, Y, T).loops
        assert loop.policy == PrecisionPolicy(CHOSEN[has_bfloat16])
        has = "with" if has_bfloat16 else "without"
        dtype = str(CHOSEN[has_bfloat16]).removeprefix("torch.")
        assert f'dtype="auto" is {dtype} on a CPU {has} arithmetic for bfloat16' in str(loop)


def test_gradients_are_those_of_the_dtype_that_is_named(has_bfloat16):
    torch.manual_seed(0)
    auto, named = Euler(), Euler()
    named.load_state_dict(auto.state_dict())
    got = gradients(torch.compile(rampde_fx.mixed_precision(auto), **OURS), auto)
    torch._dynamo.reset()
    marked = rampde_fx.mixed_precision(named, dtype=CHOSEN[has_bfloat16])
    for value, wanted in zip(got, gradients(torch.compile(marked, **OURS), named), strict=True):
        assert torch.equal(value, wanted)


def test_other_fields_of_the_policy_stay(has_bfloat16):
    given = PrecisionPolicy(storage=torch.float16, scaling="dynamic", checkpoint=2)
    (loop,) = rampde_fx.explain(rampde_fx.mixed_precision(Euler(), policy=given), Y, T).loops
    assert str(loop.policy) == f"{CHOSEN[has_bfloat16]}, {str(given).partition(', ')[2]}".removeprefix("torch.")


def test_on_cuda_it_is_float16():
    assert PrecisionPolicy().chosen_for("cuda") == PrecisionPolicy(torch.float16)


@pytest.mark.parametrize("device", ["meta", "xpu", "mps"])
def test_a_device_of_which_nothing_is_known_is_refused(device):
    with pytest.raises(errors.PolicyError, match=r"auto.*" + device) as refusal:
        PrecisionPolicy().chosen_for(device)
    assert "torch.bfloat16" in refusal.value.fix


def test_a_loop_of_no_real_device_is_refused_with_its_line():
    model = rampde_fx.mixed_precision(Euler().to("meta"))
    with pytest.raises(errors.PolicyError, match="meta") as refusal:
        rampde_fx.explain(model, Y.to("meta"), T.to("meta"))
    assert "for t_i, dt in" in refusal.value.where or "models.py" in refusal.value.where
    assert rampde_fx.explain(
        rampde_fx.mixed_precision(Euler().to("meta"), dtype=torch.float16), Y.to("meta"), T.to("meta")
    )


def test_a_loop_that_computes_on_two_devices_is_refused():
    class Two(nn.Module):
        def forward(self, y, z, t):
            for _, dt in rampde_fx.steps(t):
                y, z = y + dt * torch.tanh(y), z + 0.1 * torch.tanh(z)
            return y, z

    with pytest.raises(errors.PolicyError, match="cpu and meta"):
        rampde_fx.explain(rampde_fx.mixed_precision(Two()), Y, Y.to("meta"), T)


def test_times_on_the_host_do_not_count():
    """A grid on the CPU beside a state elsewhere is one device: that of the state."""

    def solve(y, t):
        for _, dt in rampde_fx.steps(t):
            y = y + dt * torch.tanh(y)
        return y

    with pytest.raises(errors.PolicyError, match="type 'meta'"):
        rampde_fx.explain(rampde_fx.mixed_precision(solve), Y.to("meta"), T)


def test_the_policy_of_auto_has_no_dtype_yet():
    made = PrecisionPolicy()
    for field in ("dtype", "storage_dtype", "adjoint_scaling"):
        with pytest.raises(errors.PolicyError, match="auto"):
            getattr(made, field)
    assert made.filled_in() == made
    with pytest.raises(errors.PolicyError, match="storage"):
        PrecisionPolicy(storage="auto")


def test_tolerances_are_those_of_the_dtype(has_bfloat16):
    for name in ("rtol", "atol"):
        named = str(PrecisionPolicy(CHOSEN[has_bfloat16]))
        assert default_tolerance(name, "auto", "torch.float32", "cpu") == default_tolerance(
            name, named, "torch.float32", "cpu"
        )


def test_the_log_says_which_dtype(has_bfloat16, caplog):
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO, logger="rampde_fx"):
        torch.compile(rampde_fx.mixed_precision(Euler()), **OURS)(Y, T)
    dtype = str(CHOSEN[has_bfloat16]).removeprefix("torch.")
    assert sum(f'dtype="auto" is {dtype}' in record.message for record in caplog.records) == 1


def test_check_takes_it(has_bfloat16):
    result = rampde_fx.check(Euler(), Y, T, policies=[PrecisionPolicy()])
    (row,) = [row for row in result.rows if row.name == "auto"]
    assert row.policy == PrecisionPolicy() and not row.refusal
    assert (max(row.gradient_errors.values()) > 2.0**-14) == has_bfloat16


def test_verified_in_float64(has_bfloat16):
    torch._dynamo.reset()
    options = {"compiler": "aot_eager", "verify": True}
    model = Euler()
    function = torch.compile(rampde_fx.mixed_precision(copy.deepcopy(model)), backend="rampde_fx", options=options)
    difference = (function(Y, T) - model(Y, T)).norm() / model(Y, T).norm()
    assert difference < 2.0 ** (-7 if has_bfloat16 else -20)
