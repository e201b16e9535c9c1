"""A policy as text, its types, and what a marked target says of it."""

import argparse
import copy
import dataclasses
import functools
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import get_args

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters

import rampde_fx
from rampde_fx import AdjointScaling, MemoryBudget, PrecisionPolicy, errors, policy, policy_of
from rampde_fx.policy_text import text_of
from rampde_fx.proof.check_table import label
from tests.models import Euler
from tests.test_properties import cases

Y, T = torch.linspace(-1, 1, 20).view(4, 5), torch.linspace(0, 1, 4)
BF16 = PrecisionPolicy(torch.bfloat16, checkpoint="sqrt")
ROOT = Path(__file__).parent.parent

VALUES = {
    "velocity": list(policy.DTYPES_OF["velocity"].values()),
    "storage": [None, *policy.DTYPES_OF["storage"].values()],
    "storage_scaling": [None, *get_args(policy.Scaling)],
    "scaling": [None, *get_args(policy.Scaling), AdjointScaling(), AdjointScaling(2.0**-4), AdjointScaling(None, 2)],
    "accumulation": get_args(policy.Accumulation),
    "loop": get_args(policy.LoopForm),
    "checkpoint": [*get_args(policy.Checkpoint), 1, 16, MemoryBudget(), MemoryBudget(0), MemoryBudget(share=0.25)],
}


def every_policy():
    for values in itertools.product(*VALUES.values()):
        made = dict(zip(VALUES, values, strict=True))
        if made["storage"] not in policy.ALWAYS_SCALED or made["storage_scaling"] != "none":  # is refused
            yield PrecisionPolicy(**made)


def test_every_policy_is_read_back_from_its_text():
    assert list(VALUES) == [field.name for field in dataclasses.fields(PrecisionPolicy)]
    texts = set()
    for made in every_policy():
        assert PrecisionPolicy.parse(str(made)) == made
        texts.add(str(made))
    assert len(texts) == len(set(every_policy()))


@hypothesis.given(st.integers(-1074, 1023), st.integers(1, 10**6))
def test_every_scaling_is_read_back_from_its_text(exponent, attempts):
    made = PrecisionPolicy(scaling=AdjointScaling(2.0**exponent, attempts), checkpoint=attempts)
    assert PrecisionPolicy.parse(str(made)) == made


def test_a_field_takes_several_classes(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Window:
        first: int = 0
        last: int = 1

        __str__ = text_of

    monkeypatch.setitem(policy._NESTED, "checkpoint", (MemoryBudget, Window))
    for checkpoint in (MemoryBudget(2), Window(), Window(last=3)):
        made = PrecisionPolicy(checkpoint=checkpoint)
        assert PrecisionPolicy.parse(str(made)) == made


def test_the_policies_of_random_models_are_read_back_from_their_text():
    for _, problem in cases(200, 0):
        assert PrecisionPolicy.parse(str(problem.policy())) == problem.policy()


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (PrecisionPolicy(), "auto"),
        (PrecisionPolicy(checkpoint="none"), "auto, checkpoint=none"),
        (PrecisionPolicy(torch.float32, loop="scan"), "float32, loop=scan"),
        (
            PrecisionPolicy(torch.float16, storage=torch.float8_e4m3fn, checkpoint=8),
            "float16, storage=float8_e4m3fn, checkpoint=8",
        ),
        (PrecisionPolicy(torch.float16, scaling=AdjointScaling()), "float16, scaling=AdjointScaling()"),
        (
            PrecisionPolicy(torch.bfloat16, scaling=AdjointScaling(0.5, 2), accumulation="compensated"),
            "bfloat16, scaling=AdjointScaling(target=0.5, max_attempts=2), accumulation=compensated",
        ),
    ],
)
def test_the_text_says_what_differs_from_the_defaults(made, text):
    assert str(made) == text


@pytest.mark.parametrize(
    "text",
    [
        "bfloat16,checkpoint=4,scaling=AdjointScaling(max_attempts=2,target=2)",
        "  velocity = bfloat16 ,  checkpoint = 4, scaling = AdjointScaling( target = 2.0 , max_attempts = 2 ) ",
        "scaling=AdjointScaling(target=2.0, max_attempts=2), checkpoint=4, velocity=bfloat16",
    ],
)
def test_spaces_and_order_do_not_matter(text):
    assert PrecisionPolicy.parse(text) == PrecisionPolicy(torch.bfloat16, scaling=AdjointScaling(2.0, 2), checkpoint=4)


def test_what_is_not_said_is_as_by_default():
    assert PrecisionPolicy.parse("loop=scan") == PrecisionPolicy(loop="scan")


@pytest.mark.parametrize(
    ("text", "found", "fix"),
    [
        ("", "velocity=''", "write float16"),
        ("fp16", "velocity='fp16'", "write float16"),
        ("torch.bfloat16", "velocity='torch.bfloat16'", "write bfloat16"),
        ("float8_e4m3fn", "velocity='float8_e4m3fn'", "write float"),
        ("float16, storage=float8_e3m4", "storage='float8_e3m4'", "write float8_e4m3fn"),
        ("float16, storage=None", "storage='None'", "write float16"),
        ("float16, checkpont=sqrt", "no field 'checkpont'", "write checkpoint=sqrt"),
        ("float16, encoded=x", "no field 'encoded'", "leave 'encoded=x' out"),
        ("float16; loop=scan", "no field 'float16; loop'", "leave 'float16; loop=scan' out"),
        ("float16, loop=scan)", "no field 'float16, loop'", "leave"),
        ("float16, sqrt", "'sqrt' names no field", "leave 'sqrt' out"),
        ("float16,", "'' names no field", "leave '' out"),
        ("float16, loop=scan, loop=auto", "loop twice", "leave 'loop=auto' out"),
        ("float16, velocity=float16", "velocity twice", "leave 'velocity=float16' out"),
        ("float16, loop=while", "loop='while'", "use the default, 'auto'"),
        ("float16, loop='scan'", "loop=\"'scan'\"", "use the default, 'auto'"),
        ("float16, checkpoint=2.0", "checkpoint=2.0", "use the default, 'step'"),
        ("float16, checkpoint=0", "checkpoint=0", "use the default, 'step'"),
        ("float16, scaling=static", "scaling='static'", "leave it out"),
        ("float16, scaling=AdjointScaling(target=0.5", "scaling='AdjointScaling", "leave it out"),
        ("float16, scaling=AdjointScaling(0.5)", "'0.5' names no field of AdjointScaling", "leave '0.5' out"),
        ("float16, scaling=AdjointScaling(targt=0.5)", "AdjointScaling has no field 'targt'", "write target=0.5"),
        ("float16, scaling=AdjointScaling(target=0.3)", "AdjointScaling(target=0.3)", "such as 1.0"),
        ("float16, scaling=AdjointScaling(max_attempts=x)", "max_attempts='x'", "use the default, 3"),
        ("float16, storage=float8_e4m3fn, storage_scaling=none", "storage_scaling", "leave storage_scaling out"),
    ],
)
def test_what_is_no_policy_is_refused(text, found, fix):
    with pytest.raises(errors.PolicyError) as refused:
        PrecisionPolicy.parse(text)
    assert found in refused.value.found and fix in refused.value.fix and refused.value.required


def test_a_command_line_takes_it(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--policy", type=PrecisionPolicy.parse)
    assert parser.parse_args(["--policy", str(BF16)]).policy == BF16
    with pytest.raises(SystemExit):
        parser.parse_args(["--policy", "float16, checkpont=sqrt"])
    assert "fix: write checkpoint=sqrt" in capsys.readouterr().err


def test_policies_of_one_effect_have_one_name():
    same = [
        PrecisionPolicy(torch.float16),
        PrecisionPolicy(torch.float16, storage=torch.float16, scaling="dynamic"),
        PrecisionPolicy(torch.float16, storage_scaling="none", scaling=AdjointScaling()),
    ]
    assert {label(made) for made in same} == {"float16"}
    assert {made.filled_in() for made in same} == {same[0].filled_in()}
    low = PrecisionPolicy(torch.bfloat16, scaling=AdjointScaling(), storage=torch.float8_e4m3fn)
    assert label(low) == label(low.filled_in()) == "bfloat16, storage=float8_e4m3fn, scaling=dynamic"
    assert (
        label(PrecisionPolicy(torch.float16, scaling=AdjointScaling(1.0)))
        == "float16, scaling=AdjointScaling(target=1.0)"
    )


def test_the_fields_are_those_that_a_user_gives():
    full = PrecisionPolicy(torch.bfloat16, scaling=AdjointScaling(0.5), checkpoint=2)
    found = dataclasses.asdict(full)
    assert list(found) == list(VALUES) and found["scaling"] == dataclasses.asdict(AdjointScaling(0.5))
    assert PrecisionPolicy(**{name: getattr(full, name) for name in found}) == full
    changed = dataclasses.replace(full, velocity=torch.float16)
    assert changed == PrecisionPolicy(torch.float16, scaling=AdjointScaling(0.5), checkpoint=2)
    assert str(changed) == "float16, scaling=AdjointScaling(target=0.5), checkpoint=2" == changed.encoded
    for again in (pickle.loads(pickle.dumps(full)), copy.deepcopy(full)):
        assert again == full and str(again) == str(full)
    with pytest.raises(TypeError, match="encoded"):
        dataclasses.replace(full, encoded="float16")


USE = """import rampde_fx
rampde_fx.PrecisionPolicy(scaling="dynamic", storage_scaling="none", loop="scan", checkpoint="sqrt")
rampde_fx.PrecisionPolicy(scaling=rampde_fx.AdjointScaling(0.5), accumulation="compensated", checkpoint=8)
rampde_fx.PrecisionPolicy(scaling="static")  # wrong
rampde_fx.PrecisionPolicy(storage_scaling="static")  # wrong
rampde_fx.PrecisionPolicy(accumulation="kahan")  # wrong
rampde_fx.PrecisionPolicy(loop="while")  # wrong
rampde_fx.PrecisionPolicy(checkpoint="all")  # wrong
rampde_fx.policy_of(rampde_fx.steps).loop  # wrong
"""


@pytest.mark.slow
def test_mypy_knows_what_a_field_takes(tmp_path):
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")
    (tmp_path / "use.py").write_text(USE)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "use.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("use.py:")]
    wrong = [str(number) for number, line in enumerate(USE.splitlines(), 1) if line.endswith("# wrong")]
    assert [line.split(":")[1] for line in lines] == wrong, done.stdout + done.stderr


def flow(y, t):
    for _, dt in rampde_fx.steps(t):
        y = y + dt * torch.tanh(y)
    return y


@rampde_fx.mixed_precision(policy=BF16)
class Marked(Euler):
    """Marked as a class."""


class Below(Marked):
    """What it calls is marked."""


class Overriding(Marked):
    """Its own forward is not marked; the one that it calls is."""

    def forward(self, y, t):
        return super().forward(y, t)


class WithMethod(nn.Module):
    """A method that is marked."""

    @rampde_fx.mixed_precision(policy=BF16)
    def solve(self, y, t):
        return flow(y, t)

    def forward(self, y, t):
        return self.solve(y, t)


class Described(Marked):
    """A user's own extra_repr, of two lines."""

    def extra_repr(self):
        return "order=1\n" + super().extra_repr()


def marked_instance():
    return rampde_fx.mixed_precision(Euler(), policy=BF16)


def marked_forward():
    model = Euler()
    model.forward = rampde_fx.mixed_precision(model.forward, policy=BF16)
    return model


MARKED = {
    "class": lambda: Marked,
    "instance of a class": Marked,
    "subclass": lambda: Below,
    "instance of a subclass": Below,
    "instance": marked_instance,
    "its class": lambda: type(marked_instance()),
    "its copy": lambda: copy.deepcopy(marked_instance()),
    "pickled": lambda: pickle.loads(pickle.dumps(marked_instance())),
    "pickled instance of a class": lambda: pickle.loads(pickle.dumps(Marked())),
    "its forward": lambda: marked_instance().forward,
    "forward alone": marked_forward,
    "function": lambda: rampde_fx.mixed_precision(flow, policy=BF16),
    "method": lambda: WithMethod.solve,
    "bound method": lambda: WithMethod().solve,
    "callable object": lambda: rampde_fx.mixed_precision(functools.partial(flow), policy=BF16),
    "compiled function": lambda: torch.compile(rampde_fx.mixed_precision(flow, policy=BF16)),
    "compiled instance": lambda: torch.compile(marked_instance()),
    "compiled in place": lambda: (model := marked_instance()).compile() or model,
    "compiled bound method": lambda: torch.compile(WithMethod().solve),
}
UNMARKED = {
    "class": lambda: Euler,
    "instance": Euler,
    "its forward": lambda: Euler().forward,
    "function": lambda: flow,
    "built-in function": lambda: torch.sin,
    "class that is no Module": lambda: dict,
    "compiled function": lambda: torch.compile(flow),
    "compiled instance": lambda: torch.compile(Euler()),
    "forward of a subclass": Overriding,
    "a method beside forward": WithMethod,
    "a submodule": lambda: nn.Sequential(marked_instance()),
    "a decorator": lambda: rampde_fx.mixed_precision(policy=BF16),
    "the class of an instance that was marked": lambda: type(marked_instance()).__mro__[1],
}


@pytest.mark.parametrize("case", MARKED)
def test_the_policy_of_a_marked_target(case):
    assert policy_of(MARKED[case]()) == BF16


@pytest.mark.parametrize("case", UNMARKED)
def test_an_unmarked_target_has_no_policy(case):
    assert policy_of(UNMARKED[case]()) is None


@pytest.mark.parametrize(
    "target", [BF16, None, "float16", Euler().state_dict()], ids=lambda target: type(target).__name__
)
def test_what_cannot_be_called_has_no_policy_to_ask_for(target):
    with pytest.raises(errors.PolicyError, match="pass the model itself"):
        policy_of(target)


def test_a_policy_is_read_back_as_it_was_given():
    given = PrecisionPolicy(torch.float16, storage=torch.float16, scaling=AdjointScaling())
    for target in (Euler(), flow):
        marked = rampde_fx.mixed_precision(target, policy=given)
        assert policy_of(marked) == given != PrecisionPolicy()
        assert rampde_fx.explain(marked, Y, T).loops[0].policy == given


def marked_twice(target):
    return rampde_fx.mixed_precision(rampde_fx.mixed_precision(target, dtype=torch.bfloat16), dtype=torch.float32)


@pytest.mark.parametrize(
    "make",
    [
        lambda: marked_twice(flow),
        marked_twice(type("Twice", (Euler,), {"forward": Euler.forward})),
        lambda: rampde_fx.mixed_precision(Marked(), dtype=torch.float16),
        lambda: marked_twice(Euler()),
    ],
    ids=["function", "class", "instance of a marked class", "instance"],
)
def test_of_a_target_that_is_marked_twice_it_is_the_policy_of_its_loops(make):
    target = make()
    assert policy_of(target) == rampde_fx.explain(target, Y, T).loops[0].policy


def test_the_repr_of_a_marked_module_shows_its_policy():
    line = "\n  mixed_precision: bfloat16, checkpoint=sqrt\n"
    for model in (Marked(), Below(), marked_instance(), copy.deepcopy(marked_instance())):
        assert repr(model).count("mixed_precision") == 1 and line in repr(model)
        assert repr(model).replace(line, "\n") == repr(Euler()).replace("Euler", type(model).__name__)
    for model in (
        Euler(),
        Overriding(),
        rampde_fx.mixed_precision(WithMethod(), dtype=torch.float16)._unmarked_class(),
    ):
        assert "mixed_precision" not in repr(model)
    assert line.strip() in repr(torch.compile(marked_instance()))


def test_an_own_extra_repr_stays():
    line = "mixed_precision: bfloat16, checkpoint=sqrt"
    leaf = rampde_fx.mixed_precision(nn.Linear(3, 5), policy=BF16)
    assert leaf.extra_repr() == f"in_features=3, out_features=5, bias=True\n{line}"
    assert rampde_fx.mixed_precision(nn.Identity(), policy=BF16).extra_repr() == line
    assert Described().extra_repr() == f"order=1\n{line}"
    again = rampde_fx.mixed_precision(Described(), dtype=torch.float16)
    assert again.extra_repr() == f"order=1\n{line}"  # the class's own mark stands inside, and counts
    renewed = rampde_fx.mixed_precision(leaf, dtype=torch.float16)
    assert renewed.extra_repr() == "in_features=3, out_features=5, bias=True\nmixed_precision: float16"


def test_a_function_keeps_its_repr():
    marked = rampde_fx.mixed_precision(flow, policy=BF16)
    assert "flow" in repr(marked) and "bfloat16" not in repr(marked)


def test_a_marked_module_stays_as_it_was_otherwise():
    plain = Euler()
    marked = rampde_fx.mixed_precision(copy.deepcopy(plain), policy=BF16)
    assert list(marked.state_dict()) == list(plain.state_dict()) and vars(marked).keys() == vars(plain).keys()
    marked.load_state_dict(plain.state_dict())
    assert torch.equal(marked(Y, T), plain(Y, T))


@pytest.mark.parametrize("make", [Marked, marked_instance, Below], ids=["class", "instance", "subclass"])
def test_reading_and_showing_it_compiles_nothing_anew(make):
    model = make()
    compiled = torch.compile(model, backend="rampde_fx", options={"compiler": "eager"}, fullgraph=True)
    counters.clear()
    compiled(Y, T)
    assert policy_of(compiled) == BF16 and "bfloat16" in repr(compiled)
    compiled(Y, T)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
