#!/usr/bin/env bash
# The tests of cudarc on the stand-in, work as late and as early as its order allows; one test at a time, since what synchronises one
# would do the work of another. Left out are those that need more kernels than it has.
#   bash interop/cudarc/stand_in/run.sh            needs a C compiler
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p target/stand_in
cc -shared -fPIC -O2 -Wl,-soname,libcuda.so.1 -o target/stand_in/libcuda.so.1 stand_in/cuda.c -lm -lpthread
export LD_LIBRARY_PATH=$PWD/target/stand_in
for early in "" 1; do
  env ${early:+STAND_IN_EARLY=1} cargo test --quiet --tests -- --test-threads 1 --skip a_layer_runs --skip of_16_bits
done
