"""Write the tutorial of the documentation as a notebook: its text and its code, cell by cell, without outputs.

`python examples/tutorial.py` writes examples/tutorial.ipynb from docs/tutorial.md; the notebook runs in any Jupyter, in
an environment in which rampde_fx is installed. A test compares the two.
"""

from __future__ import annotations

import argparse
import doctest
import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
NOTEBOOK = Path(__file__).with_suffix(".ipynb")
CODE = ("python", "pycon")


def cells(page: str) -> list[tuple[str, str]]:
    """The kind of each cell, "markdown" or "code", and its text."""
    found: list[tuple[str, list[str]]] = [("markdown", [])]
    fence = ""
    for line in page.splitlines():
        if line.startswith("```") and not fence and line[3:] in CODE:
            fence = line[3:]
            found.append((fence, []))
        elif line == "```" and fence:
            fence = ""
            found.append(("markdown", []))
        elif not line.startswith("<!--"):
            found[-1][1].append(line)
    return [_cell(kind, "\n".join(lines).strip("\n")) for kind, lines in found if any(map(str.strip, lines))]


def _cell(kind: str, text: str) -> tuple[str, str]:
    """Of a block with prompts what is typed, alone."""
    if kind == "pycon":
        text = "".join(example.source for example in doctest.DocTestParser().get_examples(text + "\n")).strip("\n")
    return ("markdown", text) if kind == "markdown" else ("code", text)


def notebook(page: str) -> dict[str, Any]:
    """The page as a notebook of Jupyter's format 4.5, with relative links to the pages."""
    return {
        "cells": [_as_json(number, kind, text) for number, (kind, text) in enumerate(cells(page))],
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _as_json(number: int, kind: str, text: str) -> dict[str, Any]:
    if kind == "markdown":  # the links of the page, from the folder of the notebook
        text = re.sub(r"\]\((?!https?:|#)", "](../docs/", text)
    cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell if kind == "markdown" else {**cell, "execution_count": None, "outputs": []}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    NOTEBOOK.write_text(json.dumps(notebook(PAGE.read_text()), indent=1) + "\n")
    print(f"written: {NOTEBOOK}")
