"""Products of bfloat16 in C++: of integers, whose sums float32 has exactly, so that every bit of a result is known."""

import itertools
import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import rampde_fx
from rampde_fx.torch_private import kernels, low_products, native_library

pytestmark = [
    pytest.mark.inductor,
    pytest.mark.skipif(not low_products.multiplies(), reason="oneDNN has no kernels for bfloat16 here"),
]
SMALL = [*itertools.product([0, 1, 2, 17, 33], [0, 1, 2, 7, 34], [0, 1, 2, 7, 33])]
LARGE = [
    (1100, 9, 40),
    (40, 301, 1101),
    (130, 520, 2050),
    (65, 64, 64),
    (300, 257, 96),
]  # more than a block, and a tile


HEADER = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
# As a loop of two steps does; in between what it may not change is changed.
TWICE = """static void multiply_twice(
    char* left, char* right, char* out, int64_t left_by_columns, int64_t right_by_columns, int64_t rows,
    int64_t columns, int64_t inner, int64_t left_lead, int64_t right_lead, int64_t out_lead, char* added, int64_t adds,
    int64_t added_row, int64_t added_column
) {
    const KeepingFactors keeping;
    for (int step = 0; step < 2; ++step) {
        std::fill_n(reinterpret_cast<Low*>(out), rows * out_lead, Low(NAN));
        low_product(left_by_columns, right_by_columns, rows, columns, inner, reinterpret_cast<const Low*>(left),
                    left_lead, reinterpret_cast<const Low*>(right), right_lead, reinterpret_cast<Low*>(out), out_lead,
                    adds ? reinterpret_cast<const Low*>(added) : nullptr, added_row, added_column, true);
        std::fill_n(reinterpret_cast<Low*>(right), inner * columns, Low(7.f));
    }
}"""


@pytest.fixture(scope="module")
def multiply():
    [function] = native_library.load_library(["multiply_low"], HEADER + low_products.FROM_PYTHON)
    return function


@pytest.fixture(scope="module")
def multiply_twice():
    [function] = native_library.load_library(["multiply_twice"], HEADER + TWICE)
    return function


def integers(*shape):
    return torch.randint(-3, 4, shape).bfloat16()


def product(multiply, a, b, added=None):
    """By the library: of factors stored by rows or by columns, into a part of something."""
    flags = [int(value.stride(1) != 1) for value in (a, b)]
    leads = [max(value.stride(0), value.stride(1)) for value in (a, b)]
    (m, k), n = a.shape, b.shape[1]
    out = torch.full((m, n + 3), torch.nan, dtype=torch.bfloat16)
    term = torch.zeros(1, dtype=torch.bfloat16) if added is None else added
    strides = (0, 0) if added is None else added.stride()
    multiply(a, b, out, *flags, m, n, k, *leads, n + 3, term, int(added is not None), *strides)
    assert out[:, n:].isnan().all()
    return out[:, :n]


@pytest.mark.parametrize("by_columns", [*itertools.product([False, True], repeat=2)], ids=str)
@pytest.mark.parametrize("sizes", [SMALL, *([case] for case in LARGE)], ids=["small", *map(str, LARGE)])
def test_every_layout_and_size(multiply, sizes, by_columns):
    """Beside numbers that are none: what lies between rows and behind the last one is not read."""
    torch.manual_seed(0)
    for (m, n, k), kind in itertools.product(sizes, ("none", "row", "matrix", "column")):
        shapes, factors = ((m, k), (k, n)), []
        for shape, flag in zip(shapes, by_columns, strict=True):
            rows, columns = shape[::-1] if flag else shape
            around = torch.full((rows + 1, columns + 2 + columns % 2), torch.nan, dtype=torch.bfloat16)
            around[:rows, :columns] = integers(rows, columns)
            part = around[:rows, :columns]
            factors.append(part.T if flag else part)
        added = {
            "none": None,
            "row": integers(1, n).expand(m, n),
            "matrix": integers(m, n),
            "column": integers(m, 2 * n)[:, ::2],
        }[kind]
        exact = factors[0].double() @ factors[1].double() + (0 if added is None else added.double())
        assert torch.equal(product(multiply, *factors, added), exact.float().bfloat16()), (m, n, k, kind)


@pytest.mark.parametrize("by_columns", [*itertools.product([False, True], repeat=2)], ids=str)
def test_a_right_factor_that_stays_is_laid_out_once_in_a_loop(multiply, multiply_twice, by_columns):
    torch.manual_seed(0)
    sizes = [(m, n, k) for m, n, k in SMALL if m * n * k]
    for m, n, k in [*sizes, *LARGE, *sizes]:
        a, b = (
            integers(*(shape[::-1] if flag else shape))
            for shape, flag in zip(((m, k), (k, n)), by_columns, strict=True)
        )
        a, b = (value.T if flag else value for value, flag in zip((a, b), by_columns, strict=True))
        exact = (a.double() @ b.double()).float().bfloat16()
        assert torch.equal(product(multiply_twice, a, b), exact), (m, n, k)
        assert (b == 7).all()
        after = (a.double() @ b.double()).float().bfloat16()
        assert torch.equal(product(multiply, a, b), after)  # behind the loop nothing is kept
        assert torch.equal(product(multiply_twice, a, b), after)


def test_an_odd_distance_between_columns(multiply):
    b = integers(7, 33).T  # which is read by pairs otherwise
    a = integers(5, 33)
    assert torch.equal(product(multiply, a, b[:, :7]), (a.double() @ b.double()).float().bfloat16())


def test_what_is_no_number_stays_so(multiply):
    a, b = integers(20, 40), integers(40, 50)
    a[3, 5], b[7, 11] = torch.inf, torch.nan
    expected = (a.float() @ b.float()).bfloat16()
    torch.testing.assert_close(product(multiply, a, b), expected, rtol=0, atol=0, equal_nan=True)


def test_the_number_of_threads_changes_no_bit(multiply):
    torch.manual_seed(0)
    a, b = torch.randn(300, 700).bfloat16(), torch.randn(700, 300).bfloat16()
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(product(multiply, a, b))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])
    exact = a.double() @ b.double()
    error = (found[0].double() - exact).abs() / (a.double().abs() @ b.double().abs())
    assert error.max() <= 2**-8 + 700 * 2**-24  # one rounding, and sums in float32


def test_where_onednn_is_switched_off_sums_are_written_out(multiply):
    a, b, added = integers(20, 33), integers(33, 21), integers(20, 21)
    expected = (a.double() @ b.double() + added.double()).float().bfloat16()
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(product(multiply, a, b, added), expected)


def test_onednn_is_switched_off_while_products_run(multiply):
    """By another thread, which runs while a large one does: it is computed again, without."""
    a, b = integers(4000, 192), integers(192, 130)
    expected = (a.double() @ b.double()).float().bfloat16()
    done = threading.Event()

    def switch():
        while not done.is_set():
            with torch.backends.mkldnn.flags(enabled=False):
                time.sleep(0.0005)
            time.sleep(0.005)

    other = threading.Thread(target=switch)
    other.start()
    try:
        assert all(torch.equal(product(multiply, a, b), expected) for _ in range(200))
    finally:
        done.set()
        other.join()
    assert torch.backends.mkldnn.enabled


def test_where_onednn_is_switched_off_nothing_is_compiled_for_it():
    with torch.backends.mkldnn.flags(enabled=False):
        assert not low_products.multiplies()
    assert low_products.multiplies()


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_memory_of_what_is_laid_out_is_given_back_behind_the_loop(multiply_twice):
    weights = [torch.ones(2048, 2048).bfloat16() for _ in range(20)]  # each in a place of its own
    product(multiply_twice, integers(1, 2048), weights[0])
    before = resident()
    for weight in weights:
        product(multiply_twice, integers(1, 2048), weight)
    assert resident() - before < 32 * 2**20  # 8 MiB are laid out of each


def test_batches_of_many_sizes_take_little_memory(multiply):
    """torch keeps a kernel for each number of summands, which is that of a batch in the gradients of weights."""
    before = resident()
    for size in range(2, 1000, 2):
        product(multiply, integers(size, 272).T, integers(size, 272))
    assert resident() - before < 150 * 2**20  # 562 MiB, were there one for each size


def test_a_kernel_that_multiplies_otherwise_is_not_used(monkeypatch):
    """As of another version of oneDNN: the library is refused, and Inductor's own module stays."""
    places = low_products.places()
    release = places[1]  # takes other arguments, and writes no sums
    with monkeypatch.context() as patch:
        patch.setattr(low_products, "places", lambda: (release, *places[1:]))
        with pytest.raises(RuntimeError, match="products of bfloat16 are wrong"):
            native_library._low_kernels.__wrapped__()
    native_library._low_kernels.__wrapped__()  # the library is one for all


@pytest.mark.parametrize("name", low_products._LIMITS)
def test_a_limit_of_instructions_is_respected(monkeypatch, name):
    monkeypatch.setenv(name, "AVX2")
    assert low_products.places.__wrapped__() == (0, 0, 0, 0)


class Recorded:
    """Inductor's kernels, which tell that they were called."""

    def __init__(self):
        self.calls = 0

    def mm(self, left, right, *, out):
        self.calls += 1
        torch.mm(left, right, out=out)

    def addmm(self, added, left, right, *, alpha, beta, out):
        self.calls += 1
        torch.addmm(added, left, right, alpha=alpha, beta=beta, out=out)

    def bmm(self):
        return "another one"


class TestInPython:
    @pytest.mark.parametrize(
        ("change", "is_low"),
        [
            (lambda a, b, out: (a, b, out), True),
            (lambda a, b, out: (a.T.contiguous().T, b.T.contiguous().T, out), True),
            (lambda a, b, out: (a[:, :20], b[:20], out), True),
            (lambda a, b, out: (a[:1], b, out[:1]), True),
            (lambda a, b, out: (a[:0], b, out[:0]), True),
            (lambda a, b, out: (a[:, :1], b[:1], out), True),
            (lambda a, b, out: (a.float(), b.float(), out.float()), False),
            (lambda a, b, out: (a.half(), b.half(), out.half()), False),
            (lambda a, b, out: (a[:, ::2], b[::2], out), False),  # no factor that a kernel reads
            (lambda a, b, out: (a[:1].expand(40, 33), b, out), False),
            (lambda a, b, out: (a, b, out.T.contiguous().T), False),
        ],
    )
    def test_what_is_of_bfloat16_is_multiplied_by_the_library(self, multiply, change, is_low):
        torch.manual_seed(0)
        a, b, out = change(integers(40, 33), integers(33, 35), torch.empty(40, 35, dtype=torch.bfloat16))
        recorded = Recorded()
        found = low_products.WithLowProducts(recorded, multiply)
        exact = a.double() @ b.double()
        found.mm(a, b, out=out)
        assert torch.equal(out, exact.float().to(out.dtype)) and recorded.calls == (not is_low)
        for added in (integers(35), integers(1, 35), integers(*out.shape)):
            found.addmm(added.to(out.dtype), a, b, alpha=1, beta=1, out=out)
            assert torch.equal(out, (exact + added.double()).float().to(out.dtype))
        assert recorded.calls == 4 * (not is_low)
        found.addmm(integers(35).to(out.dtype), a, b, alpha=2, beta=1, out=out)
        assert recorded.calls == 1 + 4 * (not is_low) and found.bmm() == "another one"


class Field(torch.nn.Module):
    """A velocity that is narrow nowhere; sorted, if it is not to be written in C++."""

    def __init__(self, is_sorted):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(12, 40), torch.nn.Tanh(), torch.nn.Linear(40, 12))
        self.is_sorted = is_sorted

    def forward(self, y, t):
        for _, dt in rampde_fx.steps(t):
            v = self.layers(y)
            y = y + dt * (v.sort(1).values if self.is_sorted else v)
        return y


@pytest.mark.slow
@pytest.mark.parametrize("is_sorted", [False, True], ids=["in C++", "in Python"])
def test_a_compiled_loop(monkeypatch, is_sorted):
    """The products of both directions are of the library; what they give is what the compiler without it gives."""
    monkeypatch.setattr(kernels, "cpu_has_tiles", lambda: True)
    torch.manual_seed(0)
    model, t, y = Field(is_sorted), torch.linspace(0, 1, 9), torch.randn(24, 12)
    found = []
    for compiler in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        marked = rampde_fx.mixed_precision(model, dtype=torch.bfloat16)
        function = torch.compile(marked, backend="rampde_fx", options={"compiler": compiler}, fullgraph=True)
        model.zero_grad()

        def train(function=function):
            loss = function(y, t).square().mean()
            loss.backward()
            return loss

        loss, codes = run_and_get_code(train)
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.5)
        found[-1] += [train().detach(), *(p.grad.clone() for p in model.parameters())]
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.5)
    forward, backward = codes
    stays = r"low_product\((?:[^;]*), true\);"
    assert is_sorted or (re.search(stays, forward) and re.search(stays, backward))
    wanted = "extern_kernels = " if is_sorted else " low_product("
    assert wanted in forward and wanted in backward and "widened" not in forward
    assert ("_loop_native(" in forward) != is_sorted
    for got, expected in zip(*found[::-1], strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
