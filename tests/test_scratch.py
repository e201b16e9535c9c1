"""Where intermediate results of steps in C++ lie."""

import ast
import random

import pytest

from rampde_fx.emit.scratch import places, room
from rampde_fx.torch_private.wrapper_code import Allocate


@pytest.mark.parametrize(
    ("wanted", "expected", "total"),
    [
        ([], [], 0),
        ([(64, 0, 1), (64, 2, 3)], [0, 0], 64),
        ([(64, 0, 1), (64, 1, 3)], [0, 64], 128),  # the second is written where the first is read
        ([(64, 0, 1), (128, 2, 3)], [0, 0], 128),
        ([(64 * n, n, n + 1) for n in range(1, 9)], None, 64 * (8 + 7)),  # of eight that grow, two live
        ([(64, 0, 0), (64, 0, 9), (128, 1, 2)], None, 192),  # no gap is left between
    ],
)
def test_places(wanted, expected, total):
    begins, end = places(wanted)
    assert end == total and (expected is None or begins == expected)


def test_whatever_lives_together_lies_apart():
    draw = random.Random(0)
    for _ in range(200):
        firsts = [draw.randrange(20) for _ in range(draw.randrange(1, 25))]
        wanted = [(64 * draw.randrange(1, 30), first, first + draw.randrange(6)) for first in firsts]
        begins, end = places(wanted)
        spans = [(begin, begin + count) for begin, (count, _, _) in zip(begins, wanted, strict=True)]
        for i, (_, first, last) in enumerate(wanted):
            for j, (_, other_first, other_last) in enumerate(wanted[:i]):
                if first <= other_last and other_first <= last:
                    assert spans[i][1] <= spans[j][0] or spans[j][1] <= spans[i][0]
        needed = [sum(count for count, first, last in wanted if first <= at <= last) for at in range(26)]
        assert max(needed) <= end == max(end for _, end in spans)
        assert end <= 1.5 * max(needed)


@pytest.mark.parametrize(
    ("size", "stride", "dtype", "unit", "count"),
    [
        ("()", "()", "float32", "1", 64),
        ("(3, 5)", "(5, 1)", "float32", "1", 64),
        ("(3, 6)", "(6, 1)", "float64", "1", 192),
        ("(0, 5)", "(5, 1)", "float32", "1", 64),
        ("(4, 1)", "(0, 1)", "float32", "1", 64),
        ("(s0, 5)", "(5, 1)", "float32", "((s0) + 63)//64*64", 20),
        ("(4, s0, 5)", "(5, 20, 1)", "int64", "((s0) + 63)//64*64", 160),
        ("(2 * s0, )", "(1, )", "bool", "((2 * s0) + 63)//64*64", 1),
        ("(s0 & 248, 5)", "(5, 1)", "float32", "((s0 & 248) + 63)//64*64", 20),
        ("(s0 if s1 < s0 else 9, 5)", "(5, 1)", "float32", "((s0 if s1 < s0 else 9) + 63)//64*64", 20),
        ("(4, s0)", "(8, 1)", "float32", "((((4)*(8) + (s0)*(1))*4) + 63)//64*64", 1),
        ("(s0, s1)", "(s1, 1)", "float32", "((((s0)*(s1) + (s1)*(1))*4) + 63)//64*64", 1),
    ],
)
def test_what_a_tensor_takes(size, stride, dtype, unit, count):
    values = [tuple(ast.parse(text, mode="eval").body.elts) for text in (size, stride)]
    found = room(Allocate("buf0", *values, f"torch.{dtype}", ""))
    assert (found.unit, found.count) == (unit, count)
    for s0, s1 in ((1, 1), (3, 7), (64, 1), (0, 5), (255, 300)):
        names = {"s0": s0, "s1": s1}
        taken = eval(unit, names) * count
        sizes, strides = (eval(text, names) for text in (size, stride))
        entries = 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) if all(sizes) else 0
        assert taken % 64 == 0 and taken >= entries * {"float32": 4, "float64": 8, "int64": 8, "bool": 1}[dtype]
