#!/usr/bin/env bash
# Packs the executables that benches/gpu.sh runs, for a GPU host without Rust, into .gpu/pack.tar.xz, which git ignores.
#
#   benches/pack.sh
#
# There, in a copy of this tree with .gpu/, which may lack ptx/:
#   python3 -c 'import tarfile; tarfile.open(".gpu/pack.tar.xz").extractall(".gpu")' && cp -r .gpu/ptx . && \
#     DROPLESS_BIN=.gpu/run benches/gpu.sh FOLDER
#
# Executables lie in .gpu/run/{test,bench,example}, stripped; they find their data in the folder they are
# started in, where the scripts and the configurations are, too. The images of ptx/ are in the pack, where
# they take next to nothing, since the executables hold the same bytes. Ends with 1 if two executables have
# one name, one is missing, a file that gpu.sh reads is not tracked, or the pack and the tracked tree without
# ptx/ are more than 60 MiB together.
set -euo pipefail
[ $# -eq 0 ] || { echo "usage: benches/pack.sh (no arguments)" >&2; exit 2; }
cd "$(dirname "$0")/.."
rm -rf .gpu
mkdir .gpu
git ls-files --error-unmatch benches/{gpu.sh,gpu.py,model_sizes.py,model_steps.py,serving.py} \
  benches/gpu/attention_cases.txt benches/peers/{gpu_moe,gpu_attention,gpu_table}.py \
  examples/configs/{dbrx,mixtral-8x7b,llama-2-70b}.json benches/record/gpu/2026-11-27/{dropless,torch}.jsonl \
  tests/data/dbrx/tiny-dbrx-f32/config.json >.gpu/read

# What gpu.sh runs, and what one runs by hand there.
tests="instructions params ops hardware dbrx doctor"
benches="gpu"
examples="doctor dbrx quickstart"

build() { # a kind of target, those that are packed, and the cargo command that builds them
  local folder=$1 names=$2; shift 2
  "$@" --message-format=json | python3 -c '
import json, os, shutil, subprocess, sys
folder, names = sys.argv[1], sys.argv[2].split()
packages = [os.path.abspath(path) for path in ("Cargo.toml", "examples/lm/Cargo.toml")]
to = f".gpu/run/{folder}"
os.makedirs(to)
for line in sys.stdin:
    made = json.loads(line)
    if made.get("reason") != "compiler-artifact" or not made.get("executable"):
        continue
    [kind], name = made["target"]["kind"][:1], made["target"]["name"]
    if kind != folder or name not in names or made["manifest_path"] not in packages:
        continue
    if os.path.exists(f"{to}/{name}"):
        sys.exit(f"two executables are called {folder}/{name}")
    shutil.copy2(made["executable"], f"{to}/{name}")
    subprocess.run(["strip", f"{to}/{name}"], check=True)
' "$folder" "$names"
  for name in $names; do
    [ -x ".gpu/run/$folder/$name" ] || { echo "$folder/$name is missing" >&2; exit 1; }
  done
}
build test "$tests" cargo test --no-run # as `cargo test` has built them, if it has run
build bench "$benches" cargo bench --bench gpu --no-run
build example "$examples" cargo build --release --examples

# -9: a dictionary larger than one executable, since all of them hold the same images.
cp -r ptx .gpu
tar -C .gpu -c run ptx | xz -T0 -9 >.gpu/pack.tar.xz
pack=$(stat -c %s .gpu/pack.tar.xz)
tree=$(git ls-files -z ':!ptx' | xargs -0 stat -c %s | awk '{ sum += $1 } END { print sum }')
echo "pack $((pack >> 10)) KiB, tracked tree without ptx/ $((tree >> 10)) KiB, together $(((pack + tree) >> 20)) of 60 MiB"
[ $((pack + tree)) -le $((60 << 20)) ] || { echo "too large" >&2; exit 1; }
