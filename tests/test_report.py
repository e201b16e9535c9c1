"""The report beyond its text: the logs of the passes, FLOP, the page, and the command."""

import logging
import os
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import rampde_fx
from rampde_fx import torchdiffeq
from rampde_fx.__main__ import environment, main
from rampde_fx.backend import STEP_PASSES
from rampde_fx.ir import graphs, loop_verifier, pass_log
from rampde_fx.report import report_html, step_picture
from rampde_fx.solvers.tableau import ButcherTableau
from rampde_fx.torch_private import kernels
from tests.models import RK4, Euler, Flow, LogDensity, Midpoint, Trajectory, Velocity

PASSES = ["roll_loop", *(step_pass.__name__ for step_pass in STEP_PASSES)]
VOID = {"meta"}


def explained(form, **policy):
    model = rampde_fx.mixed_precision(form(), policy=rampde_fx.PrecisionPolicy(**{"velocity": torch.float16, **policy}))
    return rampde_fx.explain(model, torch.zeros(3, 5), torch.linspace(0, 1, 5))


def page_of(report):
    return report_html.page(report.loops, report._remarks())


class Page(HTMLParser):
    """A page that is well-formed: every element is closed, in order; ids are unique and edges end at boxes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.ends, self.outside, self.text = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        assert len(set(self.ids)) == len(self.ids) and set(self.ends) <= set(self.ids)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.open += [] if tag in VOID else [tag]
        self.ids += [found["id"]] if "id" in found else []
        self.ends += [found[end] for end in ("data-from", "data-to") if end in found]
        leads = [found[name] for name in ("src", "href", "xlink:href") if name in found]
        self.ends += [target[1:] for target in leads if target.startswith("#")]
        self.outside += [target for target in leads if not target.startswith("#")]
        self.text.append(found.get("title", ""))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize(
    "form, policy",
    [
        (RK4, {}),
        (LogDensity, {}),
        (Trajectory, {"velocity": torch.bfloat16, "checkpoint": 2}),
        (Euler, {"storage": torch.float8_e4m3fn, "accumulation": "compensated"}),
        (Midpoint, {"checkpoint": "none"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_page_holds_every_node(form, policy, tmp_path):
    report = explained(form, **policy)
    report.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.outside and "http" not in text and "url(" not in text
    assert page.tags.count("svg") == 2 * len(report.loops)
    pictures = "\n".join(page.text)
    for loop in report.loops:
        for node in [*loop.step.graph.nodes, *loop.adjoint.graph.nodes]:
            assert re.search(rf"\b{node.name}\b", pictures), node
    for role, colours in report_html.COLOURS.items():
        assert f"--{role}:" in text and all(colour in text for colour in colours)
        assert f'class="node {role}' in text
    assert "models.py" in pictures


def test_casts_and_scaling_are_marked():
    scaled = page_of(explained(Euler))
    assert 'class="node velocity scale"' in scaled and 'class="node state scale"' in scaled
    assert 'class="node state cast"' in scaled and "f32→f16" in scaled and "f16→f32" in scaled
    assert 'class="node velocity scale"' not in page_of(explained(Euler, velocity=torch.bfloat16))


def test_without_gradients_there_is_one_picture():
    with torch.no_grad():
        report = explained(Midpoint)
    assert report.loops[0].adjoint_flops == 0
    page = Page(page_of(report))
    assert page.tags.count("svg") == 1 and any("no gradient" in text for text in page.text)


def test_a_notebook_shows_the_tables():
    report = explained(Euler)
    shown = report._repr_html_()
    assert "<svg" not in shown and "1 evaluation of the velocity in float16" in shown
    assert all(text in unescape(shown) for _, text in report.loops[0].rows())
    assert "nothing is rewritten" in rampde_fx.explain(torch.nn.Linear(5, 5), torch.zeros(3, 5))._repr_html_()


def test_what_is_low_is_filled_and_parameters_have_a_lane():
    page = page_of(explained(Euler))
    assert 'class="node velocity low"' in page and 'class="node parameter"' in page
    wide = page_of(explained(Euler, velocity=torch.float32))
    assert "low" not in " ".join(re.findall(r'class="(node [^"]*)"', wide))


def test_the_code_of_a_call_stands_below_its_picture():
    page = page_of(explained(Euler))
    (leads,) = set(re.findall(r'href="#(l0s-\d+-code)"', page))
    assert re.search(rf'<details class="code [^"]*"><summary>velocity_0</summary><pre id="{leads}">[^<]*tanh', page)


def test_without_a_loop_the_page_says_so():
    text = page_of(rampde_fx.explain(torch.nn.Linear(5, 5), torch.zeros(3, 5)))
    assert "nothing is rewritten" in " ".join(Page(text).text)


class Encoded(Flow):
    """An encoder that Dynamo does not capture, in front of an odeint."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.GRU(2, 5, batch_first=True)

    def forward(self, x, t):
        y = self.encoder(x)[0][:, -1]
        return rampde_fx.odeint(self.velocity, y, t, method="euler")[-1]


def test_graph_breaks_are_told_and_the_loop_behind_one_has_its_line():
    model, x = rampde_fx.mixed_precision(Encoded(), dtype=torch.float16), torch.randn(3, 4, 2)
    report = rampde_fx.explain(model, x, torch.linspace(0, 1, 4))
    (loop,), (reason,) = report.loops, report.graph_breaks
    assert "test_report.py" in loop.where and "rampde_fx.odeint(self.velocity, y, t" in loop.where
    assert "GRU" in reason
    for text in (str(report), report._repr_html_(), page_of(report)):
        assert f"graph break: {reason} (torch.compile(" in unescape(text)


def test_what_stands_behind_a_graph_break_is_in_the_users_function():
    def solve(y, t):
        torch._dynamo.graph_break()
        return rampde_fx.odeint(lambda t, y: torch.tanh(y), y, t, method="euler")[-1]

    report = rampde_fx.explain(rampde_fx.mixed_precision(solve), torch.ones(2, 5), torch.linspace(0, 1, 4))
    (loop,) = report.loops
    assert ", in solve: return rampde_fx.odeint(" in loop.where and len(report.graph_breaks) == 1


def test_without_graph_breaks_none_are_told():
    report = rampde_fx.explain(rampde_fx.mixed_precision(Euler()), torch.ones(2, 5), torch.linspace(0, 1, 4))
    assert report.graph_breaks == () and "graph break" not in str(report)


def test_hostile_names_are_escaped():
    report = explained(Euler)
    (loop,) = report.loops
    hostile = '<script>alert("&")</script>'
    for node in (graphs.placeholders(loop.step)[0], graphs.body(loop.step)[-1]):
        node._rename(hostile)  # torch makes identifiers of names, as long as nobody goes round it
        node.name = hostile
        node.meta["stack_trace"] = f'File "{hostile}.py", line 1, in f\n    {hostile}'
    object.__setattr__(loop, "where", f"{hostile}:1, in f: {hostile}")
    text = page_of(report)
    assert hostile not in text and hostile in unescape(text)
    assert Page(text).tags.count("script") == 1


def test_every_role_has_a_lane_and_every_lane_a_colour():
    assert set(step_picture.LANE_OF) == loop_verifier.ROLES > step_picture.SCALINGS
    assert set(step_picture.LANE_OF.values()) < set(step_picture.LANES) == set(report_html.COLOURS)
    assert set(step_picture.LANES) < {kind for kind, _ in report_html.LEGEND}


def test_edges_turn_in_the_gutters_alone():
    (loop,) = explained(RK4).loops
    drawing = step_picture._Drawing(loop.passes[-1].loop, loop.adjoint, "a")
    lefts = [step_picture._left(lane) for lane in step_picture.LANES]
    for edge in drawing.edges():
        path = re.search(r'd="M(\d+),\d+(H\d+)?C(-?\d+),\d+ -?\d+,\d+ (\d+),\d+"', edge)
        start, across, handle, end = path.groups()
        start, handle, end = int(across[1:] if across else start), int(handle), int(end)
        for i in range(1, 20):
            u = i / 20
            x = start * ((1 - u) ** 3) + 3 * handle * u * (1 - u) + end * u**3
            assert 0 < x < step_picture.WIDTH, edge
            assert not any(left + 1 < x < left + step_picture.LANE - 1 for left in lefts), edge


def test_flops_are_those_of_the_products():
    (loop,) = explained(Euler).loops  # two layers, (5 + 1) to 7 to 5, on a batch of 3
    products = 2 * 3 * (6 * 7 + 7 * 5)
    assert loop.step_flops == products
    assert loop.adjoint_flops == 3 * products  # evaluated again, and one product for each factor's gradient
    (kept,) = explained(Euler, checkpoint="none").loops
    assert kept.adjoint_flops == 2 * products
    assert f"{products:,} FLOP" in str(loop) and f">{4 * products:,}<" in page_of(explained(Euler))


def test_one_checkpointed_loop_after_another():
    """What the second one reads is no input of the model, and has no name that the user gave it."""
    flow = rampde_fx.mixed_precision(Midpoint(), dtype=torch.float16)

    def twice(y, t):
        return checkpoint(flow, checkpoint(flow, y, t, use_reentrant=False), t, use_reentrant=False)

    report = rampde_fx.explain(twice, torch.randn(3, 5), torch.linspace(0, 1, 4))
    assert [loop.steps for loop in report.loops] == [3, 3]


def test_the_report_keeps_the_loop_after_each_pass():
    (loop,) = explained(Euler).loops
    assert [after.name for after in loop.passes] == PASSES
    assert loop.passes[-1].loop.step is loop.step and loop.passes[-1].loop.adjoint.module is loop.adjoint
    codes = {after.name: after.code for after in loop.passes}
    assert "velocity_0" not in codes["partition_velocity"] and "velocity_0" in codes["lower_velocity"]
    assert "adjoint_scale_0" not in codes["widen_gradients"] and "adjoint_scale_0" in codes["scale_adjoint"]


def test_code_printed_late_is_what_the_pass_returned(monkeypatch):
    printed, tell = [], pass_log.tell

    def tell_and_print(number, pass_name, loop):
        printed.append(pass_log.code(loop))
        tell(number, pass_name, loop)

    monkeypatch.setattr(pass_log, "tell", tell_and_print)
    (loop,) = explained(Midpoint, accumulation="compensated").loops
    assert [after.code for after in loop.passes] == printed


def test_the_logs_name_each_pass_in_order(caplog):
    with caplog.at_level(logging.DEBUG, logger="rampde_fx"):
        model = torch.compile(
            rampde_fx.mixed_precision(Euler(), dtype=torch.float16),
            backend="rampde_fx",
            options={"compiler": "eager"},
            fullgraph=True,
        )
        model(torch.zeros(3, 5), torch.linspace(0, 1, 5))
    records = [record for record in caplog.records if record.name == "rampde_fx.ir.pass_log"]
    assert [record.args[1] for record in records] == PASSES
    assert "models.py" in records[0].getMessage() and '"f16[3, 5]"' in records[-1].getMessage()


def test_without_a_reader_no_graph_is_printed(monkeypatch, caplog):
    def refuse(_):
        raise AssertionError("a graph is printed")

    monkeypatch.setattr(pass_log, "code", refuse)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])  # pytest's own reads everything
    explained(Euler)
    assert not [record for record in caplog.records if record.name.startswith("rampde_fx")]


def flow():
    return rampde_fx.mixed_precision(Euler(), dtype=torch.float16)


def run(arguments, **settings):
    command = [sys.executable, "-m", "rampde_fx", "explain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **settings})


def test_the_command_writes_the_page_and_torch_logs_have_the_passes(tmp_path):
    page, trace = tmp_path / "page.html", tmp_path / "trace"
    arguments = ["tests.test_report:flow", "--call", "--shape", "3,5", "--times", "4", "--html", str(page)]
    shown = run(arguments, TORCH_LOGS="+rampde_fx", TORCH_TRACE=str(trace))
    assert shown.returncode == 0, shown.stderr
    assert "1 evaluations per step in float16" in shown.stdout
    Page(page.read_text(encoding="utf-8"))
    assert re.findall(r"loop 0 after (\w+),", shown.stderr) == PASSES
    traced = "".join(file.read_text(encoding="utf-8") for file in trace.iterdir())
    assert re.findall(r'"name": "rampde_fx_loop_0_(\w+)"', traced) == PASSES and "velocity_0_pullback" in traced


def test_output_that_nobody_reads_to_its_end(tmp_path):
    command = [sys.executable, "-m", "rampde_fx", "explain", "tests.test_report:flow", "--call"]
    command += ["--shape", "3,5", "--times", "4", "--html", str(tmp_path / "page.html")]
    shown = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    shown.stdout.close()
    assert (shown.stderr.read(), shown.wait()) == ("", 0)
    Page((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_the_command_prints_what_results_depend_on(capsys):
    assert main(["env"]) == 0
    found = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert found["torch"] == torch.__version__ and found["rampde_fx"] == rampde_fx.__version__
    assert {"python", "CUDA", "CPU capability", "CPU products in", "threads", "GPUs"} <= found.keys()


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_the_command_names_the_dtype_that_is_chosen_here(has_bfloat16, monkeypatch):
    monkeypatch.setattr(kernels, "cpu_has_bfloat16", lambda: has_bfloat16)
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda dtype: dtype is torch.bfloat16)
    low = "bfloat16" if has_bfloat16 else "float32 alone"
    assert f"CPU products in: {low}\n" in environment()
    (loop,) = rampde_fx.explain(rampde_fx.mixed_precision(Euler()), torch.zeros(3, 5), torch.linspace(0, 1, 5)).loops
    assert (loop.policy.dtype is torch.bfloat16) == has_bfloat16


def test_the_command_refuses_a_bad_target():
    shown = run(["tests.models:Nothing", "--shape", "3,5"])
    assert shown.returncode == 2 and "Nothing" in shown.stderr


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ("tests.models", "MODULE:NAME"),
        ("no_such_module:model", "No module named"),
        ("tests.models:Flow", "--call"),
        ("tests.models:FORMS", "list"),
        ("tests.models:Velocity.forward --call", "missing a required argument: 'self'"),
        ("tests.models:Euler --call --shape 3,5", "missing a required argument: 't'"),
        ("tests.models:Euler --call --shape 3,x --times 4", "no shape"),
        ("tests.models:Euler --call --shape 3,5 --times 0", "no number of steps"),
        ("", "MODULE:NAME"),
    ],
)
def test_arguments_that_mean_nothing(arguments, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["explain", *arguments.split()])
    assert stopped.value.code == 2 and reason in capsys.readouterr().err


def test_a_model_that_is_refused(capsys):
    assert main("explain tests.test_report:changes_shape --shape 3,5 --times 4".split()) == 1
    assert "required:" in capsys.readouterr().err


def changes_shape(y, t):
    for _, dt in rampde_fx.steps(t):
        y = torch.cat([y, dt * y])
    return y


def test_explain_takes_arguments_of_several_tensors():
    """What a Module or a tuple among the arguments holds keeps names of its own."""

    @rampde_fx.mixed_precision(dtype=torch.float16)
    def integrate(velocity, pair, t):
        y, z = pair
        for t_i, dt in rampde_fx.steps(t):
            y, z = y + dt * velocity(t_i, z), z + dt * velocity(t_i, y)
        return y, z

    report = rampde_fx.explain(integrate, Velocity(), (torch.zeros(3, 5), torch.zeros(3, 5)), torch.linspace(0, 1, 5))
    assert report.loops[0].evaluations == 2
    assert len(set(report.loops[0].carries)) == 2
    parameters = [node.name for node in graphs.placeholders(report.loops[0].step)][4:]
    assert len(set(parameters)) == 4 and all("linear" in name for name in parameters), parameters


def test_of_a_loop_with_an_operator_that_writes():
    """Its floating-point operations are those of its product: 2 * 4 * 6 * 6."""

    @torch.library.custom_op("tests::count_up", mutates_args={"count"})
    def count_up(count: torch.Tensor) -> None:
        count.add_(1)

    count, w = torch.zeros(()), torch.randn(6, 6)

    @rampde_fx.mixed_precision(dtype=torch.float16)
    def flow(y, t):
        for _, dt in rampde_fx.steps(t):
            count_up(count)
            y = y + dt * torch.tanh(y @ w)
        return y

    (loop,) = rampde_fx.explain(flow, torch.randn(4, 6), torch.linspace(0, 1, 3)).loops
    assert loop.step_flops == 288


class Writing(torch.nn.Module):
    """Writes to all that it holds, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.calls = torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), 0
        for name in ("steps_made", "added", "bound"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, y, t):
        self.calls += 1
        with torch.no_grad():
            self.layer.weight.mul_(0.5)
            torch.add(self.added, 1, out=self.added)
            y.add_(1)
        self.bound = self.bound + 1
        y = torch.nn.functional.dropout(y)
        for _, dt in rampde_fx.steps(t):
            self.steps_made += 1
            y = y + dt * torch.tanh(self.norm(self.layer(y)))
        return y


def test_explain_changes_nothing():
    model, y = Writing(), torch.ones(4, 3)
    state, bound = {name: value.clone() for name, value in model.state_dict().items()}, model.bound
    generator = torch.get_rng_state()
    report = rampde_fx.explain(rampde_fx.mixed_precision(model), y, torch.linspace(0, 1, 41))
    assert report.loops[0].steps == 40 and report.loops[0].adjoint is not None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.calls == 0 and model.bound is bound and y.eq(1).all()
    assert torch.equal(generator, torch.get_rng_state())


def test_the_tolerances_that_odeint_took_are_told():
    """The defaults follow from the velocity's dtype; tensors and lists of them have no number at the capture."""

    def told(solve, policy, **arguments):
        def model(y, t):
            return solve(lambda t, y: -y, y, t, **arguments)

        marked = rampde_fx.mixed_precision(model, policy=rampde_fx.PrecisionPolicy(policy))
        y, t = torch.ones(3), torch.linspace(0, 1, 2)
        search, loop = rampde_fx.explain(marked, y, t).loops
        assert loop.tolerances == "" and "adapts to" not in str(loop)
        assert f"adapts to           {search.tolerances}" in str(search)
        return search.tolerances

    ends = "; errors of a method of order 4, at most 4,096 steps"
    assert told(rampde_fx.odeint, torch.float16) == f"rtol 0.001, atol 1e-05{ends}"
    assert told(rampde_fx.odeint, torch.float32, rtol=1e-2) == f"rtol 0.01, atol 1e-08{ends}"
    assert told(torchdiffeq.odeint, torch.float32) == f"rtol 1e-07, atol 1e-09{ends}"
    assert told(torchdiffeq.odeint, torch.float32, rtol=torch.tensor(1e-3)).startswith(
        "rtol known at run time, atol 1e"
    )


@pytest.mark.parametrize(
    ("solve", "points", "arguments", "told"),
    [
        (rampde_fx.odeint, 2, {"method": "rk4"}, ["rk4, fixed steps of order 4"]),
        (rampde_fx.odeint, 4, {"method": "heun3", "options": {"step_size": 0.3}}, ["heun3, fixed steps of order 3"]),
        (rampde_fx.odeint, 4, {"options": {"num_steps": 2}}, ["dopri5, fixed steps of order 5"]),
        (rampde_fx.odeint, 2, {}, ["dopri5, adaptive steps of order 5", "dopri5, found steps"]),
        (
            rampde_fx.odeint,
            4,
            {"method": "bosh3"},
            ["bosh3, adaptive steps of order 3", "bosh3, found steps, between them an interpolant of order 3"],
        ),
        (
            rampde_fx.odeint,
            4,
            {"method": "dopri8"},
            ["dopri8, adaptive steps of order 8", "dopri8, found steps, which end at the output times"],
        ),
        (
            rampde_fx.odeint,
            2,
            {"method": ButcherTableau(a=[[], [1]], b=[0.5, 0.5], c=[0, 1], order=2)},
            ["a tableau without a name, fixed steps of order 2"],
        ),
        (torchdiffeq.odeint, 4, {"method": "rk4"}, ["rk4_38, fixed steps of order 4"]),
        (
            torchdiffeq.odeint,
            4,
            {"method": "midpoint", "options": {"step_size": 0.3, "interp": "cubic"}},
            ["midpoint, fixed steps of order 2, between them an interpolant of order 3"],
        ),
        (
            torchdiffeq.odeint,
            4,
            {},
            ["dopri5, adaptive steps of order 5", "dopri5, found steps, between them an interpolant of order 4"],
        ),
    ],
)
def test_the_method_of_an_odeint_is_told(solve, points, arguments, told):
    model = rampde_fx.mixed_precision(lambda y, t: solve(lambda t, y: -y, y, t, **arguments), dtype=torch.float32)
    loops = rampde_fx.explain(model, torch.ones(3), torch.linspace(0, 1, points)).loops
    assert [loop.method for loop in loops] == told
    assert all(f"  method              {loop.method}\n" in str(loop) for loop in loops)
    searches = [str(loop) for loop in loops if loop.emitted == "search"]
    assert all(text.startswith("search of steps at ") and "stored" not in text for text in searches)
    assert len(searches) == sum("adaptive" in text for text in told)


def test_why_a_loop_at_a_prompt_is_captured_in_full():
    """It has no file by which its reason could be found."""
    names = {"rampde_fx": rampde_fx, "torch": torch}
    typed = (
        "def flow(y, t):\n"
        "    for i, (_, dt) in enumerate(rampde_fx.steps(t)):\n"
        "        y = y + dt * torch.tanh(y) * float(i)\n"
        "    return y\n"
    )
    exec(compile(typed, "<stdin>", "exec"), names)
    model = rampde_fx.mixed_precision(names["flow"], dtype=torch.float16)
    loops = rampde_fx.explain(model, torch.ones(3), torch.linspace(0, 1, 17)).loops
    assert all(re.match("all 16 iterations: the variable '.*' .*differs", loop.captured) for loop in loops)
