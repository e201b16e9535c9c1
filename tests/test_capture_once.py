"""Marked loops of which a few iterations are captured: the same values, gradients and side effects as eager."""

import copy
import math
import random

import pytest
import torch
from torch.utils._pytree import tree_leaves

import rampde_fx
from rampde_fx import backend
from rampde_fx.passes import match_iterations
from rampde_fx.torch_private import interpreter_state, repetition
from tests import numbered_loops, repeating_loops
from tests.models import FORMS, RK4, PerStepWeights
from tests.random_python import random_program
from tests.repeating_loops import Model, forget

ONCE = {**repeating_loops.ONCE, **numbered_loops.ONCE}
WHOLE = {**repeating_loops.WHOLE, **numbered_loops.WHOLE}

# Raised with iterations that are captured one by one, too.
REFUSED = {
    "steps_as_a_list": rampde_fx.errors.RampdeError,
    "generator_that_is_made_a_list": rampde_fx.errors.RampdeError,
    "rows_of_a_view": rampde_fx.errors.MutationError,
}


@pytest.fixture
def captured(monkeypatch):
    """For each graph that is rewritten, of its loops: how many iterations were captured, and whether they repeat."""
    found, find = [], backend.find_loops

    def noted(*args, **kwargs):
        loops = find(*args, **kwargs)
        found.append([(len(loop.iterations), loop.repeats) for loop in loops])
        return loops

    monkeypatch.setattr(backend, "find_loops", noted)
    return found


def outcome(function, model, y, t):
    """Values, gradients and side effects of a run."""
    forget()
    model.zero_grad()
    y, t = y.clone().requires_grad_(), t.clone().requires_grad_()
    values = [x for x in tree_leaves(function(y, t)) if isinstance(x, torch.Tensor)]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator) for x in values]
    sum((x * w).sum() for x, w in zip(values, weights, strict=True) if x.is_floating_point()).backward()
    gradients = [torch.zeros(()) if x.grad is None else x.grad for x in (y, t, *model.parameters())]
    return [x.detach().clone() for x in values], gradients, model.effects()


def difference(got, wanted):
    """The largest relative difference of two outcomes; what is no tensor must be equal."""
    largest = 0.0
    for a, b in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
        if isinstance(b, torch.Tensor):
            assert a.shape == b.shape and a.dtype == b.dtype
            error = ((a.detach().double() - b.detach().double()).norm() / (b.detach().double().norm() + 1e-6)).item()
            largest = max(largest, math.inf if math.isnan(error) else error)
        else:
            assert a == b
    return largest


def compiled(model, **options):
    policy = rampde_fx.PrecisionPolicy(velocity=torch.float32, **options.pop("policy", {}))
    options = {"options": {"compiler": "aot_eager"}, **options}
    return torch.compile(rampde_fx.mixed_precision(model, policy=policy), backend="rampde_fx", **options)


def compare(program, numbers, **options):
    """A program against eager over several numbers of steps, one after the other."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(program)
    reference = copy.deepcopy(model)
    function = compiled(model, **options)
    for n in numbers:
        y, t = torch.randn(3, 4), torch.linspace(0, 1, n + 1)
        got, wanted = outcome(function, model, y, t), outcome(reference, reference, y, t)
        assert difference(got, wanted) < 2e-5, n  # 40 steps and gradients of a parameter in float32


@pytest.mark.parametrize("name", ONCE)
def test_what_repeats_is_captured_once_and_agrees_with_eager(name, captured):
    compare(ONCE[name], (12,))
    assert all(count < 12 and repeats for loops in captured for count, repeats in loops) and captured


@pytest.mark.parametrize("name", WHOLE)
def test_what_differs_is_captured_as_a_whole_and_agrees_with_eager(name, captured):
    if name in REFUSED:
        with pytest.raises(REFUSED[name]):
            compare(WHOLE[name], (12,))
    else:
        compare(WHOLE[name], (12,))
    assert not any(repeats for _, repeats in captured[-1])


# One static graph, then a dynamic one; fewer than the captured iterations are a graph of their own.
NUMBERS = (8, 12, 20, 100, 33)
SYMBOLIC = (
    "euler heun_by_a_helper times_in_a_closure counter_that_is_returned index_behind_the_loop two_step_method"
    " everything_behind_the_loop value_of_the_first_step trajectory trajectory_along_another_dimension"
    " two_values_in_one_list state_in_a_dataclass state_in_the_module buffer_in_place dropout_of_nothing"
    " vjp_in_the_body checkpointed_loop two_loops_in_a_row generator_around_the_steps in_place size_of_the_grid"
    " states_behind_the_first states_along_the_second_dimension states_read_from_the_trajectory times_by_the_index"
    " first_step_by_its_index"
).split()


@pytest.mark.parametrize("name", SYMBOLIC)
def test_all_numbers_of_steps_take_two_graphs(name, captured):
    compare(ONCE[name], NUMBERS)
    assert len(captured) == 2


TOLD = {
    "format": lambda i, n: f"{i:03d}",
    "format of a sum": lambda i, n: f"{i + 1:>5}",
    "percent": lambda i, n: "%d of %d" % (i, n),  # noqa: UP031
    "str": lambda i, n: str((i, n)),
    "divmod": lambda i, n: divmod(n, 3),
}


@pytest.mark.filterwarnings("error::rampde_fx.errors.FullPrecisionWarning")
@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD)
@pytest.mark.parametrize("fullgraph", [True, False])
def test_numbers_behind_a_loop_are_written_as_uncompiled(told, fullgraph):
    def program(m, y, t):
        n = 0
        i = n = 0
        for i, (t_i, dt) in enumerate(rampde_fx.steps(t)):  # noqa: B007
            y = y + dt * m.field(t_i, y)
            n += 2
        return y, told(i, n)

    torch._dynamo.reset()
    model = Model(program)
    reference = copy.deepcopy(model)
    function = compiled(model, fullgraph=fullgraph)
    for n in (8, 12, 20, 12):
        y, t = torch.randn(3, 4), torch.linspace(0, 1, n + 1)
        (got, text), (wanted, expected) = function(y, t), reference(y, t)
        assert text == expected and torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["euler", "trajectory", "two_step_method", "index_behind_the_loop"])
def test_dynamic_shapes_from_the_start_take_one_graph(name, captured):
    compare(ONCE[name], NUMBERS, dynamic=True)
    assert len(captured) == 1


def test_a_marked_dimension_takes_one_graph(captured):
    torch._dynamo.reset()
    model = Model(ONCE["trajectory"])
    reference = copy.deepcopy(model)
    function = compiled(model)
    for n in NUMBERS:
        y, t = torch.randn(3, 4), torch.linspace(0, 1, n + 1)
        torch._dynamo.mark_dynamic(t, 0)
        assert torch.allclose(function(y, t), reference(y, t), rtol=1e-5, atol=1e-6)
    assert len(captured) == 1


POLICIES = [
    {"loop": "scan"},
    {"checkpoint": 4},
    {"checkpoint": "sqrt"},
    {"checkpoint": "none"},
    {"accumulation": "compensated"},
    {"loop": "scan", "checkpoint": "sqrt"},
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("name", ["trajectory", "dropout_of_nothing"])
def test_all_numbers_of_steps_take_two_graphs_under_each_policy(name, policy, captured):
    compare(ONCE[name], NUMBERS, policy=policy)
    assert len(captured) == 2


@pytest.mark.parametrize("name", ["trajectory", "two_step_method", "everything_behind_the_loop"])
def test_unrolled_loops_agree_with_eager(name, captured):
    compare(ONCE[name], (12, 7), policy={"loop": "unroll"}, dynamic=False)
    assert all(repeats for loops in captured for _, repeats in loops)


@pytest.mark.parametrize("name", ["euler", "trajectory", "two_step_method", "value_of_the_first_step"])
def test_few_steps(name):
    compare(ONCE[name], (1, 2, 3, 4, 5, 6, 7))


def test_the_graph_is_as_large_for_16_as_for_1024_steps(monkeypatch):
    sizes, rewrite = [], backend.rewrite

    def noted(graph_module, *args, **kwargs):
        sizes.append(len(graph_module.graph.nodes))
        loops = rewrite(graph_module, *args, **kwargs)
        sizes.append(len(graph_module.graph.nodes))
        return loops

    monkeypatch.setattr(backend, "rewrite", noted)
    for n in (16, 1024):
        torch._dynamo.reset()
        model = RK4(layers=3)
        reference = copy.deepcopy(model)
        y, t = torch.randn(3, 5), torch.linspace(0, 1, n + 1)
        assert torch.allclose(compiled(model)(y, t), reference(y, t), rtol=1e-4, atol=1e-5)
    assert sizes[:2] == sizes[2:]


IRREGULAR = {
    "PerStepWeights": "all 12 iterations: ",  # a layer of its own in each step
    "Uneven": "all 12 iterations: ",  # another activation in every second step
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_forms_are_captured_once(form):
    model = form(steps=12) if form is PerStepWeights else form()
    report = rampde_fx.explain(
        rampde_fx.mixed_precision(model, dtype=torch.float16), torch.randn(3, model.dim), torch.linspace(0, 1, 13)
    )
    told = {loop.captured for loop in report.loops}
    if form.__name__ in IRREGULAR:
        assert all(text.startswith(IRREGULAR[form.__name__]) and "enumerate" in text for text in told)
    else:
        assert told <= {f"{n} iterations, which stand for all 12" for n in (3, 4, 5)} and told


def captured_line(program, n=12):
    model = rampde_fx.mixed_precision(Model(program), dtype=torch.float16)
    return rampde_fx.explain(model, torch.randn(3, 4), torch.linspace(0, 1, n + 1)).loops[0].captured


def test_the_report_names_what_differs():
    found = captured_line(WHOLE["counter_that_is_compared"], 20)
    told, _, place = found.partition(", and is read in ")
    assert told == "all 20 iterations: the variable 'n' differs from iteration to iteration: 10, then 11"
    code = WHOLE["counter_that_is_compared"].__code__
    assert place == f"{code.co_filename}:{code.co_firstlineno + 5}"
    assert "second name" in captured_line(WHOLE["one_dict_again_and_again"])
    assert "for loop" in captured_line(WHOLE["steps_by_next_alone"])
    assert captured_line(ONCE["euler"], 3) == ""
    assert captured_line(ONCE["euler"], 1000) == "4 iterations, which stand for all 1,000"


def test_a_torch_with_unknown_state_is_captured_as_a_whole(monkeypatch, captured):
    known = [name for name in interpreter_state.CONSTANT_OF_FRAME if name != "lineno"]
    monkeypatch.setattr(interpreter_state, "CONSTANT_OF_FRAME", known)
    compare(ONCE["trajectory"], (12,))
    assert captured == [[(12, False)]]
    told = captured_line(ONCE["euler"])
    assert f"torch {torch.__version__} keeps state" in told and "lineno" in told


@pytest.mark.parametrize("part", ["_places", "_lag", "_are_counted", "_finish"])
def test_an_error_of_the_comparison_is_no_error_of_the_capture(part, monkeypatch, captured):
    def fails(*_):
        raise AttributeError("another torch")

    monkeypatch.setattr(repetition, part, fails)
    compare(ONCE["two_step_method"], (12,))
    assert captured == [[(12, False)]]


def test_what_the_passes_refuse_is_captured_again_as_a_whole(monkeypatch, captured):
    def refuses(marked, run):
        raise rampde_fx.errors.RewriteError("no", required="more", fix="none")

    monkeypatch.setattr(match_iterations, "check_extension", refuses)
    compare(ONCE["trajectory"], (12, 20))
    assert [repeats for ((_, repeats),) in captured] == [True, False] * 2
    assert "no." in captured_line(ONCE["euler"])


def test_verify_runs_the_loop_as_it_is_written(captured):
    compare(ONCE["trajectory"], (12,), options={"compiler": "aot_eager", "verify": True})
    assert all(loops == [(12, False)] for loops in captured) and captured


@pytest.mark.parametrize("backend_of_torch", ["eager", "aot_eager"])
def test_other_backends_are_given_every_iteration(backend_of_torch):
    model = Model(ONCE["trajectory"])
    y, t = torch.randn(3, 4), torch.linspace(0, 1, 13)
    torch._dynamo.reset()
    marked = rampde_fx.mixed_precision(copy.deepcopy(model), dtype=torch.float16)
    with pytest.warns(rampde_fx.errors.FullPrecisionWarning):
        got = torch.compile(marked, backend=backend_of_torch)(y, t)
    assert torch.allclose(got, model(y, t), rtol=1e-6)
    graphs = []

    def ours(graph_module, _):
        graphs.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    with pytest.warns(rampde_fx.errors.FullPrecisionWarning):
        torch.compile(marked, backend=ours)(y, t)
    markers = graphs[0].graph.find_nodes(op="call_function", target=torch.ops.rampde_fx.step)
    assert len(markers) == 12 and torch.allclose(marked(y, t), got, rtol=1e-6)


@pytest.mark.parametrize("wrapped", ["tqdm(steps(t))", "enumerate(tqdm(steps(t)))", "tqdm(enumerate(steps(t)))"])
def test_progress_bars_are_harmless(wrapped, captured, capsys):
    names = {"steps": rampde_fx.steps, "tqdm": pytest.importorskip("tqdm").tqdm}
    head = f"i, (t_i, dt) in {wrapped}" if "enumerate" in wrapped else f"t_i, dt in {wrapped}"
    text = f"def program(m, y, t):\n for {head}:\n  y = y + dt * m.field(t_i, y)\n return y"
    exec(text, names)
    compare(names["program"], (12,), fullgraph=True)
    assert all(repeats for loops in captured for _, repeats in loops) and captured
    assert "12it" in capsys.readouterr().err  # of the uncompiled model


def test_a_loop_that_is_left_early_is_refused_as_before():
    def leaves(m, y, t):
        n = 0
        for t_i, dt in rampde_fx.steps(t):
            y = y + dt * m.field(t_i, y)
            n += 1  # noqa: SIM113
            if n == 6:
                break
        return y

    torch._dynamo.reset()
    with pytest.raises(rampde_fx.errors.UnsupportedLoopError, match="was left in iteration 6"):
        compiled(Model(leaves))(torch.randn(3, 4), torch.linspace(0, 1, 13))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["trajectory", "two_step_method", "batch_norm"])
def test_without_gradients(name, mode, captured):
    torch._dynamo.reset()
    model = Model(ONCE[name])
    reference = copy.deepcopy(model)
    function = compiled(model)
    with mode():
        for n in (12, 20):
            y, t = torch.randn(3, 4), torch.linspace(0, 1, n + 1) ** 2
            assert difference(function(y, t), reference(y, t)) < 1e-5
    assert all(repeats for loops in captured for _, repeats in loops) and len(captured) == 2


def try_random_program(seed):
    """Compare a random program with eager; whether it is rewritten, or refused as iteration by iteration."""
    program, text = random_program(seed)
    try:
        compare(program, random.Random(seed).sample(range(1, 41), 2))
    except rampde_fx.errors.RampdeError as error:
        assert not isinstance(error, rampde_fx.errors.RewriteError), text
        return False
    except AssertionError as error:
        raise AssertionError(f"program {seed} differs from eager:\n{text}") from error
    return True


@pytest.mark.parametrize("seed", range(6))
def test_random_python_agrees_with_eager(seed):
    try_random_program(seed)
