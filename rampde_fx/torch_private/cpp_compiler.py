"""What Inductor asks of the C++ compiler before its first kernel, asked while graphs are traced.

Two answers take seconds where nothing is cached: for which vector instructions it compiles, and the header with which
every kernel begins, compiled before. A thread has them ready, for compilers are processes of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rampde_fx.torch_private.names import Names

_torch = Names(
    {
        "torch._inductor.codecache": "CppPythonBindingsCodeCache",
        "torch._inductor.config": ".",
        "torch._inductor.cpp_builder": "get_cpp_compiler",
        "torch._inductor.cpu_vec_isa": "VecISA pick_vec_isa",
    }
)
_CAPABILITIES = {512: ("AVX512",), 256: ("AVX2", "AVX512")}  # of torch's own kernels, by bits of a vector
# What a compiler that is known makes of vectors: the assembler must know their instructions, too.
_PROGRAM = """
#if __GNUC__ < 11 || defined(__clang__)
#error "not known"
#endif
typedef float Vector __attribute__((vector_size(BYTES)));
Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
"""


class _Preparation(threading.Thread):
    """Finds the vector instructions, and then makes the header. What fails Inductor meets again, where it is told."""

    def __init__(self) -> None:
        # No daemon: at exit the interpreter waits for the compiler, which would go on writing without it.
        super().__init__(name="rampde_fx: C++ compiler", daemon=False)
        self._vectors = threading.Event()
        self._check = _torch.VecISA.check_build
        self._short = _asked_shortly(self._check)
        self.has_header = False
        os.register_at_fork(after_in_child=self._restore)  # where this thread is not

    def _restore(self) -> None:
        if _torch.VecISA.check_build is self._short:
            _torch.VecISA.check_build = self._check

    def run(self) -> None:
        with contextlib.suppress(Exception):
            _torch.VecISA.check_build = self._short
            _torch.pick_vec_isa()
        self._restore()
        self._vectors.set()
        with contextlib.suppress(Exception):
            if _torch.config.cpp_cache_precompile_headers:
                _torch.CppPythonBindingsCodeCache.load_async("")  # which is not compiled: nobody loads it
                self.has_header = True

    def wait(self) -> None:
        """Until the vector instructions are known."""
        while self.is_alive() and not self._vectors.wait(0.01):  # in a fork the thread is gone
            pass


@functools.cache
def prepare() -> _Preparation:
    """Begin, in a thread."""
    preparation = _Preparation()
    preparation.start()
    return preparation


def wait_for_vectors() -> None:
    """Wait until the vector instructions are known, if that was begun: Inductor asks next."""
    if prepare.cache_info().currsize:
        prepare().wait()


@functools.cache
def library_cache() -> Any:
    """Inductor's cache of libraries, one for each source; the functions that are looked for are those of ours.

    A library is compiled with the header if that is there. To wait for it would take as long as is gained.
    """

    class Library(_torch.CppPythonBindingsCodeCache):  # type: ignore[name-defined]
        entry_function = "library"

        @classmethod
        def _get_uncompiled_header(cls, device: str) -> str | None:
            is_there = prepare.cache_info().currsize and prepare().has_header
            return super()._get_uncompiled_header(device) if is_there else None

    return Library


def makes_long_vectors() -> bool:
    """Whether Inductor makes vectors of 512 bits, if the compiler does; torch's own kernels have them."""
    asked = _torch.config.cpp.simdlen in (None, 512)
    return asked and torch.backends.cpu.get_cpu_capability() == "AVX512"


def torch_library() -> ctypes.CDLL:
    """The library of torch that has its CPU's kernels.

    Raises:
        OSError: It is not where it is looked for.
    """
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def _asked_shortly(check_build: Callable[[Any, str], bool]) -> Callable[[Any, str], bool]:
    """Inductor's check of a kind of vector instructions, without its program of torch's headers where that must run."""

    def check(kind: Any, code: str) -> bool:
        is_first = code == _torch.VecISA._avx_code
        return (is_first and _runs_vectors(kind)) or check_build(kind, code)

    return check


def _runs_vectors(kind: Any) -> bool:
    """Whether it is known, without compiling torch's headers, that code with vector instructions runs.

    Inductor's program shows three things: the CPU has the instructions, the compiler makes them, and torch has the
    functions of vectors that its headers call. So torch's own kernels use them, a compiler that is known makes them of
    a short program, and the functions are there.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    bits = kind.bit_width()
    if torch.backends.cpu.get_cpu_capability() not in _CAPABILITIES.get(bits, ()):
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "vectors.cpp"
        source.write_text(_PROGRAM.replace("BYTES", str(bits // 8)))
        command = [_torch.get_cpp_compiler(), *kind.build_arch_flags().split(), "-c", source, "-o", f"{folder}/vectors"]
        made = subprocess.run(command, capture_output=True, check=False, timeout=10).returncode == 0
    return made and hasattr(torch_library(), f"Sleef_expf{bits // 32}_u10")
