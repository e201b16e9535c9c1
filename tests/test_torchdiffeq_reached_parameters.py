"""odeint_adjoint compiled: parameters that func does not read have a gradient of zero, as they have uncompiled."""

import pytest
import torch
from torch import nn

import rampde_fx
from rampde_fx.torchdiffeq import odeint_adjoint

DOUBLE = torch.float64


class Partly(nn.Module):
    """A velocity that reads one of its parameters."""

    def __init__(self, unread):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(-0.5, dtype=DOUBLE))
        self.unread = nn.Parameter(unread)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, t, y):
        return (self.rate * y[0],) if isinstance(y, tuple) else self.rate * y


class Solved(nn.Module):
    def __init__(self, func, kind, arguments):
        super().__init__()
        self.func, self.kind, self.arguments = func, kind, arguments

    def forward(self, y):
        end = torch.tensor([0.0, 1.0], dtype=DOUBLE)
        y = (y,) if self.kind == "tuple" else y
        found = odeint_adjoint(self.func, y, end, **self.arguments)
        if self.kind in ("statistics", "tuple"):
            found = found[0]
        return found[1] if self.kind == "event" else found


GIVEN = {
    "tensor": {},
    "tuple": {"method": "rk4"},
    "statistics": {"method": "rk4", "options": {"stats": True}},
    "event": {"event_fn": lambda t, y: y[0] - 1.5, "rtol": 1e-6, "atol": 1e-6},
}
UNREAD = {
    "infinite": torch.full((2, 3), torch.inf),
    "complex": torch.ones(2, dtype=torch.complex128),
    "half": torch.ones((), dtype=torch.float16),
    "empty": torch.ones(0, 4),
}


def gradients(run, model, y):
    solution = run(y)
    (solution[0] if isinstance(solution, tuple) else solution).square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("kind", "unread"),
    [*((kind, "infinite") for kind in GIVEN), *(("tuple", name) for name in UNREAD if name != "infinite")],
)
def test_a_parameter_that_is_not_read_has_a_gradient_of_zero(kind, unread):
    model = Solved(Partly(UNREAD[unread].clone()), kind, GIVEN[kind])
    y = torch.tensor([2.0, 1.0], dtype=DOUBLE)
    wanted = gradients(model, model, y)
    torch.compiler.reset()
    marked = rampde_fx.mixed_precision(model, dtype=DOUBLE)
    run = torch.compile(marked, backend="rampde_fx", options={"compiler": "aot_eager"}, fullgraph=True)
    found = gradients(run, model, y)
    none = found["func.unread"]
    assert none is not None and none.dtype == UNREAD[unread].dtype and not none.any()
    assert found["func.frozen"] is None and wanted["func.frozen"] is None
    torch.testing.assert_close(found["func.rate"], wanted["func.rate"], rtol=1e-5, atol=1e-6)
