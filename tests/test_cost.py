"""What a training step costs, counted instead of timed, and compared with what was recorded.

A number that rises is a regression, or has a reason that belongs in the commit; one that falls is recorded anew with
EXPECTTEST_ACCEPT=1.
"""

import collections
import contextlib
import operator
import re

import pytest
import torch
from expecttest import TestCase
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import rampde_fx
from rampde_fx import PrecisionPolicy, backend
from rampde_fx.ir import graphs, operator_table
from rampde_fx.torch_private import kernels
from tests.benchmarks.cases import QUICK
from tests.benchmarks.contenders import solve_by_odeint
from tests.benchmarks.measure import saved_bytes

pytestmark = pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="recorded on torch 2.13")

CASES = {case.name: case for case in QUICK}
CPU = torch.device("cpu")


def prepared(name, dtype, compiler="aot_eager", **policy):
    """Loss, model and data of a case, compiled."""
    model, x, t = CASES[name].build(solve_by_odeint, CPU)
    marked = rampde_fx.mixed_precision(model, policy=PrecisionPolicy(velocity=dtype, **policy))
    return torch.compile(marked, backend="rampde_fx", options={"compiler": compiler}, fullgraph=True), model, x, t


@contextlib.contextmanager
def recorded_graphs(monkeypatch):
    """The captured graphs as they were rewritten."""
    found, own = [], backend.rewrite

    def rewrite(graph_module):
        loops = own(graph_module)
        found.append(graph_module)
        return loops

    with monkeypatch.context() as patched:
        patched.setattr(backend, "rewrite", rewrite)
        yield found


def bodies(graph_module):
    """The bodies of scans: what runs once in every step."""
    for name, module in graph_module.named_modules():
        if isinstance(module, fx.GraphModule) and name.rpartition(".")[2].startswith("scan_combine_graph"):
            yield name, module


def counted(graph_module):
    """Operations of a body by kind, views and numbers left out."""
    kinds = collections.Counter()
    for node in graphs.body(graph_module):
        if not torch.utils._pytree.tree_any(torch.is_tensor, node.meta.get("val")) or graphs.is_view(node):
            continue
        name = operator_table.name_of(node.target)
        if operator_table.is_product(node):
            kinds["products"] += 1
        elif node.target is operator.getitem:
            continue
        elif name == "_to_copy":
            kinds["casts"] += 1
        elif name == "amax":
            kinds["maxima"] += 1
        else:
            kinds["others"] += 1
    return kinds


def host_reads(graph_module):
    """Nodes by which the host reads a value of the device: conditions of while loops, and numbers from tensors."""
    modules = [m for m in graph_module.modules() if isinstance(m, fx.GraphModule)]
    names = [operator_table.name_of(node.target) for module in modules for node in module.graph.nodes]
    return sum(name in ("while_loop", "_local_scalar_dense") for name in names)


def described(kinds):
    return ", ".join(f"{kinds[kind]} {kind}" for kind in ("products", "casts", "maxima", "others"))


def cost(monkeypatch, name, dtype):
    """Lines: the operations of each step, host reads, bytes saved, graphs and graph breaks."""
    counters.clear()
    with recorded_graphs(monkeypatch) as found:
        function, model, x, t = prepared(name, dtype)
        for _ in range(2):
            function(x, t).backward()
        saved = saved_bytes(lambda: function(x, t), model)
    lines = []
    for graph_module in found:
        for path, body in bodies(graph_module):
            direction = "adjoint step" if "backward" in path else "step"
            lines.append(f"{direction}: {described(counted(body))}")
    reads, breaks = sum(map(host_reads, found)), sum(counters["graph_break"].values())
    lines += [f"host reads: {reads}", f"bytes saved: {saved}"]
    return "\n".join([*lines, f"graphs: {counters['stats']['unique_graphs']}, graph breaks: {breaks}"])


def kernels_of(code):
    """For each loop body in the generated code: its calls of generated kernels, and of library products."""
    in_python = re.findall(
        r"^def (while_loop_body_graph_\w+)(?<!_loop)\(args\):\n((?:    .*\n|\n)+)", code, re.MULTILINE
    )
    in_cpp = dict(re.findall(r"^static void (\w+)_native\(.*\n((?:    .*\n)+)", code, re.MULTILINE))
    for name, body in in_python:
        calls = in_cpp.get(name, body)
        fused = len(re.findall(r"^ +cpp_fused_\w+\(", calls, re.MULTILINE))
        products = len(re.findall(r"^ +(?:extern_kernels\.\w+|product<float>|low_product)\(", calls, re.MULTILINE))
        yield f"{fused} kernels, {products} products"


class TestCost(TestCase):
    @pytest.fixture(autouse=True)
    def _patches(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def check(self, name, dtype, expected):
        self.assertExpectedInline(cost(self.monkeypatch, name, dtype), expected, skip=1)

    def test_density_flow_in_float32(self):
        self.check(
            "cnf",
            torch.float32,
            """\
step: 16 products, 0 casts, 0 maxima, 62 others
adjoint step: 47 products, 0 casts, 0 maxima, 166 others
host reads: 0
bytes saved: 26244
graphs: 1, graph breaks: 0""",
        )

    def test_density_flow_in_float16(self):
        self.check(
            "cnf",
            torch.float16,
            """\
step: 16 products, 16 casts, 4 maxima, 125 others
adjoint step: 47 products, 96 casts, 8 maxima, 393 others
host reads: 1
bytes saved: 13956
graphs: 1, graph breaks: 0""",
        )

    def test_potential_flow_in_float16(self):
        self.check(
            "otflow",
            torch.float16,
            """\
step: 28 products, 32 casts, 4 maxima, 261 others
adjoint step: 79 products, 252 casts, 16 maxima, 1334 others
host reads: 1
bytes saved: 14148
graphs: 1, graph breaks: 0""",
        )

    def test_attention_in_bfloat16(self):
        self.check(
            "attention",
            torch.bfloat16,
            """\
step: 20 products, 21 casts, 0 maxima, 35 others
adjoint step: 54 products, 55 casts, 0 maxima, 146 others
host reads: 0
bytes saved: 81956
graphs: 1, graph breaks: 0""",
        )

    def test_convolutions_in_float16(self):
        self.check(
            "conv",
            torch.float16,
            """\
step: 8 products, 8 casts, 6 maxima, 106 others
adjoint step: 15 products, 36 casts, 4 maxima, 160 others
step: 8 products, 8 casts, 6 maxima, 106 others
adjoint step: 15 products, 36 casts, 4 maxima, 160 others
step: 8 products, 8 casts, 6 maxima, 106 others
adjoint step: 15 products, 36 casts, 4 maxima, 160 others
host reads: 3
bytes saved: 543700
graphs: 1, graph breaks: 0""",
        )

    @pytest.mark.inductor
    @pytest.mark.slow
    def test_kernels_of_a_step_and_of_its_adjoint(self):
        """Of every loop body in the order of the generated code: steps, attempts at the reverse loop, adjoint steps."""
        self.monkeypatch.setattr(kernels, "cpu_multiplies", lambda dtype: True)  # on whatever CPU it runs
        function, _, x, t = prepared("cnf", torch.float16, "inductor")
        _, codes = run_and_get_code(lambda: function(x, t).backward())
        self.assertExpectedInline(
            "\n".join(found for code in codes for found in kernels_of(code)),
            """\
6 kernels, 8 products
1 kernels, 0 products
21 kernels, 24 products
3 kernels, 0 products""",
        )

    @pytest.mark.inductor
    @pytest.mark.slow
    def test_what_is_kept_is_stored_by_the_kernels_that_make_it(self):
        self.monkeypatch.setattr(kernels, "cpu_multiplies", lambda dtype: True)
        self.monkeypatch.setattr(kernels, "cpu_has_tiles", lambda: False)
        found = {}
        for checkpoint in ("step", "none"):
            torch._dynamo.reset()
            function, _, x, t = prepared("cnf", torch.bfloat16, "inductor", checkpoint=checkpoint)
            _, codes = run_and_get_code(lambda function=function, x=x, t=t: function(x, t))
            found[checkpoint] = list(kernels_of(codes[0]))
        assert found == {"step": ["6 kernels, 8 products"], "none": ["5 kernels, 8 products"]}
