"""python -m rampde_fx: the report on a model (explain MODULE:NAME), and what a bug report should say (env)."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from inspect import signature
from typing import Any, NoReturn

import torch
from torch import nn

import rampde_fx
from rampde_fx.errors import RampdeError
from rampde_fx.report.explain import explain
from rampde_fx.torch_private import capturing, kernels

EPILOG = """examples:
  python -m rampde_fx explain flow:model --shape 256,2 --times 32
  python -m rampde_fx explain flow:make_model --call --shape 256,2 --shape 256,1 --html flow.html"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 where the rewrite refuses the model. Arguments that mean nothing exit with 2."""
    asked = _parser().parse_args(arguments)
    if asked.command == "env":
        print(environment())
        return 0
    model = _load(asked.target, call=asked.call, refuse=asked.refuse)
    given = [torch.randn(shape) for shape in asked.shape]
    given += [torch.linspace(0, 1, asked.times + 1)] if asked.times else []
    _check_arguments(model, given, asked.refuse)
    try:
        with torch.set_grad_enabled(not asked.no_grad):
            report = explain(model, *given)
    except RampdeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        error.add_note(f"raised by {asked.target} on arguments of shapes {[tuple(value.shape) for value in given]}")
        raise
    if asked.html:
        report.to_html(asked.html)
    try:
        print(report, flush=True)
    except BrokenPipeError:  # whoever reads the output, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def environment() -> str:
    """What results depend on: versions, the processor's arithmetic, devices; one "name: value" a line."""
    has = {"float16": kernels.cpu_multiplies(torch.float16), "bfloat16": kernels.cpu_has_bfloat16()}
    products = [name for name, is_fast in has.items() if is_fast]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {
        "rampde_fx": rampde_fx.__version__,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "CPU products in": ", ".join(products) or "float32 alone",
        "threads": str(torch.get_num_threads()),
        "GPUs": ", ".join(devices) or "none",
    }
    return "\n".join(f"{name}: {value}" for name, value in found.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rampde_fx", description="Mixed-precision neural ODEs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    commands.add_parser("env", help="print what a bug report should say: versions, processor, devices")
    command = commands.add_parser(
        "explain",
        help="report what the rewrite does to a model",
        description="Rewrite a model's marked loops, without compiling them, and report. The model is run once.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("target", metavar="MODULE:NAME", help="a function or a Module, imported from the current directory or sys.path")
    add("--call", action="store_true", help="call NAME without arguments first: a Module class, or a factory")
    add("--shape", type=_shape, action="append", default=[], help="a random float32 argument, like 256,2 (repeatable)")
    add("--times", type=_count, metavar="N", help="a last argument: linspace(0, 1, N + 1), the times of N steps")
    add("--no-grad", action="store_true", help="report on the model under torch.no_grad")
    add("--html", metavar="FILE", help="write the report as a page with pictures of the graphs, too")
    command.set_defaults(refuse=command.error)
    return parser


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(",") if size.strip())
    except ValueError:
        sizes = (-1,)
    if any(size < 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: give sizes like 256,2")
    return sizes


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of steps: give one of at least 1")
    return int(text)


def _load(target: str, *, call: bool, refuse: Callable[[str], NoReturn]) -> Callable[..., Any]:
    """What the target names, called if that is asked for."""
    module, _, name = target.partition(":")
    if not module or not name:
        refuse(f"{target!r} is no MODULE:NAME")
    try:
        found = reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        refuse(f"{target!r} cannot be imported: {error}")
    if isinstance(found, type) and not call:
        refuse(f"{target!r} is a class: --call makes an instance of it")
    if call and callable(found):
        _check_arguments(found, (), refuse)
        found = found()
    if not callable(found):
        refuse(f"{target!r} holds a {type(found).__name__}, neither a function nor a Module")
    return capturing.uncompiled(found)


def _check_arguments(function: Callable[..., Any], given: Sequence[Any], refuse: Callable[[str], NoReturn]) -> None:
    wanted = signature(function.forward if isinstance(function, nn.Module) else function)
    try:
        wanted.bind(*given)
    except TypeError as error:
        refuse(f"{error}: what is called takes {wanted}, and is given {len(given)} arguments")


if __name__ == "__main__":
    sys.exit(main())
