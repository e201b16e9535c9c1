"""The documentation is true: its code runs, its printouts are printed, its commands exist.

The python blocks of a page run in order in one namespace. One thing is substituted: where a block compiles for the
rampde_fx backend without naming a compiler, options={"compiler": "aot_eager"} is added, so that Inductor's C++ compiler
is not waited for. A block of text behind one that prints is what it prints. Blocks with a prompt are doctests. A block
below an HTML comment "not run: REASON" is only parsed; the printouts of graphs are compared with what is printed. In
the pages for users no block has an empty line where Python's own prompt would end a statement.
"""

import ast
import code
import contextlib
import doctest
import importlib
import io
import json
import linecache
import re
import shlex
import subprocess
import sys
import unittest
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rampde_fx

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GRAPHS = ROOT / "docs" / "before_and_after.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: (.+) -->$")
PRINTOUT = "a printout"
# Everything that is not run, in all pages together. It should stay few.
MOST_NOT_RUN = 8
COMMAND = re.compile(r"(?:python -m |python examples/|make )\S")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its lines without the fences, and the number of the first of these."""

    language: str
    text: str
    line: int
    not_run: str


def blocks(page: Path) -> list[Block]:
    found, opened, lines, comment = [], None, [], ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if opened is not None and line.strip() == "```":
            found.append(Block(opened[0], "\n".join(lines) + "\n", opened[1], comment))
            opened, lines, comment = None, [], ""
        elif opened is not None:
            lines.append(line)
        elif line.startswith("```"):
            opened = (line.removeprefix("```").strip(), number + 1)
        elif line.strip():
            marked = NOT_RUN.match(line)
            comment = marked[1] if marked else ""
    assert opened is None, f"{page.name} ends inside a block"
    return found


def code_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("python", "pycon")]


def run(page: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Run the blocks of a page as one module; what they define."""
    module = ModuleType(page.stem)
    monkeypatch.setitem(sys.modules, page.stem, module)  # Dynamo looks the globals up there
    namespace = vars(module)
    printed = ""
    for block in blocks(page):
        if block.language == "text" and printed:
            assert block.text.strip() == printed.strip(), f"{page.name}:{block.line}"
        printed = ""
        if block.language == "pycon":
            example = doctest.DocTestParser().get_doctest(block.text, namespace, page.name, str(page), block.line - 1)
            told: list[str] = []
            runner = doctest.DocTestRunner(optionflags=FLAGS)
            runner.run(example, out=told.append, clear_globs=False)
            assert runner.failures == 0, "".join(told)
            namespace.update(example.globs)
        if block.language != "python" or block.not_run == PRINTOUT:
            continue
        # The lines before are left empty, so that tracebacks and reports name the lines of the page.
        compiled = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        if not block.not_run:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compiled, namespace)
            printed = out.getvalue()
    return namespace


def run_test_cases(namespace: dict[str, object]) -> None:
    """Run the tests that a page defines."""
    for case in [value for value in namespace.values() if isinstance(value, type)]:
        if issubclass(case, unittest.TestCase) and case.__module__ == namespace["__name__"]:
            result = unittest.defaultTestLoader.loadTestsFromTestCase(case).run(unittest.TestResult())
            problems = [text for _, text in (*result.errors, *result.failures)]
            assert result.testsRun and not problems, problems


@pytest.fixture
def without_inductor(monkeypatch):
    """torch.compile(backend="rampde_fx") without a compiler in its options takes aot_eager."""
    compile_ = torch.compile

    def substituted(model=None, *, backend="inductor", options=None, **others):
        if backend == "rampde_fx":
            options = {"compiler": "aot_eager", **(options or {})}
        return compile_(model, backend=backend, options=options, **others)

    monkeypatch.setattr(torch, "compile", substituted)
    rampde_fx.backward_counts(reset=True)


PAGES_WITH_CODE = [
    pytest.param(page, marks=[pytest.mark.slow] if page.name in ("README.md", "migration.md") else [], id=page.name)
    for page in PAGES
    if page != GRAPHS and code_blocks(page)
]


@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_the_code_of_a_page_runs(page, without_inductor, monkeypatch):
    run_test_cases(run(page, monkeypatch))


class Prompt(code.InteractiveConsole):
    """Python's own prompt: it reads line by line, and runs nothing here."""

    def __init__(self) -> None:
        super().__init__()
        self.statements, self.wrong = 0, ""

    def runcode(self, code: object) -> None:
        self.statements += any(line.strip() and not line.startswith("#") for line in self.buffer)

    def showsyntaxerror(self, filename: str | None = None, **given: object) -> None:
        self.wrong = str(sys.exc_info()[1])


def pasted(text: str) -> Prompt:
    prompt = Prompt()
    for line in (*text.splitlines(), ""):
        prompt.push(line)
    return prompt


# The other two pages are for those who work on the package.
PASTED = [page for page in PAGES if code_blocks(page) and page.name not in ("adjoint.md", "writing_a_pass.md")]


@pytest.mark.parametrize("page", PASTED, ids=lambda page: page.name)
def test_the_code_of_a_page_can_be_pasted_into_the_prompt(page):
    for block in blocks(page):
        if block.language == "python" and block.not_run != PRINTOUT:
            prompt = pasted(block.text)
            assert not prompt.wrong and not prompt.buffer, f"{page.name}:{block.line}: {prompt.wrong}"
            assert prompt.statements == len(ast.parse(block.text).body), f"{page.name}:{block.line}"


def test_what_the_prompt_does_not_take():
    method = "    def {}(self):\n        return 1\n"
    assert not pasted("class A:\n" + method.format("a") + method.format("b")).wrong
    assert pasted("class A:\n" + method.format("a") + "\n" + method.format("b")).wrong
    assert pasted("def f():\n    return 1\nf()\n").wrong


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def outside_of_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", outside_of_blocks(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKING = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_repository_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", outside_of_blocks(page)):
        if not target.startswith(("https://", "mailto:")):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.is_file(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_the_gallery_has_every_example_and_every_picture_of_one():
    text = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    programs = [path for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert len(programs) >= 5
    assert [path.name for path in programs if f"`python examples/{path.name}" not in text] == []
    pictures = {path.name for path in (ROOT / "docs").glob("*.png")} - {"monitor.png", "scaling-cpu.png"}
    assert pictures == set(re.findall(r"\]\((.+\.png)\)", text))


def test_issues_ask_for_the_environment():
    forms = list((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 2
    assert [path.name for path in forms if "python -m rampde_fx env" not in path.read_text(encoding="utf-8")] == []


def test_little_is_not_run():
    skipped = [(page.name, block.line) for page in PAGES for block in code_blocks(page) if block.not_run]
    assert len(skipped) <= MOST_NOT_RUN, skipped
    assert len(skipped) * 4 <= sum(len(code_blocks(page)) for page in PAGES)


def test_the_api_page_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r":: (?:\w+\.)*(\w+)(?:\(\))?$", text, flags=re.MULTILINE))
    assert set(rampde_fx.__all__) - {"errors"} <= documented
    assert ".. automodule:: rampde_fx.errors" in text


def test_every_block_has_a_language():
    known = {"python", "pycon", "sh", "text", "math", "{include}", "{toctree}", "{eval-rst}"}
    assert {block.language.split(" ")[0] for page in PAGES for block in blocks(page)} <= known


def test_the_page_of_graphs_runs_and_they_are_printed(without_inductor, monkeypatch):
    """Every line of the printouts, up to a cut "..." or a comment, stands in what is printed, in this order."""
    loop = run(GRAPHS, monkeypatch)["report"].loops[0]
    printouts = [block.text for block in code_blocks(GRAPHS) if block.not_run == PRINTOUT]
    graphs = [loop.passes[0].loop.step, loop.step, loop.adjoint]
    for text, graph in zip(printouts, graphs, strict=True):
        printed = [line.strip() for line in graph.print_readable(print_output=False).splitlines()]
        for line in text.splitlines():
            shown = line.split("  #")[0].split("...")[0].strip()
            if shown and not shown.startswith("#"):
                at = next((i for i, candidate in enumerate(printed) if candidate.startswith(shown)), None)
                assert at is not None, f"not printed, or not in this order: {line}"
                printed = printed[at + 1 :]


def commands() -> list[str]:
    """The commands that the pages name: in blocks of sh, in indented blocks, and between backticks."""
    found: dict[str, None] = {}
    for page in PAGES:
        fenced = [line for block in blocks(page) if block.language == "sh" for line in block.text.splitlines()]
        outside = outside_of_blocks(page)
        indented = re.findall(r"^    (\S.*)$", outside, flags=re.MULTILINE)
        quoted = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside)]
        for line in (*fenced, *indented, *quoted):
            command = line.split("  #")[0].strip()
            if COMMAND.match(command):
                found[command] = None
    return list(found)


@cache
def help_of(*command: str) -> str:
    line = [sys.executable, *command, "--help"]
    asked = subprocess.run(line, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert asked.returncode == 0, asked.stderr
    return asked.stdout


def test_the_targets_of_make_exist():
    named = {word for line in commands() if line.startswith("make ") for word in line.split()[1:] if "=" not in word}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named and named - {"TARGET"} <= targets


PYTHON_COMMANDS = [line for line in commands() if line.startswith("python ")]


@pytest.mark.slow
@pytest.mark.parametrize("line", PYTHON_COMMANDS)
def test_the_options_of_a_command_exist(line):
    words = shlex.split(line)[1:]
    size = 2 if words[0] == "-m" else 1
    size += words[:2] == ["-m", "rampde_fx"]  # its command, explain
    text = help_of(*words[:size])
    for option in (word.split("=")[0] for word in words[size:] if word.startswith("--")):
        assert re.search(rf"{re.escape(option)}\b(?!-)", text), f"{option} is not an option of {' '.join(words[:size])}"


@pytest.mark.slow
def test_the_api_page_has_every_option_of_the_command():
    options = set(re.findall(r"--[a-z][a-z-]*", help_of("-m", "rampde_fx", "explain"))) - {"--help"}
    assert options == set(re.findall(r"--[a-z][a-z-]*", (ROOT / "docs" / "api.md").read_text(encoding="utf-8")))


def rows_of(page: Path) -> list[list[str]]:
    """The cells of all rows of the tables of a page, without their heads."""
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if row[0] != "what" and set(row[0]) != {"-"}]


def test_what_it_works_with_has_a_test_for_every_row():
    files = [*(ROOT / "tests").glob("test_*.py"), ROOT / "tests" / "trainers.py"]
    tests = {path.name: path.read_text(encoding="utf-8") for path in files}
    rows, before = rows_of(ROOT / "docs" / "works_with.md"), ""
    assert len(rows) > 30
    for what, outcome, shown in rows:
        named = re.findall(r"`(test_\w+)(\.py)?`", before if shown == "the same" else shown)
        assert what and outcome and named, what
        for name, is_file in named:
            found = f"{name}.py" in tests if is_file else any(f"def {name}(" in text for text in tests.values())
            assert found, (what, name)
        before = before if shown == "the same" else shown


def test_the_notebook_is_the_tutorial(monkeypatch):
    """`python examples/tutorial.py` writes it; its cells hold the code that the page's blocks run, in their order."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    tutorial = importlib.import_module("tutorial")
    page = tutorial.PAGE.read_text(encoding="utf-8")
    assert json.loads(tutorial.NOTEBOOK.read_text(encoding="utf-8")) == tutorial.notebook(page)
    code = ["".join(cell["source"]) for cell in tutorial.notebook(page)["cells"] if cell["cell_type"] == "code"]
    assert len(code) == len(code_blocks(tutorial.PAGE)) > 5
    for source in code:
        ast.parse(source)
        assert ">>>" not in source


@pytest.mark.slow
def test_the_notebook_runs(without_inductor, monkeypatch):
    """Cell after cell in one namespace, as Jupyter does; what a last expression shows is left out."""
    cells = json.loads((ROOT / "examples" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    module = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", module)
    with contextlib.redirect_stdout(io.StringIO()):
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                # Dynamo and explain read the lines of what they capture.
                source, name = "".join(cell["source"]), f"<cell {number}>"
                linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
                exec(compile(source, name, "exec"), vars(module))
    assert vars(module)["record"].scales.shape == (8, 4)
