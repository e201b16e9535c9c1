"""How Sphinx builds the documentation. Nothing is fetched: no inventories of other projects, no script for formulas."""

from __future__ import annotations

from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

import rampde_fx

project = "rampde_fx"
author = "The rampde_fx authors"
copyright = author
release = version = rampde_fx.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser", "sphinx_copybutton"]

# Formulas as GitHub writes them, too: $...$, $$...$$ and fences called math.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 120
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "returns_style")]

# The prompts of examples stay out of what is copied.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

MATHML = "{http://www.w3.org/1998/Math/MathML}"
ElementTree.register_namespace("", MATHML[1:-1])
ACCENTS = "~^\u02c9\u02d9"  # tilde, hat, bar, dot

html_theme = "furo"
html_title = "rampde_fx"
smartquotes_action = "D"  # dashes alone: what stands in quotation marks is code, as a rule
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_theme_options = {"light_css_variables": {"code-font-size": "75%"}, "dark_css_variables": {"code-font-size": "75%"}}


def inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    """A formula in a line, as MathML."""
    translator.body.append(mathml(node, as_block=False))
    raise nodes.SkipNode


def block_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    """A formula of its own, as MathML; not numbered."""
    translator.body.append(f'<div class="math">{mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def mathml(node: nodes.Node, *, as_block: bool) -> str:
    """The formula of a node; what docutils does not know of LaTeX is a warning."""
    try:
        formula = ElementTree.fromstring(tex2mathml(node.astext(), as_block=as_block))
    except MathError as error:
        logging.getLogger(__name__).warning("formula: %s", error, location=node)
        return ""
    for element in formula.iter():
        mend_accent(element)
        if element.text in set("|\u27e8\u27e9"):  # no operators between two numbers; angle brackets in a line
            element.attrib |= {"lspace": "0", "rspace": "0", "stretchy": "false"}
    return ElementTree.tostring(formula, encoding="unicode")


def mend_accent(element: ElementTree.Element) -> None:
    """Docutils puts the index of a letter with an accent below the letter; it belongs behind both."""
    children = list(element)
    if element.tag != MATHML + "munderover" or children[2].text not in ACCENTS:
        return
    letter, index, accent = children
    element.tag = MATHML + "msub"
    for child in children:
        element.remove(child)
    accented = ElementTree.SubElement(element, MATHML + "mover", accent="true")
    accented.extend([letter, accent])
    element.append(index)


def link_to_front_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """The front page holds the README: what links to the one on GitHub links to the other here."""
    source[0] = source[0].replace("](../README.md", "](index.md")


def setup(app: Sphinx) -> None:
    """MathML is in every browser of today; docutils makes it while the pages are built."""
    app.connect("source-read", link_to_front_page)
    app.add_html_math_renderer("mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None))
