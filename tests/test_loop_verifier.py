"""A loop that is not whole is refused at once, by the name of the pass that made it."""

from dataclasses import replace

import pytest
import torch
from torch import fx

import rampde_fx
from rampde_fx import backend
from rampde_fx.errors import RewriteError
from rampde_fx.ir import graphs
from rampde_fx.ir.ends import ActivationSlot, Gradient, Operand, Vanished
from rampde_fx.ir.loop_verifier import faults, verify
from rampde_fx.ir.loops import Pipeline
from tests.models import FORMS, Midpoint

aten = torch.ops.aten


def loops(model, monkeypatch, **policy):
    """The loop behind each pass, by its name."""
    found, plain = {}, backend._passed

    def watched(step_pass, loop):
        found[step_pass.__name__] = plain(step_pass, loop)
        return found[step_pass.__name__]

    monkeypatch.setattr(backend, "_passed", watched)
    marked = rampde_fx.mixed_precision(model, policy=rampde_fx.PrecisionPolicy(torch.float16, **policy))
    y, t = torch.randn(4, model.dim, requires_grad=True), torch.linspace(0, 1, 5)
    rampde_fx.explain(marked, y, t)
    return found


@pytest.fixture
def loop(monkeypatch):
    """A loop behind all passes: an adjoint that is scaled, stored states, compensated sums."""
    return loops(Midpoint(), monkeypatch, accumulation="compensated")["compensate_sums"]


def edited(module, edit):
    """A copy of a graph, changed."""
    module = graphs.copied(module)
    edit(module)
    return module


def returns(change):
    """Change what a graph returns."""

    def edit(module):
        output = module.graph.output_node()
        output.args = (tuple(change(list(output.args[0]))),)

    return edit


def without_value(module):
    next(node for node in module.graph.nodes if node.op == "call_function").meta.pop("val")


def as_float64(module):
    node = graphs.placeholders(module)[0]
    node.meta["val"] = node.meta["val"].double()


def other_call(module):
    call = next(node for node in module.graph.nodes if node.op == "call_module")
    call.target = "velocity_9"


def fewer_operands(module):
    call = next(node for node in module.graph.nodes if node.op == "call_module")
    call.args = call.args[:-1]


def result_out_of_reach(module):
    call = next(node for node in module.graph.nodes if node.op == "call_module")
    item = next(iter(call.users))
    item.args = (call, 99)


def one_more_placeholder(module):
    last = graphs.placeholders(module)[-1]
    with module.graph.inserting_after(last):
        module.graph.placeholder("surplus").meta["val"] = last.meta["val"]


def placeholder_of_a_taken_name(module):
    first, *_, last = graphs.placeholders(module)
    last.target = first.target


def wrong_role(module):
    next(node for node in module.graph.nodes if "role" in node.meta).meta["role"] = "velocities"


def swapped(values, i=0, j=1):
    values = list(values)
    values[i], values[j] = values[j], values[i]
    return tuple(values)


def adjoint(p, **changes):
    return replace(p, adjoint=replace(p.adjoint, **changes))


def slot(p, **changes):
    return replace(p, slots=(replace(p.slots[0], **changes), *p.slots[1:]))


def evaluation(p, **changes):
    return adjoint(p, evaluations=(replace(p.adjoint.evaluations[0], **changes), *p.adjoint.evaluations[1:]))


CORRUPTIONS = {
    "one carry more": lambda p: replace(p, carries=p.carries + 9),
    "no carry": lambda p: replace(p, carries=0),
    "one per-step input too many": lambda p: replace(p, per_step=p.per_step + 99),
    "needs_grad is shorter": lambda p: replace(p, needs_grad=p.needs_grad[:-1]),
    "the plain needs_grad is shorter": lambda p: replace(p, plain_needs_grad=p.plain_needs_grad[:-1]),
    "a correction of no carry": lambda p: replace(p, corrections=(7,)),
    "the correction is forgotten": lambda p: replace(p, corrections=()),
    "an input of the adjoint is lost": lambda p: adjoint(p, inputs=p.adjoint.inputs[:-1]),
    "a result of the adjoint is lost": lambda p: adjoint(p, results=p.adjoint.results[:-1]),
    "two inputs of the adjoint are exchanged": lambda p: adjoint(p, inputs=swapped(p.adjoint.inputs)),
    "two results of the adjoint are exchanged": lambda p: adjoint(p, results=swapped(p.adjoint.results)),
    "an input of the adjoint twice": lambda p: adjoint(p, inputs=(*p.adjoint.inputs[:-1], p.adjoint.inputs[0])),
    "an unknown kind of input": lambda p: adjoint(p, inputs=(Gradient(0), *p.adjoint.inputs[1:])),
    "an input of no operand": lambda p: adjoint(p, inputs=(*p.adjoint.inputs[:-1], Operand(99))),
    "the gradient of no input": lambda p: adjoint(p, results=(p.adjoint.results[0], Gradient(99), Vanished())),
    "one carry of the adjoint too many": lambda p: adjoint(p, carries=p.adjoint.carries + 1),
    "a correction of no carry of the adjoint": lambda p: adjoint(p, corrections=(9,)),
    "a slot of no carry": lambda p: slot(p, carry=5),
    "two slots of a carry": lambda p: replace(p, slots=(p.slots[0], p.slots[0])),
    "a slot is forgotten": lambda p: replace(p, slots=()),
    "a slot of no evaluation": lambda p: replace(p, slots=(ActivationSlot("velocity_7"),)),
    "an evaluation that the step does not call": lambda p: evaluation(p, step_call="velocity_7"),
    "a pullback that the adjoint does not call": lambda p: evaluation(p, pullback="velocity_7_pullback"),
    "a pullback without cotangents": lambda p: evaluation(p, cotangents=0),
    "a result of the step is lost": lambda p: replace(p, step=edited(p.step, returns(lambda values: values[1:]))),
    "a carry becomes None": lambda p: replace(p, step=edited(p.step, returns(lambda v: [None, *v[1:]]))),
    "the adjoint returns less": lambda p: adjoint(p, module=edited(p.adjoint.module, returns(lambda v: v[:-1]))),
    "a node without a value": lambda p: replace(p, step=edited(p.step, without_value)),
    "a carry of another dtype": lambda p: replace(p, step=edited(p.step, as_float64)),
    "a cotangent of another dtype": lambda p: adjoint(p, module=edited(p.adjoint.module, as_float64)),
    "a call of nothing": lambda p: replace(p, step=edited(p.step, other_call)),
    "a call with fewer operands": lambda p: replace(p, step=edited(p.step, fewer_operands)),
    "a result that a call has not": lambda p: adjoint(p, module=edited(p.adjoint.module, result_out_of_reach)),
    "a placeholder more": lambda p: replace(p, step=edited(p.step, one_more_placeholder)),
    "a placeholder of a taken name": lambda p: replace(p, step=edited(p.step, placeholder_of_a_taken_name)),
    "a role that is none": lambda p: replace(p, step=edited(p.step, wrong_role)),
    "a load of another dtype": lambda p: slot(p, load=edited(p.slots[0].load, as_float64)),
    "a load that gives nothing": lambda p: slot(p, load=edited(p.slots[0].load, returns(lambda values: []))),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_loop_is_refused_by_the_name_of_its_pass(name, loop):
    assert not list(faults(loop))
    with pytest.raises(RewriteError, match="the pass scale_adjoint leaves a loop that is not whole"):
        verify(CORRUPTIONS[name](loop), "scale_adjoint")


def test_all_reasons_are_said_at_once(loop):
    broken = replace(loop, needs_grad=loop.needs_grad[:-1], plain_needs_grad=loop.plain_needs_grad[:-1])
    assert len(list(faults(broken))) >= 2


def test_every_pass_leaves_a_loop_whole(monkeypatch):
    found = loops(FORMS[0](), monkeypatch)
    assert list(found) == [step_pass.__name__ for step_pass in backend.STEP_PASSES]
    assert Vanished() in found["scale_adjoint"].adjoint.results
    assert isinstance(found["store_states"].slots[0].load, fx.GraphModule)


def test_a_pass_that_breaks_a_loop_is_named(monkeypatch):
    def forgetful(loop):
        return replace(loop, needs_grad=loop.needs_grad[:-1])

    first, *rest = backend.STEP_PASSES
    monkeypatch.setattr(backend, "STEP_PASSES", Pipeline(first, forgetful, *rest))
    with pytest.raises(RewriteError, match="the pass forgetful leaves a loop that is not whole"):
        rampde_fx.explain(
            rampde_fx.mixed_precision(Midpoint(), dtype=torch.float16), torch.randn(4, 5), torch.linspace(0, 1, 5)
        )


def test_a_pass_that_fails_is_named(monkeypatch):
    def failing(loop):
        raise KeyError("role")

    monkeypatch.setattr(backend, "STEP_PASSES", Pipeline(failing, *backend.STEP_PASSES))
    with pytest.raises(RewriteError, match="the pass failing failed by KeyError"):
        rampde_fx.explain(
            rampde_fx.mixed_precision(Midpoint(), dtype=torch.float16), torch.randn(4, 5), torch.linspace(0, 1, 5)
        )
