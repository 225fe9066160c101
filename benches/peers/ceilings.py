#!/usr/bin/env python3
"""This machine's two ceilings by code that is not ours to tune: sgemm of 2048^3 through numpy's OpenBLAS (GFLOP/s) and a read of
1.2 GB by OpenMP threads (GB/s), each the best of eight.

    OPENBLAS_NUM_THREADS=2 OMP_NUM_THREADS=2 python3 ceilings.py
"""
import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

READ = r"""
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
int main(void) {
    size_t n = 300u << 20;
    float* x = aligned_alloc(4096, n * sizeof *x);
    double best = 0;
    #pragma omp parallel for
    for (size_t i = 0; i < n; i++) x[i] = 1;
    for (int round = 0; round < 8; round++) {
        double start = omp_get_wtime();
        float sum = 0;
        #pragma omp parallel for reduction(+:sum)
        for (size_t i = 0; i < n; i++) sum += x[i];
        double rate = n * sizeof *x / (omp_get_wtime() - start);
        if (sum > 0 && rate > best) best = rate;
    }
    printf("%.0f\n", best);
}"""


def sgemm_gflops(n=2048):
    a, b = (np.random.rand(n, n).astype(np.float32) for _ in range(2))
    a @ b
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best / 1e9


def read_gb_per_s():
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "read.c", Path(folder) / "read"
        source.write_text(READ)
        subprocess.run(["gcc", "-O3", "-ffast-math", "-march=native", "-fopenmp", str(source), "-o", str(program)], check=True)
        return float(subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout) / 1e9


if __name__ == "__main__":
    print(json.dumps({"sgemm_gflops": round(sgemm_gflops(), 1), "read_gb_per_s": round(read_gb_per_s(), 2)}))
