"""Steps in C++: what they compute, what they take, and which bodies stay in Python."""

import _thread
import ctypes
import itertools
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import rampde_fx
from rampde_fx.emit import native_code
from rampde_fx.torch_private import cpp_compiler, kernels, native_library

KERNEL = """
cpp_{name} = async_compile.cpp_pybinding([{types}], r'''
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void  kernel({parameters})
{{
    for (int64_t i = 0; i < {count}; i += 1) {{ {body} }}
}}
''')
"""
SCALE = KERNEL.format(
    name="scale",
    types="'const float*', 'float*'",
    parameters="const float* x, float* y",
    count=6,
    body="y[i] = 2 * x[i];",
)
ADD = KERNEL.format(
    name="add",
    types="'const float*', 'const float*', 'float*', 'const int64_t'",
    parameters="const float* x, const float* y, float* z, const int64_t n",
    count=4,
    body="z[i] = x[i] + y[i] + n;",
)
BODY = """
def while_loop_body_graph_0_0(args):
    arg0_1, arg1_1, arg2_1, = args
    args.clear()
    assert_size_stride(arg0_1, (), (), 'input')
    u0 = arg0_1.item()
    buf0 = None
    if not (u0 >= 0):
        raise RuntimeError('u0 >= 0')
    assert_size_stride(arg1_1, (2, 3), (3, 1), 'input')
    assert_size_stride(arg2_1, (2, 3), (3, 1), 'input')
    buf1 = empty_strided_cpu((2, 3), (3, 1), torch.float32)
    cpp_scale(arg1_1, buf1)
    buf2 = empty_strided_cpu((2, 2), (2, 1), torch.float32)
    extern_kernels.mm(buf1, reinterpret_tensor(arg2_1, (3, 2), (1, 3), 0), out=buf2)
    buf3 = reinterpret_tensor(buf1, (2, 2), (2, 1), 0); del buf1  # reuse
    extern_kernels.mm(buf2, buf2, out=buf3)
    buf4 = empty_strided_cpu((2, 2), (2, 1), torch.float32)
    cpp_add(buf2, buf3, buf4, u0)
    del buf2
    del buf3
    return (buf4, reinterpret_tensor(arg1_1, (3, ), (1, ), 3), arg2_1, )
"""
MODULE = SCALE + ADD + BODY
# More intermediates, one behind the other.
LATER = MODULE.replace("mm(buf2, buf2, out=buf3)", "mm(buf2, buf3, out=buf5)").replace(
    "    cpp_add(buf2, buf3, buf4, u0)",
    "    cpp_add(buf5, buf5, buf4, u0)",
)
LATER = LATER.replace(
    "    extern_kernels.mm(buf2, buf3",
    "    cpp_scale(buf2, buf3)\n    buf6 = empty_strided_cpu((2, 2), (2, 1), torch.float32)\n"
    "    cpp_scale(buf3, buf6)\n    buf5 = empty_strided_cpu((2, 2), (2, 1), torch.float32)\n"
    "    extern_kernels.mm(buf6, buf6",
)


def native(code):
    """The text of a module that is written anew, or the same."""
    written = native_code.native(code)
    return code if written is None else written.text


def module_of(code):
    """The names that Inductor's own module has, and those of the code."""
    header = """
import torch
from torch._C._dynamo.guards import assert_size_stride, _empty_strided_cpu as empty_strided_cpu
from torch._C._dynamo.guards import _reinterpret_tensor as reinterpret_tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.select_algorithm import extern_kernels
async_compile = AsyncCompile()
"""
    names = {}
    exec(header + code + "\nasync_compile.wait(globals())", names)
    return names


@pytest.mark.inductor
class TestRun:
    def test_the_step_does_what_it_did_in_python(self):
        written = native(MODULE)
        assert "while_loop_body_graph_0_0_native(arg1_1, arg2_1, buf4, scratch0, u0)" in written
        x, weight = torch.randn(2, 3), torch.randn(2, 3)
        results = [
            module_of(code)["while_loop_body_graph_0_0"]([torch.tensor(3), x, weight]) for code in (MODULE, written)
        ]
        square = 2 * x @ weight.T
        torch.testing.assert_close(results[1][0], square + square @ square + 3)
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        assert results[1][1].data_ptr() == x.data_ptr() + 3 * 4 and results[1][2] is weight

    @pytest.mark.parametrize("shape", ["(2, ), (1, )", "(2, 2), (0, 1)", "(1, 2), (5, 1)"])
    def test_a_product_and_a_sum(self, shape):
        added = f"reinterpret_tensor(arg1_1, {shape}, 1)"
        out = "alpha=1, beta=1, out=buf2"
        code = MODULE.replace("mm(buf1,", f"addmm({added}, buf1,").replace("out=buf2", out)
        x, weight = torch.randn(2, 3), torch.randn(2, 3)
        assert "_native" in native(code)
        got, *_ = module_of(native(code))["while_loop_body_graph_0_0"]([torch.tensor(3), x, weight])
        square = x[0, 1:] + 2 * x @ weight.T
        torch.testing.assert_close(got, square + square @ square + 3)

    def test_what_python_refuses_is_refused(self):
        step = module_of(native(MODULE))["while_loop_body_graph_0_0"]
        with pytest.raises(RuntimeError, match="u0 >= 0"):
            step([torch.tensor(-1), torch.ones(2, 3), torch.ones(2, 3)])
        with pytest.raises(AssertionError, match="expected size"):
            step([torch.tensor(1), torch.ones(3, 2), torch.ones(2, 3)])

    def test_a_kernel_that_raises(self):
        code = MODULE.replace("y[i] = 2 * x[i];", 'throw std::runtime_error("of the kernel");')
        with pytest.raises(RuntimeError, match="of the kernel"):
            module_of(native(code))["while_loop_body_graph_0_0"]([torch.tensor(1), torch.ones(2, 3), torch.ones(2, 3)])

    def test_a_kernel_that_raises_what_is_no_exception(self):
        code = MODULE.replace("y[i] = 2 * x[i];", "throw 5;")
        with pytest.raises(RuntimeError, match="unknown error"):
            module_of(native(code))["while_loop_body_graph_0_0"]([torch.tensor(1), torch.ones(2, 3), torch.ones(2, 3)])

    @pytest.mark.parametrize("lead", [2**31, 2**32 + 3])
    def test_sizes_that_blas_cannot_read(self, lead):
        """The rows of a factor lie further apart than an integer of 32 bits says."""
        source = """static void multiply(char* a, char* b, char* c, int64_t lead) {
    product<float>(false, false, 2, 2, 2, reinterpret_cast<const float*>(a), lead,
                   reinterpret_cast<const float*>(b), 2, reinterpret_cast<float*>(c), 2, nullptr, 0, 0);
}"""
        [multiply] = native_library.load_library(["multiply"], source)
        a = torch.empty(lead + 2)  # pages that nothing touches take no memory
        a[:2], a[lead:] = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
        b, out = torch.tensor([[5.0, 6.0], [7.0, 8.0]]), torch.full((2, 2), torch.nan)
        multiply(a, b, out, lead)
        assert torch.equal(out, torch.tensor([[19.0, 22.0], [43.0, 50.0]]))

    def test_a_library_that_is_loaded_where_blas_is_not(self, monkeypatch):
        """Of a cache that another build of torch filled: the sums are written out."""
        text = native(MODULE)
        monkeypatch.setattr(native_library, "_gemms", lambda: None)
        x, weight = torch.randn(2, 3), torch.randn(2, 3)
        got, *_ = module_of(text)["while_loop_body_graph_0_0"]([torch.tensor(3), x, weight])
        square = 2 * x @ weight.T
        torch.testing.assert_close(got, square + square @ square + 3)

    @pytest.mark.skipif(not native_library._mkl_threads(), reason="BLAS is not MKL")
    def test_small_products_are_of_one_thread_and_the_rest_of_all(self, monkeypatch):
        """Which is so while they run, and for no other product."""
        source = """static void multiply(char* a, char* b, char* c, int64_t n) {
    product<float>(false, false, n, n, n, reinterpret_cast<const float*>(a), n, reinterpret_cast<const float*>(b), n,
                   reinterpret_cast<float*>(c), n, nullptr, 0, 0);
}"""
        counts = []
        asks = cpp_compiler.torch_library().MKL_Get_Max_Threads
        gemm = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 13)(lambda *_: counts.append(asks()))
        address = ctypes.cast(gemm, ctypes.c_void_p).value
        monkeypatch.setattr(native_library, "_gemms", lambda: (address, address))
        [multiply] = native_library.load_library(["multiply"], source)
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            for n in (2, 50, 51, 80):  # 51 ** 3 is the first above 2 ** 17
                multiply(*(torch.ones(n, n) for _ in range(3)), n)
            assert counts == [1, 1, 3, 3] and asks() == 3
        finally:
            torch.set_num_threads(threads)

    def test_kernels_run_one_at_a_time(self):
        """They share a flag of the process, by which an integer that is divided by zero is told."""
        body = (
            'static std::atomic<int> inside{0}; if (inside++) throw std::runtime_error("two kernels");'
            " for (volatile int j = 0; j < 20000; j = j + 1) {} y[i] = x[i]; --inside;"
        )
        step = module_of(native(MODULE.replace("y[i] = 2 * x[i];", body)))["while_loop_body_graph_0_0"]
        failures = []

        def run():
            try:
                for _ in range(200):
                    step([torch.tensor(1), torch.ones(2, 3), torch.ones(2, 3)])
            except RuntimeError as error:
                failures.append(error)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

    @pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="vectors of another size")
    def test_numbers_are_rounded_to_bfloat16_as_torch_rounds_them(self):
        """Beside and between all that bfloat16 has: subnormal numbers, infinities and NaN too."""
        source = """#include <torch/csrc/inductor/cpp_prefix.h>
static void to_low(char* x, char* y, int64_t n) {
    for (int64_t i = 0; i < n; i += 32) {
        auto wide = at::vec::VectorizedN<float,2>::loadu(reinterpret_cast<const float*>(x) + i, 32);
        auto low = at::vec::convert<at::BFloat16,1,float,2>(wide);
        low.store(reinterpret_cast<at::BFloat16*>(y) + i, 32);
    }
}"""
        [to_low] = native_library.load_library(["to_low"], source)
        high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
        rest = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
        x = (high[:, None] + rest).flatten().view(torch.float32)
        for given in (x, x[torch.randperm(len(x))]):
            low = torch.empty(len(given), dtype=torch.bfloat16)
            to_low(given, low, len(given))
            wanted = given.bfloat16()
            same = low.view(torch.int16) == wanted.view(torch.int16)
            assert (same | (low.isnan() & wanted.isnan())).all()

    def test_functions_of_a_library_check_what_they_get(self):
        [step] = native_library.load_library(["step"], "static void step(char* x, int64_t n) {}")
        step(torch.ones(1), 1)
        with pytest.raises(RuntimeError, match="number of arguments"):
            step(torch.ones(1))
        with pytest.raises(TypeError):
            step(torch.ones(1), "one")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_products_of_every_layout_and_size(self, dtype):
        number = {torch.float32: "float", torch.float64: "double"}[dtype]
        source = f"""static void multiply(
    char* a, char* b, char* c, int64_t by_columns_a, int64_t by_columns_b, int64_t m, int64_t n, int64_t k,
    int64_t lead_a, int64_t lead_b, int64_t lead_c, char* d, int64_t adds, int64_t row
) {{
    product<{number}>(by_columns_a, by_columns_b, m, n, k, reinterpret_cast<const {number}*>(a), lead_a,
                      reinterpret_cast<const {number}*>(b), lead_b, reinterpret_cast<{number}*>(c), lead_c,
                      adds ? reinterpret_cast<const {number}*>(d) : nullptr, row, 1);
}}"""
        [multiply] = native_library.load_library(["multiply"], source)
        sizes = [0, 1, 2, 7, 33]
        cases = itertools.product(sizes, sizes, sizes, (0, 1), (0, 1), (None, 0, 1))
        for m, n, k, a_by_columns, b_by_columns, added_rows in cases:
            wide = [torch.randn(*shape, dtype=dtype) for shape in ((m, k + 2), (k, n + 1))]
            a, b = wide[0][:, :k], wide[1][:, :n]
            given = [value.T.contiguous() if flag else value for value, flag in ((a, a_by_columns), (b, b_by_columns))]
            added = torch.randn(m if added_rows else 1, n, dtype=dtype)
            out = torch.full((m, n + 3), torch.nan, dtype=dtype)
            multiply(
                *(given[0], given[1], out, a_by_columns, b_by_columns, m, n, k),
                *(given[0].stride(0) or 1, given[1].stride(0) or 1, n + 3),
                *(added, added_rows is not None, n if added_rows else 0),
            )
            expected = a @ b if added_rows is None else a @ b + (added if added_rows else added[:1])
            torch.testing.assert_close(out[:, :n], expected)
            assert out[:, n:].isnan().all()


class TestText:
    def test_memory_is_used_again_and_results_have_their_own(self):
        written = native(MODULE)
        assert "scratch0 = empty_strided_cpu((128,), (1,), torch.uint8)" in written  # buf1, which buf3 is, and buf2
        assert "buf4 = empty_strided_cpu((2, 2), (2, 1), torch.float32)" in written
        assert "scratch0 = empty_strided_cpu((128,), (1,), torch.uint8)" in native(LATER)  # four, of which two live

    def test_kernels_that_only_steps_call_are_not_called_from_python(self):
        assert "load_library(['while_loop_body_graph_0_0_native']" in native(MODULE)
        assert "load_library(['cpp_add', 'while" in native(MODULE + "\ndef call(args):\n    cpp_add(*args)\n")

    def test_sizes_that_are_symbols_are_computed_in_python(self):
        code = MODULE.replace("arg2_1, = args", "arg2_1, arg3_1, = args").replace("clear()", "clear()\n    s0 = arg3_1")
        code = code.replace("(2, 2), (2, 1)", "(s0, 2), (2, 1)").replace("(2, 3), (3, 1)", "(s0, 3), (3, 1)")
        written = native(code)
        assert "scratch0 = empty_strided_cpu((20 * (((s0) + 63)//64*64),), (1,), torch.uint8)" in written  # buf1, buf2
        assert "buf4 = empty_strided_cpu((s0, 2), (2, 1), torch.float32)" in written
        assert "_native(arg1_1, arg2_1, buf4, scratch0, s0, u0, ((s0) + 63)//64*64)" in written

    @pytest.mark.inductor
    def test_memory_whose_size_is_a_symbol_is_used_again(self):
        code = LATER.replace("arg2_1, = args", "arg2_1, arg3_1, = args").replace("clear()", "clear()\n    s0 = arg3_1")
        code = code.replace("empty_strided_cpu((2, 2), (2, 1)", "empty_strided_cpu((s0, 2), (2, 1)")
        written = native(code)
        # buf2 and buf6, then buf6 and buf5
        assert "scratch1 = empty_strided_cpu((16 * (((s0) + 63)//64*64),)" in written
        given = [torch.tensor(3), torch.randn(2, 3), torch.randn(2, 3), 2]
        results = [module_of(text)["while_loop_body_graph_0_0"]([*given]) for text in (code, written)]
        torch.testing.assert_close(results[1], results[0])

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("extern_kernels.mm(buf2, buf2, out=buf3)", "extern_kernels.bmm(buf2, buf2, out=buf3)"),
            ("extern_kernels.mm(buf2, buf2, out=buf3)", "buf3 = torch.ops.aten.sort.default(buf2)"),
            ("(3, 2), (1, 3), 0)", "(3, 2), (0, 1), 0)"),  # an expanded factor
            ("(3, 2), (1, 3), 0)", "(3, 2), (6, 2), 0)"),
            ("(2, 2), (2, 1), torch.float32", "(2, 2), (2, 1), torch.float16"),
            (
                "buf2 = empty_strided_cpu((2, 2), (2, 1), torch.float32",
                "buf2 = empty_strided_cpu((2, 2), (2, 1), torch.float64",
            ),
            ("(2, 2), (2, 1), torch.float32", "(2, 2), (1, 2), torch.float32"),
            ("mm(buf2, buf2, ", "addmm(arg0_1, buf2, buf2, alpha=1, beta=1, "),
            ("mm(buf2, buf2, ", "addmm(arg1_1, buf2, buf2, alpha=1, beta=1, "),
            ("mm(buf2, buf2, ", "addmm(buf2, buf2, buf2, alpha=2, beta=1, "),
            ("buf0 = None", "u1 = buf2.item()"),
            ("del buf2\n", "u1 = arg0_1.item()\n"),
            ("if not (u0 >= 0)", "if not (buf4 >= 0)"),
            ("buf4 = empty", "buf2 = empty"),
            ("cpp_add(buf2, buf3, buf4, u0)", "cpp_add(buf2, buf3, buf4, u7)"),
            ("cpp_add(buf2, buf3, buf4, u0)", "cpp_add(buf2, buf3, buf4)"),
            ("cpp_add(buf2, buf3, buf4, u0)", "cpp_other(buf2, buf3, buf4, u0)"),
            ("cpp_add(buf2, buf3, buf4, u0)", "cpp_add(buf2, buf9, buf4, u0)"),
            ("    return (buf4", "    while u0:\n        pass\n    return (buf4"),
            ("    return (buf4", "    return [buf4"),
            ("mm(buf1, reinterpret_tensor(arg2_1, (3, 2), (1, 3), 0)", "mm(buf1, arg2_1"),
        ],
    )
    def test_a_body_with_anything_else_stays_in_python(self, old, new):
        assert old in MODULE
        code = MODULE.replace(old, new).replace(
            "arg2_1, )\n", "arg2_1, ]\n" if new.endswith("[buf4") else "arg2_1, )\n"
        )
        if "arg2_1" in new:
            code = code.replace("    assert_size_stride(arg2_1, (2, 3), (3, 1), 'input')\n", "")
        written = native(code)
        assert "_native" not in written and code.split("def ")[1].strip() in written
        assert "load_library(['cpp_scale'" in written

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('extern "C"', 'static int counter;\nextern "C"'),
            ('extern "C"', 'static int twice(int x)\n{\n    return 2 * x;\n}\nextern "C"'),
            ("'const float*', 'float*'", "'const float*', 'PyObject'"),
        ],
    )
    def test_a_kernel_that_is_more_than_one_function_stays_by_itself(self, old, new):
        written = native(MODULE.replace(SCALE, SCALE.replace(old, new)))
        assert "cpp_scale = async_compile" in written and "_native" not in written

    def test_a_module_without_kernels_is_left_alone(self):
        assert native(BODY) == BODY

    @pytest.mark.parametrize("precision", ["medium", "high", "highest"])
    def test_less_precise_products_are_not_taken_from_blas(self, precision):
        """Where a user asks torch for products in bfloat16 on the CPU, torch calls them."""
        before, usual = torch.get_float32_matmul_precision(), native_code.NativeOrKept().uuid()
        try:
            torch.set_float32_matmul_precision(precision)
            assert ("_native" in native(MODULE)) == (precision != "medium")
            assert (native_code.NativeOrKept().uuid() == usual) == (precision != "medium")  # of Inductor's caches
        finally:
            torch.set_float32_matmul_precision(before)

    def test_settings_that_torch_does_not_mix(self):
        """Of these torch's older question for the precision of products is an error."""
        code = "import torch; torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        code += "from rampde_fx.torch_private import native_library; assert native_library.multiplies()"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_lines_that_are_counted_otherwise(self):
        assert native_code.native(MODULE + "# \r\n") is None

    def test_whatever_fails_leaves_the_module_as_it_is(self, monkeypatch, caplog):
        broken = MODULE.replace("y[i] = 2 * x[i];", "no C++")
        assert native_code.NativeOrKept()(broken) == broken
        quoted = LESS + NEXT + LOOP.replace("raise RuntimeError('2*u0 < 2*s1 - 1')", "raise RuntimeError(\"'''\")")
        assert native_code.NativeOrKept()(quoted) == quoted  # no module of Python any more
        monkeypatch.setattr(native_code, "read_kernels", lambda module: 1 / 0)
        assert native_code.NativeOrKept()(MODULE) == MODULE
        assert [record.levelname for record in caplog.records if "is kept" in record.message] == ["WARNING"] * 3

    def test_no_blas_no_products(self, monkeypatch):
        monkeypatch.setattr(native_library, "multiplies", lambda: False)
        assert "_native" not in native(MODULE)


LOOP = """
def while_loop_cond_graph_0_0(args):
    other0_1, other1_1, other2_1, other3_1, = args
    args.clear()
    s1 = other3_1
    assert_size_stride(other0_1, (), (), 'input')
    buf0 = empty_strided_cpu((), (), torch.bool)
    cpp_less(other0_1, buf0, s1)
    del other0_1
    return (buf0, )

def while_loop_body_graph_0_0(args):
    arg0_1, arg1_1, arg2_1, arg3_1, = args
    args.clear()
    s1 = arg3_1
    assert_size_stride(arg0_1, (), (), 'input')
    u0 = arg0_1.item()
    if not (2*u0 < 2*s1 - 1):
        raise RuntimeError('2*u0 < 2*s1 - 1')
    assert_size_stride(arg1_1, (2, 2), (2, 1), 'input')
    assert_size_stride(arg2_1, (8, ), (1, ), 'input')
    buf1 = empty_strided_cpu((2, 2), (2, 1), torch.float32)
    extern_kernels.mm(arg1_1, arg1_1, out=buf1)
    buf10 = empty_strided_cpu((), (), torch.int64)
    cpp_next(arg0_1, buf1, buf10, arg2_1, u0, 2*s1)
    return (buf10, reinterpret_tensor(buf1, (2, 2), (2, 1), 0), arg2_1, )

def call(args):
    i, y, stack, primals_4, = args
    buf6 = [None] * 3
    buf6[0] = i
    buf6[1] = y
    buf6[2] = stack
    while_loop_cond_graph_0_0_args = [buf6[0], buf6[1], buf6[2], primals_4]
    (buf6_cond_result,) = while_loop_cond_graph_0_0(while_loop_cond_graph_0_0_args)
    should_loop = buf6_cond_result
    if not should_loop:
        buf6[0] = i.clone()
    while should_loop:

        # subgraph: while_loop_body_graph_0_0
        while_loop_body_graph_0_0_args = [buf6[0], buf6[1], buf6[2], primals_4]
        (buf6[0], buf6[1], buf6[2]) = while_loop_body_graph_0_0(while_loop_body_graph_0_0_args)

        # subgraph: while_loop_cond_graph_0_0
        while_loop_cond_graph_0_0_args = [buf6[0], buf6[1], buf6[2], primals_4]
        (buf6_cond_result,) = while_loop_cond_graph_0_0(while_loop_cond_graph_0_0_args)
        should_loop = buf6_cond_result
    return buf6
"""
LESS = KERNEL.format(
    name="less",
    types="'const int64_t*', 'bool*', 'const int64_t'",
    parameters="const int64_t* x, bool* y, const int64_t n",
    count=1,
    body="y[i] = x[i] < n;",
)
NEXT = KERNEL.format(
    name="next",
    types="'const int64_t*', 'float*', 'int64_t*', 'float*', 'const int64_t', 'const int64_t'",
    parameters="const int64_t* i0, float* y, int64_t* i1, float* stack, const int64_t u, const int64_t n",
    count=1,
    body="i1[0] = i0[0] + 1; y[0] += 0.5; stack[u] = y[3] + n;",
)


def slow_call(count):
    """A loop of any number of steps, each of which counts."""
    slow = NEXT.replace("y[0] += 0.5;", f"for (volatile int64_t j = 0; j < {count}; j = j + 1) {{}}")
    return module_of(native(LESS + slow.replace("stack[u]", "stack[0]") + LOOP))["call"]


class TestLoops:
    @pytest.mark.inductor
    @pytest.mark.parametrize("steps", [0, 1, 2, 5])
    def test_a_loop_does_what_it_did_in_python(self, steps):
        code = LESS + NEXT + LOOP
        assert "while_loop_body_graph_0_0_loop_native(arg0_1, arg1_1, " not in code
        results = []
        for text in (code, native(code)):
            y = torch.tensor([[0.5, 0.25], [0.75, 0.1]])
            given = [torch.tensor(0), y, torch.zeros(8), steps]
            results.append(module_of(text)["call"](given))
            assert given[1:3] == [] or torch.equal(y, torch.tensor([[0.5, 0.25], [0.75, 0.1]]))
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)
        assert results[1][0] == steps

    @pytest.mark.inductor
    def test_what_a_step_checks_is_checked_in_every_step(self):
        code = native(LESS + NEXT + LOOP.replace("2*u0 < 2*s1 - 1", "u0 < 3"))
        with pytest.raises(RuntimeError, match="u0 < 3"):
            module_of(code)["call"]([torch.tensor(0), torch.ones(2, 2), torch.zeros(8), 5])

    @pytest.mark.inductor
    def test_a_user_interrupts(self):
        call = slow_call(1_000_000)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
        try:
            threading.Timer(0.5, _thread.interrupt_main).start()
            with pytest.raises(KeyboardInterrupt):
                call([torch.tensor(0), torch.ones(2, 2), torch.zeros(8), 10**9])
        finally:
            signal.signal(signal.SIGINT, before)

    @pytest.mark.inductor
    def test_memory_that_a_parameter_gives_up_in_mid_loop_is_held(self):
        """Where other threads, or handlers of signals, run Python."""
        call = slow_call(200_000)
        y, seen = torch.ones(2, 2) / 2, []
        memory = kernels.StorageWeakRef(y.untyped_storage())

        def give_up():
            y.data = y.data.clone()
            seen.append(memory.expired())

        threading.Timer(0.2, give_up).start()
        call([torch.tensor(0), y, torch.zeros(8), 20000])
        assert seen == [False] and memory.expired()

    @pytest.mark.inductor
    def test_memory_that_is_moved_in_mid_loop_is_an_error(self):
        call = slow_call(200_000)
        y = torch.ones(2, 2) / 2
        threading.Timer(0.2, y.share_memory_).start()
        with pytest.raises(RuntimeError, match="moved while a compiled loop ran"):
            call([torch.tensor(0), y, torch.zeros(8), 20000])

    @pytest.mark.inductor
    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no handlers of signals")
    def test_a_handler_of_a_signal_calls_the_loop_that_runs(self):
        call = slow_call(200_000)
        y, inner = torch.ones(2, 2) / 2, []

        def called(*_):
            inner.append(call([torch.tensor(0), y, torch.zeros(8), 100])[0])
            y.data = y.data.clone()

        before = signal.signal(signal.SIGALRM, called)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        try:
            found = call([torch.tensor(0), y, torch.zeros(8), 10000])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert found[0] == 10000 and len(inner) >= 2 and set(map(int, inner)) == {100}

    @pytest.mark.inductor
    @pytest.mark.parametrize("size", [128, 512], ids=["between products", "while a product runs"])
    def test_other_threads_run(self, size):
        source = f"""static void many(char* a, char* b, char* c, int64_t count) {{
    for (int64_t i = 0; i < count; ++i)
        product<float>(false, false, {size}, {size}, {size}, reinterpret_cast<const float*>(a), {size},
                       reinterpret_cast<const float*>(b), {size}, reinterpret_cast<float*>(c), {size}, nullptr, 0, 0);
}}"""
        [many] = native_library.load_library(["many"], source)
        a, b, c = torch.randn(3, size, size)
        done = []
        threading.Timer(0.1, lambda: done.append(time.monotonic())).start()
        many(a, b, c, 20000 * 128**3 // size**3)
        assert done and done[0] < time.monotonic() - 0.1
        torch.testing.assert_close(c, a @ b, rtol=1e-3, atol=1e-3)

    @pytest.mark.inductor
    def test_an_integer_of_more_than_64_bits(self):
        call = module_of(native(LESS + NEXT + LOOP.replace("u0, 2*s1)", f"u0, {2**64})")))["call"]
        with pytest.raises(OverflowError):
            call([torch.tensor(0), torch.ones(2, 2), torch.zeros(8), 5])

    def test_while_a_profile_is_recorded_each_step_is_called_from_python(self):
        assert re.search(r"^    if should_loop and not .*profiled\(\):$", native(LESS + NEXT + LOOP), re.MULTILINE)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("(buf10, reinter", "(arg0_1, reinter"),  # the number would be that of the first step
            ("return (buf10, reinterpret_tensor(buf1, (2, 2), (2, 1), 0), arg2_1", "return (buf10, arg1_1, buf1"),
            (
                "reinterpret_tensor(buf1, (2, 2), (2, 1), 0), arg2_1",
                "reinterpret_tensor(buf1, (2, 2), (1, 2), 0), arg2_1",
            ),
            ("2*s1)", "s1//2 + u0//2)"),
            ("if not (2*u0 < 2*s1 - 1)", "if not (0 < 2*u0 < 2*s1 - 1)"),
            ("if not (2*u0 < 2*s1 - 1)", "if (2*u0 < 2*s1 - 1)"),
            ("if not (2*u0 < 2*s1 - 1)", "if not (0.5*u0 < 2*s1 - 1)"),
            ("cpp_less(other0_1, buf0, s1)", "cpp_less(other0_1, buf0, other3_1)"),
            ("raise RuntimeError", "raise AssertionError"),
            (  # the first step's number is not that of every step
                "    buf10 = ",
                "    buf7 = empty_strided_cpu((1 + u0, 2), (2, 1), torch.float32)\n"
                "    extern_kernels.mm(reinterpret_tensor(arg2_1, (1 + u0, 2), (2, 1), 0), arg1_1, out=buf7)\n"
                "    buf10 = ",
            ),
            ("buf10 = empty_strided_cpu((), (), torch.int64)", "buf10 = empty_strided_cpu((), (), torch.int32)"),
            (
                "    cpp_less(other0_1, buf0, s1)\n",
                "    cpp_less(other0_1, buf0, s1)\n    cpp_less(other0_1, buf0, s1)\n",
            ),
            ("    return (buf0, )", "    return (other0_1, )"),
            ("(buf6[0], buf6[1], buf6[2]) = while", "(buf6[0], buf6[2], buf6[1]) = while"),
            ("    assert_size_stride(arg1_1, (2, 2), (2, 1), 'input')\n", ""),
        ],
    )
    def test_any_other_loop_stays_in_python(self, old, new):
        code = LESS + NEXT + LOOP
        assert "_loop_native" in native(code) and old in code
        assert "_loop_native" not in native(code.replace(old, new))


class Flow(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)

    def forward(self, y, t):
        def velocity(t, y):
            return self.layers(torch.cat([y, t.expand(y.shape[0], 1)], 1))

        return rampde_fx.odeint(velocity, y, t, method="rk4")[-1].square().sum()


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "checkpoint", "dynamic"),
    [
        (torch.float32, "step", False),
        (torch.float64, "step", True),
        (torch.float32, "sqrt", True),
        (torch.bfloat16, "none", False),
    ],
)
def test_compiled_loops(dtype, checkpoint, dynamic):
    """Both bodies are in C++, and give what the compiler without any gives."""
    torch.manual_seed(0)
    wide = dtype if dtype == torch.float64 else torch.float32
    model, t = Flow(wide), torch.linspace(0, 1, 10, dtype=wide)
    policy = rampde_fx.PrecisionPolicy(velocity=dtype, loop="scan", checkpoint=checkpoint)
    found = []
    for compiler in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        function = torch.compile(
            rampde_fx.mixed_precision(model, policy=policy),
            backend="rampde_fx",
            options={"compiler": compiler},
            dynamic=dynamic,
        )
        for batch in (5, 16) if dynamic else (5,):
            y = torch.linspace(-1, 1, 3 * batch, dtype=wide).reshape(batch, 3).requires_grad_()
            model.zero_grad()

            def train(function=function, y=y):
                loss = function(y, t)
                loss.backward()
                return loss

            loss, codes = run_and_get_code(train)
            found.append([loss, y.grad, *(p.grad.clone() for p in model.parameters())])
            if compiler == "inductor" and batch == 5:
                counts = [len(re.findall(r"^static void \w+_loop_native\(", code, re.MULTILINE)) for code in codes]
                assert counts == [1, 2 if checkpoint == "sqrt" else 1]
    half = len(found) // 2
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for expected, got in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(got, expected, **close)
