#!/usr/bin/env bash
# Compiles the library and its tests with the oldest cudarc that it allows and the newest of every minor version.
#   bash interop/cudarc/check.sh            what CI's long run does; no GPU and no CUDA is needed
# A newer cudarc of one of these lines goes in here; a new line also into the library's Cargo.toml, this folder's, and the documentation.
set -euo pipefail
cd "$(dirname "$0")"

root=$(cd ../.. && pwd)
scratch=target/check
mkdir -p "$scratch"
for version in 0.16.1 0.16.6 0.17.8 0.18.2 0.19.10; do
  echo "== cudarc $version"
  cp -r src tests Cargo.lock "$scratch/"
  sed "s|path = \"../..\"|path = \"$root\"|" Cargo.toml >"$scratch/Cargo.toml"
  (
    cd "$scratch"
    cargo update --quiet --package cudarc --precise "$version"
    CARGO_TARGET_DIR="$PWD/target" cargo check --quiet --tests
  )
done
