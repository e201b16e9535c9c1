"""The table of operators is whole and without contradictions, and no other file lists operators."""

import ast
import re

import pytest
import torch
from torch import fx

from rampde_fx.ir import operator_table
from rampde_fx.ir.operator_table import ROWS, TABLE, Operator, properties
from tests.sources import FILES

aten = torch.ops.aten
DISPATCHED = set(torch._C._dispatch_get_all_op_names())
ATEN = {name.removeprefix("aten::").partition(".")[0] for name in DISPATCHED if name.startswith("aten::")}
# Are composites without a kernel, and yet stand in graphs: of sizes, and on CUDA.
KEPT = {"sym_size", "sym_stride", "sym_numel", "_fused_rms_norm"}


def overloads(name):
    """The functional overloads that a key of the table stands for."""
    space, _, name = name.rpartition("::")
    name, _, only = name.partition(".")
    spaces = [torch.ops.rampde_fx] if space else [aten, torch.ops.prims]
    packet = next((getattr(s, name) for s in spaces if hasattr(s, name)), None)
    found = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    found = [target for target in found if only in ("", target._overloadname) and "out" not in target._overloadname]
    return [target for target in found if target.name() in DISPATCHED]


def arguments(target):
    return [argument.name for argument in target._schema.arguments]


def contradictions(name, row):
    """What a row says of an operator that cannot be, or lacks."""
    targets = overloads(name)
    if not targets:
        return ["no such operator"]
    whole = row.product in ("matrices", "tensors")
    rules = {
        "nothing is known of it": row != Operator(),
        "a product of whole tensors is low": row.dtype == "low" or not whole,
        "linear in each: a product": row.linear != "each" or row.product != "",
        "linear in the operand at a position that it has": not isinstance(row.linear, int)
        or all(str(target._schema.arguments[row.linear].type) == "Tensor" for target in targets),
        "what a state is updated by is linear, or a view": row.update in ("", "cast")
        or row.linear != ""
        or any(map(operator_table.is_view, targets)),
        "what divides is a product of entries": not row.divides or (row.product == "entries" and not row.commutes),
        "what adds to its first operand is linear": not row.first_is_summand or row.linear in ("all", "each"),
        "what commutes is a sum or a scaling": not row.commutes or row.update in ("add", "scale"),
        "what is bounded is not wide": row.limit == "" or row.dtype != "wide",
        "what handles NaN is not linear": row.nan not in ("asks", "handles") or row.linear == "",
        "what reads shapes follows": not row.reads_shape or row.dtype == "follows",
        "a sum that is rounded once has a dtype": not row.rounded_once
        or (row.linear == "all" and any("dtype" in arguments(target) for target in targets)),
        "the argument by which it adds": row.adds_if == "" or any(row.adds_if in arguments(t) for t in targets),
        "what nothing has written follows": not row.unwritten or row.dtype == "follows",
        "heads are of query, key and value": not row.aligned
        or all({"query", "key", "value"} <= set(arguments(target)) for target in targets),
        "a twin that is wide takes its dtype": not row.wide_overload
        or "out_dtype" in arguments(getattr(targets[0].overloadpacket, row.wide_overload, None) or targets[0]),
        "a product by itself is one": not row.without_summand
        or (row.first_is_summand and whole and _is_by_itself(row.without_summand)),
        "what is wide on a CPU is a product": not row.wide_on_cpu
        or (whole and any(target._overloadname == "default" for target in targets)),
        "what is slow on a CPU can be wide there": not row.slow_on_cpu
        or (row.wide_on_cpu and set(row.slow_on_cpu) <= {torch.float16, torch.bfloat16}),
    }
    return [rule for rule, holds in rules.items() if not holds]


def _is_by_itself(name):
    row = TABLE.get(name, Operator())
    return row.product == "matrices" and not row.first_is_summand and "default" in getattr(aten, name).overloads()


def test_each_operator_stands_in_one_row():
    assert sum(len(names.split()) for names in ROWS) == len(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_no_row_is_incomplete_or_contradicts_itself(name):
    assert contradictions(name, TABLE[name]) == []


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("no_such_operator", Operator("wide")),
        ("mm.no_such_overload", Operator("wide")),
        ("mm", Operator()),
        ("mm", Operator(product="matrices", linear="each")),
        ("mm", Operator("low", linear="each")),
        ("mm", Operator("low", product="matrices", wide_overload="default")),
        ("mm", Operator("low", product="matrices", without_summand="bmm")),
        ("addmm", Operator("low", product="matrices", linear="each", first_is_summand=True, without_summand="addmv")),
        ("addmm", Operator("low", product="matrices", first_is_summand=True)),
        ("triangular_solve", Operator(linear=2)),
        ("relu", Operator(update="add", limit="bounded")),
        ("exp", Operator("wide", limit="bounded")),
        ("exp", Operator("wide", commutes=True)),
        ("exp", Operator("wide", rounded_once=True)),
        ("exp", Operator("wide", divides=True)),
        ("exp", Operator("wide", wide_on_cpu=True)),
        ("mm", Operator("low", product="matrices", linear="each", slow_on_cpu=(torch.float16,))),
        (
            "mm",
            Operator("low", product="matrices", linear="each", wide_on_cpu=True, slow_on_cpu=(torch.float32,)),
        ),
        ("exp", Operator("wide", unwritten=True)),
        ("isnan", Operator(linear="all", nan="asks")),
        ("zeros_like", Operator(reads_shape=True)),
        ("index_put", Operator("follows", adds_if="adds")),
        ("mm", Operator("low", product="matrices", aligned=True)),
    ],
)
def test_a_row_that_contradicts_itself_is_found(name, row):
    assert contradictions(name, row) != []


@pytest.mark.parametrize("name", [name for name in TABLE if "::" not in name and name not in KEPT])
def test_every_operator_can_stand_in_a_graph(name):
    """linalg_solve is taken apart before a graph is made: what a row says of it is never read."""

    def is_taken_apart(target):
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        return has_kernel(target.name(), "CompositeImplicitAutograd") and not has_kernel(target.name(), "CPU")

    assert not all(map(is_taken_apart, overloads(name)))


def test_every_attention_is_a_low_product():
    names = {n for n in ATEN if n.startswith("_scaled_dot_product_") and "math" not in n and "quantized" not in n}
    assert len(names) >= 10
    for name in names:
        assert TABLE[name].dtype == "low" and TABLE[name].product == "tensors", name


def test_a_rounded_quotient_is_not_linear():
    graph = fx.Graph()
    y = graph.placeholder("y")
    quotient = graph.call_function(aten.div.Tensor, (y, 2))
    rounded = graph.call_function(aten.div.Tensor_mode, (y, 2), {"rounding_mode": "floor"})
    assert operator_table.linear_operands(quotient, {y}) == [y]
    assert operator_table.linear_operands(rounded, {y}) == []


@pytest.mark.parametrize("put", [aten.index_put.default, aten._unsafe_index_put.default], ids=str)
def test_what_adds_to_entries_does_not_follow_its_operands(put):
    follows = operator_table.follows_operands
    y, i = torch.ones(3), torch.tensor([0])
    assert follows(put, (y, [i], y), {}) and follows(put, (y, [i], y, False), {})
    assert not follows(put, (y, [i], y, True), {}) and not follows(put, (y, [i], y), {"accumulate": True})
    assert follows(aten.scatter.src, (y, 0, i, y), {}) and not follows(
        aten.scatter.reduce, (y, 0, i, y), {"reduce": "add"}
    )


def test_an_input_is_no_operator_whatever_its_name():
    assert properties("mm") == properties(fx.Graph().placeholder("isnan").target) == Operator()


def test_operators_of_others_are_known_apart_from_torchs():
    assert properties(torch.ops.rampde_fx.narrow.default).update == "cast"
    assert properties(aten.narrow.default) == Operator()
    with torch.library._scoped_library("a_users", "DEF") as library:
        library.define("mm(Tensor a, Tensor b) -> Tensor")
        assert properties(torch.ops.a_users.mm.default) == Operator()


def test_python_names_are_those_of_rows():
    assert set(operator_table.OTHER_NAMES.values()) <= set(TABLE) and not set(operator_table.OTHER_NAMES) & set(TABLE)
    assert operator_table.properties_of_captured("true_divide_") is TABLE["div"]


def operator_lists(source):
    """The lists of operators in a file: what has two of them or more, as they are or by name.

    A dictionary of functions is none: it says what to do for each.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        entries = _entries(node)
        listed = [entry for entry in entries if _is_operator(entry)]
        if len(listed) >= 2 and len(listed) > 0.75 * len(entries):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def _entries(node):
    if isinstance(node, (ast.Set, ast.List, ast.Tuple)):
        return node.elts
    if isinstance(node, ast.Dict):
        does = all(isinstance(value, (ast.Lambda, ast.Name, ast.Call)) for value in node.values)
        return [] if does else [key for key in node.keys if key is not None]
    words = str(node.value).split() if isinstance(node, ast.Constant) else []
    return [ast.Constant(word) for word in words] if len(words) > 2 else []  # two may be words of a language


def _is_operator(node):
    if isinstance(node, ast.Constant):
        return node.value in ATEN
    return isinstance(node, ast.Attribute) and re.search(r"\b(aten|prims)\.\w", ast.unparse(node)) is not None


@pytest.mark.parametrize("name", sorted(FILES.keys() - {operator_table.__name__}))
def test_no_other_file_lists_operators(name):
    assert operator_lists(FILES[name].read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "SUM = {aten.add.Tensor, aten.sub.Tensor}",
        "PRODUCT = {torch.ops.aten.mm.default: torch.ops.aten.mm.dtype, torch.ops.aten.bmm.default: 1}",
        "if name in ('mul', 'div'): pass",
        "LOW = set('mm addmm getitem bmm mv'.split())",
        "MOVES = [aten.cat.default, aten.stack.default, aten.where.self, aten.clone.default, other]",
        "ADDS = {'index_put': ('accumulate', 3), 'scatter': ('reduce', 4)}",
    ],
)
def test_a_list_of_operators_is_found(source):
    assert len(operator_lists(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "node.target is aten.add.Tensor or node.target is aten.sub.Tensor",
        "graph.call_function(aten.add.Tensor, (y, aten.mul.Tensor))",
        "DRAWS = {aten.rand.default: uniform, aten.randn.default: lambda *_: normal}",
        "CHAIN = ('add', 'scale', 'copy')",
        "message = 'sum and mean of the states'",
    ],
)
def test_what_is_no_list_of_operators_is_not_found(source):
    assert operator_lists(source) == []
