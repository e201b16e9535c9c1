"""The Python of the documentation's pages runs as it is shown, and prints what is shown."""

import contextlib
import io
import re
import sys
import types
import unittest
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["adjoint", "writing_a_pass"])
def test_page(page, monkeypatch):
    """Its blocks run one after the other in one module; a text block is what the one before it prints."""
    module, printed = types.ModuleType(page), ""
    monkeypatch.setitem(sys.modules, page, module)  # Dynamo imports the globals of a function by its module's name
    names = module.__dict__
    for kind, block in BLOCK.findall((DOCS / f"{page}.md").read_text()):
        if kind == "text":
            assert printed.strip() == block.strip()
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block, f"{page}.md", "exec"), names)
        printed = out.getvalue()
    cases = [value for value in names.values() if isinstance(value, type) and issubclass(value, unittest.TestCase)]
    for case in cases:
        result = unittest.defaultTestLoader.loadTestsFromTestCase(case).run(unittest.TestResult())
        problems = [text for _, text in (*result.errors, *result.failures)]
        assert result.testsRun == 0 or not problems, problems[0]
