"""checkpoint="auto": what is kept follows from a budget of memory, and no gradient does."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

import rampde_fx
from rampde_fx import MemoryBudget, PrecisionPolicy, backend, errors
from rampde_fx.ir import budgets, pass_log
from rampde_fx.proof import checking
from rampde_fx.schedules import Checkpoint
from rampde_fx.validation import verification
from tests.comparison import compiled, gradients, relative_errors
from tests.models import RK4, AdamsBashforth, Euler, LogDensity, Midpoint, Solved, Trajectory
from tests.test_checkpoint import BOUNDS, agree, explained, found
from tests.test_odeint import compiled as solver
from tests.test_random import BatchNorm, Dropout
from tests.test_storage import saved_bytes

Y, T = torch.linspace(-1, 1, 15).view(3, 5), torch.linspace(0, 1, 9)
EVALUATION = 3 * (6 + 7) * 2  # bytes of one of Midpoint's in float16: (y, t) and a layer of 7
BOTH = 8 * 2 * EVALUATION


def of(max_bytes):
    return MemoryBudget(max_bytes=max_bytes)


def graphs_under(monkeypatch, model, **policy):
    """The steps and adjoints behind all passes, and what they are emitted as."""
    rewritten, emitted, rewrite = [], [], backend.rewrite

    def watched(graph, *args, **settings):
        loops = rewrite(graph, *args, **settings)
        rewritten.extend(map(pass_log.code, loops))
        emitted.append(pass_log.readable(graph))
        return loops

    with monkeypatch.context() as patch:
        patch.setattr(backend, "rewrite", watched)
        found(model, torch.float16, Y, T, compiler="eager", **policy)
    return rewritten, emitted


def rewritten(function, *args):
    """The loops of a compiled function's one graph."""
    kept, rewrite = [], backend.rewrite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "rewrite", lambda *a, **k: [kept.append(rewrite(*a, **k)), kept[-1]][1])
        function(*args)
    (loops,) = kept
    return loops


@pytest.mark.parametrize("model", [RK4, AdamsBashforth, LogDensity, Dropout])
def test_the_ends_are_the_schedules_without_a_budget(model, monkeypatch):
    torch.manual_seed(0)
    made = model()
    assert graphs_under(monkeypatch, made, checkpoint=of(0)) == graphs_under(monkeypatch, made)
    kept = graphs_under(monkeypatch, made, checkpoint="none")
    assert graphs_under(monkeypatch, made, checkpoint=of(10**15)) == kept
    assert graphs_under(monkeypatch, made, checkpoint="auto") == kept  # some MiB are free


@pytest.mark.parametrize(
    ("budget", "kept"),
    [(0, 0), (BOTH // 2 - 1, 0), (BOTH // 2, 1), (BOTH - 1, 1), (BOTH, 2), (10**15, 2)],
)
def test_as_many_evaluations_are_kept_as_fit(budget, kept):
    model = Midpoint(dim=5, width=7)
    (loop,) = explained(copy.deepcopy(model), 8, checkpoint=of(budget)).loops
    states = 0 if kept == 2 else 8 * 3 * 5 * 2
    assert (loop.kept, loop.kept_bytes, loop.budget) == (kept, kept * BOTH // 2, budget)
    assert loop.stored_bytes == loop.kept_bytes + states and loop.segment == 1
    assert f"keeps the activations of {kept} of 2 evaluations, {loop.kept_bytes:,} bytes of a budget of" in str(loop)
    assert ("auto: the activations that fit" in str(loop)) == (kept > 0)
    wanted = loop.stored_bytes + 2 * 4 * 8 + sum(p.numel() * 4 for p in model.parameters())  # t and dt are saved too
    assert saved_bytes(compiled(model, torch.float16, checkpoint=of(budget)), Y, T) == wanted


def test_the_adjoint_evaluates_what_is_not_kept():
    flops = []
    for kept in range(5):
        (loop,) = explained(RK4(), 8, checkpoint=of(8 * kept * EVALUATION)).loops
        names = [node.target for node in loop.adjoint.graph.nodes if node.op == "call_module"]
        assert sum(name.endswith("forward") for name in names) == 4 - kept == 4 - loop.kept
        flops.append(loop.adjoint_flops)
    product = 2 * 3 * 6 * 7
    assert [before - after >= product for before, after in pairwise(flops)] == [True] * 4


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1), (torch.float32, 3), (torch.float16, 2)], ids=str)
def test_gradients_are_those_of_float64_and_of_eager(dtype, share):
    torch.manual_seed(share)
    own = torch.float64 if dtype is torch.float64 else torch.float32
    model, y, t = RK4().to(own), torch.randn(3, 5, dtype=own), torch.linspace(0, 1, 9, dtype=own)
    budget = of(share * 8 * 3 * (6 + 7) * dtype.itemsize)
    agree(model, dtype, y, t, modes=(budget,), compiler="eager")
    wide = copy.deepcopy(model).double()
    exact = gradients(wide, wide, y.double(), t.double())
    plain = gradients(model, model, y, t)
    got = found(model, dtype, y, t, compiler="eager", checkpoint=budget)
    for reference in (exact, plain):
        errors_ = relative_errors([g.double() for g in got], [r.double() for r in reference])
        assert max(errors_[:2] + errors_[3:]) < 8 * BOUNDS[dtype] and errors_[2] < 64 * BOUNDS[dtype], errors_


@pytest.mark.parametrize(
    "policy",
    [
        {"loop": "unroll"},
        {"accumulation": "compensated"},
        {"storage": torch.float8_e4m3fn},
        {"storage_scaling": "dynamic", "accumulation": "compensated", "loop": "unroll"},
    ],
    ids=str,
)
def test_other_fields_of_the_policy(policy):
    agree(Midpoint(), torch.float16, Y, T, modes=(of(BOTH // 2),), compiler="eager", **policy)


@pytest.mark.parametrize("model", [Trajectory, AdamsBashforth, Dropout, BatchNorm])
def test_other_loops(model):
    torch.manual_seed(0)
    (whole,) = explained(model(), 8, checkpoint=of(10**15)).loops[-1:]
    agree(model(), torch.float32, Y, T, modes=(of(whole.kept_bytes), of(2 * whole.kept_bytes - 1)), compiler="eager")


class Two(nn.Module):
    """Two loops in one graph."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Midpoint(), Midpoint()

    def forward(self, y, t):
        return self.second(self.first(y, t), t)


@pytest.mark.parametrize(("evaluations", "kept"), [(0, [0, 0]), (1, [1, 0]), (3, [2, 1]), (4, [2, 2])])
def test_the_loops_of_a_graph_share_a_budget(evaluations, kept):
    budget = of(8 * evaluations * EVALUATION)
    report = explained(Two(), 8, checkpoint=budget)
    assert [loop.kept for loop in report.loops] == kept
    assert sum(loop.kept_bytes for loop in report.loops) <= budget.max_bytes
    assert report.loops[1].budget == budget.max_bytes - report.loops[0].kept_bytes
    agree(Two(), torch.float16, Y, T, modes=(budget,), compiler="eager")


def test_a_share_is_of_what_is_free_and_read_once(monkeypatch):
    asked = []
    monkeypatch.setattr(budgets, "_free_bytes", lambda device, where: asked.append(device) or 4 * BOTH)
    report = explained(Two(), 8, checkpoint=MemoryBudget(share=0.125))
    assert [loop.kept for loop in report.loops] == [1, 0] and asked == [torch.device("cpu")]
    assert report.loops[0].budget == BOTH // 2
    assert [loop.kept for loop in explained(Two(), 8, checkpoint="auto").loops] == [2, 2]
    assert len(asked) == 2
    with torch.no_grad():
        (loop,) = explained(Midpoint(), 8, checkpoint="auto").loops
    assert loop.budget is None and len(asked) == 2


def test_what_is_free_on_a_device_of_which_nothing_is_known_is_not_guessed():
    y, t = Y.to("meta").requires_grad_(), T.to("meta")
    for budget in ("auto", MemoryBudget(share=0.1)):
        marked = rampde_fx.mixed_precision(Euler().to("meta"), policy=PrecisionPolicy(torch.float16, checkpoint=budget))
        with pytest.raises(errors.PolicyError, match="on meta") as refusal:
            rampde_fx.explain(marked, y, t)
        assert "max_bytes" in refusal.value.fix and "models.py" in refusal.value.where
    marked = rampde_fx.mixed_precision(Euler().to("meta"), policy=PrecisionPolicy(torch.float16, checkpoint=of(10**9)))
    assert rampde_fx.explain(marked, y, t).loops[0].kept == 1


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"meminfo": "MemTotal: 100 kB\nMemAvailable: 50 kB\n"}, 51200),
        ({"meminfo": "MemAvailable: 50 kB\n", "memory.max": "max\n", "memory.current": "10\n"}, 51200),
        ({"meminfo": "MemAvailable: 50 kB\n", "memory.max": "9000\n", "memory.current": "1000\n"}, 8000),
        (
            {
                "meminfo": "MemAvailable: 50 kB\n",
                "memory.max": "9000\n",
                "memory.current": "9500\n",
                "memory.stat": "anon 100\ninactive_file 700\n",
            },
            200,
        ),
    ],
    ids=["no Linux", "a machine", "no limit", "a container", "a container that is full"],
)
def test_what_a_host_has_left(files, free, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(budgets, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(budgets, "GROUP", tmp_path)
    assert budgets._free_bytes_of_host() == free


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="says what is free on Linux")
def test_this_host_has_something_left():
    assert budgets._free_bytes_of_host() > 2**20


def test_sizes_that_change_count_as_captured():
    run = compiled(Midpoint(), torch.float16, checkpoint=of(BOTH // 2))
    torch._dynamo.mark_dynamic(batch := Y.clone(), 0)
    (loop,) = rewritten(run, batch.requires_grad_(), T)
    assert loop.kept == 1 and budgets.kept_bytes(loop) == BOTH // 2
    (note,) = [note for note in loop.notes if "auto" in note]
    assert note.endswith("by the sizes at the capture, which may change")


def test_any_number_of_steps_takes_the_choice_that_was_made():
    model = Solved(method="midpoint")
    run = solver(model, checkpoint=of(20 * 3 * (6 + 7) * 4))  # an evaluation of up to 20 steps in float32
    for points in (8, 17, 40, 26):
        t = torch.linspace(0, 1, points)
        wanted = gradients(model, model, Y, t)
        assert max(relative_errors(gradients(run, model, Y, t), wanted)) < 2e-6


@pytest.mark.parametrize("arguments", [{"method": "midpoint", "options": {"step_size": 0.07}}, {"method": "dopri5"}])
@pytest.mark.parametrize("budget", ["auto", of(10**9)], ids=str)
def test_of_an_unknown_number_of_steps_nothing_is_kept(arguments, budget):
    model, t = Solved(**arguments), torch.linspace(0, 1, 4)
    wanted = gradients(solver(model), model, Y, t)
    torch._dynamo.reset()
    run = solver(model, checkpoint=budget)
    *_, loop = rewritten(run, Y.clone().requires_grad_(), t)
    assert loop.kept == 0 and any("known at run time only" in note for note in loop.notes)
    assert max(relative_errors(gradients(run, model, Y, t), wanted)) == 0


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_verify_checks_what_was_chosen(kept, monkeypatch):
    """The same evaluations are kept in float64, of whose activations the budget takes fewer."""
    twins, init = [], verification.Twin.__init__
    monkeypatch.setattr(
        verification.Twin, "__init__", lambda self, *a, **k: [init(self, *a, **k), twins.append(self)][0]
    )
    policy = PrecisionPolicy(torch.float16, checkpoint=of(8 * kept * EVALUATION))
    marked = rampde_fx.mixed_precision(Midpoint(), policy=policy)
    options = {"compiler": "eager", "verify": True}
    torch.compile(marked, backend="rampde_fx", options=options, fullgraph=True)(Y.clone().requires_grad_(), T)
    assert [loop.kept for twin in twins for loop in twin.loops] == [kept]


def test_check_measures_it():
    assert {policy.checkpoint for policy in checking.POLICIES} == set(get_args(Checkpoint))
    policies = [PrecisionPolicy(torch.float16, checkpoint=value) for value in ("step", of(1000), "auto", "none")]
    result = rampde_fx.check(Midpoint(), Y, T, policies=policies, compiler="eager")
    names = ["checkpoint=MemoryBudget(max_bytes=1000)", "checkpoint=auto", "checkpoint=none"]
    rows = {row.name: row for row in result.rows}
    step, some, auto, none = (rows[name] for name in ("float16", *(f"float16, {name}" for name in names)))
    assert step.stored_bytes < some.stored_bytes < auto.stored_bytes == none.stored_bytes
    assert some.stored_bytes - step.stored_bytes == none.stored_bytes // 2 <= 1000
    assert auto.gradient_errors == none.gradient_errors


@pytest.mark.parametrize(
    ("settings", "found", "fix"),
    [
        ({"max_bytes": -1}, "max_bytes=-1", "2**30"),
        ({"max_bytes": 0.5}, "max_bytes=0.5", "2**30"),
        ({"max_bytes": True}, "max_bytes=True", "2**30"),
        ({"max_bytes": "1GB"}, "'1GB'", "2**30"),
        ({"share": 0}, "share=0", "max_bytes="),
        ({"share": 0.0}, "share=0.0", "0.5"),
        ({"share": 1.5}, "share=1.5", "0.5"),
        ({"share": 4096}, "share=4096", "max_bytes="),
        ({"share": float("nan")}, "share=nan", "0.5"),
        ({"share": True}, "share=True", "0.5"),
        ({"max_bytes": 1, "share": 0.5}, "max_bytes=1, share=0.5", "leave share out"),
    ],
    ids=str,
)
def test_budgets_that_mean_nothing_are_refused(settings, found, fix):
    with pytest.raises(errors.PolicyError) as refusal:
        MemoryBudget(**settings)
    assert found in refusal.value.found and fix in refusal.value.fix and refusal.value.required


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("float16, checkpoint=MemoryBudget(max_bytes=-2)", "max_bytes=-2"),
        ("float16, checkpoint=MemoryBudget(bytes=2)", "no field 'bytes'"),
        ("float16, checkpoint=MemoryBudget(2)", "'2' names no field"),
        ("float16, checkpoint=MemoryBudget", "checkpoint='MemoryBudget'"),
        ("float16, checkpoint=AdjointScaling()", "checkpoint='AdjointScaling()'"),
        ("float16, scaling=MemoryBudget()", "scaling='MemoryBudget()'"),
    ],
)
def test_texts_that_are_no_budget_are_refused(text, found):
    with pytest.raises(errors.PolicyError) as refusal:
        PrecisionPolicy.parse(text)
    assert found in refusal.value.found


def test_budgets_of_one_effect_have_one_name():
    same = [PrecisionPolicy(torch.float16, checkpoint=c) for c in ("auto", MemoryBudget(), MemoryBudget(share=0.5))]
    assert {policy.filled_in() for policy in same} == {same[0].filled_in()}
    assert str(same[2]) == "float16, checkpoint=MemoryBudget(share=0.5)"
    assert PrecisionPolicy.parse(str(same[2])) == same[2]


def test_a_policy_with_a_budget_may_be_made_in_compiled_code():
    def solve(y, w, t):
        policy = PrecisionPolicy(torch.float16, checkpoint=MemoryBudget(max_bytes=10**6))
        return rampde_fx.odeint(lambda t, y: torch.tanh(y @ w), y, t, method="euler", policy=policy)[-1]

    w = torch.eye(5).requires_grad_()
    run = torch.compile(solve, backend="rampde_fx", options={"compiler": "eager"}, fullgraph=True)
    (loop,) = rewritten(run, Y, w, T)
    assert loop.policy.checkpoint == of(10**6) and loop.kept == 1


@pytest.mark.inductor
@pytest.mark.slow
def test_compiled_by_inductor():
    wanted = found(model := RK4(), torch.float16, Y, T)
    got = found(model, torch.float16, Y, T, checkpoint=of(2 * 8 * EVALUATION), compiler="inductor")
    errors_ = relative_errors(got, wanted)
    assert max(errors_[:2] + errors_[3:]) < BOUNDS[torch.float16] and errors_[2] < 8 * BOUNDS[torch.float16], errors_
