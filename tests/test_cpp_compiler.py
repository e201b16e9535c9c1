"""What Inductor asks of the C++ compiler is found out while graphs are traced, and is what Inductor finds itself."""

import os
import platform
import subprocess
import sys
import threading

import pytest
import torch
from torch._inductor import config, cpu_vec_isa

from rampde_fx.torch_private import cpp_compiler, inductor, native_library
from tests.comparison import compiled
from tests.models import Euler

ON_X86 = sys.platform == "linux" and platform.machine() == "x86_64"
SOURCE = "#include <torch/csrc/inductor/cpp_prefix.h>\nstatic void twice(float* x, int64_t n) { *x *= n; } // "


@pytest.fixture
def anew():
    """Nothing is found out yet; and no thread of another test remains."""
    cpp_compiler.prepare.cache_clear()
    yield
    if cpp_compiler.prepare.cache_info().currsize and cpp_compiler.prepare().is_alive():
        cpp_compiler.prepare().join(60)
    cpp_compiler.prepare.cache_clear()


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_vector_instructions_are_looked_for_while_graphs_are_traced(compiler, anew, monkeypatch):
    """What goes wrong there Inductor meets again, where it can be told."""
    given, found, waits = {}, [], threading.Event()

    def stub(graph_module, inputs, *, config_patches=None, inner_compile=None):
        given.update(config_patches or {})
        return graph_module

    def fails():
        waits.wait(10)
        found.append(threading.current_thread() is threading.main_thread())
        raise RuntimeError("no compiler")

    monkeypatch.setattr(inductor, "lookup_backend", lambda name: stub)
    monkeypatch.setattr(cpp_compiler._torch, "pick_vec_isa", fails, raising=False)
    compiled(Euler(), torch.float32, compiler)(torch.randn(3, 5), torch.linspace(0, 1, 4))
    assert found == []
    waits.set()
    if compiler == "inductor":
        given["post_grad_custom_pre_pass"](torch.fx.Graph())
    assert found == [False] * (compiler == "inductor")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked")
def test_a_fork_has_torchs_own_check(anew, monkeypatch):
    """While the thread asks shortly; there is none in the other process, which would end that."""
    begun, goes_on = threading.Event(), threading.Event()

    def waits():
        begun.set()
        goes_on.wait(20)

    monkeypatch.setattr(cpp_compiler._torch, "pick_vec_isa", waits, raising=False)
    own = cpu_vec_isa.VecISA.check_build
    with config.patch(cpp_cache_precompile_headers=False):
        preparation = cpp_compiler.prepare()
        assert begun.wait(20) and cpu_vec_isa.VecISA.check_build is not own
        if (child := os.fork()) == 0:
            cpp_compiler.wait_for_vectors()
            os._exit(cpu_vec_isa.VecISA.check_build is not own)
        assert os.waitpid(child, 0)[1] == 0
        goes_on.set()
        preparation.join(20)
    assert cpu_vec_isa.VecISA.check_build is own


def test_nobody_waits_for_a_thread_that_a_fork_lost(anew, monkeypatch):
    monkeypatch.setattr(cpp_compiler._Preparation, "start", lambda self: None)
    cpp_compiler.prepare()
    cpp_compiler.wait_for_vectors()
    assert not cpp_compiler.prepare().is_alive()


@pytest.mark.inductor
@pytest.mark.parametrize("kind", cpu_vec_isa.supported_vec_isa_list, ids=lambda kind: "-".join(str(kind).split()))
def test_the_short_answer_is_that_of_inductors_program(kind):
    """Yes for all whose program runs, and for nothing else; of a compiler that is not known the answer is no."""
    is_supported = ON_X86 and set(str(kind).split()) <= set(cpu_vec_isa.x86_isa_checker())
    runs = is_supported and kind.check_build(cpu_vec_isa.VecISA._avx_code)
    if is_supported:
        version = subprocess.check_output([cpp_compiler._torch.get_cpp_compiler(), "-dumpversion"], text=True)
        assert cpp_compiler._runs_vectors(kind) == (runs and int(version.split(".")[0]) >= 11)


@pytest.mark.skipif(not ON_X86, reason="the short answer is for x86-64")
@pytest.mark.parametrize("lacks", ["", "capability", "version", "maker", "flag", "assembler", "function"])
def test_what_is_not_known_is_asked_by_inductors_program(lacks, tmp_path, monkeypatch):
    kind, real = cpu_vec_isa.VecAVX2(), cpp_compiler._torch.get_cpp_compiler()
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch does not use the vectors of this CPU")
    wrapper, assembler = tmp_path / "compiler", tmp_path / "as"
    options = {"version": "-U__GNUC__ -D__GNUC__=10", "maker": "-D__clang__", "flag": "-mno-such", "assembler": "-B"}
    wrapper.write_text(
        f'#!/bin/sh\nexec {real} "$@" {options.get(lacks, "")} {tmp_path if lacks == "assembler" else ""}\n'
    )
    assembler.write_text("#!/bin/sh\nexit 1\n")
    for script in (wrapper, assembler):
        script.chmod(0o755)
    monkeypatch.setattr(cpp_compiler._torch, "get_cpp_compiler", lambda: str(wrapper), raising=False)
    if lacks == "capability":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    if lacks == "function":
        monkeypatch.setattr(cpp_compiler, "torch_library", object)
    assert cpp_compiler._runs_vectors(kind) == (lacks == "")
    asked = []
    check = cpp_compiler._asked_shortly(lambda kind, code: asked.append(code) or False)
    assert check(kind, cpu_vec_isa.VecISA._avx_code) == (lacks == "") and len(asked) == (lacks != "")


def test_other_programs_of_inductors_are_compiled():
    check = cpp_compiler._asked_shortly(lambda kind, code: code == "of bfloat16")
    assert check(cpu_vec_isa.VecAVX2(), "of bfloat16") and not check(cpu_vec_isa.VecAVX2(), "of tiles")


@pytest.mark.inductor
@pytest.mark.skipif(os.name == "nt", reason="Inductor compiles no header there")
def test_a_library_is_compiled_with_the_header_if_that_is_there(anew, monkeypatch):
    """The library is the same either way, by one key."""
    cache, used = cpp_compiler.library_cache(), []
    given = cache._get_uncompiled_header.__func__

    def noted(cls, device):
        used.append(given(cls, device))
        return used[-1]

    monkeypatch.setattr(cache, "_get_uncompiled_header", classmethod(noted))
    monkeypatch.setattr(cpp_compiler._Preparation, "start", lambda self: None)
    cpp_compiler.prepare()
    native_library.load_library(["twice"], SOURCE + "without")
    cpp_compiler.prepare().run()
    keys = set(cache.cache)
    [twice] = native_library.load_library(["twice"], SOURCE + "with")
    native_library.load_library(["twice"], SOURCE + "without")
    assert used == [None, "torch/csrc/inductor/cpp_prefix.h"] and len(set(cache.cache) - keys) == 1
    x = torch.ones(1)
    twice(x, 2)
    assert x.item() == 2


@pytest.mark.parametrize("wanted", [True, False])
def test_no_header_is_made_where_the_user_wants_none(wanted, anew, monkeypatch):
    made = []
    monkeypatch.setattr(cpp_compiler._torch, "pick_vec_isa", lambda: None, raising=False)
    monkeypatch.setattr(
        cpp_compiler._torch,
        "CppPythonBindingsCodeCache",
        type("Cache", (), {"load_async": staticmethod(made.append)}),
        raising=False,
    )
    with config.patch(cpp_cache_precompile_headers=wanted):
        preparation = cpp_compiler._Preparation()
        preparation.run()
    assert (made, preparation.has_header) == ([""] * wanted, wanted)
