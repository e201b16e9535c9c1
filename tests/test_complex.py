"""Complex numbers in velocities, parameters and states: values and all gradients are eager's, and they stay wide."""

import pytest
import torch

import rampde_fx
from rampde_fx.errors import StateChangeError, StateError
from tests.comparison import compiled, relative_errors

# Roundings of the real operations beside the complex ones; a multiple, for errors add up over six steps.
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-2}
FREQUENCIES = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


def differentiated(function, y, weights, t, dtype):
    """Outputs, and the gradients of the state, the weights and t, in the precision of a dtype."""
    leaves = [converted(x, dtype).requires_grad_() for x in (y, weights, t)]
    outputs = function(*leaves)
    loss = sum((parts(x) * torch.linspace(0.5, 2, parts(x).numel()).view(parts(x).shape)).sum() for x in outputs)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, leaves)]


def converted(x, dtype):
    wide = {torch.float32: torch.complex64, torch.float64: torch.complex128}
    return x.to(wide[dtype] if x.is_complex() else dtype).clone()


def parts(x):
    return torch.view_as_real(x) if x.is_complex() else x


def check(function, y, weights, dtype, **policy):
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    wanted = differentiated(function, y, weights, t, torch.float64)
    state = torch.float64 if dtype is torch.float64 else torch.float32
    got = differentiated(compiled(function, dtype, **policy), y, weights, t, state)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == converted(b, state).dtype
    errors = relative_errors([parts(a).double() for a in got], [parts(b) for b in wanted])
    assert max(errors) <= BOUNDS[dtype], errors


def spectral(y, w, t):
    """A convolution by FFT, beside a real product."""
    for _, dt in rampde_fx.steps(t):
        filtered = torch.fft.irfft(torch.fft.rfft(y) * torch.view_as_complex(w), n=y.shape[-1])
        y = y + dt * torch.tanh(filtered @ w.flatten(1)[:, :1].repeat(2, 4)[:4])
    return (y,)


def rotated(y, w, t):
    """Pairs of reals that a velocity multiplies as complex numbers."""
    for s, dt in rampde_fx.steps(t):
        z = torch.view_as_complex(y.view(3, 2, 2)) * torch.view_as_complex(w)[0, :2] * torch.exp(1j * s)
        y = y + dt * torch.sin(torch.view_as_real(z).reshape(3, 4) + z.abs().repeat(1, 2) + z.angle().repeat(1, 2))
    return (y,)


def schroedinger(psi, w, t):
    """Strang splitting: the state itself is complex, and every step multiplies it by phases."""
    k = torch.arange(4, device=psi.device).to(w.dtype)
    for _, dt in rampde_fx.steps(t):
        half = torch.exp(-0.5j * dt * w[0, 0, 0] * (psi.abs() ** 2 + k))
        psi = half * torch.fft.ifft(torch.exp(-0.5j * dt * k**2) * torch.fft.fft(half * psi))
    return (psi,)


def driven(z, w, t):
    """A complex state beside a real one."""
    energy = torch.zeros_like(z.real[:, 0])
    matrix = torch.view_as_complex(w)
    for _, dt in rampde_fx.steps(t):
        rate = 1j * z + torch.tanh(z.real @ w[:, :, 0]) + z.conj() * matrix[0, 0]
        z, energy = z + dt * rate, energy + dt * (z.conj() * rate).real.sum(-1)
    return z, energy


def solved(z, w, t):
    """odeint of a complex state."""
    rotation = torch.view_as_complex(w)[0, 0]
    return (rampde_fx.odeint(lambda s, z: rotation * z + torch.sin(s) * z.conj(), z, t, method="rk4"),)


REAL = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).sin()
COMPLEX = torch.complex(REAL, REAL.flip(0) * 0.5)
WEIGHTS = torch.linspace(-0.7, 0.9, 18, dtype=torch.float64).view(3, 3, 2)
CASES = {
    "spectral": (spectral, REAL),
    "rotated": (rotated, REAL),
    "schroedinger": (schroedinger, COMPLEX),
    "driven": (driven, COMPLEX[:, :3].contiguous()),
    "solved": (solved, COMPLEX),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtype):
    function, y = CASES[name]
    check(function, y, WEIGHTS, dtype)


@pytest.mark.parametrize("policy", [{"checkpoint": "none"}, {"checkpoint": 2}, {"loop": "unroll"}], ids=str)
@pytest.mark.parametrize("name", ["spectral", "driven"])
def test_with_each_way_to_emit_the_loop(name, policy):
    function, y = CASES[name]
    check(function, y, WEIGHTS, torch.float64, **policy)


def test_complex_sums_are_compensated():
    function, y = CASES["driven"]
    check(function, y, WEIGHTS, torch.float64, accumulation="compensated")


def test_complex_operations_stay_wide_and_real_products_beside_them_are_low():
    function, y = CASES["spectral"]
    marked = rampde_fx.mixed_precision(function, dtype=torch.float16)
    t = torch.linspace(0, 1, 7)
    (loop,) = rampde_fx.explain(marked, y.float().requires_grad_(), WEIGHTS.float(), t).loops
    wide = {fallback.operation: fallback.reason for fallback in loop.fallbacks}
    assert wide["_fft_r2c"] == wide["_fft_c2r"] == "complex: fp32"
    velocity = loop.step.get_submodule("velocity_0")
    dtypes = {str(n.target): n.meta["val"].dtype for n in velocity.graph.nodes if n.op == "call_function"}
    assert dtypes["aten.mm.default"] is torch.float16


def test_a_product_of_complex_phases_is_the_states_own():
    function, y = CASES["schroedinger"]
    marked = rampde_fx.mixed_precision(function, dtype=torch.float16)
    (loop,) = rampde_fx.explain(marked, converted(y, torch.float32), WEIGHTS.float(), torch.linspace(0, 1, 7)).loops
    assert loop.carries == ("psi: complex64[3, 4]",)


def test_a_state_in_half_complex_is_refused():
    def decay(z, t):
        for _, dt in rampde_fx.steps(t):
            z = z - dt.to(z.dtype) * z
        return z

    with pytest.raises(StateChangeError, match="complex32"):
        compiled(decay, torch.float16)(COMPLEX.to(torch.complex32), torch.linspace(0, 1, 5))
    with pytest.raises(StateError, match="complex32"):
        rampde_fx.odeint(lambda t, z: -z, COMPLEX.to(torch.complex32), torch.linspace(0, 1, 5))


@pytest.mark.inductor
@pytest.mark.slow
def test_under_inductor():
    function, y = CASES["spectral"]
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    wanted = differentiated(function, y, WEIGHTS, t, torch.float64)
    got = differentiated(compiled(function, torch.float32, "inductor"), y, WEIGHTS, t, torch.float32)
    assert max(relative_errors([x.double() for x in got], wanted)) <= BOUNDS[torch.float32]
