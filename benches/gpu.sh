#!/usr/bin/env bash
# Everything that wants a GPU, in one run: correctness, then times, then what PyTorch does at the same shapes.
#
#   benches/gpu.sh [FOLDER]      records go to FOLDER, benches/record/gpu/<date> by default
#
# DROPLESS_BIN names a folder of executables built elsewhere, for a machine without Rust: test/ (the tests below, by any name),
# bench/gpu, example/doctor. Tests read their data from this folder's tree. TOKENS chooses the batches.
# Ends with 1 if anything failed, and measures all the same.
set -uo pipefail
case ${1:-} in -*) echo "usage: benches/gpu.sh [FOLDER]" >&2; exit 2 ;; esac
out=${1:+$(realpath -m "$1")}
bin=${DROPLESS_BIN:+$(realpath -m "$DROPLESS_BIN")}
cd "$(dirname "$0")/.." || exit 1
out=${out:-benches/record/gpu/$(date +%F)}
tokens=${TOKENS:-1,2,4,8,16,32,64,128,512,2048,8192}
failed=0
mkdir -p "$out" || exit 1
export DROPLESS_REQUIRE_GPU=1

one() { # a name and a command: its log, and one line of what came of it
  local name=$1 verdict=ok; shift
  timeout "${limit:-600}" "$@" >"$out/$name.log" 2>&1 || { verdict="FAILED ($?)"; failed=1; }
  echo "$name: $verdict $(grep -a '^test result' "$out/$name.log" | tail -1)"
}

nvidia-smi -q -d CLOCK,POWER,MEMORY >"$out/card.txt"
nvidia-smi --query-gpu=timestamp,name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv -lms 500 >"$out/clocks.csv" &
watch=$!
trap 'kill $watch 2>/dev/null' EXIT

# 1. Correctness: instructions first, since everything rests on them; each test binary is a process, so that a lost device ends one.
if [ -n "$bin" ]; then
  one doctor "$bin/example/doctor"
  for test in "$bin"/test/*; do limit=1800 one "test-$(basename "$test")" "$test" --test-threads=1; done
else
  limit=3600 one build-tests cargo test -p dropless --tests --no-run
  limit=3600 one build-bench cargo bench --no-run --bench gpu
  limit=3600 one build-doctor cargo build --release --example doctor
  one doctor cargo run --release --example doctor
  for test in instructions params ops streams faults dbrx; do limit=1800 one "test-$test" cargo test -p dropless --test "$test" -- --test-threads=1; done
fi

# 2. Times.
bench=(cargo bench --bench gpu --); [ -z "$bin" ] || bench=("$bin/bench/gpu")
one bench "${bench[@]}" --tokens "$tokens" --out "$out/dropless.jsonl"

# 3. The peer, and the card's ceilings, in the same minutes.
one peer python3 benches/peers/gpu_moe.py --tokens "$tokens" --out "$out/torch.jsonl"

python3 benches/peers/gpu_table.py "$out/dropless.jsonl" "$out/torch.jsonl" | tee "$out/table.md" || failed=1
exit $failed
