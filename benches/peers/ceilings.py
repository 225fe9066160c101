#!/usr/bin/env python3
"""This machine's two ceilings by code that is not ours to tune: sgemm of 2048^3 through numpy's OpenBLAS (GFLOP/s) and a read of
0.4 GB by OpenMP threads (GB/s). Alone it prints each one's best of eight; `cpu_dbrx.py` asks for means beside what it times.

    OPENBLAS_NUM_THREADS=2 OMP_NUM_THREADS=2 python3 ceilings.py
"""
import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

# Reads as many times as a line of the input says, and prints the mean rate in bytes per second.
READ = r"""
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
int main(void) {
    size_t n = 100u << 20;
    float* x = aligned_alloc(4096, n * sizeof *x);
    #pragma omp parallel for
    for (size_t i = 0; i < n; i++) x[i] = 1;
    for (int passes; scanf("%d", &passes) == 1;) {
        double start = omp_get_wtime();
        float sum = 0;
        for (int pass = 0; pass < passes; pass++) {
            #pragma omp parallel for reduction(+:sum)
            for (size_t i = 0; i < n; i++) sum += x[i];
        }
        double seconds = omp_get_wtime() - start;
        printf("%.0f\n", sum > 0 ? passes * (n * sizeof *x) / seconds : 0);
        fflush(stdout);
    }
}"""


class Ceilings:
    def __init__(self, n=2048):
        self.a, self.b = (np.random.rand(n, n).astype(np.float32) for _ in range(2))
        self.folder = tempfile.TemporaryDirectory()
        source, program = Path(self.folder.name) / "read.c", Path(self.folder.name) / "read"
        source.write_text(READ)
        subprocess.run(["gcc", "-O3", "-ffast-math", "-march=native", "-fopenmp", str(source), "-o", str(program)], check=True)
        self.reader = subprocess.Popen([str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.sgemm(1), self.read(1)  # the first warms up

    def sgemm(self, passes):
        """Mean GFLOP/s."""
        start = time.perf_counter()
        for _ in range(passes):
            self.a @ self.b
        return passes * 2 * len(self.a) ** 3 / (time.perf_counter() - start) / 1e9

    def read(self, passes):
        """Mean GB/s."""
        self.reader.stdin.write(f"{passes}\n")
        self.reader.stdin.flush()
        return float(self.reader.stdout.readline()) / 1e9


if __name__ == "__main__":
    ceilings = Ceilings()
    best = lambda f: round(max(f(1) for _ in range(8)), 2)
    # Reads first: OpenBLAS's threads go on waiting busily for a while.
    print(json.dumps({"read_gb_per_s": best(ceilings.read), "sgemm_gflops": best(ceilings.sgemm)}))
