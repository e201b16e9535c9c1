"""A library of functions in C++, made by Inductor's compiler and called from Python; products by BLAS and oneDNN."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence

import torch

from rampde_fx.torch_private import cpp_compiler, low_kernels, low_products
from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "torch._C": "DisableTorchFunction",
        "torch._C._dynamo.guards": "_torchinductor_pyobject_tensor_data_ptr",
    }
)

_HEADERS = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <algorithm>
#include <chrono>
#include <cstdint>
#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
"""
_GIVEN = """
using Clock = std::chrono::steady_clock;
static void* (*data_of)(PyObject*);
static PyObject *idle, *storages_of, *place_of;

// What a call from Python was given.
struct Given {
    struct Tensor { PyObject* itself; void* data; size_t storage; };  // where it and its storage were

    PyObject* const* args;
    Py_ssize_t count;
    Given* outer;
    PyObject* held = nullptr;  // for each tensor its storage, and where that was
    std::vector<Tensor> tensors;
    Clock::time_point last = Clock::now();

    static Given*& current() { static thread_local Given* given = nullptr; return given; }
    Given(PyObject* const* args, Py_ssize_t count) : args(args), count(count), outer(current()) { current() = this; }
    ~Given() {
        current() = outer;
        if (PyGILState_Check()) Py_XDECREF(held);  // the interpreter ends a thread without the GIL: then it stays
    }

    // Other code in Python runs next, and may give a tensor another storage (parameter.data = ...): the old one stays.
    void hold() {
        if (held) return;
        for (Py_ssize_t i = 0; i < count; ++i)
            if (!PyLong_Check(args[i]) && !PyFloat_Check(args[i])) tensors.push_back({args[i], data_of(args[i]), 0});
        PyObject* const list = PyList_New(tensors.size());
        if (!list) throw std::runtime_error("the memory of tensors cannot be held");
        for (size_t i = 0; i < tensors.size(); ++i) PyList_SET_ITEM(list, i, Py_NewRef(tensors[i].itself));
        held = PyObject_CallOneArg(storages_of, list);
        Py_DECREF(list);
        if (!held) throw std::runtime_error("the memory of tensors cannot be held");
        for (size_t i = 0; i < tensors.size(); ++i)
            tensors[i].storage = PyLong_AsSize_t(PyTuple_GetItem(PyList_GetItem(held, i), 1));
    }

    // It may also have given a storage other memory (share_memory_, resize_): the old one is gone.
    void check() {
        for (size_t i = 0; i < tensors.size(); ++i)
            if (data_of(tensors[i].itself) != tensors[i].data && place(i) != tensors[i].storage)
                throw std::runtime_error("the memory of a tensor was moved while a compiled loop ran");
    }

    size_t place(size_t tensor) {
        PyObject* const found = PyObject_CallOneArg(place_of, PyTuple_GetItem(PyList_GetItem(held, tensor), 0));
        if (!found) throw std::runtime_error("the memory of a tensor cannot be found");
        const size_t place = PyLong_AsSize_t(found);
        Py_DECREF(found);
        return place;
    }
};

// A function in Python that does nothing: before it begins, threads that wait run, and handlers of signals. For code in
// Python they wait as long (sys.getswitchinterval).
static void let_python_run() {
    Given& given = *Given::current();
    if (Clock::now() - given.last < std::chrono::milliseconds(5)) return;
    given.hold();
    PyObject* const done = PyObject_CallNoArgs(idle);
    if (!done) throw std::runtime_error("interrupted");
    Py_DECREF(done);
    given.check();
    given.last = Clock::now();
}
"""
# BLAS reads integers of 32 or of 64 bits: where the low ones come first, a small one of 64 is either. Where there is no
# BLAS any more, or a size is no small one, the sums are written out.
_PRODUCT = """
template <typename T>
using Gemm = void (*)(const char*, const char*, const int64_t*, const int64_t*, const int64_t*, const T*, const T*,
                      const int64_t*, const T*, const int64_t*, const T*, T*, const int64_t*);
static Gemm<float> sgemm;
static Gemm<double> dgemm;
static int (*mkl_threads)(int);  // of this thread's products, 0 for all; gives how many they were
// What two threads share takes them longer up to here: 3.4 us instead of 2.1 for 128 x 16 x 16, 4.7 instead of 4.3 for
// 128 x 32 x 32, and 10 instead of 12 for 128 x 64 x 64.
static constexpr int64_t FEW = 1 << 17;

// Kernels hold the GIL, for they share a flag; while a product runs that takes long, other threads run Python.
template <typename Run>
static void beside_python(int64_t size, Run run) {
    if (size >= (1 << 26)) {
        struct Released {
            PyThreadState* const state = PyEval_SaveThread();
            ~Released() noexcept(false) { PyEval_RestoreThread(state); }
        };
        Given::current()->hold();
        { Released released; run(); }
        Given::current()->check();
    } else {
        run();
    }
    if (size >= (1 << 20)) let_python_run();
}

// out = left @ right + added, row by row; either factor may be stored column by column. Nothing is added for nullptr.
template <typename T>
static void product(bool left_by_columns, bool right_by_columns, int64_t rows, int64_t columns, int64_t inner,
                    const T* left, int64_t left_lead, const T* right, int64_t right_lead, T* out, int64_t out_lead,
                    const T* added, int64_t added_row, int64_t added_column) {
    const T one = 1, kept = added ? 1 : 0;
    for (int64_t* lead : {&left_lead, &right_lead, &out_lead}) *lead = std::max<int64_t>(*lead, 1);
    const auto gemm = [] { if constexpr (std::is_same_v<T, float>) return sgemm; else return dgemm; }();
    const bool fits = std::max({rows, columns, inner, left_lead, right_lead, out_lead}) <= INT32_MAX;
    if (added || !inner || !gemm || !fits)  // MKL leaves the result as it is where nothing is summed
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j)
                out[i * out_lead + j] = added ? added[i * added_row + j * added_column] : T(0);
    if (!gemm || !fits) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t k = 0; k < inner; ++k)
                for (int64_t j = 0; j < columns; ++j)
                    out[i * out_lead + j] += left[left_by_columns ? k * left_lead + i : i * left_lead + k] *
                                             right[right_by_columns ? j * right_lead + k : k * right_lead + j];
    } else if (rows && columns && inner) {
        const int64_t size = rows * columns * inner;
        beside_python(size, [&] {
            const int threads = size <= FEW && mkl_threads ? mkl_threads(1) : -1;
            // BLAS writes by columns: the transposed product
            gemm(right_by_columns ? "T" : "N", left_by_columns ? "T" : "N", &columns, &rows, &inner, &one,
                 right, &right_lead, left, &left_lead, &kept, out, &out_lead);
            if (threads >= 0) mkl_threads(threads);
        });
    }
}
"""
# torch rounds by integers, in twenty instructions. The processor's takes subnormal numbers for zeros: torch has those.
_TORCH_ROUNDS = "at::vec::convert<at::BFloat16,1,float,2>("
_ROUNDED = """
static inline at::vec::Vectorized<at::BFloat16> to_bfloat16(const at::vec::VectorizedN<float, 2>& x) {
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
    const __m512 first = x[0], second = x[1];
    constexpr int subnormal = 0x20;
    if (!(_mm512_fpclass_ps_mask(first, subnormal) | _mm512_fpclass_ps_mask(second, subnormal)))
        return at::vec::Vectorized<at::BFloat16>((__m512i)_mm512_cvtne2ps_pbh(second, first));
#endif
    return at::vec::convert<at::BFloat16, 1, float, 2>(x);
}
"""
_BINDINGS = """
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
static void call(void (*function)(T...), PyObject* const* args, std::index_sequence<I...>) {
    function(argument<T>(args[I])...);
}

template <typename... T>
static PyObject* run(void (*function)(T...), PyObject* const* args, Py_ssize_t count) {
    Given given(args, count);
    try {
        if (count != sizeof...(T)) throw std::invalid_argument("a wrong number of arguments");
        call(function, args, std::index_sequence_for<T...>{});
        Py_RETURN_NONE;
#ifdef __GLIBCXX__
    } catch (abi::__forced_unwind&) {  // the interpreter ends this thread
        throw;
#endif
    } catch (const std::exception& error) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    } catch (...) {
        PyErr_SetString(PyExc_RuntimeError, "unknown error");
    }
    return nullptr;
}

template <auto function>
static PyObject* from_python(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return run(function, args, count);
}

static PyObject* connect(PyObject*, PyObject* args) {
    unsigned long long data, single, twice, threads, low;
    if (!PyArg_ParseTuple(args, "KKKKKOOO", &data, &single, &twice, &threads, &low, &idle, &storages_of, &place_of))
        return nullptr;
    for (PyObject* function : {idle, storages_of, place_of}) Py_INCREF(function);
    data_of = reinterpret_cast<decltype(data_of)>(data);
    sgemm = reinterpret_cast<decltype(sgemm)>(single);
    dgemm = reinterpret_cast<decltype(dgemm)>(twice);
    mkl_threads = reinterpret_cast<decltype(mkl_threads)>(threads);
    CONNECTED
    Py_RETURN_NONE;
}

#define FROM_PYTHON(name) \\
    {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&from_python<name>)), METH_FASTCALL, ""}
static PyMethodDef functions[] = {
    {"connect", connect, METH_VARARGS, ""},
    FUNCTIONS
    {nullptr, nullptr, 0, nullptr}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "library", nullptr, -1, functions};
PyMODINIT_FUNC PyInit_library() { return PyModule_Create(&definition); }
"""


def load_library(names: Sequence[str], source: str) -> list[Callable[..., None]]:
    """Compile and load functions in C++.

    Args:
        names: Those that Python calls, with tensors and numbers.
        source: All of them, and what they call, but product, low_product and let_python_run.

    Returns:
        The functions, in the order of the names.
    """
    functions = [f"FROM_PYTHON({name})," for name in names]
    includes, definitions = _apart(source)
    is_low = low_products.CALL in definitions
    bound = _BINDINGS.replace("FUNCTIONS\n", "\n    ".join(functions) + "\n")
    bound = bound.replace(
        "CONNECTED\n", "low_kernels = reinterpret_cast<decltype(low_kernels)>(low);\n" if is_low else "\n"
    )
    definitions = definitions.replace(_TORCH_ROUNDS, "to_bfloat16(")
    rounded = _ROUNDED if "to_bfloat16(" in definitions else ""
    low = low_products.DECLARED if is_low else ""
    text = includes + _HEADERS + _GIVEN + _PRODUCT + rounded + low + definitions + bound
    cpp_compiler.wait_for_vectors()
    library = cpp_compiler.library_cache().load(text)
    products = *(_gemms() or (0, 0)), _mkl_threads(), _low_kernels() if is_low else 0
    library.connect(_torch._torchinductor_pyobject_tensor_data_ptr, *products, _idle, _storages, _place)
    return [getattr(library, name) for name in names]


def _idle() -> None: ...


def _storages(tensors: list[torch.Tensor]) -> list[tuple[torch.UntypedStorage, int]]:
    """The storages, and where they are."""
    with _torch.DisableTorchFunction():  # modes of the user's do not see it
        storages = [tensor.untyped_storage() for tensor in tensors]
        return [(storage, storage.data_ptr()) for storage in storages]


def _place(storage: torch.UntypedStorage) -> int:
    with _torch.DisableTorchFunction():
        return storage.data_ptr()


def _apart(source: str) -> tuple[str, str]:
    """The lines of headers, which come first, and the rest."""
    lines = source.split("\n")
    count = next((i for i, line in enumerate(lines) if line and not line.startswith("#include")), len(lines))
    return "\n".join(lines[:count]), "\n".join(lines[count:])


def multiplies() -> bool:
    """Whether products of float32 and float64 are to be had from torch's BLAS: it has no less precise ones.

    torch.set_float32_matmul_precision("medium") is a setting of oneDNN's, too; it cannot always be asked for itself.
    """
    return _gemms() is not None and torch.backends.mkldnn.matmul.fp32_precision != "bf16"


@functools.cache
def _low_kernels() -> int:
    """Where products of bfloat16 are, in a library of their own.

    Raises:
        RuntimeError: oneDNN's kernels do not multiply as they should.
    """
    [connect_kernels] = load_library(["connect_kernels"], low_kernels.SOURCE)
    found = torch.zeros((), dtype=torch.int64)
    connect_kernels(*low_products.places(), found)
    return int(found)


@functools.cache
def _gemms() -> tuple[int, int] | None:
    """Where torch's BLAS has the products of float32 and of float64; None if it has none that can be found."""
    try:
        library = cpp_compiler.torch_library()
        single, double = (ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in ("sgemm_", "dgemm_"))
    except (OSError, AttributeError):
        return None
    return (single, double) if single and double and sys.byteorder == "little" else None


@functools.cache
def _mkl_threads() -> int:
    """Where MKL has its function that sets the number of threads of the calling thread's products; 0 for another BLAS.

    torch.set_num_threads would set that of the whole process, and of torch's own operations.
    """
    try:
        return ctypes.cast(cpp_compiler.torch_library().MKL_Set_Num_Threads_Local, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0
