#!/usr/bin/env bash
# Everything that wants a GPU, in one run of at most seven minutes: correctness, then times, then what PyTorch does. See gpu.py.
exec python3 "$(dirname "$0")/gpu.py" "$@"
