"""A library of functions in C++, made by Inductor's compiler and called from Python; products of matrices by BLAS."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "torch._C._dynamo.guards": "_torchinductor_pyobject_tensor_data_ptr",
        "torch._inductor.codecache": "CppPythonBindingsCodeCache",
        "torch._inductor.config": ".",
    }
)

_HEADERS = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
"""
# BLAS reads integers of 32 or of 64 bits: where the low ones come first, a small one of 64 is either.
_PRODUCT = """
template <typename T>
using Gemm = void (*)(const char*, const char*, const int64_t*, const int64_t*, const int64_t*, const T*, const T*,
                      const int64_t*, const T*, const int64_t*, const T*, T*, const int64_t*);
static Gemm<float> sgemm;
static Gemm<double> dgemm;

// out = left @ right + added, row by row; either factor may be stored column by column. Nothing is added for nullptr.
template <typename T>
static void product(bool left_by_columns, bool right_by_columns, int64_t rows, int64_t columns, int64_t inner,
                    const T* left, int64_t left_lead, const T* right, int64_t right_lead, T* out, int64_t out_lead,
                    const T* added, int64_t added_row, int64_t added_column) {
    const T one = 1, kept = added ? 1 : 0;
    for (int64_t* lead : {&left_lead, &right_lead, &out_lead}) *lead = std::max<int64_t>(*lead, 1);
    const auto gemm = [] { if constexpr (std::is_same_v<T, float>) return sgemm; else return dgemm; }();
    if (added || !inner)  // MKL leaves the result as it is where nothing is summed
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j)
                out[i * out_lead + j] = added ? added[i * added_row + j * added_column] : T(0);
    if (rows && columns && inner)  // BLAS writes by columns: the transposed product
        gemm(right_by_columns ? "T" : "N", left_by_columns ? "T" : "N", &columns, &rows, &inner, &one,
             right, &right_lead, left, &left_lead, &kept, out, &out_lead);
}
"""
_SIGNALS = """
// Ten times a second: whether the user interrupts.
static void check_signals(std::chrono::steady_clock::time_point& last) {
    const auto now = std::chrono::steady_clock::now();
    if (now - last < std::chrono::milliseconds(100)) return;
    last = now;
    const PyGILState_STATE state = PyGILState_Ensure();
    const bool interrupted = PyErr_CheckSignals();
    PyGILState_Release(state);
    if (interrupted) throw std::runtime_error("interrupted");
}
"""
_BINDINGS = """
static void* (*data_of)(PyObject*);

template <typename T>
static T argument(PyObject* given) {
    if constexpr (std::is_pointer_v<T>) {
        return static_cast<T>(data_of(given));
    } else {
        T value;
        if constexpr (std::is_floating_point_v<T>) value = static_cast<T>(PyFloat_AsDouble(given));
        else value = static_cast<T>(PyLong_AsLongLong(given));
        if (PyErr_Occurred()) throw std::invalid_argument("expected a number");
        return value;
    }
}

template <typename... T, size_t... I>
static void call(void (*function)(T...), PyObject* const* args, bool releases, std::index_sequence<I...>) {
    std::tuple<T...> given{argument<T>(args[I])...};
    struct Release {
        PyThreadState* state;
        explicit Release(bool releases) : state(releases ? PyEval_SaveThread() : nullptr) {}
        ~Release() { if (state) PyEval_RestoreThread(state); }
    } release(releases);
    function(std::get<I>(given)...);
}

template <typename... T>
static PyObject* run(void (*function)(T...), PyObject* const* args, Py_ssize_t count, bool releases) {
    try {
        if (count != sizeof...(T)) throw std::invalid_argument("a wrong number of arguments");
        call(function, args, releases, std::index_sequence_for<T...>{});
        Py_RETURN_NONE;
    } catch (const std::exception& error) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

template <auto function, bool releases>
static PyObject* from_python(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return run(function, args, count, releases);
}

static PyObject* connect(PyObject*, PyObject* args) {
    unsigned long long data, single, twice;
    if (!PyArg_ParseTuple(args, "KKK", &data, &single, &twice)) return nullptr;
    data_of = reinterpret_cast<decltype(data_of)>(data);
    sgemm = reinterpret_cast<decltype(sgemm)>(single);
    dgemm = reinterpret_cast<decltype(dgemm)>(twice);
    Py_RETURN_NONE;
}

#define FROM_PYTHON(name, releases) \\
    {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&from_python<name, releases>)), METH_FASTCALL, ""}
static PyMethodDef functions[] = {
    {"connect", connect, METH_VARARGS, ""},
    FUNCTIONS
    {nullptr, nullptr, 0, nullptr}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "library", nullptr, -1, functions};
PyMODINIT_FUNC PyInit_library() { return PyModule_Create(&definition); }
"""


def load_library(kernels: Sequence[str], steps: Sequence[str], source: str) -> list[Callable[..., None]]:
    """Compile and load functions in C++.

    Args:
        kernels: Names of those that fill buffers.
        steps: Names of those that may take long, while other threads run Python.
        source: All of them, and what they call, but products and check_signals.

    Returns:
        Functions of tensors and numbers, in that order.
    """
    functions = [f"FROM_PYTHON({name}, false)," for name in kernels] + [f"FROM_PYTHON({name}, true)," for name in steps]
    includes, definitions = _apart(source)
    text = (
        includes
        + _HEADERS
        + _PRODUCT
        + _SIGNALS
        + definitions
        + _BINDINGS.replace("FUNCTIONS\n", "\n    ".join(functions) + "\n")
    )
    # A header that is compiled before takes longer to make than it saves: this runs once for a graph.
    with _torch.config.patch(cpp_cache_precompile_headers=False):
        library = _cache().load(text)
    library.connect(_torch._torchinductor_pyobject_tensor_data_ptr, *(_gemms() or (0, 0)))
    return [getattr(library, name) for name in (*kernels, *steps)]


def _apart(source: str) -> tuple[str, str]:
    """The lines of headers, which come first, and the rest."""
    lines = source.split("\n")
    count = next((i for i, line in enumerate(lines) if line and not line.startswith("#include")), len(lines))
    return "\n".join(lines[:count]), "\n".join(lines[count:])


@functools.cache
def _cache() -> Any:
    """Inductor's cache of libraries, one for each source; the functions that are looked for are those of ours."""
    return type("Library", (_torch.CppPythonBindingsCodeCache,), {"entry_function": "library"})


def multiplies() -> bool:
    """Whether products of float32 and float64 can be had from torch's BLAS, with the precision that is asked for."""
    asked = (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.fp32_precision)
    return _gemms() is not None and torch.get_float32_matmul_precision() != "medium" and not {*asked} & {"bf16", "tf32"}


@functools.cache
def _gemms() -> tuple[int, int] | None:
    """Where torch's BLAS has the products of float32 and of float64; None if it has none that can be found."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        single, double = (ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in ("sgemm_", "dgemm_"))
    except (OSError, AttributeError):
        return None
    return (single, double) if single and double and sys.byteorder == "little" else None
