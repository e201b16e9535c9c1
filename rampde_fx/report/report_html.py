"""A report as one page of HTML, without anything from outside: Report.to_html."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from html import escape
from itertools import pairwise

from rampde_fx.ir.loops import CompensatedLoop
from rampde_fx.report.loop_report import LoopReport, PassReport
from rampde_fx.report.step_picture import picture

# Of every lane, on a light and on a dark page.
COLOURS = {
    "time": ("#a85d00", "#f2b456"),
    "state": ("#0b5cad", "#7ab8ff"),
    "velocity": ("#00786a", "#5fd3bd"),
    "parameter": ("#7d3c98", "#d2a8e8"),
}
STYLE = """
body { margin: 0 auto; padding: 1.5rem; max-width: 1480px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; overflow-wrap: anywhere; }
h2 small { display: block; font: 0.85rem ui-monospace, monospace; color: var(--faint); }
table { border-collapse: collapse; margin: 0.75rem 0; } td, th { padding: 0.2rem 0.9rem 0.2rem 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid var(--line); } th { font-weight: 600; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { margin: 0; padding: 0.75rem; overflow: auto; background: var(--code); font: 11px/1.45 ui-monospace, monospace; }
.summary { font-size: 1.1rem; max-width: 60rem; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; align-items: flex-start; }
.tables > div, .picture, table { max-width: 100%; overflow-x: auto; }
svg text, .code > summary { font: 11px ui-monospace, monospace; fill: currentColor; }
svg text.lane { font: 600 12px system-ui, sans-serif; fill: var(--role); }
.node rect { stroke: var(--role); stroke-width: 1.2; fill: var(--page); }
.node.low rect { fill: color-mix(in srgb, var(--role) 38%, var(--page)); }
.node.cast rect { stroke-dasharray: 4 2.5; } .node.scale rect { stroke-width: 3; }
svg .kind { fill: var(--faint); } svg .low .kind { fill: currentColor; }
svg a:hover rect, svg a:focus rect { stroke-width: 3; }
.edge { fill: none; stroke: var(--role); stroke-width: 1.1; opacity: 0.45; }
.edge.near { stroke-width: 2.4; opacity: 1; }
.code { border-left: 4px solid var(--role); margin: 0.25rem 0; padding-left: 0.6rem; }
.code > summary { cursor: pointer; }
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1.5rem; padding: 0; list-style: none; }
.legend span { box-sizing: border-box; display: inline-block; width: 2rem; height: 0.9rem; margin-right: 0.5rem;
  vertical-align: -0.1rem;
  border: 1.5px solid var(--role); border-radius: 3px; }
.legend .cast { border-style: dashed; } .legend .scale { border-width: 3px; } .plain { --role: var(--faint); }
.legend .low { background: color-mix(in srgb, var(--role) 38%, var(--page)); }
.passes > details { border-top: 1px solid var(--line); padding: 0.25rem 0; }
.passes summary { cursor: pointer; font-family: ui-monospace, monospace; font-size: 13px; }
.passes summary span { color: var(--faint); }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 0.5rem; margin: 0.5rem 0; }
.pair h4 { margin: 0; font-weight: 600; } del, ins { text-decoration: none; display: block; }
del { background: color-mix(in srgb, var(--time) 22%, transparent); }
ins { background: color-mix(in srgb, var(--velocity) 22%, transparent); }
"""
# Over a box its edges stand out.
SCRIPT = """
for (const box of document.querySelectorAll("svg .node")) {
  const edges = box.closest(".picture").querySelectorAll(`[data-from="${box.id}"], [data-to="${box.id}"]`);
  for (const [event, near] of [["mouseenter", true], ["mouseleave", false]])
    box.addEventListener(event, () => edges.forEach(edge => edge.classList.toggle("near", near)));
}
"""
LEGEND = (
    ("time", "time: depends on no state"),
    ("state", "state: accumulated wide"),
    ("velocity", "velocity: evaluated low"),
    ("parameter", "parameters"),
    ("plain low", "filled: in 16 or 8 bits, or holds such values"),
    ("plain cast", "a cast"),
    ("plain scale", "scaling by a power of two"),
    ("plain", "▾ leads to its code below"),
)


def page(reports: Sequence[LoopReport], remarks: Sequence[str]) -> str:
    """The whole page: of loops, and what there is to say beside them."""
    loops = "".join(_loop(f"l{i}", loop) for i, loop in enumerate(reports))
    legend = "".join(f'<li><span class="{kind}"></span>{escape(text)}</li>' for kind, text in LEGEND)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>rampde_fx report</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_palette()}{STYLE}</style></head><body><h1>rampde_fx: what the rewrite did</h1>"
        f'<ul class="legend">{legend}</ul>{loops}{_paragraphs(remarks)}<script>{SCRIPT}</script></body></html>\n'
    )


def brief(reports: Sequence[LoopReport], remarks: Sequence[str]) -> str:
    """What a notebook shows: the tables of each loop, without pictures and passes."""
    return "".join(map(_brief, reports)) + _paragraphs(remarks)


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _brief(loop: LoopReport) -> str:
    notes = "".join(f"<p>note: {escape(note)}</p>" for note in loop.notes)
    return (
        f"<h4>Loop at {escape(loop.where or 'an unknown line')}</h4><p>{escape(loop.summary())}</p>"
        f"{_table((), loop.rows())}{notes}{_fallbacks(loop)}"
    )


def _palette() -> str:
    light, dark = (";".join(f"--{role}:{pair[i]}" for role, pair in COLOURS.items()) for i in range(2))
    lanes = "".join(f".{lane}{{--role:var(--{lane})}}" for lane in COLOURS)
    return (
        f":root{{color-scheme:light dark;{light};--page:#fff;--text:#1c2024;--faint:#5c6670;--line:#d9dee3;"
        "--code:#f4f6f8}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark};--page:#14171a;--text:#e4e8ec;--faint:#98a2ac;"
        f"--line:#343b42;--code:#1d2227}}}}{lanes}"
    )


def _loop(key: str, loop: LoopReport) -> str:
    place, _, line = loop.where.partition(": ")
    notes = "".join(f"<p>note: {escape(note)}</p>" for note in loop.notes)
    return (
        f"<section><h2>Loop at {escape(place or 'an unknown line')}<small>{escape(line)}</small></h2>"
        f'<p class="summary">{escape(loop.summary())}</p>'
        f"{_table((), loop.rows())}{notes}"
        f'<div class="tables"><div>{_costs(loop)}</div><div>{_fallbacks(loop)}</div></div>'
        f"{_pictures(key, loop)}"
        f'<h3>The passes</h3><div class="passes">{_passes(loop.passes)}</div></section>'
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str | int]]) -> str:
    """A table whose numbers stand to the right."""
    top = f"<tr>{''.join(f'<th>{escape(label)}</th>' for label in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table>{top}{body}</table>"


def _cell(entry: str | int) -> str:
    return f'<td class="number">{entry:,}</td>' if isinstance(entry, int) else f"<td>{escape(entry)}</td>"


def _costs(loop: LoopReport) -> str:
    """Memory and operations: of one step, and of all where their number is known."""
    times = loop.steps or 1
    memory = [
        ("bytes stored for the backward", loop.stored_bytes),
        ("the same in the dtype of the state", loop.stored_bytes_fp32),
        ("bytes that plain autograd stores", loop.stored_bytes_autograd),
    ]
    flops = [("FLOP of the products, step", loop.step_flops), ("FLOP of the products, adjoint", loop.adjoint_flops)]
    rows = [(label, count // times, count) for label, count in memory]
    rows += [(label, count, count * times) for label, count in flops]
    head, columns = ("cost", "per step", "all steps"), 3 if loop.steps else 2
    return "<h3>Memory and operations</h3>" + _table(head[:columns], [row[:columns] for row in rows])


def _fallbacks(loop: LoopReport) -> str:
    rows = [(fallback.count, fallback.operation, fallback.reason) for fallback in loop.fallbacks]
    return f"<h3>What stayed wide</h3>{_table(('calls', 'operation', 'reason'), rows)}"


def _pictures(key: str, loop: LoopReport) -> str:
    final = loop.passes[-1].loop
    assert isinstance(final, CompensatedLoop), "behind all passes"
    graphs_of = [("The step", "s", loop.step), ("The adjoint of the step", "a", loop.adjoint)]
    none = "<p>none: no gradient is wanted</p>"
    return "".join(
        f"<h3>{title}</h3>{picture(final, graph, key + letter, title) if graph is not None else none}"
        for title, letter, graph in graphs_of
    )


def _passes(passes: Sequence[PassReport]) -> str:
    first = passes[0]
    captured = f"<details><summary>{escape(first.name)}</summary><pre>{escape(first.code)}</pre></details>"
    return captured + "".join(_change(before, after) for before, after in pairwise(passes))


def _change(before: PassReport, after: PassReport) -> str:
    """One pass: the graphs before and after it, with the lines that differ marked."""
    if before.code == after.code:
        return f"<details><summary>{escape(after.name)} <span>changes no graph</span></summary></details>"
    old, new = _marked(before.code, after.code)
    return (
        f'<details><summary>{escape(after.name)}</summary><div class="pair"><h4>before</h4><h4>after</h4>'
        f"<pre>{old}</pre><pre>{new}</pre></div></details>"
    )


def _marked(before: str, after: str) -> tuple[str, str]:
    """Two texts, escaped, the lines of each that the other lacks in del and ins."""
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    lines: tuple[list[str], list[str]] = ([], [])
    for kind, a, b, c, d in SequenceMatcher(None, old, new).get_opcodes():
        for found, text, tag in ((lines[0], old[a:b], "del"), (lines[1], new[c:d], "ins")):
            block = escape("".join(text))
            found.append(block if kind == "equal" or not block else f"<{tag}>{block}</{tag}>")
    return "".join(lines[0]), "".join(lines[1])
