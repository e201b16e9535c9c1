"""The structure of the source: imports go one way, and files and functions stay short."""

import ast
import re

import pytest

from tests import durations
from tests.sources import FILES, ROOT

# From the top to the bottom: a file imports from its own part and from those below it.
ORDER = """__main__ proof report shipping backend validation passes emit torchdiffeq ir solvers frontend runtime policy
    schedules policy_text torch_private reach small_tensors indices errors""".split()
DATA = {"rampde_fx.solvers.tableau", "rampde_fx.ir.operator_table"}


def imported(tree, known):
    """The known modules that a tree imports, wherever the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known.keys() or {node.module} & known.keys()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
    return found


def circle(edges):
    """A circle of a graph, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        found = next(filter(None, map(visit, edges[node])), None)
        path.pop()
        done.add(node)
        return found

    return next(filter(None, map(visit, edges)), None)


def length(function):
    """The lines of a function without its docstring."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    return function.end_lineno - function.lineno + 1 - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def test_there_is_no_import_circle():
    edges = {name: imported(ast.parse(path.read_text()), FILES) - {name} for name, path in FILES.items()}
    assert sum(map(len, edges.values())) > 200
    assert circle(edges) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def part(module):
    return module.split(".")[1]


def test_imports_go_down_the_list_of_contributing():
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("| part of `rampde_fx/` | holds |")[2].partition("\n\n")[0]
    told = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)(?:/|\.py)?`", row.split("|")[1])]
    assert told == ORDER
    for name, path in FILES.items():
        if name.count("."):  # but for the package itself, which gathers what is public
            upward = {other for other in imported(ast.parse(path.read_text()), FILES) if other.count(".")}
            upward = {other for other in upward if ORDER.index(part(other)) < ORDER.index(part(name))}
            assert not upward, (name, upward)


def test_contributing_says_which_tests_are_for_what():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`(test_\w+\.py)`", text))
    assert {path.name for path in (ROOT / "tests").glob("test_*.py")} == named
    table = text.partition("| what you touch | run |")[2].partition("\n\n")[0]
    touched = "".join(row.split("|")[1] for row in table.splitlines()[2:])
    passes = [name.rpartition(".")[2] for name in FILES if name.startswith("rampde_fx.passes.")]
    assert [name for name in (*ORDER, *passes) if not re.search(rf"`{name}(/|\.py)?`", touched)] == []


def test_no_pass_imports_another():
    passes = {name: path for name, path in FILES.items() if name.startswith("rampde_fx.passes.")}
    for name, path in passes.items():
        assert not imported(ast.parse(path.read_text()), passes) - {name}, name


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_short(name):
    text = FILES[name].read_text()
    assert name in DATA or text.count("\n") <= 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert all(length(function) <= 50 for function in functions), max(functions, key=length).name


def test_examples_stay_short():
    lengths = {path.name: path.read_text().count("\n") for path in (ROOT / "examples").glob("*.py")}
    assert "training.py" in lengths and max(lengths.values()) <= 400, lengths


def test_no_meta_key_says_what_a_type_could_say():
    """Nodes carry the metadata of torch, the roles that partition_velocity writes, and nothing else of ours."""
    ours = {"role", "rank", "outside", "user_name", "recompute"}
    torchs = {"val", "example_value", "stack_trace", "grapharg", "tensor_meta", "nn_module_stack"}
    found = set()
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            is_meta = isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith(".meta")
            if is_meta and isinstance(node.slice, ast.Constant):
                found.add(node.slice.value)
    assert "val" in found and found <= ours | torchs


def test_the_fastest_case_of_a_test_has_a_larger_limit():
    seconds = {
        "a.py::alone": durations.MOST + 1,
        "a.py::other": durations.MOST,
        "a.py::two[x]": durations.LIMIT + 2,
        "a.py::two[y[0]]": durations.LIMIT + 1,
        "a.py::fast[x]": durations.LIMIT / 2,
        "a.py::fast[y]": durations.LIMIT,
    }
    assert durations.long_cases(seconds) == {"a.py::alone", "a.py::two[x]"}


def test_long_cases_are_cases_of_tests_that_are():
    cases = durations.LIST.read_text().splitlines()
    assert cases == sorted(set(cases))
    for case in cases:
        file, *_, name = case.partition("[")[0].split("::")
        assert f"def {name}(" in (ROOT / file).read_text(), f"{case}: renew tests/long_cases.txt by make test-all"
