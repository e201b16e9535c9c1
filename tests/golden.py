"""Printing graphs for golden tests: dtypes and shapes, without the user's source lines."""

import re

from torch import fx


def printed(graph_module: fx.GraphModule) -> str:
    """The module and its submodules as Python with true dtypes, one statement a line."""
    text = graph_module.print_readable(print_output=False)
    text = re.sub(r"\n\s*# [^\n]*", "", text)  # source lines
    text = re.sub(r";  [\w = ]*= None", "", text)  # where names end
    text = re.sub(r", layout = torch.strided, device = device\(type='cpu'\)", "", text)
    text = re.sub(r"torch\.ops\.", "", text)
    text = re.sub(r"'[^']*/(\w+\.py):\d+'", r"'\1'", text)  # where the loop stands
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    return "\n".join(lines) + "\n"


def without_captured_inputs(text: str) -> str:
    """A captured graph without its own inputs, whose order differs between versions of torch."""
    return "\n".join(line for line in text.split("\n") if "L_args_" not in line)
