"""What one core multiplies and adds in a second, in float32 and in bfloat16: the bound of every ratio of products.

python -m tests.benchmarks.instructions

A loop of independent instructions, without memory; the most of several runs, in GFLOP/s. They are of 512 bits, and
those of matrix units (AMX) where the CPU has them. It needs a C++ compiler and a CPU with AVX512-BF16.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = """
#include <chrono>
#include <cstdio>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

constexpr long ROUNDS = 20000000;
constexpr int CHAINS = 16;  // an instruction waits for the one before it on its accumulator alone

template <class Factor, class Instruction>
double seconds(Factor left, Factor right, Instruction instruction) {
    __m512 sums[CHAINS];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    const auto begin = std::chrono::steady_clock::now();
    for (long i = 0; i < ROUNDS; ++i) {
        asm volatile("" : "+v"(left));
        #pragma GCC unroll 16
        for (auto& sum : sums) sum = instruction(sum, left, right);
    }
    for (auto& sum : sums) asm volatile("" : "+v"(sum));
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

#ifdef __AMX_BF16__
double seconds_of_tiles() {
    syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM: asks Linux for the registers
    struct alignas(64) {
        unsigned char palette = 1, rest[15] = {};
        unsigned short bytes[16] = {};
        unsigned char rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) shape.bytes[i] = 64, shape.rows[i] = 16;
    _tile_loadconfig(&shape);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    const auto begin = std::chrono::steady_clock::now();
    for (long i = 0; i < ROUNDS / 10; ++i) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    const double taken = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    _tile_release();
    return taken;
}
#endif

int main() {
    const double single = seconds(_mm512_set1_ps(0.5f), _mm512_set1_ps(1e-3f),
        [](__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); });
    const auto small = (__m512bh)_mm512_set1_epi16(0x3a80);
    const double low = seconds(small, small,
        [](__m512 sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); });
    const double count = 1e-9 * ROUNDS * CHAINS;
    std::printf("%f %f", count * 2 * 16 / single, count * 2 * 32 / low);
#ifdef __AMX_BF16__
    std::printf(" %f", 1e-9 * (ROUNDS / 10) * 4 * 2 * 16 * 16 * 32 / seconds_of_tiles());
#endif
}
"""


def measure(runs: int) -> list[float]:
    """GFLOP/s of float32's instruction, of bfloat16's, and of its matrix units' if there are any."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "program.cpp", f"{folder}/program"
        source.write_text(PROGRAM)
        flags = ["-O2", "-march=native", "-o", program]
        subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source)], check=True)
        found = [subprocess.run([program], check=True, capture_output=True, text=True).stdout for _ in range(runs)]
    return [max(values) for values in zip(*(map(float, line.split()) for line in found), strict=True)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="default %(default)s")
    options = parser.parse_args()
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        sys.exit("this CPU has no AVX512-BF16")
    single, *low = measure(options.runs)
    print(f"float32 {single:.1f} GFLOP/s")
    for name, found in zip(("bfloat16", "bfloat16, matrix units"), low, strict=False):
        print(f"{name} {found:.1f} GFLOP/s: the same product takes {single / found:.2f}")


if __name__ == "__main__":
    main()
